"""Strings in, strings out: `complete` a list of prompts, `stream` one, or read one to ask about it often."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.generation.generate import (
    Draw,
    check_count,
    check_start,
    draw,
    end_ids,
    generate,
    is_finite,
    read,
    row_keys,
    start_drawing,
    warn_unless_finite,
)
from kivi_jax.generation.prefix import Prefix, extend, prefill, weights_mark
from kivi_jax.generation.sampling import Greedy, Sampler
from kivi_jax.model.inputs import read_prompts
from kivi_jax.model.llama import Llama


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """A mapping with `input_ids`; text that continues another is read without special tokens."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        ...


def encode(tokenizer: Tokenizer, text: str, *, begins: bool = True) -> list[int]:
    """Token ids of a text that begins a row or, without special tokens, continues one.

    Raises:
        ValueError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError(
            "there is no tokenizer: copy its files beside the weights, or pass token ids to kj.generate"
        )
    return list((tokenizer(text) if begins else tokenizer(text, add_special_tokens=False))["input_ids"])


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, least: int = 1
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """Right-pad token ids to one width, and their lengths, of which each is at least `least`.

    The width is rounded up by at most an eighth (at least to a multiple of 32), so that prompts of similar
    lengths share a compiled program.

    Raises:
        ValueError: there is no prompt, or one has too few tokens.
    """
    if not prompts:
        raise ValueError("there must be at least one prompt")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.min() < least:
        raise ValueError(f"prompt {int(lengths.argmin())} has no tokens: pass at least one")
    tokens = np.zeros((len(prompts), _width(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _width(longest: int) -> int:
    step = max(32, 1 << max(longest.bit_length() - 4, 0))
    return -(-longest // step) * step


def read_prefix(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    cache: CacheStrategy | str,
    block_tokens: int = 512,
) -> Prefix:
    """Read texts once, to continue them many times: one for all questions, or one per question.

    Raises:
        ValueError: see `generate` and `pad_prompts`.
    """
    _check_list(prompts)
    tokens, lengths = pad_prompts([encode(tokenizer, prompt) for prompt in prompts])
    prefix = prefill(
        model,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        cache=cache,
        capacity=tokens.shape[1],
        block_tokens=block_tokens,
    )
    return dataclasses.replace(prefix, mark=weights_mark(model))


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    cache: CacheStrategy | str | None = None,
    prefix: Prefix | None = None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: Sequence[int] | int | None = None,
    key: Shaped[Array, "..."] | None = None,
) -> list[str]:
    """The continuation of every prompt, special tokens left out. See `generate` for the arguments.

    After a `prefix`, a prompt may be empty, and is read without the special tokens that begin a text.

    Raises:
        ValueError: see `generate` and `pad_prompts`.
    """
    _check_list(prompts)
    ids = [encode(tokenizer, prompt, begins=prefix is None) for prompt in prompts]
    tokens, lengths = pad_prompts(ids, least=0 if prefix is not None else 1)
    out = generate(
        model,
        tokens,
        lengths,
        cache=cache,
        prefix=prefix,
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
    cache: CacheStrategy | str | None = None,
    prefix: Prefix | None = None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: Sequence[int] | int | None = None,
    key: Shaped[Array, "..."] | None = None,
) -> Iterator[str]:
    """Pieces of the continuation as they are generated; together they are what `complete` gives.

    Raises:
        ValueError: see `generate`.
    """
    tokens = stream_tokens(
        model,
        encode(tokenizer, prompt, begins=prefix is None),
        cache=cache,
        prefix=prefix,
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
    cache: CacheStrategy | str | None = None,
    prefix: Prefix | None = None,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: Sequence[int] | int | None = None,
    key: Shaped[Array, "..."] | None = None,
) -> Iterator[tuple[int, KVCache]]:
    """Each new token id, the one that ends the row included, with the cache it was drawn from.

    The cache given with a token is valid until the next one is asked for.

    Raises:
        ValueError: see `generate`.
    """
    max_new_tokens = check_count(max_new_tokens)
    strategy = check_start(model, cache, prefix)
    least = 0 if prefix is not None else 1
    tokens, lengths = read_prompts(
        *pad_prompts([prompt], least=least), vocab_size=model.config.vocab_size, least=least
    )
    start = read(model, tokens, lengths, cache=strategy, prefix=prefix, room=max_new_tokens)
    yield from stream_after(
        model, start, max_new_tokens=max_new_tokens, sampler=sampler, eos_ids=eos_ids, key=key
    )


def append(model: Llama, prefix: Prefix, tokens: Sequence[int], *, chunk_tokens: int = 128) -> Prefix:
    """`extend` one row by any number of tokens through one compiled program. The prefix is consumed."""
    for first in range(0, len(tokens), chunk_tokens):
        part = tokens[first : first + chunk_tokens]
        padded = np.zeros((1, chunk_tokens), np.int32)
        padded[0, : len(part)] = part
        prefix = extend(model, prefix, jnp.asarray(padded), jnp.asarray([len(part)], jnp.int32))
    return prefix


def stream_after(
    model: Llama,
    start: Prefix,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_ids: Sequence[int] | int | None = None,
    key: Shaped[Array, "..."] | None = None,
) -> Iterator[tuple[int, KVCache]]:
    """`stream_tokens` of one row that has been read, with room for the new tokens. The prefix is consumed."""
    sampler = Greedy() if sampler is None else sampler
    ends = end_ids(model, eos_ids)
    held, logits = start.cache, start.logits
    state, finite = start_drawing(sampler, row_keys(key, 1), start.seen), jnp.ones(1, bool)
    try:
        for index in range(max_new_tokens):
            token, state, finite = _draw(sampler, logits, state, jnp.int32(index), finite)
            yield int(token[0]), held
            if int(token[0]) in ends or index == max_new_tokens - 1:
                return
            logits, held = model.decode(token, held)
    finally:  # also where the reader stops early
        warn_unless_finite(finite)


@functools.partial(jax.jit, static_argnames=("sampler",))
def _draw(
    sampler: Sampler,
    logits: Float[Array, "B V"],
    state: Draw,
    index: Int[Array, ""],
    finite: Bool[Array, "B"],
) -> tuple[Int[Array, "B"], Draw, Bool[Array, "B"]]:
    """`draw`, and whether all logits so far that chose a token were finite."""
    token, state = draw(sampler, logits, state, index)
    return token, state, finite & is_finite(logits, token)


def _check_list(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, got one string: pass [prompt]")
