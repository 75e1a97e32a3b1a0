"""Making one computation wait for another, where the compiler's own order would cost memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def after(wait_for: Any, number: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """`number` unchanged, but computed from every array of `wait_for`.

    What is then computed from `number` runs when those arrays exist. XLA needs that where a buffer is
    read and then overwritten (else it copies the buffer) or where large inputs should be freed early.
    An `optimization_barrier` is dropped too early to do it on the CPU (jax 0.10.2).
    """
    zero = jnp.int32(0)
    for leaf in jax.tree.leaves(wait_for):
        # 0 * x is not folded for floats, and NaN converts to 0.
        zero += (leaf[(0,) * leaf.ndim].astype(jnp.float32) * 0).astype(jnp.int32)
    return number + zero
