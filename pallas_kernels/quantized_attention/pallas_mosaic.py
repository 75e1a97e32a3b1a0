"""Decode attention on Hopper GPUs through Pallas' Mosaic backend.

The arithmetic is that of `pallas_triton.py`: codes enter the matrix unit as float16 subnormals, scales are
folded into the small operands. What differs is who does the work. A program is a warpgroup (four warps):

1.  Tiles of words, scales and zeros arrive in shared memory by TMA, `stages` tiles ahead; no thread spends
    an instruction on moving them.
2.  The matrix unit (wgmma) takes 64 rows of codes from registers: 64 tokens of keys, or the channels of a
    plane of values, of as many pages as make 64 rows. query * scale and probability * scale are its right
    operand, which it reads from shared memory; the four warps share the work of writing it.
3.  64 rows may span several groups. Keys then have a column for each query head *and* group, of which every
    row keeps those of its own group; values are multiplied once for each group of rows, and the rows of the
    other groups are dropped at the end.
4.  query . zero of every group of keys is a small product outside the kernel, as is merging the splits.

Does wgmma pay? By instruction count, no. Compiled for an H100 by jax 0.11.2 and 0.12.0.1, the case that
`bench.aot` calls "2 bits" takes 3.8 instructions per code without spills (the Triton kernels: 1.6 to 1.7).
Of the 980 instructions of a tile, 287 are wgmma and what it needs before it can start: an instruction has
only 8 or 16 columns here, but wants its operand's address moved to uniform registers like a large one. And
242 registers leave room for 2 programs on a multiprocessor. More than 8 query heads to a KV head spill.
Hence `api.py` tries this kernel last; it is there for the day that Pallas drops Triton. It was right
on an H100, and not timed there.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int

from pallas_kernels.partials import NO_SCORE, AttentionPartial
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.quantized_attention.split_kv import Case, plan
from pallas_kernels.quantized_attention.tuning import Tuning
from pallas_kernels.residual.ring import Ring, Token, merge_residual

plgpu: Any = mosaic_gpu  # what it offers changes with every release of jax

_TILED = ("kb", "kw", "ks", "vw", "vs", "vz")  # the operands that come in tiles, in order
ROWS = 64  # rows of the matrix unit's left operand
_UNIT = 2.0**-24  # the value of float16's smallest subnormal: what a code's lowest bit is worth
_LIFT = 8.0  # probabilities are kept times 2**8: float16 has room above 1, and none below 2**-24
_LOG2E = math.log2(math.e)
_MOST_ROWS = 256  # of a TMA copy


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

    Raises:
        NotImplementedError: a group, head or store size that the kernel has no tile for; or a jax before
            0.11, whose Mosaic backend cannot load bytes into registers as the matrix unit wants them.
    """
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"needs jax 0.11 or later, not {jax.__version__}")
    case = _tile(plan(query, key, value, scale, tuning, interpret), key.scale.dtype, value.scale.dtype)
    if tuning is None:  # `choose` counts programs of one warp
        fewer = dataclasses.replace(case.tuning, splits=max(1, case.tuning.splits // 4))
        case = dataclasses.replace(case, tuning=fewer)
    operands = _operands(case, query, key, value, start, jnp.maximum(end - held_back, 0))
    packed = _merge(case, query.shape, *_partials(case, *operands))
    return merge_residual(packed, query, residual, own, start=start, scale=scale)


def _tile(case: Case, *scales: Any) -> Case:
    """The case with tiles of as many pages as this kernel takes.

    Raises:
        NotImplementedError: there is no such number of pages, or sizes or dtypes of `scales` are such as
            the kernel cannot take.
    """
    for store in (case.key, case.value):
        if store.words not in (16, 32, 64, 128):
            raise NotImplementedError(f"a token of {store.words} bytes, not 16, 32, 64 or 128")
    if case.key.words > 32 and not hasattr(plgpu, "store") and not case.interpret:
        raise NotImplementedError(
            f"keys of {case.key.words} bytes need jax 0.12 or later"
        )  # to store q * scale
    for scale in scales:
        if scale.itemsize != 2:
            raise NotImplementedError(f"scales of {scale}, not of 16 bits")
    if case.value.group & (case.value.group - 1) or case.value.group < 8:
        raise NotImplementedError(f"values in groups of {case.value.group}, no power of two from 8 on")
    least = max(2, case.key.group // PAGE, ROWS // case.value.words)
    most = _MOST_ROWS // max(PAGE, case.value.words)
    pages = [n for n in (2, 4, 8) if least <= n <= most and case.slots % (n * PAGE) == 0]
    if not pages:
        raise NotImplementedError(f"{case.slots} slots in tiles of {least} to {most} pages of {PAGE}")
    # With 8 pages the registers no longer suffice.
    chosen = max(n for n in pages if n <= max(min(4, case.tuning.pages), pages[0]))
    return dataclasses.replace(case, tuning=dataclasses.replace(case.tuning, pages=chosen))


def _operands(
    case: Case,
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
) -> tuple[Array, ...]:
    """The arrays the kernel reads: ranges by row, query and biases by program, the store by KV head."""
    rows, groups = key.shape[0] * key.shape[1], case.slots // case.key.group
    plain = query.reshape(rows, -1, case.heads, case.dim).astype(jnp.float16)
    plain = jnp.pad(plain, ((0, 0), (0, 0), (0, case.lanes - case.heads), (0, 0)))
    zero = key.zero.reshape(rows, groups, case.dim).astype(jnp.float16)
    bias = jnp.einsum("rphd,rgd->rpgh", plain, zero, preferred_element_type=jnp.float32)
    # Codes of plane j are worth 2**(bits * j) units, which is divided out here.
    worth = 2.0 ** -(case.key.bits * jnp.arange(case.key.planes, dtype=jnp.float32))
    worth = jnp.repeat(worth, case.key.words).astype(jnp.float16)[None, None, None]
    # A copy by TMA is a multiple of 128 bytes.
    lanes = max(case.lanes, 32 * case.key.group // case.tile)
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (0, lanes - case.lanes)))
    return (
        start.astype(jnp.int32),
        end.astype(jnp.int32),
        (plain * worth).reshape(-1, case.lanes, case.dim),
        (bias * (case.scale * _LOG2E)).reshape(-1, groups, lanes),
        key.words.reshape(rows, case.slots, case.key.words),
        key.scale.reshape(rows, groups, case.dim),
        value.words.reshape(rows, -1, PAGE),
        value.scale.reshape(rows, -1, case.value_groups, PAGE),
        value.zero.reshape(rows, -1, case.value_groups, PAGE),
    )


@dataclasses.dataclass(frozen=True)
class _Block:
    """Neighbouring rows of a tile of values that share a page and a group, in one plane."""

    plane: int
    first: int  # of the 64 rows
    page: int
    group: int
    part: int  # which 64 rows of the plane


def _blocks(case: Case, tile: int) -> list[_Block]:
    """The blocks of rows [64 * tile, 64 * tile + 64) of a tile's words, of every plane."""
    words = case.value.words
    found = []
    for j in range(case.value.planes):
        for first in range(0, ROWS, min(ROWS, words, case.value.group)):
            page, channel = divmod(tile * ROWS + first, words)
            group = (j * words + channel) // case.value.group
            found.append(_Block(j, first, page, group, channel // ROWS))
    return found


def _partials(case: Case, *arrays: Array) -> tuple[Array, ...]:
    """(out, zero sums, max in powers of two, denom) of every (program, split)."""
    programs, splits, stages = arrays[2].shape[0], case.tuning.splits, case.tuning.stages
    key, value, tile, lanes = case.key, case.value, case.tile, case.lanes
    parts = max(1, value.words // ROWS)

    def staged(dtype: Any, *shape: int) -> Any:
        return plgpu.SMEM((stages, *shape), dtype)

    def operand(*shape: int, columns: int) -> Any:
        """A right operand, transposed: its minor axis is the one that is summed over."""
        transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
        return plgpu.SMEM(shape, jnp.float16, transforms=transforms)

    outputs = (
        (value.planes, parts, ROWS, lanes),
        (case.value_groups, lanes),
        (lanes,),
        (lanes,),
    )
    options: dict[str, Any] = {
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        )
    }
    if case.interpret:
        options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
    return plgpu.kernel(
        functools.partial(_attend_split, case),
        out_type=tuple(jax.ShapeDtypeStruct((programs, splits, *s), jnp.float32) for s in outputs),
        grid=(programs, splits),
        grid_names=("program", "split"),
        scratch_types={
            "kw": staged(jnp.uint8, tile, key.words),
            "ks": staged(arrays[5].dtype, tile // key.group, case.dim),
            "kb": staged(jnp.float32, tile // key.group, arrays[3].shape[2]),
            "vw": staged(jnp.uint8, case.tuning.pages * value.words, PAGE),
            "vs": staged(arrays[7].dtype, case.value_groups, case.tuning.pages, PAGE),
            "vz": staged(arrays[8].dtype, case.value_groups, case.tuning.pages, PAGE),
            "scaled_query": operand(tile // key.group * lanes, case.dim, columns=min(key.words, 64)),
            "scaled_weight": operand(case.value_groups, lanes, tile, columns=PAGE),
            "arrived": plgpu.Barrier(num_arrivals=4 + 2 * case.value_groups, num_barriers=stages),
        },
        **options,
    )(*arrays)


def _attend_split(
    case: Case,
    *refs: Any,
    scaled_query: Any,
    scaled_weight: Any,
    arrived: Any,
    **buffers: Any,
) -> None:
    """One program: the tiles of one split of one (row, KV head)."""
    start_ref, end_ref, q_ref, *tiled = refs[:9]
    out_ref, zero_ref, max_ref, denom_ref = refs[9:]
    kw, kb, vw, vs, vz, ks = (buffers[name] for name in ("kw", "kb", "vw", "vs", "vz", "ks"))
    key, value, tile, lanes, stages = case.key, case.value, case.tile, case.lanes, case.tuning.stages
    up = case.scale * _LOG2E / _UNIT  # from units to powers of two: what exp2 wants

    program, split = jax.lax.axis_index("program"), jax.lax.axis_index("split")
    row = program // (q_ref.shape[0] // start_ref.shape[0])
    store = program // (q_ref.shape[0] // tiled[1].shape[0])
    end = end_ref[row]
    start = jnp.maximum(jnp.maximum(start_ref[row], 0), end - case.slots)
    first_tile = start // tile
    last_tile = jnp.where(start < end, (end + tile - 1) // tile, first_tile)
    share = (last_tile - first_tile + case.tuning.splits - 1) // case.tuning.splits
    low = jnp.minimum(first_tile + split * share, last_tile)
    high = jnp.minimum(low + share, last_tile)

    def fetch(t: Array, stage: Array) -> None:
        """Start copying tile t, which is in the ring at its number modulo the number of tiles."""
        slot = jax.lax.rem(t, jnp.int32(case.tiles))
        for source, name, owner in zip(tiled, _TILED, (program, *[store] * 5), strict=True):
            rows, buffer = source.shape[1] // case.tiles, buffers[name].at[stage]
            part = source.at[owner, pl.ds(slot * rows, rows)]
            if len(source.shape) == 3:
                plgpu.copy_gmem_to_smem(part, buffer, arrived.at[stage])
            else:  # [pages, groups, tokens] becomes [groups, pages, tokens]
                for group in range(case.value_groups):
                    plgpu.copy_gmem_to_smem(part.at[:, group], buffer.at[group], arrived.at[stage])

    for ahead in range(stages):
        pl.when(low + ahead < high)(functools.partial(fetch, low + ahead, jnp.int32(ahead)))

    layout = _operand_layout(case.dim)
    query = _load(q_ref.at[program], layout)
    token = _token_index(case)

    def write_scaled_query(stage: Array) -> None:
        for group in range(tile // key.group):
            scale = _load(ks.at[stage, group], _operand_layout(case.dim).reduce(0)).astype(jnp.float16)
            rows = pl.ds(group * lanes, lanes)
            _store(
                scaled_query.at[rows], query * _broadcast(scale, query.shape, 1, _operand_layout(case.dim))
            )
        plgpu.commit_smem()

    def scores(t: Array, stage: Array) -> list[Array]:
        """Scores [64, lanes] in powers of two of every 64 tokens of tile t."""
        groups = max(1, ROWS // key.group)  # in 64 tokens
        found = []
        for block in range(tile // ROWS):
            words = _load(kw.at[stage, pl.ds(block * ROWS, ROWS)], _MATRIX)
            first = block * ROWS // key.group
            columns = pl.ds(first * lanes, groups * lanes)
            terms = [
                (_plane(words, j, key.bits), scaled_query.at[columns, pl.ds(j * key.words, key.words)])
                for j in range(key.planes)
            ]
            (units,) = _multiply(case, [_full((ROWS, groups * lanes), 0.0, _MATRIX)], [terms])
            score = _full((ROWS, lanes), 0.0, _MATRIX)
            for i in range(groups):
                bias = _load(kb.at[stage, first + i, :lanes], _HEADS)
                own = units[:, i * lanes : (i + 1) * lanes] * up + _broadcast(bias, (ROWS, lanes), 1)
                score = jnp.where(token >= i * key.group, own, score) if i else own
            at = token + (t * tile + block * ROWS)
            found.append(jnp.where((at >= start) & (at < end), score, NO_SCORE))
        return found

    def visit(t: Array, carry: Any) -> Any:
        """Fold tile t into the running (accumulators, zero sums, denominator, maximum)."""
        accumulators, zero_sums, denom, top = carry
        stage = jax.lax.rem(t - low, jnp.int32(stages))
        plgpu.barrier_wait(arrived.at[stage])
        write_scaled_query(stage)
        found = scores(t, stage)
        new_top = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, found), axis=0))
        fade = _broadcast(jnp.exp2(top - new_top), (ROWS, lanes), 1)
        accumulators, zero_sums = ([x * fade for x in xs] for xs in (accumulators, zero_sums))
        denom = denom * fade
        offset = _broadcast(new_top - _LIFT, (ROWS, lanes), 1)
        for block, score in enumerate(found):
            weight = jnp.exp2(score - offset)
            denom = denom + weight
            half = weight.astype(jnp.float16)
            for group in range(case.value_groups):
                zero, scale = (_load_tokens(case, part.at[stage, group], block) for part in (vz, vs))
                zero_sums[group] += weight * _broadcast(zero.astype(jnp.float32), weight.shape, 0)
                rows = scaled_weight.at[group, :, pl.ds(block * ROWS, ROWS)]
                _store(rows.transpose((1, 0)), half * _broadcast(scale.astype(jnp.float16), half.shape, 0))
        plgpu.commit_smem()
        for part in range(case.tuning.pages * value.words // ROWS):
            words = _load(vw.at[stage, pl.ds(part * ROWS, ROWS)], _MATRIX)
            codes = [_plane(words, j, value.bits) for j in range(value.planes)]
            terms: list[list[Any]] = [[] for _ in accumulators]
            for block in _blocks(case, part):
                operand = scaled_weight.at[block.group, :, pl.ds(block.page * PAGE, PAGE)]
                terms[at_block[block.plane, block.part, block.first]].append((codes[block.plane], operand))
            accumulators = _multiply(case, accumulators, terms)
        plgpu.commit_smem()  # until all warps have read the tile
        pl.when(t + stages < high)(functools.partial(fetch, t + stages, stage))
        return accumulators, zero_sums, denom, new_top

    parts = max(1, value.words // ROWS)
    blocks = [block for part in range(parts) for block in _blocks(case, part)]
    at_block = {(block.plane, block.part, block.first): i for i, block in enumerate(blocks)}
    nothing = _full((ROWS, lanes), 0.0, _MATRIX)
    carry = (
        [nothing for _ in blocks],
        [nothing for _ in range(case.value_groups)],
        nothing,
        _full((lanes,), NO_SCORE, _HEADS),
    )
    accumulators, zero_sums, denom, top = jax.lax.fori_loop(low, high, visit, carry)

    here = (program, split)
    for j in range(value.planes):
        for part in range(parts):
            out = nothing
            for block, accumulator in zip(blocks, accumulators, strict=True):
                if (block.plane, block.part) == (j, part):
                    out = jnp.where(token >= block.first, accumulator, out)
            _store(out_ref.at[(*here, j, part)], out * (2.0 ** -(value.bits * j + _LIFT) / _UNIT))
    for group, total in enumerate(zero_sums):
        _store(zero_ref.at[(*here, group)], jnp.sum(total, axis=0) * 2.0**-_LIFT)
    _store(max_ref.at[here], top)
    _store(denom_ref.at[here], jnp.sum(denom, axis=0) * 2.0**-_LIFT)


_MATRIX = plgpu.Layout.WGMMA  # of codes (with K minor) and of results
_HEADS = _MATRIX.reduce(0)
_TOKENS = _MATRIX.reduce(1)


def _operand_layout(columns: int) -> Any:
    """[lanes, columns]: a thread holds up to 16 neighbouring bytes of a row."""
    vector = min(8, columns // 16)
    tiling = plgpu.Tiling(((8, 16 * vector), (8, 4 * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def _load(ref: Any, layout: Any) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _store(ref: Any, x: Array) -> None:
    if hasattr(plgpu, "store"):  # from jax 0.12 on
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def _broadcast(x: Array, shape: tuple[int, ...], axis: int, layout: Any = _MATRIX) -> Array:
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (axis,)), layout)


def _full(shape: tuple[int, ...], number: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, number, jnp.float32), layout)


def _token_index(case: Case) -> Array:
    """[64, lanes]: the number of the row."""
    shape = (ROWS, case.lanes)
    if case.interpret:
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_MATRIX)


def _load_tokens(case: Case, ref: Any, block: int) -> Array:
    """The 64 numbers of a block's tokens, from [pages, 32]."""
    pages = ref.at[pl.ds(2 * block, 2)]
    return pages[...].reshape(ROWS) if case.interpret else _load(pages.reshape(ROWS), _TOKENS)


def _plane(words: Array, j: int, bits: int) -> Array:
    """The codes of plane j as float16 subnormals: each is worth 2**(bits * j) units."""
    mask = (2**bits - 1) << (bits * j)
    return jax.lax.bitcast_convert_type(words.astype(jnp.int16) & jnp.int16(mask), jnp.float16)


def _multiply(case: Case, totals: list[Array], terms: list[list[tuple[Array, Any]]]) -> list[Array]:
    """total + sum of codes @ operand.T for each total and its terms: all issued, then all awaited."""
    if case.interpret:  # whose wgmma takes no operand in registers
        return [
            functools.reduce(
                lambda sum, term: sum + jnp.dot(term[0], term[1][...].T, preferred_element_type=jnp.float32),
                products,
                total,
            )
            for total, products in zip(totals, terms, strict=True)
        ]

    def issue(refs: list[Any]) -> None:
        for ref, products in zip(refs, terms, strict=True):
            for codes, operand in products:
                plgpu.wgmma(ref, codes, operand.transpose((1, 0)))

    return pl.run_state(issue)([plgpu.ACC.init(total) for total in totals])


def _merge(
    case: Case, shape: tuple[int, ...], out: Array, zero: Array, top: Array, denom: Array
) -> AttentionPartial:
    """Combine the splits, and the pages that stood side by side in 64 rows."""
    programs = top.shape[0]
    highest = top.max(1)
    share = jnp.exp2(top - highest[:, None])  # [programs, splits, lanes]
    denom = (denom * share).sum(1)
    out = (out * share[:, :, None, None, None]).sum(1)
    rows = min(ROWS, case.value.words)
    out = out.reshape(programs, case.value.planes, -1, ROWS // rows, rows, case.lanes).sum(3)
    out = out.reshape(programs, case.dim, case.lanes)
    zero = jnp.repeat((zero * share[:, :, None]).sum(1), case.value.group, axis=1)
    out = (out + zero).swapaxes(1, 2)
    top = jnp.where(denom > 0, highest / _LOG2E, NO_SCORE)
    return AttentionPartial(
        out[:, : case.heads].reshape(shape),
        top[:, : case.heads].reshape(shape[:2]),
        denom[:, : case.heads].reshape(shape[:2]),
    )
