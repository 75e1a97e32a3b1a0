"""The kernels of `triton.py`: the algorithm that `pallas_triton.py` explains, in Triton's own language.

With `INTERPRET` the PTX is replaced by the same arithmetic in Triton's language, for Triton's interpreter
(TRITON_INTERPRET=1) on a CPU.
"""

# Triton's compiler, not Python, reads the kernels: it has no unpacking, its constants are objects, and a type
# checker's wrapper would hide the source.
# ruff: noqa: RUF005, SIM108
from typing import no_type_check

import triton
import triton.language as tl

PAGE = tl.constexpr(32)
TILE_ROWS = tl.constexpr(16)
UNIT = tl.constexpr(2.0**-24)
LIFT = tl.constexpr(8.0)
LOWEST = tl.constexpr(-1e20)
LN2 = tl.constexpr(0.6931471805599453)
NO_SCORE = tl.constexpr(-1e30)


@triton.constexpr_function
@no_type_check
def _and_with(mask):
    return f"and.b32 $0, $1, {mask * 0x10001};"


@triton.jit
@no_type_check
def _widen(words, INTERPRET: tl.constexpr):
    """Bytes as 16-bit words; what the upper byte holds is masked away by `_plane`."""
    if INTERPRET:
        halves = words.to(tl.int16)
    else:
        halves = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;",
            "=r,=r,r",
            [words],
            dtype=tl.int16,
            is_pure=True,
            pack=4,
        )
    return halves


@triton.jit
@no_type_check
def _plane(halves, MASK: tl.constexpr, INTERPRET: tl.constexpr):
    """The codes under `MASK` as float16 subnormals."""
    if INTERPRET:
        codes = (halves & MASK).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        codes = tl.inline_asm_elementwise(
            _and_with(MASK), "=r,r", [halves], dtype=tl.float16, is_pure=True, pack=2
        )
    return codes


@triton.jit
@no_type_check
def _exp2(x, INTERPRET: tl.constexpr):
    if INTERPRET:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
@no_type_check
def _halve(parts, N: tl.constexpr):
    new = ()
    for i in tl.static_range(N):
        pair = tl.reshape(parts[i], (2, parts[i].shape[0] // 2, parts[i].shape[1]))
        low, high = tl.split(tl.permute(pair, (1, 2, 0)))
        new = new + (low, high)
    return new


@triton.jit
@no_type_check
def _unstack(x, N: tl.constexpr):
    """The N <= 16 parts, N a power of two, of a matrix along its first axis."""
    parts = (x,)
    if N >= 2:
        parts = _halve(parts, 1)
    if N >= 4:
        parts = _halve(parts, 2)
    if N >= 8:
        parts = _halve(parts, 4)
    if N >= 16:
        parts = _halve(parts, 8)
    return parts


@triton.jit
@no_type_check
def _scores(
    t, slot, start, end, Q, KW, KS, KZ,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr, PAGES: tl.constexpr, MASKED: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Scores [32, LANES] of every page of tile t, in units."""
    PLANES: tl.constexpr = 8 // BITS
    DIM: tl.constexpr = PLANES * COLUMNS
    TILE: tl.constexpr = PAGES * PAGE
    GROUPS: tl.constexpr = TILE // GROUP if TILE > GROUP else 1
    REPEAT: tl.constexpr = TILE_ROWS // GROUPS if GROUPS < 2 else 8
    ROWS: tl.constexpr = PAGE // FOLD
    DEPTH: tl.constexpr = FOLD * COLUMNS
    again = tl.minimum(t, 0)  # always 0, but not provably: see `pallas_triton.py`
    lane = tl.arange(0, LANES)
    dim = tl.arange(0, DIM)
    depth = tl.arange(0, DEPTH)
    fold_lane = tl.arange(0, FOLD * LANES)
    plane_row = tl.arange(0, PLANES)
    column = tl.arange(0, COLUMNS)
    # Where several tokens lie side by side: block diagonal, each has lanes of its own.
    head = fold_lane % LANES
    own = (fold_lane // LANES)[:, None] == (depth // COLUMNS)[None, :]
    own = own & (head < HEADS)[:, None]
    query = ()
    for j in tl.static_range(PLANES):
        at = again * DIM + head[:, None] * DIM + (j * COLUMNS + depth % COLUMNS)[None, :]
        rows = tl.load(Q + at, mask=own, other=0.0)
        query = query + (tl.trans(rows) * (2.0 ** (-BITS * j)),)
    real = tl.broadcast_to((lane < HEADS)[:, None], (LANES, DIM))
    plain = tl.trans(tl.load(Q + again * DIM + lane[:, None] * DIM + dim[None, :], mask=real, other=0.0))
    first_group = slot * TILE // GROUP
    group = tl.arange(0, GROUPS)
    zero = tl.load(KZ + first_group * DIM + group[:, None] * DIM + dim[None, :]).to(tl.float16)
    zero = tl.reshape(tl.broadcast_to(tl.expand_dims(zero, 1), (GROUPS, REPEAT, DIM)), (GROUPS * REPEAT, DIM))
    biases = _unstack(tl.dot(zero, plain) * UNIT, GROUPS)
    found = ()
    for page in tl.static_range(PAGES):
        bias = tl.broadcast_to(
            tl.expand_dims(biases[page * GROUPS // PAGES], 0), (PAGE // REPEAT, REPEAT, LANES)
        )
        bias = tl.reshape(bias, (PAGE, LANES))
        at = first_group + page * GROUPS // PAGES
        scale = tl.load(KS + at * DIM + plane_row[:, None] * COLUMNS + column[None, :]).to(tl.float16)
        scales = _unstack(scale, PLANES)
        row = tl.arange(0, ROWS)
        at = (slot * PAGES + page) * (ROWS * DEPTH)
        words = _widen(tl.load(KW + at + row[:, None] * DEPTH + depth[None, :]), INTERPRET)
        if FOLD == 1:
            score = bias
        else:
            score = tl.zeros((ROWS, FOLD * LANES), tl.float32)
        for j in tl.static_range(PLANES):
            folded = tl.reshape(tl.broadcast_to(scales[j], (FOLD, COLUMNS)), (DEPTH,))
            codes = _plane(words, ((1 << BITS) - 1) << (BITS * j), INTERPRET)
            score = tl.dot(codes, query[j] * folded[:, None], score)
        if FOLD > 1:
            score = tl.reshape(score, (PAGE, LANES)) + bias
        if MASKED:
            token = t * TILE + page * PAGE + tl.arange(0, PAGE)
            score = tl.where(((token >= start) & (token < end))[:, None], score, LOWEST)
        found = found + (score,)
    return found


@triton.jit
@no_type_check
def _visit(
    t, lap, start, end, accumulators, sums, top, up, Q, KW, KS, KZ, VW, VS, VZ,
    KEY_BITS: tl.constexpr, KEY_COLUMNS: tl.constexpr, KEY_GROUP: tl.constexpr, FOLD: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    VALUE_ROWS: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr, PAGES: tl.constexpr,
    TILES: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Fold tile t into the running accumulators, sums over zeros and ones, and maximum."""
    PLANES: tl.constexpr = 8 // VALUE_BITS
    GROUPS: tl.constexpr = PLANES * VALUE_COLUMNS // VALUE_GROUP
    BLOCKS: tl.constexpr = VALUE_COLUMNS // VALUE_ROWS
    slot = t - lap
    slot = tl.where(slot >= TILES, slot - TILES, slot)
    found = _scores(
        t, slot, start, end, Q, KW, KS, KZ,
        KEY_BITS, KEY_COLUMNS, FOLD, KEY_GROUP, HEADS, LANES, PAGES, MASKED, INTERPRET,
    )  # fmt: skip
    highest = found[0]
    for page in tl.static_range(1, PAGES):
        highest = tl.maximum(highest, found[page])
    new_top = tl.maximum(top, tl.max(highest, 0))
    fade = _exp2((top - new_top) * up, INTERPRET)[None, :]
    faded = ()
    for i in tl.static_range(PLANES * BLOCKS):
        faded = faded + (accumulators[i] * fade,)
    accumulators = faded
    sums = sums * fade
    offset = (new_top * up - LIFT)[None, :]
    row16 = tl.arange(0, TILE_ROWS)
    lane32 = tl.arange(0, PAGE)
    group = tl.arange(0, GROUPS)
    for page in tl.static_range(PAGES):
        at = slot * PAGES + page
        weight = _exp2(found[page] * up - offset, INTERPRET).to(tl.float16)
        # Zeros of the groups, and below them a row of ones: the denominator.
        inside = tl.broadcast_to((row16 < GROUPS)[:, None], (TILE_ROWS, PAGE))
        first = at * (GROUPS * PAGE)
        zero = tl.load(VZ + first + row16[:, None] * PAGE + lane32[None, :], mask=inside, other=0.0)
        zero = tl.where((row16 == GROUPS)[:, None], 1.0, zero.to(tl.float16)).to(tl.float16)
        sums = tl.dot(zero, weight, sums)
        scale = tl.load(VS + first + group[:, None] * PAGE + lane32[None, :]).to(tl.float16)
        # All groups as one block, so that the weights change layout once: see `pallas_triton.py`.
        scaled = tl.broadcast_to(tl.expand_dims(weight, 0), (GROUPS, PAGE, LANES))
        scaled = scaled * tl.broadcast_to(tl.expand_dims(scale, 2), (GROUPS, PAGE, LANES))
        scaled = _unstack(tl.reshape(scaled, (GROUPS * PAGE, LANES)), GROUPS)
        new = ()
        for block in tl.static_range(BLOCKS):
            row = tl.arange(0, VALUE_ROWS)
            first = (at * VALUE_COLUMNS + block * VALUE_ROWS) * PAGE
            words = _widen(tl.load(VW + first + row[:, None] * PAGE + lane32[None, :]), INTERPRET)
            for j in tl.static_range(PLANES):
                codes = _plane(words, ((1 << VALUE_BITS) - 1) << (VALUE_BITS * j), INTERPRET)
                weights = scaled[(j * VALUE_COLUMNS + block * VALUE_ROWS) // VALUE_GROUP]
                new = new + (tl.dot(codes, weights, accumulators[block * PLANES + j]),)
        accumulators = new
    return accumulators, sums, new_top


@triton.jit
@no_type_check
def attend_split(
    START, END, Q, KW, KS, KZ, VW, VS, VZ, OUT, TOP, DENOM,
    UP: tl.constexpr, PER_ROW: tl.constexpr, PER_STORE: tl.constexpr, SPLITS: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr, DIM: tl.constexpr,
    PAGES: tl.constexpr, TILES: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_COLUMNS: tl.constexpr, KEY_GROUP: tl.constexpr, FOLD: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_COLUMNS: tl.constexpr, VALUE_GROUP: tl.constexpr,
    VALUE_ROWS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program: the tiles of one split of one (row, KV head)."""
    PLANES: tl.constexpr = 8 // VALUE_BITS
    GROUPS: tl.constexpr = DIM // VALUE_GROUP
    BLOCKS: tl.constexpr = VALUE_COLUMNS // VALUE_ROWS
    TILE: tl.constexpr = PAGES * PAGE
    SLOTS: tl.constexpr = TILES * TILE
    program = tl.program_id(0)
    split = tl.program_id(1)
    end = tl.load(END + program // PER_ROW)
    start = tl.maximum(tl.maximum(tl.load(START + program // PER_ROW), 0), end - SLOTS)
    first_tile = start // TILE
    last_tile = tl.where(start < end, (end + TILE - 1) // TILE, first_tile)
    share = (last_tile - first_tile + SPLITS - 1) // SPLITS
    low = first_tile + split * share
    high = tl.minimum(low + share, last_tile)
    lap = first_tile - first_tile % TILES

    store = (program // PER_STORE).to(tl.int64)
    query = program.to(tl.int64)
    Q += query * HEADS * DIM
    KW += store * SLOTS * KEY_COLUMNS
    KS += store * (SLOTS // KEY_GROUP) * DIM
    KZ += store * (SLOTS // KEY_GROUP) * DIM
    VW += store * SLOTS * VALUE_COLUMNS
    VS += store * SLOTS * GROUPS
    VZ += store * SLOTS * GROUPS

    accumulators = ()
    for _ in tl.static_range(PLANES * BLOCKS):
        accumulators = accumulators + (tl.zeros((VALUE_ROWS, LANES), tl.float32),)
    sums = tl.zeros((TILE_ROWS, LANES), tl.float32)
    top = tl.full((LANES,), LOWEST, tl.float32)
    # Whole tiles first, then the last one, then the first if it is ragged: see `pallas_triton.py`.
    skip = ((low == first_tile) & (start > first_tile * TILE) & (high > low)).to(tl.int32)
    whole = tl.maximum(low + skip, tl.minimum(high, end // TILE))
    for t in tl.range(low + skip, whole):
        accumulators, sums, top = _visit(
            t, lap, start, end, accumulators, sums, top, UP, Q, KW, KS, KZ, VW, VS, VZ,
            KEY_BITS, KEY_COLUMNS, KEY_GROUP, FOLD, VALUE_BITS, VALUE_COLUMNS, VALUE_GROUP, VALUE_ROWS,
            HEADS, LANES, PAGES, TILES, False, INTERPRET,
        )  # fmt: skip
    for i in tl.range(whole, tl.maximum(high, low) + skip):
        t = tl.where(i < high, i, low)
        accumulators, sums, top = _visit(
            t, lap, start, end, accumulators, sums, top, UP, Q, KW, KS, KZ, VW, VS, VZ,
            KEY_BITS, KEY_COLUMNS, KEY_GROUP, FOLD, VALUE_BITS, VALUE_COLUMNS, VALUE_GROUP, VALUE_ROWS,
            HEADS, LANES, PAGES, TILES, True, INTERPRET,
        )  # fmt: skip

    lane = tl.arange(0, LANES)
    row16 = tl.arange(0, TILE_ROWS)
    row = tl.arange(0, VALUE_ROWS)
    at = (query * SPLITS + split) * HEADS
    denom = tl.sum(tl.where((row16 == GROUPS)[:, None], sums, 0.0), 0) * 2.0**-8
    norm = 1 / tl.where(denom > 0, denom, 1.0)[None, :]
    for block in tl.static_range(BLOCKS):
        for j in tl.static_range(PLANES):
            group = (j * VALUE_COLUMNS + block * VALUE_ROWS) // VALUE_GROUP
            zero = tl.sum(tl.where((row16 == group)[:, None], sums, 0.0), 0)
            out = (
                accumulators[block * PLANES + j] * (2.0 ** (24 - 8 - VALUE_BITS * j))
                + (zero * 2.0**-8)[None, :]
            )
            channel = j * VALUE_COLUMNS + block * VALUE_ROWS + row
            written = tl.broadcast_to((lane < HEADS)[:, None], (LANES, VALUE_ROWS))
            out = tl.trans((out * norm).to(tl.float16))
            tl.store(OUT + (at + lane[:, None]) * DIM + channel[None, :], out, mask=written)
    tl.store(TOP + at + lane, top * UP, mask=lane < HEADS)
    tl.store(DENOM + at + lane, denom, mask=lane < HEADS)


@triton.jit
@no_type_check
def merge_splits(
    OUT, TOP, DENOM, OUT_MERGED, TOP_MERGED, DENOM_MERGED,
    SPLITS: tl.constexpr, EVERY: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    CHANNELS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program: CHANNELS of a query head. EVERY is SPLITS rounded up to a power of two."""
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, EVERY)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    at = program * SPLITS * HEADS + head + split * HEADS
    present = split < SPLITS
    mask = present[:, None] & (channel < DIM)[None, :]
    tops = tl.load(TOP + at, mask=present, other=float("-inf"))
    denoms = tl.load(DENOM + at, mask=present, other=0.0)
    outs = tl.load(OUT + at[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    highest = tl.max(tops, 0)
    weights = denoms * _exp2(tops - highest, INTERPRET)
    denom = tl.sum(weights, 0)
    merged = program * HEADS + head
    out = tl.sum(outs.to(tl.float32) * weights[:, None], 0)
    tl.store(OUT_MERGED + merged * DIM + channel, out, mask=channel < DIM)
    tl.store(TOP_MERGED + merged, tl.where(denom > 0, highest * LN2, NO_SCORE))
    tl.store(DENOM_MERGED + merged, denom)
