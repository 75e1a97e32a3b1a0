"""What the Triton kernels share: the plan of a call, and its operands. Read `pallas_triton.py` first."""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import QuantizedTensor
from pallas_kernels.quantized_attention.tuning import Tuning, choose

TILE_ROWS = 16  # rows of the matrix unit's left operand
MIN_DEPTH = 32  # and its smallest inner size for operands loaded as bytes
MERGED_CHANNELS = 32  # channels that a program combines


@dataclasses.dataclass(frozen=True)
class Store:
    """What is static about the stored keys, or values."""

    bits: int
    group: int
    dim: int

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def words(self) -> int:
        """Bytes of a token."""
        return self.dim // self.planes

    @property
    def columns(self) -> int:
        """Words of a token, rounded up to the power of two that Triton asks of a block."""
        return pl.next_power_of_2(self.words)


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything static about one call, and the sizes that follow from it."""

    key: Store
    value: Store
    heads: int  # query heads of a program
    dim: int
    slots: int
    scale: float
    tuning: Tuning
    interpret: bool

    @property
    def lanes(self) -> int:
        """Query heads, rounded up to columns of the matrix unit."""
        return max(8, pl.next_power_of_2(self.heads))

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.tuning.pages * PAGE

    @property
    def tiles(self) -> int:
        """Tiles of the ring."""
        return self.slots // self.tile

    @property
    def fold(self) -> int:
        """Tokens side by side in a row of the key operand, where one token is too short for it."""
        return max(1, MIN_DEPTH // self.key.columns)

    @property
    def key_groups(self) -> int:
        """Groups of keys in a tile; a tile that is only part of a group has one."""
        return max(1, self.tile // self.key.group)

    @property
    def value_groups(self) -> int:
        """Groups of values in a token."""
        return self.dim // self.value.group

    @property
    def value_rows(self) -> int:
        """Rows of a block of values: as many channels of a plane as surely share their group."""
        shared = math.gcd(self.value.words, self.value.group)
        power = shared & -shared
        return power if power >= TILE_ROWS else self.value.columns

    @property
    def value_parts(self) -> tuple[tuple[int, int, int], ...]:
        """(plane, first row, group) of every accumulator.

        A block of rows has one accumulator for each group it touches: one, unless groups and planes
        do not divide each other (head_dim 96).
        """
        parts = []
        for row in range(0, self.value.words, self.value_rows):
            for j in range(self.value.planes):
                first = j * self.value.words + row
                last = j * self.value.words + min(row + self.value_rows, self.value.words) - 1
                groups = range(first // self.value.group, last // self.value.group + 1)
                parts.extend((j, row, group) for group in groups)
        return tuple(parts)


def plan(
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    scale: float,
    tuning: Tuning | None,
    interpret: bool,
) -> Case:
    """The static part of a call.

    Raises:
        NotImplementedError: the kernels have no blocks for a group or head size.
    """
    batch, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    rows, group = batch * kv_heads, heads // kv_heads
    bits = max(key.bits, value.bits)
    tuning = tuning or choose(
        rows=rows, slots=slots, heads=group, dim=dim, bits=bits, group_size=key.group_size
    )
    tuning = dataclasses.replace(tuning, pages=math.gcd(tuning.pages, slots // PAGE))
    case = Case(
        key=Store(key.bits, key.group_size, dim),
        value=Store(value.bits, value.group_size, dim),
        heads=max(n for n in range(1, tuning.heads + 1) if group % n == 0),
        dim=dim,
        slots=slots,
        scale=scale,
        tuning=tuning,
        interpret=interpret,
    )
    _check(case)
    return case


def operands(
    case: Case,
    query: Float[Array, "B N H"],
    key: QuantizedTensor,
    value: QuantizedTensor,
    start: Int[Array, "B"],
    end: Int[Array, "B"],
) -> tuple[Array, ...]:
    """The arrays a kernel reads, each with its rows in front.

    A program's row is its number divided by (programs / rows of the array).
    """
    rows = key.shape[0] * key.shape[1]
    key_groups = (rows, case.slots // max(case.tile, case.key.group), case.key_groups)
    pages = (rows, case.tiles, case.tuning.pages)
    return (
        start.astype(jnp.int32)[:, None],
        end.astype(jnp.int32)[:, None],
        # The axis of one is for an index that compilers do not know to be 0: `again` in `pallas_triton.py`.
        query.reshape(-1, 1, case.heads, case.dim).astype(jnp.float16),
        key.words.reshape(*pages, PAGE // case.fold, case.fold * case.key.words),
        key.scale.reshape(*key_groups, case.key.planes, case.key.words),
        key.zero.reshape(*key_groups, case.key.planes, case.key.words),
        value.words.reshape(*pages, case.value.words, PAGE),
        value.scale.reshape(*pages, case.value_groups, PAGE),
        value.zero.reshape(*pages, case.value_groups, PAGE),
    )


def _check(case: Case) -> None:
    """Refuse what the kernel has no blocks for."""
    words, group = min(case.key.words, case.value.words), case.key.group
    if words < TILE_ROWS:
        raise NotImplementedError(f"a token of {words} bytes is shorter than {TILE_ROWS}")
    if group % PAGE or group & (group - 1):
        raise NotImplementedError(f"keys in groups of {group}, no power of two from {PAGE} on")
    if case.value_groups >= TILE_ROWS:
        raise NotImplementedError(f"{case.value_groups} value groups for each token: {TILE_ROWS} or more")
