"""Combining the splits of `pallas_triton.py`, and attending to what is not packed, in one launch.

A split's normalized result is a value, and its log-sum-exp the score that this value has: merging is
attention over one token per split and head, of which a query head sees those of its own. So splits and the
residual's tokens go through the same online softmax, as products on the matrix unit. What is written is
normalized. The query's own token comes last and completes the attention: then it is in the type that a
layer goes on with.

A program serves all query heads of a KV head, so that the residual is read once. With few rows that would
leave most of the GPU idle: there, programs first share the channels, and then the heads.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels import online_softmax
from pallas_kernels.online_softmax import LOG2E, ROWS, Running
from pallas_kernels.partials import NO_SCORE, AttentionPartial
from pallas_kernels.quantized_attention.split_kv import MERGED_CHANNELS, Case
from pallas_kernels.residual.ring import Ring, Token
from pallas_kernels.triton_call import triton_call

_ENOUGH = 256  # programs, about two for each multiprocessor
_MOST_KEYS = 128  # of which a program multiplies all channels at a time
_NUMBERS = 8192  # of a block of values: what the threads of a program hold at a time


class _Others(NamedTuple):
    """What is attended to beside the splits, and by what: arrays, or references to them."""

    query: Any
    residual: tuple[Any, Any] | None  # keys and values
    limits: tuple[Any, Any] | None  # of the residual: start and lengths
    own: tuple[Any, Any] | None  # key and value


class _Share(NamedTuple):
    """What a program computes."""

    heads: int
    channels: int


def merge(
    case: Case,
    splits: tuple[Array, Array, Array],
    query: Float[Array, "B N H"],
    residual: Ring | None,
    own: Token | None,
    start: Int[Array, "B"],
) -> AttentionPartial:
    """The partial of every query head, from those of its splits, the residual and the query's own token."""
    programs, parts = splits[0].shape[:2]

    def by_head(keys: Array, values: Array) -> tuple[Array, Array]:
        return keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])

    def by_row(number: Array) -> Array:
        return number.astype(jnp.int32)[:, None]

    operands = (
        [x.reshape(programs, parts * case.heads, *x.shape[3:]) for x in splits],
        _Others(
            query.reshape(programs, case.heads, case.dim),
            None if residual is None else by_head(residual.keys, residual.values),
            None if residual is None else (by_row(start), by_row(residual.lengths)),
            None if own is None else by_head(*own),
        ),
    )
    share = _share(case, programs)

    def of_program(array: Any) -> pl.BlockSpec:
        own, every = array.shape[1:], programs // array.shape[0]
        return pl.BlockSpec((None, *own), lambda i, *_: (jax.lax.div(i, every), *(0 for _ in own)))

    number = jax.ShapeDtypeStruct((programs, case.heads), jnp.float32)
    dtype = jnp.float32 if own is None else own.value.dtype
    outputs = [jax.ShapeDtypeStruct((*number.shape, case.dim), dtype), number]
    out, top = triton_call(
        functools.partial(_merge, case, share, 0 if residual is None else residual.sinks),
        name="quantized_attention_merge",
        grid=(programs, -(-case.heads // share.heads), -(-case.dim // share.channels)),
        in_specs=jax.tree.map(of_program, operands),
        out_specs=[of_program(shape) for shape in outputs],
        out_shape=outputs,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=case.interpret,
    )(*operands)
    heads = query.shape[:2]
    return AttentionPartial(out.reshape(query.shape), top.reshape(heads), jnp.ones(heads))


def _share(case: Case, programs: int) -> _Share:
    channels = pl.next_power_of_2(case.dim)
    if programs < _ENOUGH:
        channels = MERGED_CHANNELS
    most = case.heads * programs * -(-case.dim // channels) // _ENOUGH
    heads = max((n for n in range(1, min(most, case.heads) + 1) if case.heads % n == 0), default=1)
    return _Share(heads, channels)


def _block(share: _Share, tokens: int) -> int:
    """Tokens that are attended to at a time."""
    return min(_NUMBERS // share.channels, max(ROWS, pl.next_power_of_2(tokens)))


def _merge(
    case: Case, share: _Share, sinks: int, splits: Any, others: _Others, out_ref: Any, max_ref: Any
) -> None:
    """One program: some channels of some query heads of one (row, KV head)."""
    row = jnp.arange(ROWS, dtype=jnp.int32)
    first = pl.program_id(1) * share.heads
    head = first + row
    channel = pl.program_id(2) * share.channels + jnp.arange(share.channels, dtype=jnp.int32)
    real, inside = (row < share.heads) & (head < case.heads), channel < case.dim
    every = jnp.arange(max(ROWS, pl.next_power_of_2(case.dim)), dtype=jnp.int32)
    # What is needed last is asked for first: nothing after a barrier starts before it, not even a load.
    query = online_softmax.load_rows(others.query, head, real, every)
    own = None if others.own is None else _load_own(case, others.own, every, channel)
    running = _fold_splits(case, share, first, head, channel, splits)
    if others.residual is not None:
        running = _fold_residual(case, share, sinks, running, query, channel, others)
    if own is not None:
        running = _fold_own(case, running, query, *own)
    seen = running.denom > 0
    denom = jnp.where(seen, running.denom, 1.0)
    out = running.out / denom[:, None]
    top = (running.top + online_softmax.log2(denom, case.interpret)) / LOG2E
    mask = real[:, None] & inside[None, :]
    plt.store(out_ref.at[head[:, None], channel[None, :]], out.astype(out_ref.dtype), mask=mask)
    # The same from every program that shares the channels.
    plt.store(max_ref.at[head], jnp.where(seen, top, NO_SCORE), mask=real)


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
    query: Array,
    channel: Array,
    others: _Others,
) -> Running:
    """The last `sinks` slots hold tokens -sinks to -1, before those of the ring (see `Ring`)."""
    assert others.residual is not None
    assert others.limits is not None
    key_ref, value_ref = others.residual
    ring, every = key_ref.shape[0] - sinks, jnp.arange(query.shape[1], dtype=jnp.int32)
    query = query.astype(key_ref.dtype)
    start, end = (ref[0] for ref in others.limits)
    end -= sinks

    def fold(running: Running, first: int, tokens: int, token_in: Callable[[Array], Array]) -> Running:
        """Slots first .. first + tokens - 1, of which slot s holds the token `token_in(s)`."""
        block = min(_MOST_KEYS, _block(share, tokens))

        def visit(i: Array, running: Running) -> Running:
            slot = first + i * block + jnp.arange(block, dtype=jnp.int32)
            present = slot < first + tokens
            key = online_softmax.load_rows(key_ref, slot, present, every)
            value = online_softmax.load_rows(value_ref, slot, present, channel)
            token = token_in(slot)
            seen = present & (token >= start) & (token < end)
            score = online_softmax.dot(query, key, trans_b=True) * (case.scale * LOG2E)
            score = jnp.where(seen[None, :], score, NO_SCORE)
            return online_softmax.fold(running, score, value, interpret=case.interpret)

        return jax.lax.fori_loop(0, -(-tokens // block), visit, running)

    def newest(slot: Array) -> Array:
        """No token where it would be one of the first."""
        last = jnp.maximum(end, 0) - 1
        token = last - jax.lax.rem(last - slot + ring, jnp.full_like(slot, ring))
        return jnp.where(token >= 0, token, end)

    running = fold(running, 0, ring, newest)
    return fold(running, ring, sinks, lambda slot: slot - (ring + sinks)) if sinks else running


def _load_own(case: Case, refs: tuple[Any, Any], every: Array, channel: Array) -> list[Array]:
    """The own token's key, and these channels of its value."""
    return [
        plt.load(ref.at[at], mask=at < case.dim, other=jnp.zeros(at.shape, ref.dtype))
        for ref, at in zip(refs, (every, channel), strict=True)
    ]


def _fold_own(case: Case, running: Running, query: Array, key: Array, value: Array) -> Running:
    # Only now: as float32 they would be held across the loops, and spill.
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    score = jnp.sum(query.astype(jnp.float32) * key[None, :], axis=1) * (case.scale * LOG2E)
    return online_softmax.fold_one(running, score, value, interpret=case.interpret)
