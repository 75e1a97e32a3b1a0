"""Prefill attention: the same outputs from XLA's blocks and from `jax.nn`, and what is lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.model import attention
from tests.draws import normal

fused = pytest.importorskip(
    "jax._src.cudnn.fused_attention_stablehlo", reason="jax has moved its cuDNN calls"
)


def inputs(dtype, tokens, slots, dim=64):
    query = normal(0, 2, tokens, 4, dim, dtype=dtype)
    return query, *normal(1, 2, 2, 2, slots, dim, dtype=dtype)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_flash_attention_is_causal_attention(window):
    query, key, value = inputs(jnp.float32, 24, 24)
    want, _ = attention.causal_attention(query, key, value, first=jnp.int32(0), window=window)
    got = attention.flash_attention(query, key, value, window=window, implementation="xla")
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("first", "window"), [(0, None), (9, None), (9, 3), (16, None), (16, 100)])
def test_flash_attention_from_a_token_on_is_causal_attention(first, window):
    """Slots that no query sees may hold anything."""
    query, key, value = inputs(jnp.float32, 8, 24)
    want, _ = attention.causal_attention(query, key, value, first=jnp.int32(first), window=window)
    key, value = (x.at[:, :, first + 8 :].set(jnp.nan) for x in (key, value))
    got = attention.flash_attention_from(
        query, key, value, first=jnp.int32(first), window=window, implementation="xla"
    )
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_lowers_to_cudnn(monkeypatch, window):
    """Lowering for CUDA needs no GPU, only to be told a version of cuDNN."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    later = functools.partial(attention.flash_attention_from, first=jnp.int32(9))
    for attend in (attention.flash_attention, later):
        traced = jax.jit(functools.partial(attend, window=window)).trace(*inputs(jnp.bfloat16, 64, 64))
        assert "__cudnn$fmha" in traced.lower(lowering_platforms=("cuda",)).as_text()


class _Device:
    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "expected"),
    [
        ("9.0", "bfloat16", 128, True),
        ("9.0", "float16", 256, True),
        ("8.0", "bfloat16", 256, False),
        ("8.9", "bfloat16", 96, True),
        ("8.0", "bfloat16", 100, False),
        ("9.0", "float32", 128, False),
        ("7.5", "float16", 128, False),
        ("gfx942", "bfloat16", 128, False),
    ],
)
def test_cudnn_is_used_where_it_can(monkeypatch, capability, dtype, dim, expected):
    monkeypatch.setattr(attention, "default_device", lambda: _Device(capability))
    assert attention.has_flash(dtype, dim) is expected
