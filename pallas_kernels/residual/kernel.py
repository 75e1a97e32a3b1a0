"""A decoding step's writes to KIVI's cache on NVIDIA GPUs, each one kernel that works in place.

XLA's are twenty small kernels a layer, and a step of one row takes as long as its kernels are many (see
docs/results-gpu.md). `take_token` puts the step's token into the rings and packs the value it displaces;
`pack_block` packs the rings' keys in the steps when they are a full block, and else ends at once.

Programs work on planes of channels, as `quantize/kernel.py` does. What they overwrite, each thread has read
itself: blocks are read and written in one layout, and have no fewer numbers than threads, or one warp's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.quantize import groups
from pallas_kernels.quantize.packing import PAGE, pack_planes, split_channels
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.residual.ring import Ring
from pallas_kernels.triton_call import check_powers_of_two, triton_call

_ALL = slice(None)
_quantize_groups = functools.partial(groups.quantize_groups, to_code=groups.round_by_triton)


def take_token(
    values: QuantizedTensor,
    ring: Ring,
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    active: Bool[Array, "B"],
    *,
    after: Array | None = None,
    interpret: bool = False,
) -> tuple[QuantizedTensor, Array, Array]:
    """`values` and the ring's keys and values after token `ring.end` of active rows has joined it.

    The value that it displaces from the ring, token `ring.end - R`, is packed into `values`. Nothing is
    written before the array `after` exists, which was computed from what is overwritten.

    Raises:
        NotImplementedError: a group or head size that the kernel has no block for.
    """
    channels = key.shape[-1]
    check_powers_of_two(channels, values.group_size)
    axes = split_channels(channels, values.bits, values.group_size)
    sets, _, shared, _ = axes
    pages = values.words.shape[2]

    def cut(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], *axes)

    stores = (
        cut(ring.keys),
        cut(ring.values),
        values.words.reshape(*values.words.shape[:2], pages, *axes[2:], PAGE),
        *(x.reshape(*x.shape[:2], pages, sets, shared, PAGE) for x in (values.scale, values.zero)),
    )
    token = (cut(key.astype(ring.keys.dtype)), cut(value.astype(ring.values.dtype)))
    keys, held, *packed = _in_place(
        functools.partial(_take_token, values.bits, values.trim, ring.sinks),
        stores,
        token,
        ring.lengths,
        active,
        parts=1,
        warps=1,
        after=after,
        name="take_token",
        interpret=interpret,
    )
    return _holding(values, *packed), keys.reshape(ring.keys.shape), held.reshape(ring.values.shape)


# A step calls it for every layer: traced and lowered once, not 32 times.
@functools.partial(jax.jit, static_argnames=("interpret",))
def pack_block(
    keys: QuantizedTensor,
    ring: Ring,
    due: Bool[Array, "B"],
    *,
    interpret: bool = False,
) -> tuple[QuantizedTensor, Array]:
    """`keys` with the ring's of the rows that are due, and the ring's keys as `keys` denotes them.

    Where a row is due, its ring has just taken token `ring.end`, the last of a block of R.

    Raises:
        NotImplementedError: a group or head size that the kernel has no block for.
    """
    slots, channels = ring.keys.shape[2:]
    group = keys.group_size
    check_powers_of_two(channels, group)
    words, planes = keys.words.shape[-1], 8 // keys.bits

    def cut(x: Array, rows: int, *rest: int) -> Array:
        return x.reshape(*x.shape[:2], -1, rows, *rest)

    stores = (
        ring.keys.reshape(*ring.keys.shape[:2], slots, planes, words),
        cut(keys.words, group, words),
        *(cut(x, planes, words) for x in (keys.scale, keys.zero)),
    )
    parts = (slots - ring.sinks) // group
    key_ring, *packed = _in_place(
        functools.partial(_pack_block, keys.bits, keys.trim, ring.sinks, parts),
        stores,
        (),
        ring.lengths,
        due,
        parts=parts,
        warps=_warps(group * words),
        after=None,
        name="pack_block",
        interpret=interpret,
    )
    return _holding(keys, *packed), key_ring.reshape(ring.keys.shape)


def _holding(tensor: QuantizedTensor, words: Array, scale: Array, zero: Array) -> QuantizedTensor:
    """`tensor` with other contents."""
    parts = {"words": words, "scale": scale, "zero": zero}
    return dataclasses.replace(
        tensor, **{name: part.reshape(getattr(tensor, name).shape) for name, part in parts.items()}
    )


def _in_place(
    kernel: Callable[..., None],
    stores: tuple[Array, ...],
    token: tuple[Array, ...],
    lengths: Int[Array, "B"],
    write: Bool[Array, "B"],
    *,
    parts: int,
    warps: int,
    after: Array | None,
    name: str,
    interpret: bool,
) -> tuple[Array, ...]:
    """The stores [B, K, ...] after `kernel(lengths, write, *token, *stores)` ran in `parts` for each head."""

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,))

    def of_row(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1,), lambda row, *_: (row,))

    def of_head(x: Array) -> pl.BlockSpec:
        rest = x.shape[2:]
        return pl.BlockSpec((None, None, *rest), lambda row, head, _: (row, head, *(0 for _ in rest)))

    limits = (lengths.astype(jnp.int32), write.astype(jnp.int32))
    unread = [] if after is None else [after.reshape(-1)]
    before = len(unread) + len(limits) + len(token)
    return triton_call(
        lambda *refs: kernel(*refs[len(unread) :]),
        name=name,
        grid=(*stores[0].shape[:2], parts),
        in_specs=[*map(whole, unread), *map(of_row, limits), *map(of_head, (*token, *stores))],
        out_specs=[of_head(x) for x in stores],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stores],
        input_output_aliases={before + i: i for i in range(len(stores))},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
    )(*unread, *limits, *token, *stores)


def _take_token(
    bits: int,
    trim: float,
    sinks: int,
    lengths_ref: Any,
    active_ref: Any,
    key_ref: Any,
    value_ref: Any,
    *refs: Any,
) -> None:
    """One program: the token of one row and head, [sets of planes, planes, groups of a plane, channels].

    Without branches, and everything is read first: what it waits for is memory's latency, once.
    """
    key_ring_ref, value_ring_ref, words_ref, scale_ref, zero_ref = refs[len(refs) // 2 :]
    slots, sets, members = value_ring_ref.shape[:3]
    residual = slots - sinks
    end, active = lengths_ref[0] - sinks, active_ref[0] != 0
    slot, leaving = jax.lax.rem(end, residual), end - residual
    if sinks:
        slot = jnp.where(end < 0, end + slots, slot)
    parts = list(itertools.product(range(sets), range(members)))
    token = [(key_ref[part], value_ref[part]) for part in parts]
    displaced = [value_ring_ref[slot, *part] for part in parts]

    def store(x: Array, mask: Array, ref: Any, *at: Any) -> None:
        """Write `x` to `ref[*at]`, where axes of `x` are slices."""
        axes = iter(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in range(x.ndim))
        index = tuple(next(axes) if i is _ALL else jnp.full(x.shape, i, jnp.int32) for i in at)
        plt.store(ref.at[index], x, mask=jnp.broadcast_to(mask, x.shape))

    for part, (key, value) in zip(parts, token, strict=True):
        store(key, active, key_ring_ref, slot, *part, _ALL, _ALL)
        store(value, active, value_ring_ref, slot, *part, _ALL, _ALL)
    full = active & (leaving >= 0)
    page = jax.lax.div(jax.lax.rem(jnp.maximum(leaving, 0), words_ref.shape[0] * PAGE), PAGE)
    lane = jax.lax.rem(jnp.maximum(leaving, 0), PAGE)
    planes = []
    for i in range(sets):
        blocks = displaced[i * members : (i + 1) * members]
        codes, scale, zero = _quantize_groups(blocks, 1, bits, scale_ref.dtype, trim=trim)
        store(scale, full, scale_ref, page, i, _ALL, lane)
        store(zero, full, zero_ref, page, i, _ALL, lane)
        planes += codes
    store(pack_planes(planes, bits), full, words_ref, page, _ALL, _ALL, lane)


def _pack_block(
    bits: int, trim: float, sinks: int, parts: int, lengths_ref: Any, due_ref: Any, *refs: Any
) -> None:
    """One program: a group of the ring of one row and head, [tokens, planes, channels of a plane]."""
    ring_ref, words_ref, scale_ref, zero_ref = refs[len(refs) // 2 :]
    tokens, planes = words_ref.shape[1], ring_ref.shape[1]
    i = pl.program_id(2)
    group = pl.ds(i * tokens, tokens)

    @pl.when(due_ref[0] != 0)
    def _pack() -> None:
        at = jax.lax.rem(jax.lax.div(lengths_ref[0] + 1 - sinks, tokens) - parts + i, words_ref.shape[0])

        def add_plane(j: Array, packed: Array) -> Array:
            block = [ring_ref[group, j]]
            (codes,), scale, zero = _quantize_groups(block, 0, bits, scale_ref.dtype, trim=trim)
            scale_ref[at, j], zero_ref[at, j] = scale, zero
            scale, zero = scale.astype(jnp.float32)[None], zero.astype(jnp.float32)[None]
            seen = codes.astype(jnp.float32) * scale + zero
            ring_ref[group, j] = seen.astype(ring_ref.dtype)
            return packed | (codes << (bits * j).astype(jnp.uint8))

        # In a loop: a program of all planes takes four times as long to compile.
        blank = jnp.zeros(words_ref.shape[1:], jnp.uint8)
        words_ref[at] = jax.lax.fori_loop(0, planes, add_plane, blank)


def _warps(numbers: int) -> int:
    """Warps of a program on blocks of so many numbers, of which a thread holds 32."""
    return min(16, max(1, numbers // 1024))
