"""Predictions are bytes over bandwidth and instructions over issue rate, and meet their measurements."""

import importlib.util

import pytest

from kivi_jax.bench import predictions
from kivi_jax.bench.decode import room
from kivi_jax.cache.strategy import full, kivi
from kivi_jax.config import ModelConfig
from kivi_jax.plan.memory import parameter_count
from pallas_kernels.quantized_attention.cases import Case

SLOW = predictions.Ceilings(bytes=1e6, instructions=1e9, memory=10**7)
CASE = Case("small", 2, 2, 4, 128, 256)
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)


def test_the_slower_of_memory_and_instructions_decides():
    assert SLOW.microseconds(nbytes=3) == 3
    assert SLOW.microseconds(nbytes=3, instructions=1000) == 3
    assert SLOW.microseconds(nbytes=3, instructions=5000) == 5


def test_dense_attention_reads_keys_and_values_once():
    (record,) = predictions.kernels([CASE], [], ceilings=SLOW)
    nbytes = 2 * 2 * 2 * 2 * 256 * 128  # 2 bytes, keys and values, rows, KV heads, slots, head_dim
    assert record == {"case": "small", "contender": "bfloat16", "bytes": nbytes, "us": nbytes}


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton's compiler is not installed")
def test_packed_attention_may_be_bound_by_its_instructions():
    starved = predictions.Ceilings(bytes=1e12, instructions=1e6, memory=0)
    _, record = predictions.kernels([CASE], ["pallas_triton"], ceilings=starved)
    codes = 2 * 2 * 2 * 256 * 128
    assert record["bytes"] == codes * 3 // 8  # 2 bits, and two 16-bit numbers for 32 codes
    assert record["us"] == pytest.approx(record["instructions_per_code"] * codes)


def test_a_step_reads_weights_and_cache():
    def step(strategy, batch):
        (record,) = predictions.steps(
            CONFIG,
            {"it": strategy},
            context=64,
            capacity=room(64, 0),
            batch=batch,
            dtype="float32",
            ceilings=SLOW,
        )
        return record

    one, two = step(full(), 1), step(full(), 2)
    row = two["bytes"] - one["bytes"]
    assert row >= 2 * 4 * 2 * 2 * 16 * 64  # keys and values, bytes, layers, heads, head_dim, tokens
    assert one["bytes"] - row == 4 * (parameter_count(CONFIG) - 64 * 32)  # but the embedding table
    assert one["us"] == one["bytes"]
    assert two["us"] == two["bytes"] / 2  # of one row's token
    assert step(full(), None)["batch"] < step(kivi(group_size=16, residual_length=32), None)["batch"]


def test_measurements_meet_their_predictions():
    predicted = [
        {"case": "a", "contender": "bfloat16", "us": 2.0},
        {"case": "a", "contender": "packed, triton", "us": 1.0},
        {"case": "b", "contender": "packed, triton", "us": 1.0},
    ]
    measured = [
        {"case": "a", "contender": "bfloat16, XLA", "us": 5.0},
        {"case": "a", "contender": "bfloat16, torch flash", "reason": "not installed"},
        {"case": "a", "contender": "packed, triton", "us": 1.5},
        {"case": "b", "contender": "packed, xla", "us": 9.0},
    ]
    found = predictions.compare(predicted, measured)
    assert [(r["case"], r["contender"], r["ratio"]) for r in found] == [
        ("a", "bfloat16, XLA", 2.5),
        ("a", "packed, triton", 1.5),
    ]
    assert predictions.table(found).row_count == 2
