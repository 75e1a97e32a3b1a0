"""transformers' caches on the windows of `kivi-jax eval frontier`."""

from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from kivi_jax.eval import peers
from kivi_jax.eval.frontier import Text
from tests.convert.checkpoints import LLAMA, write_checkpoint

CONFIG: dict[str, Any] = LLAMA | dict(eos_token_id=None, num_hidden_layers=1, max_position_embeddings=160)
TOKENS = 140  # past the prompt
ROW = 2 * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * (TOKENS - 1)  # numbers of a full cache


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return str(write_checkpoint(tmp_path_factory.mktemp("peers"), CONFIG))


@pytest.fixture
def records(torch, tmp_path):
    """Of two windows, given the model and what makes a cache; and the windows."""
    rows = np.random.default_rng(0).integers(3, 61, (2, TOKENS)).tolist()
    text = Text("book", [(str(i), row[:1], row[1:]) for i, row in enumerate(rows)])

    def measured(theirs, new_cache):
        options: dict[str, Any] = dict(
            path=tmp_path / "peer.jsonl", settings={"eval": "frontier"}, batch_size=2
        )
        with Progress(disable=True) as progress:
            return peers.measure(theirs, [text], new_cache=new_cache, **options, progress=progress)

    return rows, measured


def test_a_full_cache_is_one_forward_pass(torch, model, records):
    from transformers import DynamicCache

    theirs, _ = peers.open_peers(model, "float32", [])
    rows, measured = records
    found = measured(theirs, DynamicCache)
    assert [record["id"] for record in found] == ["book-0", "book-1"]
    logits = theirs(torch.tensor(rows)).logits[:, :-1].transpose(1, 2)
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(rows)[:, 1:], reduction="none")
    np.testing.assert_allclose([record["nll"] for record in found], nll, atol=1e-4)
    assert all(abs(record["divergence"]) < 1e-5 and record["agreement"] == 1 for record in found)
    assert {record["bytes"] for record in found} == {4 * ROW}


def test_a_quantized_cache_is_counted_as_it_is_held(model, records):
    theirs, by_name = peers.open_peers(model, "float32", ["fp8"])
    _, measured = records
    found = measured(theirs, by_name["fp8"])
    assert all(abs(record["divergence"]) < 1e-2 for record in found)
    assert {record["bytes"] for record in found} == {ROW + 4}  # and two scales of a float32 for both rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quanto:nbits", "cannot read 'nbits' in peer 'quanto:nbits': write field=whole number"),
        ("gzip:nbits=2", "transformers cannot decode with gzip:nbits=2: Unknown quantization backend"),
        ("fp8:nbits=2", "transformers cannot decode with fp8:nbits=2: The `fp8` backend"),
    ],
)
def test_what_is_no_cache_of_transformers_is_refused(model, name, message):
    with pytest.raises(ValueError, match=message):
        peers.open_peers(model, "float32", [name])
