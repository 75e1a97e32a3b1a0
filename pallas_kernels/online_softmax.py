"""The online softmax inside a Triton kernel: what kernels of query heads share.

Rows are query heads, at least as many as the matrix unit's 16. Scores are in powers of two, as `exp2` wants.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.partials import NO_SCORE

ROWS = 16  # of the matrix unit's left operand
LOG2E = math.log2(math.e)
# Where a maximum starts: below every score, and above `NO_SCORE`, which therefore weighs 0.
_BELOW_ALL = -1e25


class Running(NamedTuple):
    """Unnormalized attention over the tokens seen so far: an `AttentionPartial` of some channels."""

    out: Float[Array, "M C"]
    top: Float[Array, "M"]
    denom: Float[Array, "M"]


def nothing(channels: int) -> Running:
    """Attention over no tokens."""
    top = jnp.full((ROWS,), _BELOW_ALL, jnp.float32)
    return Running(jnp.zeros((ROWS, channels), jnp.float32), top, jnp.zeros_like(top))


def fold(
    running: Running, score: Float[Array, "M T"], value: Float[Array, "T C"], *, interpret: bool
) -> Running:
    """Some more tokens; those with `NO_SCORE` count for nothing. Weights are rounded to the values' type."""
    top = jnp.maximum(running.top, score.max(1))
    weight, fade = exp2(score - top[:, None], interpret), exp2(running.top - top, interpret)
    out = running.out * fade[:, None] + dot(weight.astype(value.dtype), value)
    return Running(out, top, running.denom * fade + jnp.sum(weight, axis=1))


def fold_one(
    running: Running, score: Float[Array, "M"], value: Float[Array, "C"], *, interpret: bool
) -> Running:
    """One more token, which every row sees."""
    top = jnp.maximum(running.top, score)
    weight, fade = exp2(score - top, interpret), exp2(running.top - top, interpret)
    out = running.out * fade[:, None] + weight[:, None] * value[None, :]
    return Running(out, top, running.denom * fade + weight)


def highest(running: Running) -> Float[Array, "M"]:
    """The maximum, `NO_SCORE` where no token was seen."""
    return jnp.where(running.denom > 0, running.top, NO_SCORE)


def dot(a: Float[Array, "M N"], b: Float[Array, "..."], *, trans_b: bool = False) -> Float[Array, "M C"]:
    """The product of two blocks, summed in float32; of float32 blocks without rounding these.

    `b` is [N, C], with `trans_b` [C, N].
    """
    return plt.dot(a, b, trans_b=trans_b, precision=jax.lax.Precision.HIGHEST)


def exp2(x: Array, interpret: bool) -> Array:
    """2**x, by the hardware's approximation."""
    return jnp.exp2(x) if interpret else assembly("ex2.approx.ftz.f32 $0, $1;", "=f,f", x, jnp.float32)


def log2(x: Array, interpret: bool) -> Array:
    """The logarithm to base 2, by the hardware's approximation."""
    return jnp.log2(x) if interpret else assembly("lg2.approx.ftz.f32 $0, $1;", "=f,f", x, jnp.float32)


def assembly(code: str, constraints: str, x: Array, dtype: Any, *, elements: int = 1) -> Array:
    """Apply PTX to `elements` neighbouring elements at a time."""
    result = jax.ShapeDtypeStruct(x.shape, dtype)
    (out,) = plt.elementwise_inline_asm(
        code, args=[x], constraints=constraints, pack=elements, result_shape_dtypes=[result]
    )
    return out


def load_rows(ref: Any, row: Array, present: Array, column: Array) -> Array:
    """These columns of rows of a matrix `ref`, rows not `present` and columns beyond its own as zeros."""
    inside = present[:, None] & (column < ref.shape[1])[None, :]
    nothing = jnp.zeros(inside.shape, ref.dtype)
    return plt.load(ref.at[row[:, None], column[None, :]], mask=inside, other=nothing)
