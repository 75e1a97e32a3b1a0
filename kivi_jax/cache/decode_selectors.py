"""Which tokens of a decoding phase stay. Read `unified_selectors.py` next.

A *decode selector* is a frozen value that says after each step how many tokens may stay in the pool; those
that score lowest under the newest query go. The newest `recent` tokens always stay, and of equals the newer
one does.

Source: SCOPE (arXiv 2412.13649) section 4.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from kivi_jax.cache.prompt_selectors import check_sizes
from kivi_jax.checks import real, whole
from kivi_jax.mesh import first_kv_head


class Slots(NamedTuple):
    """What a pool knows of its slots."""

    positions: Int[Array, "B K S"]  # -1: empty
    weights: Float[Array, "B K S"]  # of the newest query, zeros if none are needed
    memory: Float[Array, "B K S"] | None  # what the selector keeps of each
    layer: Int[Array, "B"]


class DecodeSelector(ABC):
    """Bounds the pool of a decoding phase: says how many tokens stay after a step, and which."""

    recent: int

    @property
    @abstractmethod
    def bound(self) -> int:
        """The most tokens that ever stay after a step."""

    @property
    def unified(self) -> bool:
        """Whether the pool holds the prompt, too, so that both compete for one budget."""
        return False

    @property
    def cuts_many(self) -> bool:
        """Whether more than one token may have to go after a step."""
        return False

    @property
    def slots(self) -> int:
        """The most tokens the pool ever holds, which is before a step's dropping."""
        return self.bound + 1

    def limit(self, step: Int[Array, "B"]) -> Int[Array, "B"]:
        """The most tokens that stay after decode step `step` (from 1)."""
        return jnp.full_like(step, self.bound)

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """How many of the `held` tokens stay after decode step `step`, and the new `waited`.

        `waited` starts at 0 and is the selector's to count with.
        """
        return jnp.minimum(held, self.limit(step)), waited

    @property
    def weighs(self) -> bool:
        """Whether `score` or `remember` look at weights; without, a step does not compute them."""
        return True

    @property
    def remembers(self) -> bool:
        """Whether the pool has a `memory`."""
        return False

    def first_memory(self, value: Float[Array, "B K H"]) -> Float[Array, "B K"]:
        """What is remembered of a token that joins."""
        return jnp.zeros(value.shape[:2], jnp.float32)

    def remember(
        self, memory: Float[Array, "B K S"], weights: Float[Array, "B K S"]
    ) -> Float[Array, "B K S"]:
        """The memory after a step."""
        del weights
        return memory

    def score(self, slots: Slots) -> Float[Array, "B K S"]:
        """What ranks a slot: the newest query's softmax weight, summed over the KV head's query heads."""
        return slots.weights

    @property
    def is_plain(self) -> bool:
        """Whether only `limit` and the weights say who goes: then a kernel finds it, in the step itself."""
        own, plain = type(self), DecodeSelector
        return own.score is plain.score and own.target is plain.target and self.weighs and not self.remembers


@dataclass(frozen=True, kw_only=True)
class Slide(DecodeSelector):
    """SCOPE's slide: of the decoded tokens, the heaviest `window - recent` and the last `recent`.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < window.
    """

    window: int = 512
    recent: int = 256

    def __post_init__(self) -> None:  # noqa: D105
        check_sizes("recent", self.recent, "window", self.window)

    @property
    def bound(self) -> int:
        """See `DecodeSelector`."""
        return self.window


@dataclass(frozen=True, kw_only=True)
class Random(Slide):
    """Of the decoded tokens a random `window - recent`, and the last `recent`: the control, and the cheapest.

    Every head of every layer draws for itself, so that what one forgets others keep. With a `block` above 1,
    so many neighbouring tokens share a draw. A token's draw is a hash of its position: what stays is a
    uniform sample of all that was decoded, the same in any batch. No weights are computed.

    Raises:
        ValueError: see `Slide`; or `block` is not positive.

    Source: Random Attention (arXiv 2609.03430).
    """

    block: int = 1
    seed: int = 0

    def __post_init__(self) -> None:  # noqa: D105
        super().__post_init__()
        whole("seed", self.seed)
        if whole("block", self.block) < 1:
            raise ValueError(f"block={self.block} must be positive: tokens that share a draw")

    @property
    def weighs(self) -> bool:
        """See `DecodeSelector`."""
        return False

    def score(self, slots: Slots) -> Float[Array, "B K S"]:
        """See `DecodeSelector`."""
        heads = slots.positions.shape[1]
        head = (first_kv_head(heads) + jnp.arange(heads)).astype(jnp.uint32)[None, :, None]
        block = (slots.positions // self.block).astype(jnp.uint32)
        seed = _mix(jnp.uint32(self.seed % 2**32))
        layer = _mix(seed + slots.layer.astype(jnp.uint32))[:, None, None]
        return _uniform(_mix(_mix(layer + head) + block))


@dataclass(frozen=True, kw_only=True)
class GKV(Slide):
    """Slide with a memory: a token's score is max(decay * its score, its weight / the largest weight).

    Raises:
        ValueError: see `Slide`; or `decay` is not between 0 and 1.

    Source: G-KV (arXiv 2512.00504); its decay is 0.8.
    """

    decay: float = 0.8

    def __post_init__(self) -> None:  # noqa: D105
        super().__post_init__()
        if not 0 <= real("decay", self.decay) <= 1:
            raise ValueError(f"decay={self.decay} must be from 0 (no memory) to 1 (nothing fades)")

    @property
    def remembers(self) -> bool:
        """See `DecodeSelector`."""
        return True

    def remember(
        self, memory: Float[Array, "B K S"], weights: Float[Array, "B K S"]
    ) -> Float[Array, "B K S"]:
        """See `DecodeSelector`."""
        largest = jnp.maximum(weights.max(-1, keepdims=True), jnp.finfo(weights.dtype).tiny)
        return jnp.maximum(self.decay * memory, weights / largest)

    def score(self, slots: Slots) -> Float[Array, "B K S"]:
        """See `DecodeSelector`."""
        assert slots.memory is not None
        return slots.memory


@dataclass(frozen=True, kw_only=True)
class VaSE(Slide):
    """Slide that also keeps the `reserve` tokens whose values have the widest range over channels.

    Raises:
        ValueError: see `Slide`; or the reserve is not positive, or more than window - recent.

    Source: VaSE (arXiv 2606.03928), which reserves a quarter of the window, and draws among the others.
    """

    reserve: int = 128

    def __post_init__(self) -> None:  # noqa: D105
        super().__post_init__()
        if not 0 < whole("reserve", self.reserve) <= self.window - self.recent:
            raise ValueError(
                f"reserve={self.reserve} must be from 1 to window - recent = {self.window - self.recent}"
            )

    @property
    def remembers(self) -> bool:
        """See `DecodeSelector`."""
        return True

    def first_memory(self, value: Float[Array, "B K H"]) -> Float[Array, "B K"]:
        """See `DecodeSelector`: the range of a value."""
        return (value.max(-1) - value.min(-1)).astype(jnp.float32)

    def score(self, slots: Slots) -> Float[Array, "B K S"]:
        """See `DecodeSelector`."""
        assert slots.memory is not None
        widest = jax.lax.top_k(jnp.where(slots.positions >= 0, slots.memory, -jnp.inf), self.reserve)[1]
        slot = jnp.arange(slots.positions.shape[2], dtype=widest.dtype)[None, None, None]
        reserved = (widest[..., None] == slot).any(2)
        return jnp.where(reserved, jnp.inf, slots.weights)


def _mix(x: UInt32[Array, "*B"]) -> UInt32[Array, "*B"]:
    """MurmurHash3's finalizer: every bit of `x` changes every other with a chance of one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _uniform(x: UInt32[Array, "*B"]) -> Float[Array, "*B"]:
    """From 0 to 1, as many steps as a float32 has."""
    return (x >> 8).astype(jnp.float32) * 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Adaptive(DecodeSelector):
    """SCOPE's adaptive: slide with a window that grows from `recent` to `window` over the generation.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < window <= max_new_tokens.
    """

    window: int = 512
    recent: int = 256
    max_new_tokens: int

    def __post_init__(self) -> None:  # noqa: D105
        check_sizes("recent", self.recent, "window", self.window)
        if whole("max_new_tokens", self.max_new_tokens) < self.window:
            raise ValueError(f"{self.max_new_tokens=} must be at least {self.window=}: use Slide otherwise")

    @property
    def delta(self) -> int:
        """Steps between two growths of the window by one token."""
        return (self.max_new_tokens - self.recent) // (self.window - self.recent)

    @property
    def bound(self) -> int:
        """See `DecodeSelector`."""
        return self.window

    def limit(self, step: Int[Array, "B"]) -> Int[Array, "B"]:
        """See `DecodeSelector`: the window at decode step `step`."""
        return jnp.minimum(self.recent + (step - 1) // self.delta, self.window)


@dataclass(frozen=True, kw_only=True)
class Discontinuous(Adaptive):
    """SCOPE's discontinuous: adaptive, but the pool is cut only at every (delta + 1)-th step that is due."""

    @property
    def cuts_many(self) -> bool:
        """See `DecodeSelector`."""
        return True

    @property
    def slots(self) -> int:
        """See `DecodeSelector`: between two cuts delta more tokens come."""
        return self.window + self.delta + 1

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """See `DecodeSelector`."""
        window = self.limit(step)
        due = held >= window
        cut = due & (waited == self.delta)
        waited = jnp.where(cut, 0, waited + due.astype(waited.dtype))
        return jnp.where(cut, jnp.minimum(held, window), held), waited


def drop_lowest(
    score: Float[Array, "B K S"],
    positions: Int[Array, "B K S"],
    count: Int[Array, "B"],
) -> Int[Array, "B K S"]:
    """`positions` with -1 for the `count[b]` tokens of every head that score lowest, of equals the older.

    Slots with an infinite score and empty slots (position -1) are never chosen.
    """
    droppable = (positions >= 0) & (score < jnp.inf)
    # Ascending by score, then by position; slots that stay come last.
    order = jnp.lexsort((positions, jnp.where(droppable, score, jnp.inf)), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(droppable & (rank < count[:, None, None]), -1, positions)


def drop_one(
    score: Float[Array, "B K S"], positions: Int[Array, "B K S"], drop: Bool[Array, "B"]
) -> Int[Array, "B K S"]:
    """`drop_lowest` of one token in rows where `drop` is true, without sorting."""
    droppable = (positions >= 0) & (score < jnp.inf)
    lowest = jnp.where(droppable, score, jnp.inf).min(-1, keepdims=True)
    tied = droppable & (score == lowest)
    oldest = jnp.where(tied, positions, jnp.iinfo(positions.dtype).max).min(-1, keepdims=True)
    return jnp.where(tied & (positions == oldest) & drop[:, None, None], -1, positions)
