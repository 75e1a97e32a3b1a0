"""`--verify` passes what was converted well and fails what was not."""

import jax
import pytest
from flax import nnx
from transformers.utils import import_utils

from convert.errors import CheckpointError
from convert.hf import load_hf
from convert.orbax import save
from convert.verify import verify
from tests.convert.checkpoints import LLAMA, write_checkpoint


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "hf")


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_good_conversion_passes_against_transformers(tmp_path, source, dtype):
    save(load_hf(source, dtype=dtype), tmp_path / "saved")
    found = verify(tmp_path / "saved", source)
    assert found.reference == "transformers in float32"
    assert found.passed
    assert (found.relative < 1e-5) == (dtype == "float32")


def test_without_torch_the_source_runs_in_our_own_model(tmp_path, source, monkeypatch):
    monkeypatch.setattr(import_utils, "is_torch_available", lambda: False)
    save(load_hf(source, dtype="bfloat16"), tmp_path / "saved")
    found = verify(tmp_path / "saved", source)
    assert found.reference == "kivi_jax in float32"
    assert 0 < found.relative < found.tolerance
    assert found.top_agreement > 0.9


def test_a_changed_weight_fails(tmp_path, source, monkeypatch):
    monkeypatch.setattr(import_utils, "is_torch_available", lambda: False)
    model = load_hf(source, dtype="float32")
    graphdef, state = nnx.split(model)
    state["layers"][0]["mlp"] = jax.tree.map(lambda leaf: leaf * 1.01, state["layers"][0]["mlp"])
    save(nnx.merge(graphdef, state), tmp_path / "saved")
    assert not verify(tmp_path / "saved", source).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_no_number_is_named_wherever_it_stands(tmp_path, source, value, monkeypatch):
    """Also in the row of a token that no prompt has."""
    monkeypatch.setattr(import_utils, "is_torch_available", lambda: False)
    model = load_hf(source, dtype="float32")
    model.embed.embedding.set_value(model.embed.embedding[...].at[60, 0].set(value))
    save(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"infinite or no numbers, first in embed/embedding"):
        verify(tmp_path / "saved", source)


def test_another_config_fails(tmp_path, source, monkeypatch):
    monkeypatch.setattr(import_utils, "is_torch_available", lambda: False)
    save(load_hf(source, dtype="float32"), tmp_path / "saved")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    other = write_checkpoint(tmp_path / "other", {**LLAMA, "rope_parameters": rope})
    assert not verify(tmp_path / "saved", other).passed


@pytest.mark.usefixtures("torch")
def test_a_source_that_transformers_cannot_load_is_one_line(tmp_path, source):
    save(load_hf(source, dtype="float32"), tmp_path / "saved")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load") as caught:
        verify(tmp_path / "saved", source)
    assert "\n" not in str(caught.value)
