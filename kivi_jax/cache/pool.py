"""`TokenPool`: a bounded set of tokens, for a decoding phase of any length. Read `stores.py` next."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.decode_selectors import DecodeSelector, Slots, drop_lowest, drop_one
from kivi_jax.cache.segments import Step, Tokens
from kivi_jax.cache.stores import DenseStore, Given, PackedStore, Place, PoolQuantization, TokenStore
from kivi_jax.mesh import add_replicas, has_replicas
from pallas_kernels import partials
from pallas_kernels.dispatch import by_kernel_or_xla
from pallas_kernels.partials import AttentionPartial
from pallas_kernels.pytree import pytree, static

_KERNELS = "pallas_kernels.pool.kernel"  # imported where there is a GPU for them


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
        return cls(
            store,
            positions,
            jnp.zeros(positions.shape, jnp.float32),
            jnp.zeros(positions.shape, jnp.float32) if selector.remembers else None,
            lengths,
            lengths,
            jnp.zeros_like(lengths),
            jnp.full_like(lengths, layer),
            selector,
        )

    @property
    def held(self) -> Int[Array, "B"]:
        """How many tokens of a row are in the pool: of every head as many."""
        return (self.positions[:, 0] >= 0).sum(1, dtype=jnp.int32)

    def attend(self, query: Float[Array, "B N H"]) -> AttentionPartial:
        """See `Segment`."""
        return self._attend(query)[0]

    def _attend(self, query: Float[Array, "B N H"]) -> tuple[AttentionPartial, Float[Array, "B K G S"]]:
        """Attention and the slots' scores. `append` asks the same again: XLA computes it once."""
        (keys, values), scale = self.store.read(), query.shape[-1] ** -0.5

        def by_xla() -> tuple[AttentionPartial, Array]:
            # The barrier hides that other segments are asked the same query: XLA:GPU would make one product
            # of both, and copy all of their keys side by side for it, in every step.
            turned, positions = jax.lax.optimization_barrier((self.store.turn(query), self.positions))
            seen = positions >= 0
            attended = partials.attend(turned, keys, values, seen, scale=scale)
            return attended, partials.scores(turned, keys, seen, scale=scale)

        if not isinstance(self.store, DenseStore):
            return by_xla()
        return by_kernel_or_xla(
            "attend_slots",
            _KERNELS,
            lambda kernels: kernels.attend_slots(query, keys, values, self.positions, scale=scale),
            by_xla,
        )

    def append(self, step: Step) -> "TokenPool":
        """See `Segment`: the token takes a slot of every head.

        Selectors that let one token go at a time need a minimum, and have it here; for others see `settle`.
        """
        counted = dataclasses.replace(self, lengths=self.lengths + step.active.astype(jnp.int32))

        def by_xla() -> "TokenPool":
            joined = counted._join(step, self.lengths)
            if self.selector.cuts_many:
                return joined
            drop, waited = joined._due(step.active)
            kept = drop_one(joined.ranking(), joined.positions, drop > 0)
            return dataclasses.replace(joined, positions=kept, waited=waited)

        if not isinstance(self.store, DenseStore) or not self.selector.is_plain or has_replicas():
            return by_xla()
        return by_kernel_or_xla(
            "take_slot", _KERNELS, lambda kernels: counted._take_slot(kernels, step, self.lengths), by_xla
        )

    def _take_slot(self, kernels: Any, step: Step, position: Int[Array, "B"]) -> "TokenPool":
        """The pool after the token at `position` has joined, and another has left if these were too many."""
        assert isinstance(self.store, DenseStore)
        keys, values, positions, weights = kernels.take_slot(
            self._attend(step.query)[1],
            step.log_sum_exp,
            self.store.keys,
            self.store.values,
            self.positions,
            step.key,
            step.value,
            position,
            step.active,  # where there are scores, what is overwritten has been read
            self.selector.limit(self.lengths - self.first),
            recent=self.selector.recent,
        )
        return dataclasses.replace(self, store=DenseStore(keys, values), positions=positions, weights=weights)

    def _join(self, step: Step, position: Int[Array, "B"]) -> "TokenPool":
        """The pool after the token at `position` has taken a slot of every head."""
        may_write = step.may_write
        weights, memory, place = self._weights(step), self.memory, self._place(may_write, position)
        if memory is not None:
            known = jnp.where(self.positions >= 0, memory, 0)
            known = jnp.where(may_write[:, None, None], self.selector.remember(known, weights), known)
            memory = place.put(known, self.selector.first_memory(step.value))
        if place.moved is not None and self.selector.weighs:
            weights = place.put(weights, jnp.zeros(place.slot.shape, jnp.float32))
        return dataclasses.replace(
            self,
            store=self.store.put(place, step.key, step.value),
            positions=place.put(self.positions, jnp.broadcast_to(position[:, None], place.slot.shape)),
            weights=weights,
            memory=memory,
        )

    def _place(self, active: Bool[Array, "B"], position: Int[Array, "B"]) -> Place:
        """Where a token of active rows goes: to a free slot, or into a ring, whose oldest then needs one."""
        (batch, kv_heads, slots), newest = self.positions.shape, self.store.newest
        free = jnp.argmin(self.positions[..., : slots - newest], axis=-1)
        if not newest:
            return Place(jnp.where(active[:, None], free, slots))
        slot = jnp.where(active, slots - newest + position % newest, slots)
        place = Place(jnp.broadcast_to(slot[:, None], (batch, kv_heads)))
        leaves = active[:, None] & (place.get(self.positions) >= 0)
        return place._replace(moved=jnp.where(leaves, free, slots))

    def _weights(self, step: Step) -> Float[Array, "B K S"]:
        if not self.selector.weighs:
            return self.weights
        scores = self._attend(step.query)[1]
        return add_replicas(partials.attention_weights(scores, step.log_sum_exp))

    def _due(self, active: Bool[Array, "B"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """How many tokens of active rows, which have just appended, go now; and the new `waited`."""
        stay, waited = self.selector.target(self.lengths - self.first, self.held, self.waited)
        return jnp.where(active, self.held - stay, 0), jnp.where(active, waited, self.waited)

    @classmethod
    def settle(cls, segments: Sequence["TokenPool"], active: Bool[Array, "B"]) -> tuple["TokenPool", ...]:
        """Free the slots of the tokens that the selector lets go, if it may be many at a time.

        That takes sorting, in the steps when something goes, under one conditional for all layers (on a GPU
        each would cost a synchronization).
        """
        if not segments[0].selector.cuts_many:
            return tuple(segments)
        drop, waited = segments[0]._due(active)

        def cut() -> tuple[Array, ...]:
            return tuple(drop_lowest(p.ranking(), p.positions, drop) for p in segments)

        def leave() -> tuple[Array, ...]:
            return tuple(p.positions for p in segments)

        positions = jax.lax.cond((drop > 0).any(), cut, leave)
        return tuple(
            dataclasses.replace(p, positions=kept, waited=waited)
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
