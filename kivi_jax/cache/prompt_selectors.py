"""Which tokens of a prompt are stored. Read `decode_selectors.py` next.

Selectors are frozen values. A *prompt selector* sees, per KV head, how much softmax weight the last
`observed` queries of the prompt gave to each token, and names the tokens to store: the newest ones, and
those that rank best. Of equals the newer one stays. Budgets are tokens per row.

Source: SCOPE (arXiv 2412.13649) section 3; H2O (2306.14048); SnapKV (2404.14469);
PyramidKV (2406.02069); PyramidInfer (2405.12532).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kivi_jax.checks import whole
from kivi_jax.mesh import mean_of_replicas

ALL_QUERIES = -1  # of `PromptSelector.observed`


class ExpectedQueries(NamedTuple):
    """What the queries after a prompt are like, from those in it: turned as they will be on average."""

    mean: Float[Array, "B N H"]
    covariance: Float[Array, "B N H H"]

    @classmethod
    def zeros(cls, batch: int, heads: int, dim: int) -> "ExpectedQueries":
        """Of a prompt of zeros."""
        return cls(
            jnp.zeros((batch, heads, dim), jnp.float32), jnp.zeros((batch, heads, dim, dim), jnp.float32)
        )


class Prompt(NamedTuple):
    """What prefill knows of one layer's right-padded prompt, in full precision."""

    keys: Float[Array, "B K P H"]
    values: Float[Array, "B K P H"]
    weights: Float[Array, "B K P"]  # summed softmax weights of the observed queries; zeros if none are
    lengths: Int[Array, "B"]
    queries: ExpectedQueries | None = None  # where the selector expects them


class PromptSelector(ABC):
    """Chooses the tokens of a prompt that are stored. Runs once per layer, before storage.

    Stored are the last `newest` tokens and, of the others, those that `rank` highest: `budget` in all,
    unless `most` and `kept` say otherwise.
    """

    budget: int

    @property
    @abstractmethod
    def newest(self) -> int:
        """How many of the last tokens stay, whatever their rank."""

    def rank(self, prompt: Prompt) -> Float[Array, "B K P"]:
        """What decides between tokens: by default their weights, which are zeros if none are observed."""
        return prompt.weights

    @property
    def observed(self) -> int:
        """Of how many of the last queries the weights are summed: 0 for none, or `ALL_QUERIES`."""
        return 0

    @property
    def expects(self) -> bool:
        """Whether `rank` looks at `Prompt.queries`."""
        return False

    @property
    def differs_by_layer(self) -> bool:
        """Whether layers may keep different numbers of tokens: a selector has its own way to say how many."""
        own = type(self)
        return any(
            getattr(own, name) is not getattr(PromptSelector, name) for name in ("most", "kept", "select")
        )

    def keeps_all(self, width: int) -> bool:
        """Whether every prompt of up to `width` tokens is kept whole, so that nothing need be selected."""
        return width <= self.budget

    def most(self, layer: int, layers: int, width: int) -> int:
        """The most tokens that layer number `layer` of `layers` keeps of a prompt of up to `width`."""
        del layer, layers
        return min(self.budget, width)

    def kept(self, lengths: Int[Array, "B"], layer: int, layers: int) -> Int[Array, "B"]:
        """How many tokens of each row that layer keeps, at most `most` and `lengths`."""
        del layer, layers
        return jnp.minimum(lengths, self.budget)

    def select(
        self, prompt: Prompt, layer: int, layers: int, *, first: int = 0
    ) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
        """Kept positions, ascending, M = `most(layer, layers, P)`; and how many of them count per row.

        The row's `first` tokens are among them, whatever their rank.
        """
        width = prompt.keys.shape[2]
        most = self.most(layer, layers, width)
        kept = self.kept(prompt.lengths, layer, layers)
        is_first = jnp.arange(width)[None, None] < first
        score = jnp.where(is_first, jnp.inf, self.rank(prompt))
        return keep_best(score, prompt.lengths, kept, recent=self.newest, most=most)


@dataclass(frozen=True, kw_only=True)
class KeepAll(PromptSelector):
    """Every token of the prompt; as `decode=`, every decoded token, in a cache that grows to capacity."""

    @property
    def newest(self) -> int:
        """See `PromptSelector`."""
        return 0

    @property
    def differs_by_layer(self) -> bool:
        """See `PromptSelector`."""
        return False

    def keeps_all(self, width: int) -> bool:
        """See `PromptSelector`."""
        del width
        return True

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`."""
        del layer, layers
        return width

    def kept(self, lengths: Int[Array, "B"], layer: int, layers: int) -> Int[Array, "B"]:
        """See `PromptSelector`."""
        del layer, layers
        return lengths


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
        check_sizes("window", self.window, "budget", self.budget)
        if whole("kernel", self.kernel) < 1 or self.kernel % 2 == 0:
            raise ValueError(f"{self.kernel=} must be odd and positive")
        if self.pooling not in ("average", "max"):
            raise ValueError(f'{self.pooling=} must be "average" or "max"')

    @property
    def newest(self) -> int:
        """See `PromptSelector`."""
        return self.window

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return self.window

    def rank(self, prompt: Prompt) -> Float[Array, "B K P"]:
        """See `PromptSelector`."""
        return pool_neighbours(prompt.weights, prompt.lengths - self.window, self.kernel, self.pooling)


class _Pyramid(PromptSelector):
    """Budgets that fall linearly from the first layer to the last; `budget` is about their mean.

    With b = budget - window: the first layer keeps about 2b - b / beta, the last b / beta, plus `window`.
    """

    window: int
    beta: int

    def most(self, layer: int, layers: int, width: int) -> int:
        """See `PromptSelector`: the most that `kept` gives the layer, whatever the row's length."""
        base = self.budget - self.window
        tops = range(base, 2 * base - base // self.beta + 1)
        return min(width, max(_pyramid_layer(base, first, layer, layers) for first in tops) + self.window)

    def kept(self, lengths: Int[Array, "B"], layer: int, layers: int) -> Int[Array, "B"]:
        """See `PromptSelector`: the pyramid, flatter where a row is too short for it."""
        base = self.budget - self.window
        first = jnp.minimum(2 * base - base // self.beta, lengths - self.window)
        pyramid = _pyramid_layer(base, first, layer, layers) + self.window
        flat = jnp.full_like(lengths, self.budget)
        wanted = jnp.where(lengths < 2 * base, flat, pyramid)
        return jnp.where(lengths <= self.budget, lengths, jnp.minimum(wanted, lengths))


def _pyramid_layer(base: int, first: Any, layer: int, layers: int) -> Any:
    """What layer `layer` gets where the first gets `first`, in steps of whole tokens."""
    last = 2 * base - first
    return first - layer * ((first - last) // layers)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(_Pyramid, SnapKV):
    """SnapKV with budgets that fall linearly from the first layer to the last; `budget` is about their mean.

    With b = budget - window: the first layer keeps about 2b - b / beta, the last b / beta, plus `window`.

    Raises:
        ValueError: see `SnapKV`; or `beta` is less than 1.
    """

    beta: int = 20

    def __post_init__(self) -> None:  # noqa: D105
        super().__post_init__()
        _check_beta(self.beta)


@dataclass(frozen=True, kw_only=True)
class PyramidInfer(_Pyramid):
    """H2O's weights with PyramidKV's budgets.

    Raises:
        ValueError: the sizes do not satisfy 0 < window < budget, or `beta` is less than 1.
    """

    budget: int
    window: int = 32
    beta: int = 20

    def __post_init__(self) -> None:  # noqa: D105
        check_sizes("window", self.window, "budget", self.budget)
        _check_beta(self.beta)

    @property
    def newest(self) -> int:
        """See `PromptSelector`."""
        return self.window

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return ALL_QUERIES


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(PromptSelector):
    """Tokens by the attention that queries after the prompt can be expected to give them, times ||value||.

    With queries of mean m and covariance C, as they are on average over the next 512 positions, a key's
    expected weight is exp(k . m / sqrt(H) + k . C k / 2H). The first `sinks` and the last `recent` stay.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < budget, or `sinks` is negative.

    Source: Expected Attention (arXiv 2510.00636), as kvpress has it.
    """

    budget: int
    recent: int = 32
    sinks: int = 4

    def __post_init__(self) -> None:  # noqa: D105
        check_sizes("recent", self.recent, "budget", self.budget)
        if whole("sinks", self.sinks) < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative: pass 0 for none")

    @property
    def newest(self) -> int:
        """See `PromptSelector`."""
        return self.recent

    @property
    def expects(self) -> bool:
        """See `PromptSelector`."""
        return True

    def rank(self, prompt: Prompt) -> Float[Array, "B K P"]:
        """See `PromptSelector`."""
        assert prompt.queries is not None
        keys, values = (x.astype(jnp.float32) for x in (prompt.keys, prompt.values))
        batch, kv_heads, width, dim = keys.shape
        mean, covariance = (x.reshape(batch, kv_heads, -1, *x.shape[2:]) for x in prompt.queries)
        position = jnp.arange(width)[None, None]
        score = jnp.einsum("bkph,bkgh->bkgp", keys, mean) * dim**-0.5
        score += jnp.einsum("bkph,bkghj,bkpj->bkgp", keys, covariance, keys) / (2 * dim)
        competes = (position >= self.sinks) & (position < prompt.lengths[:, None, None])
        weight = mean_of_replicas(jax.nn.softmax(score, axis=-1, where=competes[:, :, None]).mean(2))
        expected = (weight + _LEAST_EXPECTED) * jnp.linalg.norm(values, axis=-1)
        return jnp.where(position < self.sinks, jnp.inf, expected)


_LEAST_EXPECTED = 1e-2  # so that values count where no attention is expected


@dataclass(frozen=True, kw_only=True)
class KeyDiff(PromptSelector):
    """Tokens whose keys point away from the mean direction of all keys, and the last `recent`.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < budget.

    Source: KeyDiff (arXiv 2504.15364).
    """

    budget: int
    recent: int = 32

    def __post_init__(self) -> None:  # noqa: D105
        check_sizes("recent", self.recent, "budget", self.budget)

    @property
    def newest(self) -> int:
        """See `PromptSelector`."""
        return self.recent

    def rank(self, prompt: Prompt) -> Float[Array, "B K P"]:
        """See `PromptSelector`."""
        keys = prompt.keys.astype(jnp.float32)
        real = jnp.arange(keys.shape[2])[None] < prompt.lengths[:, None]
        direction = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        mean = jnp.where(real[:, None, :, None], direction, 0).sum(2, keepdims=True)
        mean /= jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        return -(direction * mean).sum(-1)


def keep_best(
    score: Float[Array, "B K P"],
    lengths: Int[Array, "B"],
    budget: Int[Array, "B"],
    *,
    recent: int,
    most: int,
) -> tuple[Int[Array, "B K M"], Int[Array, "B"]]:
    """The last `recent` tokens of each row and the best of the others, `budget[b]` <= M = `most` in all.

    A token of infinite score stays before all others. Positions are ascending; those past a row's budget are
    P - 1 and do not count.
    """
    width = score.shape[2]
    position = jnp.arange(width)[None, None]
    real = position < lengths[:, None, None]
    kept_anyway = real & (position >= (lengths - recent)[:, None, None])
    newest = jnp.where(score < jnp.inf, jnp.finfo(score.dtype).max, score)
    score = jnp.where(kept_anyway, newest, jnp.where(real, score, -jnp.inf))
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


def check_sizes(small_name: str, small: int, large_name: str, large: int) -> None:
    """Refuse what does not satisfy 0 < small < large.

    Raises:
        ValueError: that is so.
    """
    if not 0 < whole(small_name, small) < whole(large_name, large):
        raise ValueError(
            f"{small_name}={small} and {large_name}={large} must satisfy 0 < {small_name} < {large_name}"
        )


def _check_beta(beta: int) -> None:
    if whole("beta", beta) < 1:
        raise ValueError(f"{beta=} must be at least 1")
