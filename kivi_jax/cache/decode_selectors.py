"""Which tokens of a decoding phase stay. Read `unified_selectors.py` next.

A *decode selector* is a frozen value that says after each step how many tokens may stay in the pool; those
that score lowest under the newest query go. The newest `recent` tokens always stay, and of equals the newer
one does.

Source: SCOPE (arXiv 2412.13649) section 4.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.prompt_selectors import check_sizes
from kivi_jax.checks import whole


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

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """How many of the `held` tokens stay after decode step `step` (from 1), and the new `waited`.

        `waited` starts at 0 and is the selector's to count with.
        """
        del step
        return jnp.minimum(held, self.bound), waited

    def score(self, weights: Float[Array, "B K S"], positions: Int[Array, "B K S"]) -> Float[Array, "B K S"]:
        """What ranks a slot: the newest query's softmax weight, summed over the KV head's query heads."""
        del positions
        return weights


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

    def grown(self, step: Int[Array, "B"]) -> Int[Array, "B"]:
        """The window at decode step `step`."""
        return jnp.minimum(self.recent + (step - 1) // self.delta, self.window)

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """See `DecodeSelector`."""
        return jnp.minimum(held, self.grown(step)), waited


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
        window = self.grown(step)
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
