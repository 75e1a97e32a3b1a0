"""Converted models on disk: what is saved comes back, and what is damaged is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import CheckpointError, load_model, read_any_config
from convert.hf import load_hf
from convert.orbax import MANIFEST, is_converted, load, replacing, save
from kivi_jax import RopeConfig
from tests.convert import checkpoints
from tests.models import config, random_llama

MODEL = config(
    num_layers=1,
    sliding_window=9,
    eos_ids=(2, 5),
    rope=RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=16),
)


@pytest.fixture
def saved(tmp_path):
    save(random_llama(MODEL), tmp_path / "saved")
    return tmp_path / "saved"


def assert_equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_come_back_bit_for_bit(tmp_path, dtype):
    source = checkpoints.write(tmp_path / "source")
    model = load_hf(source, dtype=dtype)
    save(model, tmp_path / "saved", source=source)
    back = load(tmp_path / "saved")
    assert_equal(back, model)
    assert back.config == model.config
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_every_field_of_the_config_comes_back(saved):
    assert is_converted(saved)
    assert read_any_config(saved) == MODEL == load(saved).config


def test_loading_casts(saved):
    model, directory = load_model(saved, dtype="bfloat16")
    assert directory == saved
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_llama(MODEL))
    assert_equal(model, expected)


def test_a_full_destination_is_kept_unless_overwritten(saved):
    other = random_llama(MODEL, seed=1)
    with pytest.raises(CheckpointError, match="is not empty: choose another directory, or pass --overwrite"):
        save(other, saved)
    assert_equal(load(saved), random_llama(MODEL))
    (saved / "stale").touch()
    save(other, saved, overwrite=True)
    assert_equal(load(saved), other)
    assert not (saved / "stale").exists()


def test_an_empty_destination_is_filled(tmp_path):
    (tmp_path / "saved").mkdir()
    save(random_llama(MODEL), tmp_path / "saved")
    assert is_converted(tmp_path / "saved")


@pytest.mark.parametrize("before", [None, "kept"])
def test_failure_leaves_what_was_there(tmp_path, before):
    destination = tmp_path / "made" / "saved"
    if before:
        destination.mkdir(parents=True)
        (destination / before).touch()

    def fail():
        with replacing(destination, overwrite=True) as partial:
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    left = [path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*")]
    assert sorted(map(str, left)) == (["saved", "saved/kept"] if before else [])


def test_failure_while_saving_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.orbax._copy_beside", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(random_llama(MODEL), tmp_path / "saved", source=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_is_saved(tmp_path, saved):
    """A converted model has the permissions of any new directory."""
    (tmp_path / "new").mkdir()
    assert saved.stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=2), "has format 2, this version reads up to 1: upgrade kivi-jax"),
        (dict(format=None), "is damaged"),
        (dict(config={}), "is damaged"),
        (dict(config=3), "is damaged"),
        (dict(dtype="floot"), "is damaged"),
    ],
    ids=str,
)
def test_a_damaged_manifest_is_refused(saved, change, message):
    manifest = json.loads((saved / MANIFEST).read_text()) | change
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        load(saved)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_manifest_that_is_no_object_is_refused(saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"is damaged .* convert again"):
        load(saved)


def test_missing_parameters_are_refused(saved):
    (saved / "parameters").rename(saved / "elsewhere")
    with pytest.raises(CheckpointError, match=r"parameters cannot be restored .* convert again"):
        load(saved)


def test_truncated_parameters_are_refused(saved):
    files = [file for file in (saved / "parameters").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="parameters cannot be restored"):
        load(saved)


def test_parameters_of_another_shape_are_refused(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    manifest["config"]["intermediate_size"] = 40
    (saved / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="parameters cannot be restored"):
        load(saved)


def test_another_models_tokenizer_is_refused(saved):
    checkpoints.write_tokenizer(saved, 200)
    with pytest.raises(CheckpointError, match="the tokenizer has ids up to 199"):
        load(saved)
