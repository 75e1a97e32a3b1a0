"""A step's writes to KIVI's cache by the kernels, in Pallas' interpreter, against XLA's, bit by bit."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.cache import kivi as kivi_segment
from kivi_jax.cache.kivi import KiviQuantization, KiviTokens
from kivi_jax.cache.segments import Step
from tests.draws import normal

BATCH, KV_HEADS = 3, 2


def tokens_of(lengths, *, residual, dim, bits, group, value_group, dtype, scale_dtype, window=None, **more):
    shape = (BATCH, KV_HEADS, max(lengths), dim)
    key, value = normal(0, 2, *shape, dtype=dtype)
    quantization = KiviQuantization(
        key_bits=bits,
        value_bits=bits,
        key_group_size=group,
        value_group_size=value_group,
        residual_length=residual,
        scale_dtype=scale_dtype,
        **more,
    )
    hold = functools.partial(
        KiviTokens.from_prompt,
        quantization=quantization,
        capacity=max(lengths) + 2 * residual,
        window=window,
    )
    return jax.jit(hold)(key, value, jnp.array(lengths))


def with_kernels(tokens: KiviTokens, step: Step) -> KiviTokens:
    """As on a GPU."""

    def by_kernel(operation, module, kernel, xla):
        function = getattr(importlib.import_module(module), operation)
        interpreted = functools.partial(function, interpret=True)
        return kernel(types.SimpleNamespace(**{operation: interpreted}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kivi_segment, "by_kernel_or_xla", by_kernel)
        return with_xla(tokens, step)


def with_xla(tokens: KiviTokens, step: Step) -> KiviTokens:
    return KiviTokens.settle([tokens.append(step)], step.active)[0]


@pytest.mark.parametrize(
    "case",
    [
        {"residual": 32, "dim": 64, "bits": 2, "group": 32, "value_group": 32},
        pytest.param(
            {"residual": 64, "dim": 64, "bits": 4, "group": 32, "value_group": 64}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"residual": 32, "dim": 8, "bits": 2, "group": 8, "value_group": 8, "scale_dtype": "float32"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"residual": 64, "dim": 32, "bits": 1, "group": 64, "value_group": 16, "scale_dtype": "bfloat16"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"residual": 32, "dim": 16, "bits": 8, "group": 16, "value_group": 4, "dtype": jnp.bfloat16},
            marks=pytest.mark.slow,
        ),
        {"residual": 32, "dim": 64, "bits": 2, "group": 32, "value_group": 32, "window": 40},
        {
            "residual": 32,
            "dim": 16,
            "bits": 2,
            "group": 16,
            "value_group": 16,
            "sinks": 4,
            "rotate_keys": True,
        },
        pytest.param(
            {"residual": 32, "dim": 16, "bits": 2, "group": 32, "value_group": 16, "sinks": 31},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_steps_equal_those_of_xla(case):
    """Rows before their first block, at its end and long after it; one pauses, and a window's store wraps."""
    case = {"dtype": jnp.float32, "scale_dtype": "float16", **case}
    residual = case["residual"]
    ours = xla = tokens_of([3, residual - 2, 3 * residual - 1], **case)
    step_ours, step_xla = jax.jit(with_kernels), jax.jit(with_xla)
    for i in range(residual + 4):
        query, key, value = normal(i + 1, 3, BATCH, KV_HEADS, case["dim"])
        active = jnp.array([True, i % 5 != 2, True])
        step = Step(query, key, value, jnp.zeros((BATCH, KV_HEADS)), active)
        ours, xla = step_ours(ours, step), step_xla(xla, step)
        for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(xla), strict=True):
            got, want = np.asarray(got), np.asarray(want)
            if want.dtype == np.float32:  # a product and a sum may be one instruction, or round twice
                np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dim", [24, 80, 96])
def test_other_head_sizes_are_refused(dim):
    tokens = tokens_of(
        [40, 40, 40],
        residual=32,
        dim=dim,
        bits=2,
        group=32,
        value_group=8,
        dtype=jnp.float32,
        scale_dtype="float16",
    )
    token = tokens.key_ring[:, :, 0]
    every = jnp.ones(BATCH, bool)
    step = Step(token, token, token, token[..., 0], every)
    with pytest.raises(NotImplementedError, match=f"{dim} channels in groups of 8: no powers of two"):
        with_kernels(tokens, step)
