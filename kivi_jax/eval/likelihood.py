"""Log-likelihoods that read the compressed cache, as generation would.

A plain forward pass, or a prefill over the whole text, attends in full precision and says nothing about a
cache. Here a context, except for its last token, is read into the cache; that token and all that follow
are decoding steps whose input is given (teacher forcing), so each probability comes from the packed or
selected tokens. With a context of one token nothing is left to prefill but that token.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.generation.tokens import pad_prompts
from kivi_jax.model.llama import Llama


class Scored(NamedTuple):
    """Per token of a continuation: its log-probability, and whether it was the most likely one."""

    log_probs: Float[np.ndarray, "T"]
    greedy: Bool[np.ndarray, "T"]


def continuation_log_probs(
    model: Llama,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    cache: CacheStrategy,
    rows: int | None = None,
) -> list[Scored]:
    """What the model, holding `cache`, gives every token of each continuation after its context.

    One compiled program per padded widths: contexts to `pad_prompts`' widths, continuations to powers of
    two; padded tokens of continuations cost no steps.

    Args:
        model: the model.
        contexts: token ids, at least one each.
        continuations: token ids, at least one each.
        cache: how keys and values are held.
        rows: pad the batch to this many rows, so that batches of any size share a program.

    Raises:
        ValueError: a context or a continuation is empty, or the strategy does not fit the model.
    """
    if not all(continuations):
        raise ValueError("every continuation must have at least one token")
    cache.check(model.config)
    held = [list(context[: max(1, len(context) - 1)]) for context in contexts]
    forced = [
        [*context[len(prefix) :], *continuation]
        for context, prefix, continuation in zip(contexts, held, continuations, strict=True)
    ]
    missing = max((rows or 0) - len(held), 0)
    prefix, prefix_lengths = pad_prompts(held + held[:1] * missing)
    lengths = np.array([len(row) for row in forced] + [1] * missing, np.int32)
    width = max(32, 1 << int(lengths.max() - 1).bit_length())
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, ids in zip(tokens, forced, strict=False):
        row[: len(ids)] = ids
    arrays = (jnp.asarray(array) for array in (prefix, prefix_lengths, tokens, lengths))
    log_probs, greedy = (np.asarray(part) for part in _force(model, *arrays, cache))
    return [
        Scored(
            log_probs[i, length - len(continuation) : length], greedy[i, length - len(continuation) : length]
        )
        for i, (continuation, length) in enumerate(zip(continuations, lengths, strict=False))
    ]


@functools.partial(jax.jit, static_argnames=("strategy",))
def _force(
    model: Llama,
    prefix: Int[Array, "B P"],
    prefix_lengths: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    strategy: CacheStrategy,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probabilities of `tokens` after the prefixes, and which were the likeliest; junk past the end."""
    capacity = prefix.shape[1] + tokens.shape[1]
    logits, cache = model.prefill(prefix, prefix_lengths, cache=strategy, capacity=capacity)
    nothing = (jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, bool))

    def score(i: Array, logits: Array, scored: tuple[Array, Array]) -> tuple[Array, Array]:
        token = tokens[:, i]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        likeliest = jnp.argmax(logits, axis=-1) == token
        return scored[0].at[:, i].set(log_probs), scored[1].at[:, i].set(likeliest)

    def advance(i: Array, state: tuple) -> tuple:
        cache, scored = state
        logits, cache = model.decode(tokens[:, i - 1], cache, i < lengths)
        return cache, score(i, logits, scored)

    first = (cache, score(jnp.int32(0), logits, nothing))
    _, scored = jax.lax.fori_loop(1, lengths.max(), advance, first)
    return scored
