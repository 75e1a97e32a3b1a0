"""`kj.load`: a model and its tokenizer from either kind of directory."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from convert.orbax import save
from tests.convert.checkpoints import write_checkpoint, write_tokenizer


def test_both_kinds_of_directory_give_the_same_model_and_tokenizer(tmp_path):
    source = write_checkpoint(tmp_path / "hf")
    write_tokenizer(source, 61)
    model, tokenizer = kj.load(source, dtype="float32")
    save(model, tmp_path / "saved", source=source)
    again, same_tokenizer = kj.load(str(tmp_path / "saved"), dtype="float32")
    tokens = jnp.arange(12)[None]
    np.testing.assert_array_equal(model(tokens), again(tokens))
    for found in (tokenizer, same_tokenizer):
        assert found is not None
        assert found.convert_tokens_to_ids(["w7"]) == [7]


def test_a_tokenizer_may_be_absent(tmp_path):
    assert kj.load(write_checkpoint(tmp_path / "hf"))[1] is None


def test_the_trained_model_loads_with_its_tokenizer(shared):
    model, tokenizer = kj.load(shared / "models" / "stories260K")
    assert tokenizer is not None
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode(tokenizer("Once upon a time")["input_ids"][1:]) == "Once upon a time"


def test_a_missing_path_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        kj.load(tmp_path / "missing")


def test_importing_kivi_jax_imports_nothing_slow():
    code = (
        "import kivi_jax, sys; print([m for m in ('orbax', 'transformers', 'convert') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
