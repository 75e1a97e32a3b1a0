"""The norm of a decoding step's only row, by one kernel on NVIDIA GPUs.

XLA makes one kernel of many rows' norms, but two of one's: a sum, and what is divided by it. With one row a
step takes as long as its kernels are many.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.triton_call import triton_call

_MOST = 2**15  # numbers that a program holds in its registers
_EACH = 16  # numbers of a thread


def rms_norm(
    x: Float[Array, "*ones D"],
    scale: Float[Array, "D"],
    *,
    epsilon: float,
    offset: float,
    interpret: bool = False,
) -> Float[Array, "*ones D"]:
    """`x / rms(x) * (scale + offset)` of one row, computed in float32, in x's shape and dtype.

    Raises:
        NotImplementedError: the row is too long for a program.
    """
    if x.size > _MOST:
        raise NotImplementedError(f"{x.size} numbers are too many for a program")
    warps = min(16, max(1, pl.next_power_of_2(x.size) // (32 * _EACH)))
    return triton_call(
        functools.partial(_rms_norm, epsilon, offset),
        name="rms_norm",
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(x.reshape(-1), scale).reshape(x.shape)


def _rms_norm(epsilon: float, offset: float, x_ref: Any, scale_ref: Any, out_ref: Any) -> None:
    """The only program."""
    (size,) = x_ref.shape
    at = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)

    def load(ref: Any) -> Array:
        held = plt.load(ref.at[at], mask=at < size, other=jnp.zeros(at.shape, ref.dtype))
        return held.astype(jnp.float32)

    x = load(x_ref)
    y = x * jax.lax.rsqrt(jnp.sum(x * x) / size + epsilon)
    plt.store(out_ref.at[at], (y * (load(scale_ref) + offset)).astype(out_ref.dtype), mask=at < size)
