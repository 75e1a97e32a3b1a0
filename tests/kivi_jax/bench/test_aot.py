"""The compile gate: GPU kernels compiled without a GPU neither spill nor exceed their instruction budget."""

import functools

import jax
import jax.numpy as jnp
import pytest

from kivi_jax.bench import aot, kernels
from kivi_jax.cache.stores import hadamard
from pallas_kernels.heads import split_heads
from pallas_kernels.norm import rms_norm
from pallas_kernels.pool import kernel as pool_kernel
from pallas_kernels.quantized_attention import pallas_triton
from pallas_kernels.quantized_attention.cases import COMPILED, GPU, Case
from pallas_kernels.quantized_attention.tuning import Tuning
from pallas_kernels.residual import kernel as residual_kernel
from pallas_kernels.residual.ring import Ring, Token

pytest.importorskip("triton", reason="Triton's compiler is not installed: pip install 'kivi-jax[aot]'")
pytestmark = pytest.mark.aot

BUDGET = {  # instructions per code; `kivi-jax bench kernels --aot` has more cases than CI has time for
    "2 bits": 1.8,
    "2 bits, groups 128": 1.5,
    "4 bits": 2.05,
    "2 bits, H 64": 2.5,
    "2 bits, H 256": 1.8,
    "2 bits, G 16": 2.4,
}
cases = [case for case in COMPILED if case.name in BUDGET]


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("case", cases, ids=str)
@pytest.mark.parametrize("kernel", ["pallas_triton", "triton"])
def test_kernels_keep_their_budget(kernel, case, sm):
    try:
        record = aot.record(case, sm, kernel)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    assert record["arch"].startswith(f"sm_{sm}")
    assert record["spill_bytes"] == 0
    assert record["instructions_per_code"] <= BUDGET[case.name]
    if (kernel, case.name) == ("pallas_triton", "2 bits"):  # Triton's passes take longer than a program grows
        assert record["instructions"] <= 3200


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(("dim", "rows"), [(64, 1), (128, 1), (256, 1), (128, 64)])
def test_the_steps_other_kernels_do_not_spill(dim, rows, sm):
    """Splitting heads, merging with what is not packed, writing to the cache, of KIVI with turned keys.

    With many rows a program merges all channels.
    """
    case = Case("a step's", rows, 8, 4, dim, 4096, query_dtype="bfloat16")
    ring = jax.ShapeDtypeStruct((rows, 8, 132, dim), jnp.bfloat16)
    token, number = (
        jax.ShapeDtypeStruct((rows, 8, dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )

    def step(query, key, value, ring, token, length):
        start, active = jnp.zeros_like(length), length > 0
        residual = Ring(ring, ring, length, sinks=4)
        attend = functools.partial(pallas_triton.attend, start=start, end=length, scale=dim**-0.5)
        query, *own = split_heads(query, token, token, hadamard(dim))
        taken = residual_kernel.take_token(value, residual, *own, active)
        packed = residual_kernel.pack_block(key, residual, active)
        attended = attend(query, key, value, held_back=132, residual=residual, own=Token(*own))
        return attended, taken, packed

    query, key, value = jax.eval_shape(lambda: (case.query(), *case.pack(*case.dense()[1:])))
    names = ("split_heads", "quantized_attention_merge", "take_token", "pack_block")
    reports = aot.pallas_reports(step, query, key, value, ring, token, number, sm=sm, names=names)
    assert {report.name: report.spill_bytes for report in reports} == dict.fromkeys(names, 0)
    assert all(report.shared_bytes <= 99 * 1024 for report in reports)  # what the smallest devices have
    assert all(report.instructions <= 4500 for report in reports if report.name == "pack_block")


@pytest.mark.parametrize("size", [4096, pytest.param(14336, marks=pytest.mark.slow)])
def test_a_rows_norm_does_not_spill(size):
    row = jax.ShapeDtypeStruct((size,), jnp.bfloat16)
    norm = functools.partial(rms_norm, epsilon=1e-5, offset=0.0)
    (report,) = aot.pallas_reports(norm, row, row, sm=80)
    assert report.spill_bytes == 0


@pytest.mark.parametrize("dim", [128, pytest.param(256, marks=pytest.mark.slow)])
def test_heads_in_float32_are_turned_in_what_devices_have(dim):
    heads = jax.ShapeDtypeStruct((1, 8, dim), jnp.float32)
    (report,) = aot.pallas_reports(
        lambda x: split_heads(x, x, x, hadamard(dim)), heads, sm=80, names=("split_heads",)
    )
    assert report.shared_bytes <= 99 * 1024


@pytest.mark.parametrize(
    ("dim", "slots", "dtype", "sm"),
    [
        (128, 513, jnp.bfloat16, 90),
        pytest.param(256, 513, jnp.bfloat16, 80, marks=pytest.mark.slow),
        pytest.param(64, 2049, jnp.bfloat16, 90, marks=pytest.mark.slow),
        pytest.param(128, 513, jnp.float32, 90, marks=pytest.mark.slow),
    ],
)
def test_a_pools_kernels_do_not_spill(dim, slots, dtype, sm):
    keys, token = (jax.ShapeDtypeStruct((1, 8, *own, dim), dtype) for own in ((slots,), ()))
    query, positions = (
        jax.ShapeDtypeStruct((1, 32, dim), dtype),
        jax.ShapeDtypeStruct(keys.shape[:3], jnp.int32),
    )

    def step(query, keys, positions, token):
        attended, scores = pool_kernel.attend_slots(query, keys, keys, positions, scale=dim**-0.5)
        length = positions[:, 0, 0]
        return attended, pool_kernel.take_slot(
            scores,
            attended.log_sum_exp,
            keys,
            keys,
            positions,
            token,
            token,
            length,
            length > 0,
            length,
            recent=256,
        )

    reports = aot.pallas_reports(step, query, keys, positions, token, sm=sm)
    assert {report.name: report.spill_bytes for report in reports} == {"attend_slots": 0, "take_slot": 0}


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("group_axis", ["token", "channel"])
def test_packing_keeps_up_with_the_memory(group_axis, sm):
    """An H100 issues 24 instructions for a number in the time that its 2.375 bytes are copied."""
    record = aot.packing_record(group_axis=group_axis, bits=2, group_size=32, dim=128, sm=sm)
    assert record["arch"].startswith(f"sm_{sm}")
    assert record["spill_bytes"] == 0
    assert record["instructions_per_number"] <= 19


@pytest.mark.parametrize("name", ["1 x 4k", "MQA 8 x 32k"])
def test_most_of_the_work_is_the_main_kernels(name):
    """Merging the splits is the rest, by bytes and instructions; these are the worst cases."""
    (case,) = [case for case in GPU if case.name == name]
    record = aot.record(case, 90)
    assert 0 < record["other_bytes_share"] <= 0.15
    assert 0 < record["other_instructions_share"] <= 0.15


def test_the_sweep_leaves_out_tunings_that_spill(monkeypatch):
    monkeypatch.setattr(kernels, "compute_capability", lambda device: 9.0)
    case = Case("wide", 1, 1, 16, 256, 1024, query_dtype="bfloat16")
    (record,) = kernels.sweep([case], [Tuning(splits=1, pages=2)])
    assert record["reason"].endswith("bytes are spilled")
