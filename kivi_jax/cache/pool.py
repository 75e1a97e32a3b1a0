"""`TokenPool`: a bounded set of tokens, for a decoding phase of any length. Read `stores.py` next."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.decode_selectors import DecodeSelector, Slots, drop_lowest, drop_one
from kivi_jax.cache.segments import Step, Tokens
from kivi_jax.cache.stores import DenseStore, Given, PackedStore, Place, PoolQuantization, TokenStore
from kivi_jax.mesh import add_replicas
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
        given: Given,
        lengths: Int[Array, "B"],
        *,
        selector: DecodeSelector,
        packing: PoolQuantization | None = None,
        rotates: bool = True,
        layer: Int[Array, ""] | int = 0,
    ) -> "TokenPool":
        """A pool after prompts of the given lengths, with some of their tokens, of each head as many.

        With `packing` all but the newest are packed: those that the selector never drops. `rotates`: see
        `PackedStore`.
        """
        if packing is None:
            store, positions = DenseStore.of(given, selector.slots)
        else:
            newest = max(selector.recent, 1)
            store, positions = PackedStore.of(
                given,
                # Of a prompt, the newest may be missing.
                selector.slots if selector.unified else selector.slots - newest,
                packing,
                lengths=lengths,
                newest=newest,
                rotates=rotates,
            )
        held = (positions[:, 0] >= 0).sum(1, dtype=lengths.dtype)
        return cls(
            store,
            positions,
            jnp.zeros(positions.shape, jnp.float32),
            jnp.zeros(positions.shape, jnp.float32) if selector.remembers else None,
            lengths,
            lengths,
            held,
            jnp.zeros_like(held),
            jnp.full_like(held, layer),
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
        """See `Segment`: the token takes a slot of every head."""
        weights, memory, place = self._weights(step), self.memory, self._place(step.active)
        if memory is not None:
            known = jnp.where(self.positions >= 0, memory, 0)
            known = jnp.where(step.active[:, None, None], self.selector.remember(known, weights), known)
            memory = place.put(known, self.selector.first_memory(step.value))
        if place.moved is not None and self.selector.weighs:
            weights = place.put(weights, jnp.zeros(place.slot.shape, jnp.float32))
        count = step.active.astype(jnp.int32)
        return dataclasses.replace(
            self,
            store=self.store.put(place, step.key, step.value),
            positions=place.put(self.positions, jnp.broadcast_to(self.lengths[:, None], place.slot.shape)),
            weights=weights,
            memory=memory,
            lengths=self.lengths + count,
            held=self.held + count,
        )

    def _place(self, active: Bool[Array, "B"]) -> Place:
        """Where a token of active rows goes: to a free slot, or into a ring, whose oldest then needs one."""
        (batch, kv_heads, slots), newest = self.positions.shape, self.store.newest
        free = jnp.argmin(self.positions[..., : slots - newest], axis=-1)
        if not newest:
            return Place(jnp.where(active[:, None], free, slots))
        slot = jnp.where(active, slots - newest + self.lengths % newest, slots)
        place = Place(jnp.broadcast_to(slot[:, None], (batch, kv_heads)))
        leaves = active[:, None] & (place.get(self.positions) >= 0)
        return place._replace(moved=jnp.where(leaves, free, slots))

    def _weights(self, step: Step) -> Float[Array, "B K S"]:
        if not self.selector.weighs:
            return self.weights
        keys, _ = self.store.read()
        query, seen = self._asked(step.query)
        scale = step.query.shape[-1] ** -0.5
        return add_replicas(partials.attention_weights(query, keys, step.log_sum_exp, seen, scale=scale))

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
