"""A decoding step of a pool whose slots are reused, on NVIDIA GPUs: two kernels where XLA launches a dozen.

    attend_slots   keys, values, positions    -> attention's partial, and the slots' scores
    take_slot      scores, log-sum-exp        -> weights, the token in a free slot, the slot that becomes free

The scores go through memory, so that keys are read once: of a slot, `take_slot` reads a number for each query
head and the position. A program of it has all slots of a (row, KV head); it writes keys and values in place.

Few rows are few programs, so the slots of a head are shared among several of `attend_slots`. XLA merges what
they found where it merges a layer's segments anyway.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import online_softmax, partials
from pallas_kernels.online_softmax import LOG2E, ROWS, Running
from pallas_kernels.partials import NO_SCORE, AttentionPartial
from pallas_kernels.triton_call import triton_call

_BYTES = 16384  # of a block of keys, and of one of values: what the threads of a program hold at a time
_MOST_SCORES = 128  # of a query head at a time
_MOST_SHARES = 8  # of a head's slots: each is one more partial to merge
_MOST_SLOTS = 16384  # of `take_slot`, a program's
_LATEST = jnp.iinfo(jnp.int32).max


class _Shape(NamedTuple):
    """What is static about a call of `attend_slots`."""

    heads: int  # query heads of a KV head
    dim: int
    slots: int
    item_bytes: int
    scale: float
    interpret: bool

    @property
    def channels(self) -> int:
        """A block's, which Triton wants to be a power of two."""
        return max(ROWS, pl.next_power_of_2(self.dim))

    @property
    def block(self) -> int:
        """Slots that are attended to at a time."""
        held = _BYTES // (self.item_bytes * self.channels)
        return max(ROWS, min(held, _MOST_SCORES, pl.next_power_of_2(self.slots)))

    @property
    def share(self) -> int:
        """Slots of a program, whole blocks."""
        blocks = pl.cdiv(self.slots, self.block)
        return pl.cdiv(blocks, _MOST_SHARES) * self.block


# Compiled code of its own, so that a call with the same arguments is the same code: then XLA does it once.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def attend_slots(
    query: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions: Int[Array, "B K S"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[AttentionPartial, Float[Array, "B K G S"]]:
    """Attention over the slots that hold a token, whose position is not negative, and the scores of all.

    Raises:
        NotImplementedError: more query heads for a KV head than the kernel has rows for.
    """
    batch, kv_heads, slots, dim = keys.shape
    shape = _Shape(query.shape[1] // kv_heads, dim, slots, keys.dtype.itemsize, scale, interpret)
    if shape.heads > ROWS:
        raise NotImplementedError(f"{shape.heads} query heads for a KV head: more than {ROWS}")
    shares = pl.cdiv(slots, shape.share)

    def of_share(*own: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        spec = pl.BlockSpec((None, None, None, *own), lambda row, head, i: (i, row, head, *(0 for _ in own)))
        return spec, jax.ShapeDtypeStruct((shares, batch, kv_heads, *own), jnp.float32)

    score = jax.ShapeDtypeStruct((batch, kv_heads, shape.heads, slots), jnp.float32)
    operands = (query.reshape(batch, kv_heads, shape.heads, dim), keys, values, positions)
    out_specs, outputs = zip(
        of_share(shape.heads, dim), of_share(shape.heads), of_share(shape.heads), strict=True
    )
    *found, scores = triton_call(
        functools.partial(_attend_slots, shape),
        name="attend_slots",
        grid=(batch, kv_heads, shares),
        in_specs=[_of_head(x) for x in operands],
        out_specs=[*out_specs, _of_head(score)],
        out_shape=[*outputs, score],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(*operands)
    out, top, denom = (x.reshape(shares, batch, query.shape[1], *x.shape[4:]) for x in found)
    shared = (AttentionPartial(out[i], top[i], denom[i]) for i in range(shares))
    return partials.merge(*shared), scores


def take_slot(
    scores: Float[Array, "B K G S"],
    log_sum_exp: Float[Array, "B N"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    positions: Int[Array, "B K S"],
    key: Float[Array, "B K H"],
    value: Float[Array, "B K H"],
    lengths: Int[Array, "B"],
    active: Bool[Array, "B"],
    limit: Int[Array, "B"],
    *,
    recent: int,
    interpret: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Keys, values, positions and weights after a token of active rows has taken each head's first free slot.

    Its position is `lengths`. If a head then holds more than `limit`, the slot of the token that weighs least
    becomes free: none of the newest `recent`, and of equals the older. Weights are those of the query that
    these are the `scores` of, over all that it attended to; summed over a KV head's query heads.

    Raises:
        NotImplementedError: more slots than a program can hold.
    """
    batch, kv_heads, heads, slots = scores.shape
    if slots > _MOST_SLOTS:
        raise NotImplementedError(f"{slots} slots for a KV head: more than {_MOST_SLOTS}")
    of_row = [x.astype(jnp.int32) for x in (lengths, active, limit)]
    of_head = [
        scores,
        log_sum_exp.reshape(batch, kv_heads, heads),
        key.astype(keys.dtype),
        value.astype(values.dtype),
    ]
    held = [keys, values, positions]
    operands = (*of_row, *of_head, *held)
    outputs = [*held, jax.ShapeDtypeStruct(positions.shape, jnp.float32)]
    return tuple(
        triton_call(
            functools.partial(_take_slot, recent, interpret),
            name="take_slot",
            grid=(batch, kv_heads),
            in_specs=[
                *(pl.BlockSpec((1,), lambda row, _: (row,)) for _ in of_row),
                *(_of_head(x) for x in (*of_head, *held)),
            ],
            out_specs=[_of_head(x) for x in outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
            input_output_aliases={len(operands) - len(held) + i: i for i in range(len(held))},
            compiler_params=plt.CompilerParams(num_warps=_warps(slots), num_stages=1),
            interpret=interpret,
        )(*operands)
    )


def _of_head(x: Any) -> pl.BlockSpec:
    """What of [B, K, ...] is a program's, whose first two numbers are the row and the KV head."""
    rest = x.shape[2:]
    return pl.BlockSpec((None, None, *rest), lambda row, head, *_: (row, head, *(0 for _ in rest)))


def _attend_slots(
    shape: _Shape, query_ref: Any, key_ref: Any, value_ref: Any, position_ref: Any, *refs: Any
) -> None:
    """One program: a share of the slots of one (row, KV head)."""
    out_ref, top_ref, denom_ref, score_ref = refs
    head, channel = (jnp.arange(n, dtype=jnp.int32) for n in (ROWS, shape.channels))
    real = head < shape.heads
    query = online_softmax.load_rows(query_ref, head, real, channel).astype(key_ref.dtype)
    first = pl.program_id(2) * shape.share

    def visit(i: Any, running: Running) -> Running:
        slot = first + i * shape.block + jnp.arange(shape.block, dtype=jnp.int32)
        present = slot < shape.slots
        key = online_softmax.load_rows(key_ref, slot, present, channel)
        value = online_softmax.load_rows(value_ref, slot, present, channel)
        position = plt.load(position_ref.at[slot], mask=present, other=jnp.full_like(slot, -1))
        score = online_softmax.dot(query, key, trans_b=True) * shape.scale
        score = jnp.where((position >= 0)[None, :], score, NO_SCORE)
        plt.store(score_ref.at[head[:, None], slot[None, :]], score, mask=real[:, None] & present[None, :])
        return online_softmax.fold(running, score * LOG2E, value, interpret=shape.interpret)

    running = jax.lax.fori_loop(0, shape.share // shape.block, visit, online_softmax.nothing(shape.channels))
    mask = real[:, None] & (channel < shape.dim)[None, :]
    plt.store(out_ref.at[head[:, None], channel[None, :]], running.out, mask=mask)
    top = online_softmax.highest(running)
    plt.store(top_ref.at[head], jnp.where(top > NO_SCORE, top / LOG2E, NO_SCORE), mask=real)
    plt.store(denom_ref.at[head], running.denom, mask=real)


def _take_slot(
    recent: int, interpret: bool, length_ref: Any, active_ref: Any, limit_ref: Any, *refs: Any
) -> None:
    """One program: all slots of one (row, KV head).

    Everything is read before anything is decided, so that memory's latency is waited for once.
    """
    score_ref, norm_ref, new_key_ref, new_value_ref, _, _, position_ref = refs[:7]
    key_ref, value_ref, kept_ref, weight_ref = refs[7:]
    (heads, slots), dim = score_ref.shape, key_ref.shape[1]
    slot, channel = (jnp.arange(pl.next_power_of_2(n), dtype=jnp.int32) for n in (slots, dim))
    present, inside = slot < slots, channel < dim
    length, active, limit = length_ref[0], active_ref[0] != 0, limit_ref[0]
    position = plt.load(position_ref.at[slot], mask=present, other=jnp.full_like(slot, _LATEST))
    key, value = (
        plt.load(ref.at[channel], mask=inside, other=jnp.zeros(channel.shape, ref.dtype))
        for ref in (new_key_ref, new_value_ref)
    )
    weight = jnp.zeros(slot.shape, jnp.float32)
    for i in range(heads):
        score = plt.load(score_ref.at[i, slot], mask=present, other=jnp.full_like(weight, NO_SCORE))
        weight += online_softmax.exp2((score - norm_ref[i]) * LOG2E, interpret)
    plt.store(weight_ref.at[slot], weight, mask=present)

    free = jnp.min(jnp.where(position < 0, slot, _LATEST))
    at, joins = (jnp.full_like(channel, free), channel), active & (free < slots)
    plt.store(key_ref.at[at], key, mask=inside & joins)
    plt.store(value_ref.at[at], value, mask=inside & joins)
    position = jnp.where((slot == free) & joins, length, position)

    held = jnp.sum((present & (position >= 0)).astype(jnp.int32))
    may_go = (position >= 0) & (position <= length - recent)  # where slots are only padding, later than all
    lightest = jnp.min(jnp.where(may_go, weight, jnp.inf))
    oldest = jnp.min(jnp.where(may_go & (weight == lightest), position, _LATEST))
    goes = active & (held > limit) & (position == oldest)
    plt.store(kept_ref.at[slot], jnp.where(goes, -1, position), mask=present)


def _warps(slots: int) -> int:
    """Of a program that has so many slots, of which a thread holds eight, or more if these are too many."""
    return min(8, max(1, pl.next_power_of_2(slots) // 256))
