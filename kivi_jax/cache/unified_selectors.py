"""Selectors under which prompt and output compete for one budget: the baselines. Read `strategy.py` next.

As `prompt=` they choose once, and what is decoded is bounded apart; as `decode=` the pool holds both.

Source: H2O (arXiv 2306.14048); StreamingLLM (2309.17453).
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from kivi_jax.cache.decode_selectors import DecodeSelector, Slots
from kivi_jax.cache.prompt_selectors import ALL_QUERIES, Prompt, PromptSelector, check_sizes
from kivi_jax.checks import whole


class _Unified(PromptSelector, DecodeSelector):
    """One budget for prompt and output, of which the newest `recent` tokens are a part."""

    @property
    def newest(self) -> int:
        """See `PromptSelector`."""
        return self.recent

    @property
    def unified(self) -> bool:
        """See `DecodeSelector`."""
        return True

    @property
    def bound(self) -> int:
        """See `DecodeSelector`."""
        return self.budget


@dataclass(frozen=True, kw_only=True)
class H2O(_Unified):
    """Heavy hitters by the weights of all of the prompt's queries, and the last `recent` tokens.

    As `decode=`, the unified baseline: prompt and output compete for one `budget`.

    Raises:
        ValueError: the sizes do not satisfy 0 < recent < budget.
    """

    budget: int
    recent: int

    def __post_init__(self) -> None:  # noqa: D105
        check_sizes("recent", self.recent, "budget", self.budget)

    @property
    def observed(self) -> int:
        """See `PromptSelector`."""
        return ALL_QUERIES


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(_Unified):
    """The first `sinks` and the last `recent` tokens; as `decode=`, of prompt and output together.

    Raises:
        ValueError: `sinks` is negative or `recent` is not positive.
    """

    sinks: int = 4
    recent: int

    def __post_init__(self) -> None:  # noqa: D105
        if whole("sinks", self.sinks) < 0 or whole("recent", self.recent) < 1:
            raise ValueError(f"{self.sinks=} must not be negative, and {self.recent=} must be positive")

    @property
    def budget(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens kept in all."""
        return self.sinks + self.recent

    def rank(self, prompt: Prompt) -> Float[Array, "B K P"]:
        """See `PromptSelector`: the sinks before all others."""
        weights = prompt.weights
        first = jnp.arange(weights.shape[2]) < self.sinks
        return jnp.broadcast_to(first.astype(weights.dtype), weights.shape)

    @property
    def weighs(self) -> bool:
        """See `DecodeSelector`."""
        return False

    def score(self, slots: Slots) -> Float[Array, "B K S"]:
        """Sinks stay, the oldest of the others goes: positions instead of weights."""
        return jnp.where(slots.positions < self.sinks, jnp.inf, slots.positions.astype(jnp.float32))
