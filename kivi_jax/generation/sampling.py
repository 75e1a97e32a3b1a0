"""Samplers: frozen values that turn logits into tokens. Read `generate.py` next.

Every row draws from its own PRNG key, so what a row samples does not depend on its batch.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kivi_jax.checks import real, whole


@runtime_checkable
class Sampler(Protocol):
    """Chooses each row's next token. Hashable: a different sampler compiles anew."""

    @property
    def repetition_penalty(self) -> float:
        """Divides positive and multiplies negative logits of tokens seen before; 1 does nothing."""
        ...

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """Choose, given logits after the repetition penalty and one key per row."""
        ...


_COLDEST = 1e-6  # logits divided by less may be infinite, several of them equally


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most likely token; of equals the lowest id. Needs no key."""

    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: `repetition_penalty` is not positive and finite.
        """
        _check_positive("repetition_penalty", self.repetition_penalty)

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """See `Sampler`."""
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Random sampling. The filters apply in this order, each to what the one before left.

    Args:
        temperature: divides the logits; towards 0 it becomes greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose probabilities reach top_p together.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: see `Sampler`.

    Source: top-p, arXiv 1904.09751; min-p, arXiv 2407.01082; repetition penalty, arXiv 1909.05858.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a field is out of its range.
        """
        _check_positive("temperature", self.temperature)
        if self.temperature < _COLDEST:
            raise ValueError(f"{self.temperature=} must be at least {_COLDEST}: Greedy() is what is colder")
        _check_positive("repetition_penalty", self.repetition_penalty)
        if whole("top_k", self.top_k) < 0:
            raise ValueError(f"{self.top_k=} must not be negative; 0 keeps every token")
        if not 0 < real("top_p", self.top_p) <= 1:
            raise ValueError(f"{self.top_p=} must be in (0, 1]")
        if not 0 <= real("min_p", self.min_p) <= 1:
            raise ValueError(f"{self.min_p=} must be in [0, 1]")

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """See `Sampler`.

        Raises:
            ValueError: there is no key.
        """
        if keys is None:
            raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed)")
        logits = keep_likely(logits / self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(
    logits: Float[Array, "B V"], *, top_k: int, top_p: float, min_p: float
) -> Float[Array, "B V"]:
    """Logits with -inf for the tokens that top-k, then top-p, then min-p leave out."""
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # more likely tokens' total
        least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if min_p > 0:
        least = logits.max(-1, keepdims=True) + jnp.log(jnp.float32(min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def penalize(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Make tokens seen before less likely: positive logits / penalty, negative ones * penalty."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _check_positive(name: str, number: float) -> None:
    if not 0 < real(name, number) < float("inf"):  # NaN is neither
        raise ValueError(f"{name}={number} must be positive and finite")


def make_sampler(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float
) -> Sampler:
    """`Greedy` at temperature 0, else `Sample`.

    Raises:
        ValueError: a number is out of its range.
    """
    sample = Sample(
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    return Greedy(repetition_penalty=repetition_penalty) if temperature == 0 else sample
