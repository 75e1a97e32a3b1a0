"""The quantizer's arithmetic, on every kind of number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantize.groups import nearest_codes, round_by_triton, round_by_xla, scale_and_zero

RNG = np.random.default_rng(0)


def numbers(dtype):
    """Float32 numbers of all magnitudes, the finite ones of a 16-bit `dtype`, and both neighbours of each."""
    patterns = RNG.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    held = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    held = held[np.isfinite(held)]
    sides = (np.float32(-np.inf), np.float32(np.inf))
    x = np.concatenate([patterns, held, *(np.nextafter(held, side) for side in sides)])
    # XLA on a CPU takes numbers below float32's normal ones for 0.
    return x[np.isfinite(x) & ((np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_zero_is_the_largest_number_held_below_and_scale_the_smallest_above(dtype):
    x, dtype = numbers(dtype), jnp.dtype(dtype)
    info = jnp.finfo(dtype)
    largest, spacing = float(info.max), float(max(info.smallest_subnormal, np.finfo(np.float32).tiny))
    _, zero = jax.jit(lambda x: scale_and_zero(x, x, 2, dtype))(x)
    scale, _ = jax.jit(lambda x: scale_and_zero(jnp.zeros_like(x), x, 1, dtype))(x)
    inside = np.clip(x, -largest, largest)
    for got, beyond, side in ((zero, -np.inf, 1), (scale, np.inf, -1)):
        held = np.asarray(got).astype(dtype)
        np.testing.assert_array_equal(held.astype(np.float32), got)
        assert ((inside - got) * side >= 0).all()
        # One step back towards x goes past it, or is smaller than what float32's normal numbers tell apart.
        with np.errstate(over="ignore"):
            back = np.nextafter(held, np.full_like(held, -beyond)).astype(np.float32)
        exact = (inside - back) * side < 0
        assert (exact | (np.abs(inside - got) < spacing)).all()


@pytest.mark.parametrize("to_code", [round_by_xla, round_by_triton])
def test_codes_are_the_nearest_and_of_two_the_even(to_code):
    x = np.concatenate([np.arange(-1, 257, 1 / 64), RNG.uniform(-1, 257, 100_000)]).astype(np.float32)
    ones = np.ones_like(x)
    for bits in (1, 2, 4, 8):
        got = jax.jit(lambda x, one, bits=bits: nearest_codes(x, one, one - 1, bits, to_code))(x, ones)
        np.testing.assert_array_equal(got, np.round(np.clip(x, 0, 2**bits - 1)).astype(np.uint8))
