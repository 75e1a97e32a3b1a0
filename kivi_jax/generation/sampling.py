"""Samplers: frozen values that turn logits into tokens. Read `generate.py` next.

Every row draws from its own PRNG key, so what a row samples does not depend on its batch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kivi_jax.checks import real, whole
from pallas_kernels.pytree import pytree


@runtime_checkable
class Sampler(Protocol):
    """Chooses each row's next token. Hashable: a different sampler compiles anew."""

    @property
    def repetition_penalty(self) -> Float[Array, "B"] | float:
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
        return RowSampler.repeat(self, logits.shape[0])(logits, keys)


@pytree
class RowSampler:
    """A sampler whose numbers are arrays, one per row: rows of one batch may be drawn differently.

    Fields are `Sample`'s; a row of temperature 0 takes the most likely token, of equals the lowest id.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]

    @classmethod
    def repeat(cls, sample: Sample, rows: int) -> "RowSampler":
        """`sample` for every row."""
        kinds = {"top_k": jnp.int32}
        fields = dataclasses.asdict(sample).items()
        return cls(**{name: jnp.full(rows, number, kinds.get(name, jnp.float32)) for name, number in fields})

    def __call__(self, logits: Float[Array, "B V"], keys: Key[Array, "B"] | None) -> Int[Array, "B"]:
        """See `Sampler`.

        Raises:
            ValueError: there is no key.
        """
        if keys is None:
            raise ValueError("sampling needs a PRNG key: pass key=jax.random.key(seed)")
        likeliest, is_random = jnp.argmax(logits, axis=-1).astype(jnp.int32), self.temperature > 0

        def drawn() -> Int[Array, "B"]:
            warm = logits / jnp.where(is_random, self.temperature, 1)[:, None]
            kept = keep_likely(warm, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
            return jnp.where(is_random, jax.vmap(jax.random.categorical)(keys, kept), likeliest)

        return jax.lax.cond(is_random.any(), drawn, lambda: likeliest)


def keep_likely(
    logits: Float[Array, "B V"],
    *,
    top_k: Int[Array, "#B"],
    top_p: Float[Array, "#B"],
    min_p: Float[Array, "#B"],
) -> Float[Array, "B V"]:
    """Logits with -inf for the tokens that top-k, then top-p, then min-p leave out.

    Each is the least logit that it keeps, so what remains is what is not below any. Where no row asks for
    top-k or top-p, nothing is sorted.
    """
    vocab = logits.shape[1]
    k, p = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)[:, None], top_p[:, None]

    def of_sorted() -> Float[Array, "B 1"]:
        ordered = -jnp.sort(-logits, axis=-1)
        index = jnp.broadcast_to(k - 1, (logits.shape[0], 1))
        least = jnp.take_along_axis(ordered, index, axis=-1)
        left = jnp.where(ordered >= least, ordered, -jnp.inf)
        probability = jax.nn.softmax(left, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # more likely tokens' total
        of_p = jnp.where(before < p, left, jnp.inf).min(-1, keepdims=True)
        return jnp.where(p < 1, jnp.maximum(of_p, least), least)

    top = logits.max(-1, keepdims=True)
    filters = ((k < vocab) | (p < 1)).any()
    least = jax.lax.cond(filters, of_sorted, lambda: jnp.full_like(top, -jnp.inf))
    least = jnp.maximum(least, top + jnp.log(min_p[:, None]))
    return jnp.where(logits < least, -jnp.inf, logits)  # what is not a number is to be seen


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"] | float
) -> Float[Array, "B V"]:
    """Make tokens seen before less likely: positive logits / penalty, negative ones * penalty."""
    penalty = jnp.broadcast_to(jnp.float32(penalty), logits.shape[:1])[:, None]
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
