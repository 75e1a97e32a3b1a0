import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantize import quantization
from pallas_kernels.quantize.packing import from_pages, unpack
from pallas_kernels.quantize.quantization import get_block, set_block, set_token, zeros
from tests.draws import normal
from tests.oracles import quantization as oracle

# One program a call, as in the product: operation by operation, each would be compiled for each shape.
quantize = jax.jit(
    quantization.quantize, static_argnames=("bits", "group_size", "group_axis", "scale_dtype", "trim")
)
dequantize = jax.jit(quantization.dequantize, static_argnames="dtype")

AXIS = {"k": "token", "v": "channel"}
each_axis = pytest.mark.parametrize("axis", ["token", "channel"])
each_scale_dtype = pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])


def parts(tensor):
    """Codes [B, K, S, H], and scale and zero with the group's axis kept as a list of groups."""
    words, scale, zero = tensor.words, tensor.scale, tensor.zero
    if tensor.group_axis == "channel":
        words, scale, zero = (from_pages(part) for part in (words, scale, zero))
    return tuple(np.asarray(part) for part in (unpack(words, tensor.bits), scale, zero))


# What the original code computed (tests' `shared` folder; written by its quant_and_pack_{k,v}cache).


@pytest.mark.original
@pytest.mark.slow
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_equal_the_originals_and_scales_to_the_last_bit(shared, bits, group_size, which):
    recorded = shared / f"golden/kivi_pack_f32_b{bits}.npz"
    if not recorded.exists():
        pytest.skip(f"{recorded.name} was not recorded")
    want, x = np.load(recorded), np.load(shared / "golden/kivi_pack_inputs.npz")[f"{which.upper()}_f32"]
    got = quantize(
        jnp.asarray(x), bits=bits, group_size=group_size, group_axis=AXIS[which], scale_dtype=jnp.float32
    )
    codes, scale, zero = parts(got)
    name = f"{which}_G{group_size}_"
    np.testing.assert_array_equal(codes, want[name + "codes"])
    # XLA:CPU divides by a broadcast scalar as a product with its inverse: the last bit may differ.
    np.testing.assert_array_max_ulp(scale, want[name + "scale"].reshape(scale.shape), maxulp=1)
    np.testing.assert_array_equal(zero, want[name + "mn"].reshape(zero.shape))
    first = np.asarray(dequantize(got))[0, 0, :64]
    np.testing.assert_allclose(first, want[name + "recon_b0h0_first64"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_codes_of_half_inputs_differ_rarely_and_by_one(shared, group_size, which):
    """The original rounds every operation to half; we compute in float32."""
    want = np.load(shared / "golden/kivi_pack_f16_b2.npz")
    x = np.load(shared / "golden/kivi_pack_inputs.npz")[f"{which.upper()}_f32"].astype(np.float16)
    got = quantize(jnp.asarray(x), bits=2, group_size=group_size, group_axis=AXIS[which])
    difference = parts(got)[0].astype(int) - want[f"{which}_G{group_size}_codes"]
    assert np.abs(difference).max() <= 1
    assert (difference != 0).sum() < 200  # of 65536


@pytest.mark.original
@pytest.mark.slow
def test_edge_groups_of_the_original_give_no_nan(shared):
    """Constant, tiny and huge groups; where the original's answer is finite, so near it is ours."""
    recorded = np.load(shared / "golden/kivi_pack_edge.npz")
    names = [name.removesuffix("__x") for name in recorded.files if name.endswith("__x")]
    checked = 0
    for name in names:
        fields = name.split("_")
        if len(fields) != 5 or fields[1] not in AXIS:
            continue
        x = recorded[name + "__x"]
        group_size, bits = int(fields[2][1:]), int(fields[3][1:])
        if x.ndim != 4 or (fields[1] == "v" and x.shape[2] % 32):
            continue
        scale_dtype = jnp.float16 if fields[4] == "f16" else jnp.float32
        got = quantize(
            jnp.asarray(x),
            bits=bits,
            group_size=group_size,
            group_axis=AXIS[fields[1]],
            scale_dtype=scale_dtype,
        )
        back = np.asarray(dequantize(got))
        assert np.isfinite(back).all(), name
        # constG8: a word of the original spans two groups, and NaN codes of the first leak into the second.
        if fields[4] == "f32" and fields[0] != "constG8":
            np.testing.assert_allclose(back, recorded[name + "__recon"], rtol=1e-6, atol=1e-6, err_msg=name)
        checked += 1
    assert checked >= 8


# Properties.


@st.composite
def blocks(draw):
    """Keys or values whose scale and offset differ by many orders of magnitude."""
    seed, size = draw(st.integers(0, 2**31)), draw(st.sampled_from([1e-3, 1.0, 50.0]))
    offset = draw(st.sampled_from([0.0, 1.0, -30.0, 1000.0, 20000.0]))
    return (np.random.default_rng(seed).normal(size=(1, 2, 64, 32)) * size + offset).astype(np.float32)


@each_scale_dtype
@each_axis
@settings(max_examples=12, deadline=None)
@given(
    x=blocks(),
    bits=st.sampled_from([1, 2, 4, 8]),
    group_size=st.sampled_from([8, 16, 32]),
    trim=st.sampled_from([0.0, 1 / 16]),
)
def test_error_is_at_most_half_a_step_of_the_stored_scale(axis, scale_dtype, x, bits, group_size, trim):
    """And what is trimmed: within a group, codes span all but that."""
    got = quantize(
        jnp.asarray(x),
        bits=bits,
        group_size=group_size,
        group_axis=axis,
        scale_dtype=jnp.dtype(scale_dtype),
        trim=trim,
    )
    back = oracle.dequantize(
        got.words, got.scale, got.zero, bits=bits, group_size=group_size, group_axis=axis
    )
    _, scale, _ = parts(got)
    step = np.repeat(scale.astype(np.float64), group_size, axis=-2 if axis == "token" else -1)
    rounding = 4e-7 * (np.abs(x) + step * 2**bits)  # the quantizer's own float32 arithmetic
    trimmed = trim / (1 - 2 * trim) * step * (2**bits - 1)
    assert (np.abs(x - back) <= np.maximum(step / 2, trimmed) + rounding).all()


@each_axis
def test_dequantize_equals_the_oracle(axis):
    x = normal(0, 2, 2, 64, 24)
    got = quantize(x, bits=2, group_size=8, group_axis=axis)
    want = oracle.dequantize(got.words, got.scale, got.zero, bits=2, group_size=8, group_axis=axis)
    np.testing.assert_allclose(dequantize(got), want, rtol=1e-6, atol=1e-6)


@each_axis
def test_error_shrinks_with_bits(axis):
    x = normal(0, 1, 2, 128, 64)

    def error(bits):
        return float(jnp.abs(x - dequantize(quantize(x, bits=bits, group_size=32, group_axis=axis))).mean())

    errors = [error(bits) for bits in (1, 2, 4, 8)]
    assert all(fine < coarse / 2 for coarse, fine in itertools.pairwise(errors))


@each_axis
def test_a_constant_group_is_exact(axis):
    x = jnp.full((1, 1, 32, 32), 2.5)
    got = quantize(x, bits=2, group_size=32, group_axis=axis, trim=1 / 16)
    assert not np.asarray(got.scale).any()
    np.testing.assert_array_equal(dequantize(got), x)


@each_axis
def test_zeros_denote_zeros(axis):
    got = zeros((2, 3, 64, 32), bits=2, group_size=32, group_axis=axis)
    assert got.shape == (2, 3, 64, 32)
    np.testing.assert_array_equal(dequantize(got), np.zeros(got.shape, np.float32))


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_setting_every_token_equals_quantizing_the_whole():
    x = normal(0, 2, 3, 64, 16)
    got = dataclasses.replace(zeros(x.shape, bits=2, group_size=8, group_axis="channel"), trim=1 / 16)
    write = jax.jit(set_token)
    for i in range(64):  # row 1 fills its ring from the end
        slot = jnp.array([i, 63 - i])
        got = write(got, slot, jnp.stack([x[0, :, i], x[1, :, 63 - i]]))
    want = quantize(x, bits=2, group_size=8, group_axis="channel", trim=1 / 16)
    assert_equal(got, want)
    assert_equal(write(got, jnp.array([64, 1000]), x[:, :, 0]), want)


def test_setting_every_block_equals_quantizing_the_whole():
    x = normal(0, 2, 3, 96, 16)
    got = zeros(x.shape, bits=2, group_size=16, group_axis="token")
    write = jax.jit(set_block)
    for at in (64, 0, 32):
        block = quantize(x[:, :, at : at + 32], bits=2, group_size=16, group_axis="token")
        got = write(got, jnp.array([at, at]), block, jnp.array([True, True]))
    want = quantize(x, bits=2, group_size=16, group_axis="token")
    assert_equal(got, want)
    other = quantize(x[:, :, :32] + 1, bits=2, group_size=16, group_axis="token")
    kept = write(want, jnp.array([32, 32]), other, jnp.array([False, True]))
    np.testing.assert_array_equal(kept.words[0], want.words[0])
    np.testing.assert_array_equal(kept.words[1, :, 32:64], other.words[1])
    own = get_block(kept, jnp.array([64, 32]), 32)
    np.testing.assert_array_equal(dequantize(own)[0], dequantize(want)[0, :, 64:])
    np.testing.assert_array_equal(dequantize(own)[1], dequantize(other)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"bits": 3}, "1, 2, 4 or 8"), ({"group_size": 24}, "must divide"), ({"group_size": 0}, "positive")],
)
def test_refuses_shapes_that_do_not_divide(change, message):
    with pytest.raises(ValueError, match=message):
        zeros((1, 1, 64, 64), **({"bits": 2, "group_size": 32, "group_axis": "token"} | change))
