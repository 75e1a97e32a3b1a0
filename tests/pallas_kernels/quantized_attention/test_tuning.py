"""How the work is cut up: every split has a tile, one wave of programs, what shared memory holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.quantized_attention.tuning import choose

LLAMA = {"heads": 4, "dim": 128, "bits": 2, "group_size": 32}


@given(
    rows=st.integers(1, 2000),
    pages=st.integers(1, 4096),
    heads=st.sampled_from([1, 4, 8, 32]),
    dim=st.sampled_from([64, 96, 128, 256]),
    bits=st.sampled_from([1, 2, 4, 8]),
    device=st.sampled_from([("NVIDIA H200", 1056), ("NVIDIA A100-SXM4-80GB", 756), ("NVIDIA L4", 232)]),
)
def test_every_split_has_a_tile_and_all_run_at_once(rows, pages, heads, dim, bits, device):
    slots, (name, at_once) = 32 * pages, device
    found = choose(rows=rows, slots=slots, heads=heads, dim=dim, bits=bits, group_size=32, device_kind=name)
    tiles = -(-pages // found.pages)
    share = -(-tiles // found.splits)
    assert (found.splits - 1) * share < tiles
    programs = rows * -(-heads // found.heads)
    assert found.splits == 1 or found.splits * programs <= at_once
    assert found.stages <= max(2, share)


def test_a_third_tile_is_in_flight_where_shared_memory_holds_it():
    long = {"rows": 64, "slots": 32768}
    hopper = choose(**long, **LLAMA, device_kind="NVIDIA H200")
    assert (hopper.pages, hopper.stages) == (2, 3)
    for other in (
        choose(**long, **LLAMA, device_kind="NVIDIA A100-SXM4-80GB"),
        choose(**long, **LLAMA | {"group_size": 64}, device_kind="NVIDIA H200"),
    ):
        assert (other.pages, other.stages) == (4, 2)


@pytest.mark.parametrize(("slots", "splits", "stages"), [(64, 1, 2), (4096, 64, 2), (32768, 128, 3)])
def test_one_row_is_split_into_tiles_until_a_wave_is_full(slots, splits, stages):
    found = choose(rows=8, slots=slots, **LLAMA, device_kind="NVIDIA H200")
    assert (found.splits, found.stages) == (splits, stages)
