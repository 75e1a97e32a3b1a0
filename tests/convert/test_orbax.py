"""Saving and loading give the same model, and a destination is complete or as it was."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
from convert.errors import CheckpointError
from convert.files import replacing
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


def test_a_full_destination_is_refused_unless_told_otherwise(tmp_path):
    kept = tmp_path / "saved" / "precious.txt"
    kept.parent.mkdir()
    kept.write_text("x")
    model = random_llama(config())
    with pytest.raises(CheckpointError, match=r"is not empty.*--overwrite"):
        save(model, tmp_path / "saved")
    assert kept.exists()
    save(model, tmp_path / "saved", overwrite=True)
    assert not kept.exists()
    load(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="is a file"):
        save(model, tmp_path / "saved" / "kivi_jax.json", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_the_destination_as_it_was(tmp_path, existed):
    destination = tmp_path / "saved"
    if existed:
        destination.mkdir()
        (destination / "precious.txt").write_text("x")

    def fail():
        with replacing(destination, overwrite=True) as partial:
            (partial / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == (
        ["saved", "saved/precious.txt"] if existed else []
    )


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


def other_shape(directory):
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    manifest["config"]["intermediate_size"] = 40
    (directory / "kivi_jax.json").write_text(json.dumps(manifest))


def another_layer(directory):
    manifest = json.loads((directory / "kivi_jax.json").read_text())
    manifest["config"]["num_layers"] = 3
    (directory / "kivi_jax.json").write_text(json.dumps(manifest))


def no_parameters(directory):
    (directory / "parameters").rename(directory / "elsewhere")


def truncated(directory):
    for file in (directory / "parameters").rglob("*"):
        if file.is_file() and "d" in file.parts[-2:]:
            file.write_bytes(file.read_bytes()[:10])


def missing(directory):
    next(file for file in (directory / "parameters").rglob("*") if file.is_file()).unlink()


DAMAGE = {
    newer: "has format 99, this version reads 2: upgrade kivi-jax",
    older: "has format 1, this version reads 2: convert again",
    no_json: "kivi_jax.json is damaged",
    unknown_field: "kivi_jax.json is damaged",
    other_shape: "cannot be restored",
    another_layer: "cannot be restored",
    no_parameters: r"is damaged \(.* is missing\): copy it or convert again",
    missing: r"is damaged \(.* is missing\): copy it or convert again",
    truncated: r"is damaged \(.* has 10 bytes, not [\d,]+\): copy it or convert again",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_named(tmp_path, damage):
    save(random_llama(config()), tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=DAMAGE[damage]):
        load(tmp_path / "saved")
