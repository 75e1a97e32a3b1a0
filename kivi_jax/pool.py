"""`TokenPool`: a bounded set of tokens, for a decoding phase of any length. Read `cache.py` next."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.buffers import Step, Tokens
from kivi_jax.selection import DecodeSelector, drop_lowest, drop_one
from pallas_kernels import partials
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.pytree import pytree, static


@pytree
class TokenPool:
    """Slots per row and KV head, each with the position of the token it holds, or -1.

    A new token takes a free slot of its head; after every step the selector says how many tokens stay,
    and slots of the others become free. Nothing is moved, gathered or concatenated, so a step costs the
    same however long the output is. Heads keep different tokens, but equally many.

    `weights` are the softmax weights that the newest query gave the slots, summed over the KV head's query
    heads; nothing is accumulated.

    Source: SCOPE (arXiv 2412.13649) section 4, with a slot overwritten in place of a gather.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    positions: Int[Array, "B K S"]
    weights: Float[Array, "B K S"]
    first: Int[Array, "B"]  # position of the row's first decoded token: the length of its prompt
    lengths: Int[Array, "B"]  # position of the next token
    held: Int[Array, "B"]  # tokens in the pool
    waited: Int[Array, "B"]  # the selector's counter
    selector: DecodeSelector = static()

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        lengths: Int[Array, "B"],
        *,
        selector: DecodeSelector,
        dtype: DTypeLike,
    ) -> "TokenPool":
        """No tokens, after prompts of the given lengths."""
        shape = (batch, kv_heads, selector.slots)
        tokens = jnp.zeros((*shape, head_dim), dtype)
        none = jnp.zeros_like(lengths)
        return cls(
            tokens, tokens, jnp.full(shape, -1), jnp.zeros(shape), lengths, lengths, none, none, selector
        )

    @classmethod
    def from_prompt(
        cls,
        key: Float[Array, "B K M H"],
        value: Float[Array, "B K M H"],
        positions: Int[Array, "B K M"],
        kept: Int[Array, "B"],
        lengths: Int[Array, "B"],
        *,
        selector: DecodeSelector,
    ) -> "TokenPool":
        """Hold the first `kept[b]` of the given tokens of each row: a unified selector's start."""
        batch, kv_heads, given, dim = key.shape
        pool = cls.empty(batch, kv_heads, dim, lengths, selector=selector, dtype=key.dtype)
        extra = selector.slots - given
        real = jnp.arange(given)[None, None] < kept[:, None, None]
        positions = jnp.where(real, positions, -1)

        def pad(tokens: Array) -> Array:
            return jnp.pad(tokens, ((0, 0), (0, 0), (0, extra), (0, 0)))

        return cls(
            pad(key),
            pad(value),
            jnp.pad(positions, ((0, 0), (0, 0), (0, extra)), constant_values=-1),
            pool.weights,
            lengths,
            lengths,
            kept,
            pool.waited,
            selector,
        )

    def attend(self, query: Float[Array, "B N H"]) -> AttentionPartial:
        """See `Segment`."""
        scale = query.shape[-1] ** -0.5
        return partials.attend(query, self.keys, self.values, self.positions >= 0, scale=scale)

    def append(self, step: Step) -> "TokenPool":
        """See `Segment`: the token takes a free slot of every head."""
        batch, kv_heads, slots = self.positions.shape
        weights = partials.attention_weights(
            step.query, self.keys, step.log_sum_exp, self.positions >= 0, scale=step.query.shape[-1] ** -0.5
        )
        free = jnp.argmin(self.positions, axis=-1)
        slot = jnp.where(step.active[:, None], free, slots)  # slots: nowhere
        row, head = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None]

        def put(store: Array, new: Array) -> Array:
            return store.at[row, head, slot].set(new.astype(store.dtype), mode="drop")

        count = step.active.astype(jnp.int32)
        return TokenPool(
            put(self.keys, step.key),
            put(self.values, step.value),
            put(self.positions, jnp.broadcast_to(self.lengths[:, None], (batch, kv_heads))),
            weights,
            self.first,
            self.lengths + count,
            self.held + count,
            self.waited,
            self.selector,
        )

    @classmethod
    def settle(cls, segments: Sequence["TokenPool"], active: Bool[Array, "B"]) -> tuple["TokenPool", ...]:
        """Free the slots of the tokens that the selector lets go.

        Selectors that let one go at a time need a minimum; the others sort, in the steps when they cut, under
        one conditional for all layers (on a GPU each would cost a synchronization).
        """
        pool = segments[0]
        stay, waited = pool.selector.target(pool.lengths - pool.first, pool.held, pool.waited)
        drop = jnp.where(active, pool.held - stay, 0)
        waited = jnp.where(active, waited, pool.waited)

        if pool.selector.cuts_many:

            def cut() -> tuple[Array, ...]:
                return tuple(drop_lowest(p.ranking(), p.positions, drop) for p in segments)

            def leave() -> tuple[Array, ...]:
                return tuple(p.positions for p in segments)

            positions = jax.lax.cond((drop > 0).any(), cut, leave)
        else:
            positions = tuple(drop_one(p.ranking(), p.positions, drop > 0) for p in segments)
        return tuple(
            TokenPool(
                p.keys, p.values, kept, p.weights, p.first, p.lengths, p.held - drop, waited, p.selector
            )
            for p, kept in zip(segments, positions, strict=True)
        )

    def ranking(self) -> Float[Array, "B K S"]:
        """Scores by which slots are let go, lowest first; infinite for the newest `recent` tokens."""
        newest = (self.lengths - self.selector.recent)[:, None, None]
        score = self.selector.score(self.weights, self.positions)
        return jnp.where(self.positions >= newest, jnp.inf, score)

    def materialize(self) -> Tokens:
        """See `Segment`."""
        return Tokens(self.keys, self.values, self.positions)
