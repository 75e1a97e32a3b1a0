"""Decode attention on NVIDIA GPUs (Ampere and later) through Pallas' Triton backend.

A decode step reads every byte of the cache once, and at 2 bits a GPU's memory delivers codes about as
fast as its cores can look at them: the number of instructions per code decides the speed. So:

1.  Codes are never dequantized. A masked byte `c << bits * j`, read as the bits of a float16, *is* the
    subnormal number c * 2**(bits * j - 24), exactly, and matrix units take subnormal operands. The power
    of two goes into the query (keys) or the final result (values).
2.  Scales and zeros are folded into the small operands:
        query . key           = (query * scale) . code + query . zero
        probability . value   = (probability * scale) . code + probability . zero
3.  Codes are the matrix unit's left operand; the query heads of one KV head are its 8 or 16 columns.
4.  A program is one warp. It owns a run of tiles of one (row, KV head), so nothing is exchanged between
    warps, and the parallelism comes from splitting the tokens; `merging.py` combines the splits. Their
    results are written normalized, as float16: half the bytes, and rounding errors of many splits cancel.
5.  Tiles whose tokens are all visible carry no mask; the few at the ends of the range have their own loop,
    over pages.

Token t is in slot t % S, so the loops run over tiles of *tokens*, and a tile's place in the ring is its
number modulo the number of tiles: a ring costs two instructions a tile.

Pallas' Triton backend is deprecated upstream (jax 0.11); `triton.py` is the same kernel without it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.online_softmax import LOG2E, assembly, exp2
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.quantized_attention.merging import merge
from pallas_kernels.quantized_attention.split_kv import (
    TILE_ROWS,
    Case,
    Store,
    operands,
    plan,
)
from pallas_kernels.quantized_attention.tuning import Tuning
from pallas_kernels.residual.ring import Ring, Token
from pallas_kernels.triton_call import triton_call

_UNIT = 2.0**-24  # the value of float16's smallest subnormal: what a code's lowest bit is worth
_LIFT = 8.0  # probabilities are kept times 2**8: float16 has room above 1, and none below 2**-24
_LOWEST = -1e20  # no score, in units of `_UNIT`; finite, so that differences of maxima are
# A maximum starts below every score, and above `_LOWEST`: that weighs 0, also on a page of nothing else.
_BELOW_ALL = -1e16


def attend(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    *,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
    scale: float,
    held_back: int = 0,
    residual: Ring | None = None,
    own: Token | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> AttentionPartial:
    """See `quantized_attention`. Products are of float16 numbers, sums are float32.

    What merges the splits also attends to the residual and the own token: as XLA's, that would be several
    kernels more. With an own token the partial is normalized.

    Raises:
        NotImplementedError: a group or head size that the kernel has no block for.
    """
    case = plan(query, key, value, scale, tuning, interpret)
    splits = _partials(case, held_back, *operands(case, query, key, value, start, end))
    return merge(case, splits, query, residual, own, start)


def _partials(case: Case, held_back: int, *arrays: Array) -> tuple[Array, Array, Array]:
    """(out, max in powers of two, denom) of every (row and head block, split, query head)."""
    programs, splits = arrays[2].shape[0], case.tuning.splits  # one query operand for each

    def of_split(*rest: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *rest), lambda i, split: (i, split, *(0 for _ in rest)))

    outputs = ((case.heads, case.dim), (case.heads,), (case.heads,))
    return triton_call(
        functools.partial(_attend_split, case, held_back),
        name="quantized_attention",
        grid=(programs, splits),
        in_specs=[_of_program(array, programs) for array in arrays],
        out_specs=[of_split(*shape) for shape in outputs],
        out_shape=[
            jax.ShapeDtypeStruct((programs, splits, *shape), dtype)
            for shape, dtype in zip(outputs, (jnp.float16, jnp.float32, jnp.float32), strict=True)
        ],
        compiler_params=plt.CompilerParams(num_warps=case.tuning.warps, num_stages=case.tuning.stages),
        interpret=case.interpret,
    )(*arrays)


def _of_program(array: Array, programs: int) -> pl.BlockSpec:
    """Consecutive programs share an array that has fewer rows than there are programs."""
    rest, share = array.shape[1:], programs // array.shape[0]
    return pl.BlockSpec((None, *rest), lambda i, *_: (_div(i, share), *(0 for _ in rest)))


def _attend_split(case: Case, held_back: int, *refs: Any) -> None:
    """One program: the tiles of one split of one (row, KV head)."""
    (start_ref, end_ref, q_ref, kw_ref, ks_ref, kz_ref, vw_ref, vs_ref, vz_ref) = refs[:9]
    out_ref, max_ref, denom_ref = refs[9:]
    lanes, pages, tile = case.lanes, case.tuning.pages, case.tile
    up = case.scale * LOG2E / _UNIT  # from units to powers of two: what exp2 wants
    parts = case.value_parts
    row16 = jnp.arange(TILE_ROWS, dtype=jnp.int32)

    end = end_ref[0] - held_back  # negative where there are none yet: no tile is visited
    start = jnp.maximum(jnp.maximum(start_ref[0], 0), end - case.slots)
    first_tile = _div(start, tile)
    last_tile = jnp.where(start < end, _div(end + tile - 1, tile), first_tile)
    share = _div(last_tile - first_tile + case.tuning.splits - 1, case.tuning.splits)
    low = first_tile + pl.program_id(1) * share
    high = jnp.minimum(low + share, last_tile)
    lap = first_tile - _rem(first_tile, case.tiles)

    def scores(slot: Array, page: int | Array, count: int, first: Array | None) -> list[Array]:
        """Scores [32, lanes] of every page of some, in units; see `visit`."""
        # An index that is always 0, but not provably: a load that is the same in every iteration would
        # be hoisted, and its layout there makes Triton shuffle query * scale into place in every tile.
        again = jnp.minimum(slot, 0)
        # Codes of plane j are worth 2**(bits * j) units, which is divided out here.
        query = [
            _load_beside(case, q_ref, again, j).T * jnp.float16(2.0 ** -(case.key.bits * j))
            for j in range(case.key.planes)
        ]
        slot_group = slot if tile >= case.key.group else _div(slot, case.key.group // tile)
        groups, first_group = pl.cdiv(count * case.key_groups, pages), _div(page * case.key_groups, pages)
        # Each group's zeros are repeated over 8 rows (16 if it is alone), so that its query . zero comes
        # out of the matrix unit in the layout of the scores.
        shape = (groups, case.key.planes, case.key.columns)
        zero = _load(kz_ref, (slot_group,), shape, first_group).astype(jnp.float16)
        repeat = max(8, TILE_ROWS // groups)
        zero = jnp.broadcast_to(
            zero.reshape(groups, 1, case.key.planes * case.key.columns),
            (groups, repeat, case.key.planes * case.key.columns),
        ).reshape(groups * repeat, case.key.planes * case.key.columns)
        biases = jnp.split(plt.dot(zero, _load_planes(case, q_ref, again).T) * _UNIT, groups)
        biases = [
            jnp.broadcast_to(bias[None], (PAGE // repeat, repeat, lanes)).reshape(PAGE, lanes)
            for bias in biases
        ]
        found = []
        for i in range(count):
            group = i * groups // count
            scale = _load(ks_ref, (slot_group, first_group + group), shape[1:]).astype(jnp.float16)
            size = (PAGE // case.fold, case.fold * case.key.columns)
            words = _widen(_load(kw_ref, (slot, page + i), size), case)
            score = biases[group] if case.fold == 1 else jnp.zeros((size[0], case.fold * lanes), jnp.float32)
            for j, plane_scale in enumerate(_unstack(scale)):
                if case.fold > 1:
                    plane_scale = jnp.broadcast_to(plane_scale[None], (case.fold, case.key.columns))
                    plane_scale = plane_scale.reshape(case.fold * case.key.columns)
                score = score + plt.dot(_plane(words, j, case.key, case), query[j] * plane_scale[:, None])
            if case.fold > 1:
                score = score.reshape(PAGE, lanes) + biases[group]
            if first is not None:
                token = first + i * PAGE + jnp.arange(PAGE, dtype=jnp.int32)
                score = jnp.where(((token >= start) & (token < end))[:, None], score, _LOWEST)
            found.append(score)
        return found

    def visit(slot: Array, page: int | Array, count: int, carry: Any, first: Array | None = None) -> Any:
        """Fold `count` pages of the tile in `slot`, from `page` on, into the running (accumulators, sums over
        zeros and ones, maximum): all of their tokens, or, given the `first` one's number, those in range.
        """
        accumulators, sums, top = carry
        found = scores(slot, page, count, first)
        new_top = jnp.maximum(top, functools.reduce(jnp.maximum, found).max(0))
        fade = exp2((top - new_top) * up, case.interpret)[None, :]
        accumulators, sums = [x * fade for x in accumulators], sums * fade
        offset = (new_top * up - _LIFT)[None, :]
        for i in range(count):
            weight = exp2(found[i] * up - offset, case.interpret).astype(jnp.float16)
            # Zeros of the groups, and below them a row of ones: the denominator.
            zero = _load(vz_ref, (slot, page + i), (TILE_ROWS, PAGE)).astype(jnp.float16)
            zero = jnp.where((row16 == case.value_groups)[:, None], jnp.float16(1), zero)
            sums = sums + plt.dot(zero, weight)
            # All groups' weight * scale as one block, groups first: Triton then moves the weights into the
            # operand's layout once, before they are repeated, and not once for each group or through memory.
            groups = pl.next_power_of_2(case.value_groups)
            scale = _load(vs_ref, (slot, page + i), (groups, PAGE)).astype(jnp.float16)
            shape = (groups, PAGE, lanes)
            scaled = jnp.broadcast_to(weight[None], shape) * jnp.broadcast_to(scale[:, :, None], shape)
            scaled = _unstack(scaled)
            for row in range(0, case.value.words, case.value_rows):
                words = _widen(_load(vw_ref, (slot, page + i), (case.value_rows, PAGE), row), case)
                for at, (j, part_row, group) in enumerate(parts):
                    if part_row == row:
                        accumulators[at] += plt.dot(_plane(words, j, case.value, case), scaled[group])
        return accumulators, sums, new_top

    carry = (
        [jnp.zeros((case.value_rows, lanes), jnp.float32) for _ in parts],
        jnp.zeros((TILE_ROWS, lanes), jnp.float32),
        jnp.full((lanes,), _BELOW_ALL, jnp.float32),
    )

    def slot_of(t: Array) -> Array:
        slot = t - lap
        return jnp.where(slot >= case.tiles, slot - case.tiles, slot)

    def visit_page(i: Array, carry: Any) -> Any:
        t, page = _div(i, pages), _rem(i, pages)
        t = jnp.where(t < high, t, low)
        return visit(slot_of(t), page, 1, carry, first=t * tile + page * PAGE)

    # Only the first tile of all can begin before `start`, and only the last can end after `end`. The order
    # of tiles is free, so whole tiles go first, then the last one, and then, if need be, the first: these two
    # page by page, as a second program for whole tiles would take as long to compile as the first.
    ragged = (low == first_tile) & (start > first_tile * tile) & (high > low)
    skip = jnp.where(ragged, jnp.int32(1), jnp.int32(0))
    whole = jnp.maximum(low + skip, jnp.minimum(high, _div(end, tile)))
    carry = jax.lax.fori_loop(low + skip, whole, lambda t, carry: visit(slot_of(t), 0, pages, carry), carry)
    masked = whole * pages, (jnp.maximum(high, low) + skip) * pages
    accumulators, sums, top = jax.lax.fori_loop(*masked, visit_page, carry)

    def sum_row(row: int) -> Array:
        return jnp.sum(jnp.where((row16 == row)[:, None], sums, 0.0), axis=0) * 2.0**-_LIFT

    head = jnp.arange(lanes, dtype=jnp.int32)
    denom = sum_row(case.value_groups)
    norm = 1 / jnp.where(denom > 0, denom, 1.0)
    for accumulator, (j, row, group) in zip(accumulators, parts, strict=True):
        out = accumulator * (2.0 ** -(case.value.bits * j + _LIFT) / _UNIT) + sum_row(group)[None, :]
        at = row + jnp.arange(case.value_rows, dtype=jnp.int32)
        channel = j * case.value.words + at
        in_group = (channel >= group * case.value.group) & (channel < (group + 1) * case.value.group)
        written = (head < case.heads)[None, :] & ((at < case.value.words) & in_group)[:, None]
        out = (out * norm[None, :]).astype(jnp.float16)
        plt.store(out_ref.at[head[None, :], channel[:, None]], out, mask=written)
    plt.store(max_ref.at[head], top * up, mask=head < case.heads)
    plt.store(denom_ref.at[head], denom, mask=head < case.heads)


def _div(x: Any, by: int) -> Any:
    """Quotient of a number that is not negative (`//` would spend instructions on signs)."""
    return x // by if isinstance(x, int) else jax.lax.div(x, jnp.asarray(by, x.dtype))


def _rem(x: Array, by: int) -> Array:
    """Remainder of a number that is not negative."""
    return jax.lax.rem(x, jnp.asarray(by, x.dtype))


def _load(ref: Any, index: tuple[Any, ...], size: tuple[int, ...], first: Any = 0) -> Array:
    """ref[*index] from row `first` on as a block of `size`, zero where that goes beyond the array."""
    limits = ref.shape[len(index) :]
    if size[0] <= limits[0] and size[1:] == limits[1:]:
        return ref[(*index, pl.ds(first, size[0]))]
    axes = [jax.lax.broadcasted_iota(jnp.int32, size, axis) for axis in range(len(size))]
    mask = functools.reduce(
        jnp.logical_and, [at < n for at, n, full in zip(axes, limits, size, strict=True) if n < full]
    )
    axes[0] += first
    return plt.load(ref.at[(*index, *axes)], mask=mask, other=jnp.zeros(size, ref.dtype))


def _load_planes(case: Case, ref: Any, at: Array) -> Array:
    """The query [lanes, planes * columns], as the right operand of zeros wants it transposed."""
    column = jnp.arange(case.key.planes * case.key.columns, dtype=jnp.int32)
    word = _rem(column, case.key.columns)
    channel = _div(column, case.key.columns) * case.key.words + word
    return _load_heads(case, ref, at, jnp.arange(case.lanes, dtype=jnp.int32), channel, word, None)


def _load_beside(case: Case, ref: Any, at: Array, j: int) -> Array:
    """Plane j of the query [fold * lanes, fold * columns], as the right operand of codes wants it transposed.

    Where several tokens lie side by side in a row of codes it is block diagonal: each has lanes of its own.
    """
    lane = jnp.arange(case.fold * case.lanes, dtype=jnp.int32)
    column = jnp.arange(case.fold * case.key.columns, dtype=jnp.int32)
    word = _rem(column, case.key.columns)
    own = None
    if case.fold > 1:
        own = _div(lane, case.lanes)[:, None] == _div(column, case.key.columns)[None, :]
    return _load_heads(case, ref, at, _rem(lane, case.lanes), j * case.key.words + word, word, own)


def _load_heads(
    case: Case, ref: Any, at: Array, lane: Array, channel: Array, word: Array, mask: Array | None
) -> Array:
    """Channels of the query's heads, zero where not in the `mask`, no head or beyond a plane's words.

    Lanes beyond the last head must not repeat one: with one row all programs read the same few lines of L2,
    which these would keep busy (61 us for 38 at 128k tokens).
    """
    masks = [] if mask is None else [mask]
    if case.heads < case.lanes:
        masks.append((lane < case.heads)[:, None])
    if case.key.words < case.key.columns:
        masks.append((word < case.key.words)[None, :])
    where, shape = ref.at[at, lane[:, None], channel[None, :]], (lane.size, channel.size)
    if not masks:
        return plt.load(where)
    inside = functools.reduce(jnp.logical_and, (jnp.broadcast_to(m, shape) for m in masks))
    return plt.load(where, mask=inside, other=jnp.zeros(shape, ref.dtype))


def _unstack(x: Array) -> list[Array]:
    """The parts of `x` along its first axis, a power of two long."""
    return [part.reshape(part.shape[1:]) for part in jnp.split(x, x.shape[0])]


def _widen(words: Array, case: Case) -> Array:
    """Bytes as 16-bit words; what the upper byte holds is masked away by `_plane`."""
    if case.interpret:
        return words.astype(jnp.int16)
    code = "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;"
    return assembly(code, "=r,=r,r", words, jnp.int16, elements=4)


def _plane(halves: Array, j: int, store: Store, case: Case) -> Array:
    """The codes of plane j as float16 subnormals: each is worth 2**(bits * j) units."""
    mask = (2**store.bits - 1) << (store.bits * j)
    if case.interpret:
        return jax.lax.bitcast_convert_type(halves & jnp.int16(mask), jnp.float16)
    return assembly(f"and.b32 $0, $1, {mask * 0x10001};", "=r,r", halves, jnp.float16, elements=2)
