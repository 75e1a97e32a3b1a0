"""Strings in, strings out: `complete` a list of prompts, or `stream` one."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from kivi_jax.cache import CacheStrategy, KVCache
from kivi_jax.generation import Draw, draw, generate, row_keys, start_drawing
from kivi_jax.llama import Llama
from kivi_jax.sampling import Greedy, Sampler


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def __call__(self, text: str) -> Any:
        """A mapping with `input_ids`."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        ...


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """Right-pad token ids to one width, and their lengths.

    The width is rounded up by at most an eighth (at least to a multiple of 32), so that prompts of similar
    lengths share a compiled program.

    Raises:
        ValueError: there is no prompt, or one has no tokens.
    """
    if not prompts:
        raise ValueError("there must be at least one prompt")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError(f"prompt {int(lengths.argmin())} has no tokens: pass at least one")
    longest = int(lengths.max())
    step = max(32, 1 << max(longest.bit_length() - 4, 0))
    tokens = np.zeros((len(prompts), -(-longest // step) * step), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    cache: CacheStrategy,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: tuple[int, ...] | None = None,
    key: Key[Array, "..."] | None = None,
) -> list[str]:
    """The continuation of every prompt, special tokens left out. See `generate` for the arguments.

    Raises:
        ValueError: see `generate` and `pad_prompts`.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, got one string: pass [prompt]")
    tokens, lengths = pad_prompts([tokenizer(prompt)["input_ids"] for prompt in prompts])
    out = generate(
        model,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_ids=eos_ids,
        key=key,
    )
    new, count = np.asarray(out.tokens), np.asarray(out.lengths)
    return [
        tokenizer.decode(row[:n].tolist(), skip_special_tokens=True)
        for row, n in zip(new, count, strict=True)
    ]


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    cache: CacheStrategy,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: tuple[int, ...] | None = None,
    key: Key[Array, "..."] | None = None,
) -> Iterator[str]:
    """Pieces of the continuation as they are generated; together they are what `complete` gives.

    Raises:
        ValueError: see `generate`.
    """
    tokens = stream_tokens(
        model,
        tokenizer(prompt)["input_ids"],
        cache=cache,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_ids=eos_ids,
        key=key,
    )
    return decode_stream(tokenizer, (token for token, _ in tokens))


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens that arrive one by one, in pieces of whole characters.

    A token's text may depend on the one before it (a space that only the first word lacks), so a piece is
    what new tokens add to the text of the previous piece's tokens.
    """
    new: list[int] = []
    begin, shown = 0, 0  # the previous piece is new[begin:shown]

    def text(first: int, last: int) -> str:
        return tokenizer.decode(new[first:last], skip_special_tokens=True)

    for token in tokens:
        new.append(token)
        piece = text(begin, len(new))[len(text(begin, shown)) :]
        # A character may span tokens: its first bytes decode to a replacement character.
        if piece and not piece.endswith("\ufffd"):
            yield piece
            begin, shown = shown, len(new)
    if rest := text(begin, len(new))[len(text(begin, shown)) :]:
        yield rest


def stream_tokens(
    model: Llama,
    prompt: Sequence[int],
    *,
    cache: CacheStrategy,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: tuple[int, ...] | None = None,
    key: Key[Array, "..."] | None = None,
) -> Iterator[tuple[int, KVCache]]:
    """Each new token id, the one that ends the row included, with the cache it was drawn from.

    The cache given with a token is valid until the next one is asked for.

    Raises:
        ValueError: see `generate`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    sampler = Greedy() if sampler is None else sampler
    eos_ids = model.config.eos_ids if eos_ids is None else eos_ids
    tokens, lengths = (jnp.asarray(x) for x in pad_prompts([prompt]))
    logits, held = model.prefill(tokens, lengths, cache=cache, capacity=tokens.shape[1] + max_new_tokens)
    state = start_drawing(sampler, row_keys(key, 1), tokens, lengths, model.config.vocab_size)
    token, state = _draw(sampler, logits, state, jnp.int32(0))
    for index in range(1, max_new_tokens + 1):
        yield int(token[0]), held
        if int(token[0]) in eos_ids or index == max_new_tokens:
            return
        logits, held = model.decode(token, held)
        token, state = _draw(sampler, logits, state, jnp.int32(index))


@functools.partial(jax.jit, static_argnames=("sampler",))
def _draw(
    sampler: Sampler, logits: Float[Array, "B V"], state: Draw, index: Int[Array, ""]
) -> tuple[Int[Array, "B"], Draw]:
    return draw(sampler, logits, state, index)
