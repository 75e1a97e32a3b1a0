"""`TokenPool`: a bounded set of tokens, for a decoding phase of any length. Read `stores.py` next."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.decode_selectors import DecodeSelector, Slots, drop_lowest, drop_one
from kivi_jax.cache.segments import Step, Tokens
from kivi_jax.cache.stores import TokenStore
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
    heads; nothing is accumulated, unless a selector keeps a `memory`.

    Source: SCOPE (arXiv 2412.13649) section 4, with a slot overwritten in place of a gather.
    """

    store: TokenStore
    positions: Int[Array, "B K S"]
    weights: Float[Array, "B K S"]
    memory: Float[Array, "B K S"] | None
    first: Int[Array, "B"]  # position of the row's first decoded token: the length of its prompt
    lengths: Int[Array, "B"]  # position of the next token
    held: Int[Array, "B"]  # tokens in the pool
    waited: Int[Array, "B"]  # the selector's counter
    layer: Int[Array, "B"]  # its number, by which draws differ; not static, so that layers are shaped alike
    selector: DecodeSelector = static()

    @classmethod
    def of(
        cls,
        store: TokenStore,
        positions: Int[Array, "B K M"],
        kept: Int[Array, "B"],
        lengths: Int[Array, "B"],
        *,
        selector: DecodeSelector,
        layer: int = 0,
    ) -> "TokenPool":
        """A pool after prompts of the given lengths.

        The first M slots of `store` hold tokens, of which `kept[b]` count; M and `kept` are 0 but for a
        unified selector, under which the prompt's tokens compete, too.
        """
        batch, kv_heads, given = positions.shape
        slots = store.read()[0].shape[2]
        real = jnp.arange(given)[None, None] < kept[:, None, None]
        padding = ((0, 0), (0, 0), (0, slots - given))
        return cls(
            store,
            jnp.pad(jnp.where(real, positions, -1), padding, constant_values=-1),
            jnp.zeros((batch, kv_heads, slots), jnp.float32),
            jnp.zeros((batch, kv_heads, slots), jnp.float32) if selector.remembers else None,
            lengths,
            lengths,
            kept,
            jnp.zeros_like(kept),
            jnp.full_like(kept, layer),
            selector,
        )

    def attend(self, query: Float[Array, "B N H"]) -> AttentionPartial:
        """See `Segment`."""
        keys, values = self.store.read()
        turned, seen = self._asked(query)
        return partials.attend(turned, keys, values, seen, scale=query.shape[-1] ** -0.5)

    def _asked(self, query: Float[Array, "B N H"]) -> tuple[Float[Array, "B N H"], Bool[Array, "B K S"]]:
        """The query in the basis of the keys, and the slots that it may see.

        The barrier hides that other segments are asked the same query: XLA:GPU would make one product of
        both, and copy all of their keys side by side for it, in every step.
        """
        query, positions = jax.lax.optimization_barrier((self.store.turn(query), self.positions))
        return query, positions >= 0

    def append(self, step: Step) -> "TokenPool":
        """See `Segment`: the token takes a free slot of every head."""
        weights, memory = self._weights(step), self.memory
        batch, kv_heads, slots = self.positions.shape
        free = jnp.argmin(self.positions, axis=-1)
        slot = jnp.where(step.active[:, None], free, slots)  # slots: nowhere
        row, head = jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None]
        position = jnp.broadcast_to(self.lengths[:, None], (batch, kv_heads))
        count = step.active.astype(jnp.int32)
        if memory is not None:
            known = jnp.where(self.positions >= 0, memory, 0)
            known = jnp.where(step.active[:, None, None], self.selector.remember(known, weights), known)
            memory = known.at[row, head, slot].set(self.selector.first_memory(step.value), mode="drop")
        return dataclasses.replace(
            self,
            store=self.store.put(slot, step.key, step.value),
            positions=self.positions.at[row, head, slot].set(position, mode="drop"),
            weights=weights,
            memory=memory,
            lengths=self.lengths + count,
            held=self.held + count,
        )

    def _weights(self, step: Step) -> Float[Array, "B K S"]:
        if not self.selector.weighs:
            return self.weights
        keys, _ = self.store.read()
        query, seen = self._asked(step.query)
        scale = step.query.shape[-1] ** -0.5
        return partials.attention_weights(query, keys, step.log_sum_exp, seen, scale=scale)

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

        def cut() -> tuple[Array, ...]:
            return tuple(drop_lowest(p.ranking(), p.positions, drop) for p in segments)

        def leave() -> tuple[Array, ...]:
            return tuple(p.positions for p in segments)

        if pool.selector.cuts_many:
            positions = jax.lax.cond((drop > 0).any(), cut, leave)
        else:
            positions = tuple(drop_one(p.ranking(), p.positions, drop > 0) for p in segments)
        return tuple(
            dataclasses.replace(p, positions=kept, held=p.held - drop, waited=waited)
            for p, kept in zip(segments, positions, strict=True)
        )

    def ranking(self) -> Float[Array, "B K S"]:
        """Scores by which slots are let go, lowest first; infinite for the newest `recent` tokens."""
        newest = (self.lengths - self.selector.recent)[:, None, None]
        score = self.selector.score(Slots(self.positions, self.weights, self.memory, self.layer))
        return jnp.where(self.positions >= newest, jnp.inf, score)

    def grow(self, tokens: int) -> "TokenPool":
        """See `Segment`: the bound is the selector's, and there is always room."""
        del tokens
        return self

    def materialize(self) -> Tokens:
        """See `Segment`; keys in the basis they are held in."""
        return Tokens(*self.store.read(), self.positions)
