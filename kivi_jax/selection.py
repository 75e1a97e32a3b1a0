"""Which tokens are kept: of the prompt once, and of what is generated at every step. Read `cache.py` next.

Selectors are frozen values. A *prompt selector* sees, per KV head, how much softmax weight the last
`observed` queries of the prompt gave to each token, and names the tokens to store. A *decode selector* says
after each step how many tokens may stay in the pool; those that score lowest under the newest query go.
The newest `recent` tokens always stay, and of equals the newer one does. Budgets are tokens per row.

Source: SCOPE (arXiv 2412.13649) sections 3 and 4; H2O (2306.14048); SnapKV (2404.14469);
PyramidKV (2406.02069); PyramidInfer (2405.12532); StreamingLLM (2309.17453).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

ALL_QUERIES = -1  # of `PromptSelector.observed`


class PromptSelector(ABC):
    """Chooses the tokens of a prompt that are stored. Runs once per layer, before storage."""

    budget: int

    def keeps_all(self, width: int) -> bool:
        """Whether every prompt of up to `width` tokens is kept whole, so that nothing need be selected."""
        return width <= self.budget

    @property
    def observed(self) -> int:
        """Of how many of the last queries the weights are summed: 0 for none, or `ALL_QUERIES`."""
        return 0

    @abstractmethod
    def most(self, layer: int, layers: int, width: int) -> int:
        """The most tokens that layer number `layer` of `layers` keeps of a prompt of up to `width`."""

    @abstractmethod
    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """Kept positions, ascending, M = `most(layer, layers, P)`; and how many of them count per row.

        `weights` are zeros if none are observed.
        """


class DecodeSelector(ABC):
    """Bounds the pool of a decoding phase: says how many tokens stay after a step, and which."""

    recent: int

    @property
    def unified(self) -> bool:
        """Whether the pool holds the prompt, too, so that both compete for one budget."""
        return False

    @property
    def cuts_many(self) -> bool:
        """Whether more than one token may have to go after a step."""
        return False

    @property
    @abstractmethod
    def slots(self) -> int:
        """The most tokens the pool ever holds, which is before a step's dropping."""

    @abstractmethod
    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """How many of the `held` tokens stay after decode step `step` (from 1), and the new `waited`.

        `waited` starts at 0 and is the selector's to count with.
        """

    def score(self, weights: Float[Array, "B K S"], positions: Int[Array, "B K S"]) -> Float[Array, "B K S"]:
        """What ranks a slot: the newest query's softmax weight, summed over the KV head's query heads."""
        del positions
        return weights


@dataclass(frozen=True, kw_only=True)
class KeepAll(PromptSelector):
    """Every token of the prompt; as `decode=`, every decoded token, in a cache that grows to capacity."""

    def keeps_all(self, width: int) -> bool:
        """See `PromptSelector`."""
        del width
        return True

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        del layer, layers
        return width

    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """See `PromptSelector`."""
        del layer, layers
        return jnp.broadcast_to(jnp.arange(weights.shape[2]), weights.shape), lengths


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(PromptSelector, DecodeSelector):
    """The first `sinks` and the last `recent` tokens; as `decode=`, of prompt and output together.

    Raises:
        ValueError: `sinks` is negative or `recent` is not positive.
    """

    sinks: int = 4
    recent: int

    def __post_init__(self) -> None:  # noqa: D105
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(f"{self.sinks=} must not be negative, and {self.recent=} must be positive")

    @property
    def kept(self) -> int:
        """Tokens kept in all."""
        return self.sinks + self.recent

    def keeps_all(self, width: int) -> bool:
        """See `PromptSelector`."""
        return width <= self.kept

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        del layer, layers
        return min(self.kept, width)

    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """See `PromptSelector`."""
        score = jnp.where(jnp.arange(weights.shape[2]) < self.sinks, 1.0, 0.0)
        score = jnp.broadcast_to(score, weights.shape)
        most = self.most(layer, layers, weights.shape[2])
        return keep_best(score, lengths, jnp.minimum(lengths, self.kept), recent=self.recent, most=most)

    @property
    def unified(self) -> bool:
        """See `DecodeSelector`."""
        return True

    @property
    def slots(self) -> int:
        """See `DecodeSelector`."""
        return self.kept + 1

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """See `DecodeSelector`."""
        del step
        return jnp.minimum(held, self.kept), waited

    def score(self, weights: Float[Array, "B K S"], positions: Int[Array, "B K S"]) -> Float[Array, "B K S"]:
        """Sinks stay, the oldest of the others goes: positions instead of weights."""
        del weights
        return jnp.where(positions < self.sinks, jnp.inf, positions.astype(jnp.float32))


@dataclass(frozen=True, kw_only=True)
class H2O(PromptSelector, DecodeSelector):
    """Heavy hitters by the weights of all of the prompt's queries, and the last `recent` tokens.

    As `decode=`, the unified baseline: prompt and output compete for one `budget`.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < budget.
    """

    budget: int
    recent: int

    def __post_init__(self) -> None:  # noqa: D105
        _check_sizes("recent", self.recent, "budget", self.budget)

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return ALL_QUERIES

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        del layer, layers
        return min(self.budget, width)

    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """See `PromptSelector`."""
        most = self.most(layer, layers, weights.shape[2])
        return keep_best(weights, lengths, jnp.minimum(lengths, self.budget), recent=self.recent, most=most)

    @property
    def unified(self) -> bool:
        """See `DecodeSelector`."""
        return True

    @property
    def slots(self) -> int:
        """See `DecodeSelector`."""
        return self.budget + 1

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """See `DecodeSelector`."""
        del step
        return jnp.minimum(held, self.budget), waited


@dataclass(frozen=True, kw_only=True)
class SnapKV(PromptSelector):
    """Tokens by the weights that the last `window` queries gave their neighbourhood, and those `window`.

    Weights are pooled over `kernel` neighbouring tokens: their mean ("average") or maximum ("max").

    Raises:
        ValueError: the sizes do not satisfy 0 < window < budget, or `kernel` is not odd and positive.
    """

    budget: int
    window: int = 32
    kernel: int = 5
    pooling: Literal["average", "max"] = "average"

    def __post_init__(self) -> None:  # noqa: D105
        _check_sizes("window", self.window, "budget", self.budget)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"{self.kernel=} must be odd and positive")
        if self.pooling not in ("average", "max"):
            raise ValueError(f'{self.pooling=} must be "average" or "max"')

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return self.window

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        del layer, layers
        return min(self.budget, width)

    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """See `PromptSelector`."""
        score = pool_neighbours(weights, lengths - self.window, self.kernel, self.pooling)
        most = self.most(layer, layers, weights.shape[2])
        return keep_best(score, lengths, jnp.minimum(lengths, self.budget), recent=self.window, most=most)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(PromptSelector):
    """SnapKV with budgets that fall linearly from the first layer to the last; `budget` is about their mean.

    With b = budget - window: the first layer keeps about 2b - b / beta, the last b / beta, plus `window`.

    Raises:
        ValueError: see `SnapKV`; or `beta` is less than 1.
    """

    budget: int
    window: int = 32
    beta: int = 20
    kernel: int = 5
    pooling: Literal["average", "max"] = "average"

    def __post_init__(self) -> None:  # noqa: D105
        SnapKV(budget=self.budget, window=self.window, kernel=self.kernel, pooling=self.pooling)
        if self.beta < 1:
            raise ValueError(f"{self.beta=} must be at least 1")

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return self.window

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        return min(width, _pyramid_most(self, layer, layers))

    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """See `PromptSelector`."""
        score = pool_neighbours(weights, lengths - self.window, self.kernel, self.pooling)
        kept = pyramid_budget(self, lengths, layer, layers)
        most = self.most(layer, layers, weights.shape[2])
        return keep_best(score, lengths, kept, recent=self.window, most=most)


@dataclass(frozen=True, kw_only=True)
class PyramidInfer(PromptSelector):
    """H2O's weights with PyramidKV's budgets.

    Raises:
        ValueError: the sizes do not satisfy 0 < window < budget, or `beta` is less than 1.
    """

    budget: int
    window: int = 32
    beta: int = 20

    def __post_init__(self) -> None:  # noqa: D105
        PyramidKV(budget=self.budget, window=self.window, beta=self.beta)

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return ALL_QUERIES

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        return min(width, _pyramid_most(self, layer, layers))

    def select(
        self, weights: Float[Array, "B K P"], lengths: Int[Array, "B"], layer: int, layers: int
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """See `PromptSelector`."""
        kept = pyramid_budget(self, lengths, layer, layers)
        most = self.most(layer, layers, weights.shape[2])
        return keep_best(weights, lengths, kept, recent=self.window, most=most)


@dataclass(frozen=True, kw_only=True)
class Slide(DecodeSelector):
    """SCOPE's slide: of the decoded tokens, the heaviest `window - recent` and the last `recent`.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < window.
    """

    window: int = 512
    recent: int = 256

    def __post_init__(self) -> None:  # noqa: D105
        _check_sizes("recent", self.recent, "window", self.window)

    @property
    def slots(self) -> int:
        """See `DecodeSelector`."""
        return self.window + 1

    def target(
        self, step: Int[Array, "B"], held: Int[Array, "B"], waited: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """See `DecodeSelector`."""
        del step
        return jnp.minimum(held, self.window), waited


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
        _check_sizes("recent", self.recent, "window", self.window)
        if self.max_new_tokens < self.window:
            raise ValueError(f"{self.max_new_tokens=} must be at least {self.window=}: use Slide otherwise")

    @property
    def delta(self) -> int:
        """Steps between two growths of the window by one token."""
        return (self.max_new_tokens - self.recent) // (self.window - self.recent)

    @property
    def slots(self) -> int:
        """See `DecodeSelector`."""
        return self.window + 1

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


def keep_best(
    score: Float[Array, "B K P"],
    lengths: Int[Array, "B"],
    budget: Int[Array, "B"],
    *,
    recent: int,
    most: int,
) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
    """The last `recent` tokens of each row and the best of the others, `budget[b]` <= M = `most` in all.

    Positions are ascending; those past a row's budget are P - 1 and do not count.
    """
    width = score.shape[2]
    position = jnp.arange(width)[None, None]
    real = position < lengths[:, None, None]
    kept_anyway = real & (position >= (lengths - recent)[:, None, None])
    score = jnp.where(kept_anyway, jnp.inf, jnp.where(real, score, -jnp.inf))
    # top_k prefers the lower index of equals: reversed, that is the newer token.
    best = width - 1 - jax.lax.top_k(score[:, :, ::-1], most)[1]
    counts = jnp.arange(most)[None, None] < budget[:, None, None]
    return jnp.sort(jnp.where(counts, best, width - 1), axis=-1), budget


def pool_neighbours(
    weights: Float[Array, "B K P"], end: Int[Array, "B"], kernel: int, pooling: str
) -> Float[Array, "B K P"]:
    """Mean or maximum over `kernel` tokens around each; what is at or past `end[b]` counts as 0."""
    position = jnp.arange(weights.shape[2])[None, None]
    weights = jnp.where(position < end[:, None, None], weights, 0)
    padding = ((0, 0), (0, 0), (kernel // 2, kernel // 2))
    shape, strides = (1, 1, kernel), (1, 1, 1)
    if pooling == "max":
        return jax.lax.reduce_window(weights, 0.0, jax.lax.max, shape, strides, padding)
    return jax.lax.reduce_window(weights, 0.0, jax.lax.add, shape, strides, padding) / kernel


def pyramid_budget(
    selector: PyramidKV | PyramidInfer, lengths: Int[Array, "B"], layer: int, layers: int
) -> Int[Array, "B"]:
    """Tokens that a layer keeps of each row: the pyramid, flatter where a row is too short for it."""
    base = selector.budget - selector.window
    first = jnp.minimum(2 * base - base // selector.beta, lengths - selector.window)
    pyramid = _pyramid_layer(base, first, layer, layers) + selector.window
    flat = jnp.full_like(lengths, selector.budget)
    wanted = jnp.where(lengths < 2 * base, flat, pyramid)
    return jnp.where(lengths <= selector.budget, lengths, jnp.minimum(wanted, lengths))


def _pyramid_most(selector: PyramidKV | PyramidInfer, layer: int, layers: int) -> int:
    """The most that `pyramid_budget` gives a layer, whatever the row's length."""
    base = selector.budget - selector.window
    tops = range(base, 2 * base - base // selector.beta + 1)
    return max(_pyramid_layer(base, first, layer, layers) for first in tops) + selector.window


def _pyramid_layer(base: int, first: Any, layer: int, layers: int) -> Any:
    """What layer `layer` gets where the first gets `first`, in steps of whole tokens."""
    last = 2 * base - first
    return first - layer * ((first - last) // layers)


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


def _check_sizes(small_name: str, small: int, large_name: str, large: int) -> None:
    if not 0 < small < large:
        raise ValueError(
            f"{small_name}={small} and {large_name}={large} must satisfy 0 < {small_name} < {large_name}"
        )
