"""A row's norm by the kernel, in Pallas' interpreter, is that of a model's layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kivi_jax.model.layer import RMSNorm
from pallas_kernels.dispatch import with_derivatives_of
from pallas_kernels.norm import rms_norm
from tests.models import config


def case(dtype, offset):
    """A layer's norm of 96 channels, a row for it, and the kernel."""
    norm = RMSNorm(config(norm_offset=offset), 96, dtype=dtype)
    x, scale = (jax.random.normal(jax.random.key(seed), (1, 1, 96), dtype) for seed in (0, 1))
    norm.scale[...] = scale[0, 0]
    return norm, x, functools.partial(rms_norm, epsilon=norm.epsilon, offset=offset, interpret=True)


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 0.0), ("bfloat16", 1.0)])
def test_equals_a_layers(dtype, offset):
    norm, x, kernel = case(dtype, offset)
    got, want = kernel(x, norm.scale[...]), norm(x)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    error = np.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
    assert error <= 4 * float(jnp.finfo(dtype).eps)


def test_has_its_derivatives():
    norm, x, kernel = case("float32", 0.0)
    call = with_derivatives_of(lambda x, scale: norm(x), kernel)
    got, want = (
        jax.grad(lambda x, f=f: jnp.sin(f(x, norm.scale[...])).sum())(x) for f in (call, lambda x, _: norm(x))
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_refuses_a_row_that_no_program_holds():
    with pytest.raises(NotImplementedError, match="too many"):
        rms_norm(jnp.zeros(2**16), jnp.zeros(2**16), epsilon=1e-5, offset=0.0)
