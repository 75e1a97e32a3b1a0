"""The kernel that quantizes and packs, in Pallas' interpreter, against XLA bit for bit; who chooses it."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch
from pallas_kernels.quantize import kernel as quantize_kernel
from pallas_kernels.quantize import quantization
from pallas_kernels.quantize.quantization import quantize
from tests.draws import normal

SIXTEEN_BITS = ("float16", "bfloat16")


def both(x, **options):
    """(by the kernel, by XLA) words, scale and zero."""
    kernel = jax.jit(functools.partial(quantize_kernel.quantize, **options, interpret=True))
    xla = jax.jit(functools.partial(quantize, **options, implementation="xla"))
    return kernel(x), jax.tree.leaves(xla(x))


def assert_identical(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert np.isfinite(np.asarray(a, np.float32)).all()
        np.testing.assert_array_equal(a, b)


@st.composite
def cases(draw):
    """Numbers and how to quantize them: plain, constant, saturating float16, or of many magnitudes."""
    channels = draw(st.sampled_from([8, 32, 64, 128]))
    group_axis = draw(st.sampled_from(["token", "channel"]))
    group_size = draw(st.sampled_from([1, 4, 32, 64] if group_axis == "token" else [1, 4, 8, channels]))
    lead = draw(st.sampled_from([(), (3,), (1, 2), (2, 1, 3)]))
    tokens = draw(st.sampled_from([64, 192]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.normal(size=(*lead, tokens, channels))
    x *= draw(st.sampled_from([1e-6, 1.0, 1e3, 1e6]))
    x = x * 10.0 ** rng.integers(-3, 3, size=x.shape) if draw(st.booleans()) else x + 3
    x[..., :32, : channels // 2] = draw(st.sampled_from([0.0, 0.1, -2.5, 7e4]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    x = jnp.asarray(np.clip(x, *((-65504, 65504) if dtype == "float16" else (-1e30, 1e30))), jnp.dtype(dtype))
    return x, {
        "bits": draw(st.sampled_from([1, 2, 4, 8])),
        "group_size": group_size,
        "group_axis": group_axis,
        "scale_dtype": jnp.dtype(draw(st.sampled_from([*SIXTEEN_BITS, "float32"]))),
        "trim": draw(st.sampled_from([0.0, 1 / 16])),
    }


@settings(max_examples=10, deadline=None)
@given(cases())
def test_equals_xla_bit_for_bit(case):
    x, options = case
    assert_identical(*both(x, **options))


@pytest.mark.parametrize("group_axis", ["token", "channel"])
@pytest.mark.parametrize(("scale_dtype", "trim"), [("float16", 1 / 16), ("bfloat16", 0.0)])
def test_equals_xla_on_a_prompt(group_axis, scale_dtype, trim):
    """KIVI's default groups; every row has runs of its own."""
    x = (3 * normal(0, 2, 2, 256, 128) + 1).astype(jnp.bfloat16)
    options = {"bits": 2, "group_size": 32, "group_axis": group_axis, "scale_dtype": jnp.dtype(scale_dtype)}
    assert_identical(*both(x, **options, trim=trim))


def test_rows_can_be_mapped_over():
    x = normal(0, 3, 64, 64)
    call = functools.partial(
        quantize_kernel.quantize,
        bits=2,
        group_size=32,
        group_axis="token",
        scale_dtype=jnp.dtype("float16"),
        interpret=True,
    )
    assert_identical(jax.vmap(call)(x), call(x))


@pytest.mark.parametrize(
    ("shape", "change", "reason"),
    [
        ((64, 96), {}, "96 channels in groups of 32"),
        ((96, 64), {"group_size": 48}, "64 channels in groups of 48"),
        ((1024, 64), {"group_size": 1024}, "1024 tokens of 64 channels"),
        ((0, 64), {}, "nothing"),
    ],
)
def test_refuses_what_it_has_no_blocks_for(shape, change, reason):
    options = {"bits": 2, "group_size": 32, "group_axis": "token", "scale_dtype": jnp.float16} | change
    with pytest.raises(NotImplementedError, match=reason):
        quantize_kernel.quantize(jnp.zeros(shape), **options, interpret=True)


class _Gpu:
    platform = "gpu"
    compute_capability = "9.0"


def test_a_gpu_uses_the_kernel_and_logs_once_why_it_does_not(monkeypatch, caplog):
    calls = []

    def refuse(x, *arguments):
        calls.append(x.shape)
        raise NotImplementedError(f"no blocks for {x.shape}")

    for module in (quantization, dispatch):
        monkeypatch.setattr(module, "default_device", _Gpu)
    monkeypatch.setattr(quantize_kernel, "quantize", refuse)
    options = {"bits": 2, "group_size": 32, "group_axis": "token"}
    x = normal(0, 32, 8)
    with caplog.at_level(logging.WARNING):
        found = [quantize(x, **options) for _ in range(2)]
    assert len(calls) == 2
    assert [record.message for record in caplog.records] == [
        "quantize: pallas_triton is not used: no blocks for (32, 8)"
    ]
    want = jax.tree.leaves(quantize(x, **options, implementation="xla"))
    assert len(calls) == 2
    assert_identical(jax.tree.leaves(found[1]), want)
    with pytest.raises(NotImplementedError, match="no blocks"):
        quantize(x, **options, implementation="pallas_triton")


def test_a_cpu_has_no_kernel():
    if jax.default_backend() != "cpu":
        pytest.skip("there is a GPU")
    with pytest.raises(NotImplementedError, match="compute capability 8"):
        quantize(
            jnp.zeros((32, 8)), bits=2, group_size=32, group_axis="token", implementation="pallas_triton"
        )
