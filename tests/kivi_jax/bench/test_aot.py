"""The compile gate: GPU kernels compiled without a GPU neither spill nor exceed their instruction budget."""

import pytest

from kivi_jax.bench import aot
from pallas_kernels.quantized_attention.cases import COMPILED, GPU

pytest.importorskip("triton", reason="Triton's compiler is not installed: pip install 'kivi-jax[aot]'")

BUDGET = {  # instructions per code; `kivi-jax bench kernels --aot` has more cases than CI has time for
    "2 bits": 1.8,
    "2 bits, groups 128": 1.5,
    "4 bits": 2.0,
    "2 bits, H 64": 2.5,
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


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("group_axis", ["token", "channel"])
def test_packing_keeps_up_with_the_memory(group_axis, sm):
    """An H100 issues 24 instructions for a number in the time that its 2.375 bytes are copied."""
    record = aot.packing_record(group_axis=group_axis, bits=2, group_size=32, dim=128, sm=sm)
    assert record["arch"].startswith(f"sm_{sm}")
    assert record["spill_bytes"] == 0
    assert record["instructions_per_number"] <= 19


def test_most_of_the_work_is_the_main_kernels():
    """Laying out the query and merging the splits, by bytes and instructions; one row is the worst case."""
    (case,) = [case for case in GPU if case.name == "1 x 32k"]
    record = aot.record(case, 90)
    assert 0 < record["other_bytes_share"] <= 0.15
    assert 0 < record["other_instructions_share"] <= 0.15
