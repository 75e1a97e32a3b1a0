"""A decoding step's heads as attention and cache take them, by one kernel on NVIDIA GPUs.

Queries, keys and values come out of one projection, and go to kernels that want them apart. What XLA hands to
a kernel it computes for this one alone: the projection's last sums and RoPE once for every reader, a launch
each, and where keys are turned, a product of its own and the concatenation before it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import online_softmax
from pallas_kernels.online_softmax import ROWS
from pallas_kernels.triton_call import triton_call

_BYTES = 32768  # of the matrix that a product takes at a time: the smallest shared memory is 99 KiB


def query_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The type in which `split_heads` writes queries of this type.

    16 bits become float16, which is what the kernel of packed attention multiplies: beyond 65,504 they are
    infinite to every reader.
    """
    dtype = jnp.dtype(dtype)
    return jnp.dtype(jnp.float16) if dtype.itemsize == 2 else dtype


def split_heads(
    query: Float[Array, "B N H"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    matrix: Float[np.ndarray, "H H"] | None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K H"], Float[Array, "B K H"]]:
    """The three again, each an array of its own; queries and keys times the `matrix`, if there is one.

    Its entries are 0 or of one magnitude, so that a product with 16-bit numbers is of 16-bit numbers.
    Queries are of `query_dtype`.
    """
    parts, dim = (query, key, value), query.shape[2]
    heads = jnp.concatenate(parts, axis=1)
    turned = query.shape[1] + key.shape[1]
    signs = [] if matrix is None else [jnp.asarray(np.sign(matrix), heads.dtype)]
    magnitude = 1.0 if matrix is None else float(np.abs(matrix).max())
    dtypes = query_dtype(query.dtype), key.dtype, value.dtype
    wide = dim * heads.dtype.itemsize > 256  # bytes of a head, of which four warps would spill

    def of_row(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda row, _: (row, 0, 0))

    return triton_call(
        functools.partial(_split_heads, turned, magnitude),
        name="split_heads",
        grid=(heads.shape[0], -(-heads.shape[1] // ROWS)),
        in_specs=[of_row(heads.shape), [pl.BlockSpec((dim, dim), lambda *_: (0, 0)) for _ in signs]],
        out_specs=[of_row(part.shape) for part in parts],
        out_shape=[
            jax.ShapeDtypeStruct(part.shape, dtype) for part, dtype in zip(parts, dtypes, strict=True)
        ],
        compiler_params=plt.CompilerParams(num_warps=8 if wide else 4, num_stages=1),
        interpret=interpret,
    )(heads, signs)


def _split_heads(turned: int, magnitude: float, heads_ref: Any, signs_refs: list[Any], *refs: Any) -> None:
    """One program: some heads of one row."""
    count, dim = heads_ref.shape
    columns = max(ROWS, pl.next_power_of_2(dim))
    head = pl.program_id(1) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    channel = jnp.arange(columns, dtype=jnp.int32)
    x = online_softmax.load_rows(heads_ref, head, head < count, channel)
    for signs_ref in signs_refs:
        product = jnp.zeros(x.shape, jnp.float32)
        block = max(ROWS, min(columns, _BYTES // (columns * x.dtype.itemsize)))
        for first in range(0, columns, block):
            at = first + jnp.arange(block, dtype=jnp.int32)
            part = online_softmax.load_rows(heads_ref, head, head < count, at)
            product += online_softmax.dot(part, online_softmax.load_rows(signs_ref, at, at < dim, channel))
        x = jnp.where((head < turned)[:, None], (product * magnitude).astype(x.dtype), x)
    first = 0
    for ref in refs:
        at = head - first
        mask = ((at >= 0) & (at < ref.shape[0]))[:, None] & (channel < dim)[None, :]
        plt.store(ref.at[at[:, None], channel[None, :]], x.astype(ref.dtype), mask=mask)
        first += ref.shape[0]
