"""Combining the splits of `pallas_triton.py`, and attending to the residual meanwhile, in one launch.

A split's normalized result is a value, and its log-sum-exp the score that this value has: merging is
attention over one token per split and head, of which a query head sees those of its own. So splits and the
residual's tokens go through the same online softmax, as products on the matrix unit.

A program serves all query heads of a KV head, so that the residual is read once. With few rows that would
leave most of the GPU idle: there, programs first share the channels, and then the heads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import online_softmax
from pallas_kernels.online_softmax import ROWS, Running
from pallas_kernels.partials import NO_SCORE
from pallas_kernels.quantized_attention.split_kv import LOG2E, MERGED_CHANNELS, Case, power_of_two
from pallas_kernels.residual.ring import Ring
from pallas_kernels.triton_call import triton_call

_ENOUGH = 256  # programs, about two for each multiprocessor
_MOST_KEYS = 128  # of which a program multiplies all channels at a time
_NUMBERS = 8192  # of a block of values: what the threads of a program hold at a time


class _Share(NamedTuple):
    """What a program computes."""

    heads: int
    channels: int


def merge(
    case: Case,
    splits: tuple[Array, Array, Array],
    query: Float[Array, "B N H"],
    residual: Ring | None,
    start: Int[Array, "B"],
) -> tuple[Array, Array, Array]:
    """(out, max, denom) of every query head, from those of its splits and from the residual."""
    programs, parts = splits[0].shape[:2]
    rest = [x.reshape(programs, parts * case.heads, *x.shape[3:]) for x in splits]
    if residual is not None:
        rows = residual.keys.shape[0] * residual.keys.shape[1]
        rest += [query.reshape(programs, case.heads, case.dim)]
        rest += [x.reshape(rows, *x.shape[2:]) for x in (residual.keys, residual.values)]
        rest += [x.astype(jnp.int32)[:, None] for x in (start, residual.end)]
    share = _share(case, programs)

    def of_program(array: Any) -> pl.BlockSpec:
        own, every = array.shape[1:], programs // array.shape[0]
        return pl.BlockSpec((None, *own), lambda i, *_: (jax.lax.div(i, every), *(0 for _ in own)))

    outputs = [
        jax.ShapeDtypeStruct((programs, case.heads, *own), jnp.float32) for own in ((case.dim,), (), ())
    ]
    return triton_call(
        functools.partial(_merge, case, share, 0 if residual is None else residual.sinks),
        name="quantized_attention_merge",
        grid=(programs, -(-case.heads // share.heads), -(-case.dim // share.channels)),
        in_specs=[of_program(array) for array in rest],
        out_specs=[of_program(shape) for shape in outputs],
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=case.interpret,
    )(*rest)


def _share(case: Case, programs: int) -> _Share:
    channels = power_of_two(case.dim)
    if programs < _ENOUGH:
        channels = MERGED_CHANNELS
    heads = case.heads if programs * -(-case.dim // channels) >= _ENOUGH else 1
    return _Share(heads, channels)


def _block(share: _Share, tokens: int) -> int:
    """Tokens that are attended to at a time."""
    return min(_NUMBERS // share.channels, max(ROWS, power_of_two(tokens)))


def _merge(
    case: Case, share: _Share, sinks: int, out_ref: Any, top_ref: Any, denom_ref: Any, *refs: Any
) -> None:
    """One program: some channels of some query heads of one (row, KV head)."""
    *recent, merged_ref, merged_top_ref, merged_denom_ref = refs
    row = jnp.arange(ROWS, dtype=jnp.int32)
    first = pl.program_id(1) * share.heads
    head = first + row
    channel = pl.program_id(2) * share.channels + jnp.arange(share.channels, dtype=jnp.int32)
    real, inside = (row < share.heads) & (head < case.heads), channel < case.dim
    running = _fold_splits(case, share, first, head, channel, (out_ref, top_ref, denom_ref))
    if recent:
        running = _fold_residual(case, share, sinks, running, head, real, channel, recent)
    mask = real[:, None] & inside[None, :]
    plt.store(merged_ref.at[head[:, None], channel[None, :]], running.out, mask=mask)
    # The same from every program that shares the channels.
    top = online_softmax.highest(running)
    plt.store(merged_top_ref.at[head], jnp.where(top > NO_SCORE, top / LOG2E, NO_SCORE), mask=real)
    plt.store(merged_denom_ref.at[head], running.denom, mask=real)


def _fold_splits(case: Case, share: _Share, first: Array, head: Array, channel: Array, refs: Any) -> Running:
    out_ref, top_ref, denom_ref = refs
    tokens = case.tuning.splits * share.heads
    block = _block(share, tokens)

    def visit(i: Array, running: Running) -> Running:
        token = i * block + jnp.arange(block, dtype=jnp.int32)
        every = jnp.full_like(token, share.heads)
        of_head = first + jax.lax.rem(token, every)
        at = jax.lax.div(token, every) * case.heads + of_head
        present = token < tokens
        lowest = jnp.full(token.shape, NO_SCORE, jnp.float32)
        top = plt.load(top_ref.at[at], mask=present, other=lowest)
        denom = plt.load(denom_ref.at[at], mask=present, other=jnp.zeros_like(lowest))
        mask = present[:, None] & (channel < case.dim)[None, :]
        nothing = jnp.zeros(mask.shape, out_ref.dtype)
        value = plt.load(out_ref.at[at[:, None], channel[None, :]], mask=mask, other=nothing)
        score = jnp.where(denom > 0, top + online_softmax.log2(denom, case.interpret), NO_SCORE)
        score = jnp.where(head[:, None] == of_head[None, :], score[None, :], NO_SCORE)
        return online_softmax.fold(running, score, value, interpret=case.interpret)

    return jax.lax.fori_loop(0, -(-tokens // block), visit, online_softmax.nothing(share.channels))


def _fold_residual(
    case: Case,
    share: _Share,
    sinks: int,
    running: Running,
    head: Array,
    real: Array,
    channel: Array,
    refs: Any,
) -> Running:
    """The last `sinks` slots hold tokens -sinks to -1, before those of the ring (see `Ring`)."""
    query_ref, key_ref, value_ref, start_ref, end_ref = refs
    slots, dims = key_ref.shape[0], max(ROWS, power_of_two(case.dim))
    block = min(_MOST_KEYS, _block(share, slots))
    query = online_softmax.load_rows(query_ref, head, real, dims).astype(key_ref.dtype)
    start, last, ring = start_ref[0], end_ref[0] - 1, slots - sinks
    newest = jnp.maximum(last, -1)  # in the ring, which is empty while the sinks fill

    def visit(i: Array, running: Running) -> Running:
        slot = i * block + jnp.arange(block, dtype=jnp.int32)
        present = slot < slots
        key = online_softmax.load_rows(key_ref, slot, present, dims)
        mask = present[:, None] & (channel < case.dim)[None, :]
        nothing = jnp.zeros(mask.shape, value_ref.dtype)
        value = plt.load(value_ref.at[slot[:, None], channel[None, :]], mask=mask, other=nothing)
        token = newest - jax.lax.rem(newest - slot + ring, jnp.full_like(slot, ring))
        token = jnp.where(slot < ring, token, slot - slots)
        lowest = jnp.where(slot < ring, jnp.maximum(start, 0), start)
        seen = present & (token >= lowest) & (token <= last)
        score = online_softmax.dot(query, key, trans_b=True) * (case.scale * LOG2E)
        score = jnp.where(seen[None, :], score, NO_SCORE)
        return online_softmax.fold(running, score, value, interpret=case.interpret)

    return jax.lax.fori_loop(0, -(-slots // block), visit, running)
