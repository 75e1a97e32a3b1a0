"""Saving and loading give the same model, and a destination is complete or as it was."""

import errno
import json
import os
import shutil
import stat
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import convert
from convert.errors import CheckpointError
from convert.hf import load_hf
from convert.orbax import load, save
from kivi_jax.config import RopeConfig
from tests.convert.checkpoints import write_checkpoint, write_tokenizer
from tests.models import config, random_llama

ROPE = RopeConfig(kind="yarn", factor=4.0, attention_factor=1.5, truncate=False)


def leaves(model):
    return jax.tree.leaves(nnx.state(model))


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(attention_bias=True)])
def test_a_saved_model_comes_back(tmp_path, changes):
    model = random_llama(config(rope=ROPE, eos_ids=(2, 5), sliding_window=9, **changes))
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config == model.config
    assert hash(again.config) == hash(model.config)
    tokens = jnp.arange(20)[None]
    np.testing.assert_array_equal(again(tokens), model(tokens))
    for got, expected in zip(leaves(again), leaves(model), strict=True):
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(got, expected)


def test_dtypes_are_kept_and_cast(tmp_path):
    model = load_hf(write_checkpoint(tmp_path / "hf"), dtype="bfloat16")
    save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "kivi_jax.json").read_text())["dtype"] == "bfloat16"
    assert {leaf.dtype for leaf in leaves(load(tmp_path / "saved"))} == {jnp.dtype("bfloat16")}
    wide = load(tmp_path / "saved", dtype="float32")
    for got, expected in zip(leaves(wide), leaves(model), strict=True):
        np.testing.assert_array_equal(got, expected.astype(jnp.float32))


def test_the_default_dtype_is_the_platforms(tmp_path):
    source = write_checkpoint(tmp_path / "hf")
    save(load_hf(source, dtype="bfloat16"), tmp_path / "saved")
    expected = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for path in (source, tmp_path / "saved"):
        model, directory = convert.load_model(path)
        assert directory == path
        assert {leaf.dtype.name for leaf in leaves(model)} == {expected}
    model, _ = convert.load_model(tmp_path / "saved", dtype="float16")
    assert {leaf.dtype.name for leaf in leaves(model)} == {"float16"}


def test_config_and_tokenizer_stand_beside(tmp_path):
    source = write_checkpoint(tmp_path / "hf")
    write_tokenizer(source, 61)
    (source / "generation_config.json").write_text("{}")
    (source / "README.md").write_text("not needed")
    save(load_hf(source, dtype="float32"), tmp_path / "saved", source=source)
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert names == {"kivi_jax.json", "parameters", "config.json", "generation_config.json", *tokenizer}


def test_named_templates_stand_beside(tmp_path):
    source = write_checkpoint(tmp_path / "hf", tokens=61)
    template = source / "additional_chat_templates" / "rag.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    save(random_llama(config()), tmp_path / "saved", source=source)
    assert (tmp_path / "saved" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ messages }}"


def test_a_destination_has_the_permissions_of_any_new_directory(tmp_path):
    save(random_llama(config()), tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("saved", "plain")]
    assert modes[0] == modes[1]


def test_a_destination_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        save(random_llama(config()), tmp_path / "file" / "below" / "saved")


def newer(directory):
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    (directory / "kivi_jax.json").write_text(json.dumps(manifest | {"format": 99}))


def older(directory):
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    (directory / "kivi_jax.json").write_text(json.dumps(manifest | {"format": 1}))


def no_json(directory):
    (directory / "kivi_jax.json").write_text("{")


def unknown_field(directory):
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    manifest["config"]["experts"] = 8
    (directory / "kivi_jax.json").write_text(json.dumps(manifest))


def edited(directory):
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    manifest["config"]["rms_norm_eps"] = 0.5
    (directory / "kivi_jax.json").write_text(json.dumps(manifest))


def of_a_former_version(directory, **changes):
    """Whose manifest has no checksum."""
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    del manifest["manifest"]
    manifest["config"] |= changes
    (directory / "kivi_jax.json").write_text(json.dumps(manifest))


def no_fields(directory):
    (directory / "kivi_jax.json").write_text('{"format": 2, "config": [1], "dtype": "float32", "files": {}}')


def other_shape(directory):
    of_a_former_version(directory, intermediate_size=40)


def another_layer(directory):
    of_a_former_version(directory, num_layers=3)


def no_parameters(directory):
    (directory / "parameters").rename(directory / "elsewhere")


def truncated(directory):
    for file in (directory / "parameters").rglob("*"):
        if file.is_file() and "d" in file.parts[-2:]:
            file.write_bytes(file.read_bytes()[:10])


def flipped(directory):
    """One bit of the largest file, which holds weights."""
    files = [file for file in (directory / "parameters").rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def missing(directory):
    next(file for file in (directory / "parameters").rglob("*") if file.is_file()).unlink()


DAMAGE = {
    newer: "has format 99, this version reads 2: upgrade kivi-jax",
    older: "has format 1, this version reads 2: convert again",
    no_json: "kivi_jax.json is damaged",
    unknown_field: "kivi_jax.json was edited: its checksum is another one; convert again",
    edited: "kivi_jax.json was edited: its checksum is another one; convert again",
    no_fields: "kivi_jax.json is damaged",
    other_shape: "cannot be restored",
    another_layer: "cannot be restored",
    no_parameters: r"is damaged \(.* is missing\): copy it or convert again",
    missing: r"is damaged \(.* is missing\): copy it or convert again",
    flipped: r"is damaged \(.* is not what was written: its checksum is another one\): copy it or convert",
    truncated: r"is damaged \(.* has 10 bytes, not [\d,]+\): copy it or convert again",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named(tmp_path, damage):
    save(random_llama(config()), tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=DAMAGE[damage]):
        load(tmp_path / "saved")


def test_a_model_without_checksums_loads(tmp_path):
    """Those converted before checksums were taken."""
    model = random_llama(config())
    save(model, tmp_path / "saved")
    manifest = json.loads((tmp_path / "saved" / "kivi_jax.json").read_text())
    del manifest["checksums"], manifest["manifest"]
    (tmp_path / "saved" / "kivi_jax.json").write_text(json.dumps(manifest))
    assert load(tmp_path / "saved").config == model.config


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(CheckpointError, match=r"saved cannot be written: No space left on device$"):
        save(random_llama(config()), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"saved needs [\d,]+ bytes, and 1,000 are free"):
        save(random_llama(config()), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
