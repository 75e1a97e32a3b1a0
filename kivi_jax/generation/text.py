"""Texts or conversations in, strings out: `complete` many, `stream` one, or read one to ask it often."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kivi_jax.cache.strategy import CacheStrategy, KVCache
from kivi_jax.checks import warn_beyond, warn_once
from kivi_jax.generation.generate import (
    Decoding,
    Draw,
    Drawing,
    Generation,
    check_count,
    check_model,
    check_sampler,
    check_start,
    draw,
    end_ids,
    generate,
    is_finite,
    read,
    row_keys,
    start_drawing,
    warn_if_long,
    warn_unless_finite,
)
from kivi_jax.generation.prefix import Prefix, check_prefix, extend, prefill, weights_mark
from kivi_jax.generation.sampling import Sampler
from kivi_jax.generation.stops import check_stop, decode_stream, find_stop
from kivi_jax.generation.templates import (
    Conversation,
    Prompt,
    continue_turn,
    encode_conversation,
    has_template,
    open_turn,
    user_turn,
)
from kivi_jax.generation.tokens import (
    CONTEXT,
    Tokenizer,
    check_tokenizer,
    encode,
    encode_after,
    encode_as_is,
    ending_ids,
    pad_prompts,
)
from kivi_jax.mesh import on_host
from kivi_jax.model.inputs import read_prompts
from kivi_jax.model.llama import Llama

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt was continued by.

    `tokens` are the new ones, the one that ended the row or completed a stop string included. It finished for
    "stop" at such a token, for "length" at `max_new_tokens`. `log_probs`, if asked for, are the tokens' under
    the model, before penalties, temperature and filters.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    log_probs: list[float] | None = None


def read_prefix(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Conversation | Sequence[Prompt],
    *,
    cache: CacheStrategy | str,
    block_tokens: int | None = None,
) -> Prefix:
    """Read texts once, to continue them many times: one for all questions, or one per question.

    The last turn of a conversation stays open: what follows goes on in it, as the tokenizer's chat template
    writes that. So an instruct model is asked about `[{"role": "user", "content": document}]`.

    Raises:
        ValueError: see `generate` and `pad_prompts`; texts and conversations are mixed.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    batch = as_batch(prompts)
    turn = not isinstance(batch[0], str) if batch else False
    if any(isinstance(prompt, str) is turn for prompt in batch):
        raise ValueError("a prefix is of texts or of conversations: read the others apart")
    ids = [
        encode(tokenizer, prompt)
        if isinstance(prompt, str)
        else encode_as_is(tokenizer, open_turn(tokenizer, prompt))
        for prompt in batch
    ]
    tokens, lengths = pad_prompts(ids)
    warn_beyond(model.config.context, int(lengths.max()))
    prefix = prefill(
        model,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        cache=cache,
        capacity=tokens.shape[1],
        block_tokens=block_tokens,
    )
    return dataclasses.replace(prefix, turn=turn, mark=weights_mark(model))


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Conversation | Sequence[Prompt],
    *,
    stop: Sequence[str] = (),
    **options: Unpack[Decoding],
) -> list[str]:
    """The continuation of every prompt: what stands after it in the text of both, special tokens left out.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: texts, or conversations (lists of `{"role": ..., "content": ...}`), which the tokenizer's
            chat template writes; or one conversation. After a `prefix` of an open turn they go on in it.
        stop: strings that end a continuation; they are left out.
        options: see `generate`. Rows end by default at the model's and the tokenizer's end of text.

    Raises:
        ValueError: see `generate`, `pad_prompts` and `encode_prompt`; a stop string is empty.
    """
    return [out.text for out in completions(model, tokenizer, prompts, stop=stop, **options)]


def completions(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Conversation | Sequence[Prompt],
    *,
    stop: Sequence[str] = (),
    log_probs: bool = False,
    **options: Unpack[Decoding],
) -> list[Completion]:
    """`complete`, with tokens, why each row finished and, with `log_probs`, how likely its tokens were.

    Raises:
        ValueError: see `complete`.
    """
    check_model(model)
    prefix, batch = options.get("prefix"), as_batch(prompts)
    ids = [encode_prompt(tokenizer, prompt, prefix, row=row) for row, prompt in enumerate(batch)]
    found = complete_tokens(model, tokenizer, ids, stop=stop, log_probs=log_probs, **options)
    ends = _ends(model, tokenizer, options)
    for prompt, out in zip(batch, found, strict=True):
        _say_if_empty(tokenizer, prompt, out.tokens[0] in ends)
    return found


def complete_tokens(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str] = (),
    log_probs: bool = False,
    **options: Unpack[Decoding],
) -> list[Completion]:
    """`completions` of prompts that are token ids already, see `encode_prompt`.

    Raises:
        ValueError: see `generate` and `pad_prompts`; a stop string is empty.
    """
    prefix, stop = options.get("prefix"), check_stop(stop)
    tokens, lengths = pad_prompts(prompts, least=0 if prefix is not None else 1)
    ends = options["eos_ids"] = _ends(model, tokenizer, options)
    before = [text_before(prompt, prefix, row=row) for row, prompt in enumerate(prompts)]

    def text(row: int, new: Sequence[int]) -> str:
        return decode_after(tokenizer, before[row], new[:-1] if new and new[-1] in ends else new)

    def stopped(new: Int[np.ndarray, "B M"], counts: Int[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
        texts = (text(row, new[row, :count].tolist()) for row, count in enumerate(counts))
        return np.array([find_stop(found, stop) is not None for found in texts])

    out = generate(
        model,
        tokens,
        lengths,
        **options,
        log_probs=log_probs,
        ends=stopped if stop else None,
    )
    return [
        _completion(out, row, stop, ends, len(prompt), functools.partial(text, row))
        for row, prompt in enumerate(prompts)
    ]


def _completion(
    out: Generation,
    row: int,
    stop: tuple[str, ...],
    ends: tuple[int, ...],
    prompt_tokens: int,
    text: functools.partial[str],
) -> Completion:
    """One row, cut at the stop string that is complete first."""
    new = out.tokens[row, : int(out.lengths[row])].tolist()
    shown = text(new)
    reason: FinishReason = "stop" if new[-1] in ends else "length"
    if (end := find_stop(shown, stop)) is not None:
        # The fewest tokens whose text has it: text grows with tokens, so halving finds them.
        low, high = 1, len(new)
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if find_stop(text(new[:middle]), stop) is not None else (middle + 1, high)
            )
        new, shown, reason = new[:low], shown[:end], "stop"
    log_probs = None if out.log_probs is None else out.log_probs[row, : len(new)].tolist()
    return Completion(shown, new, reason, prompt_tokens, log_probs)


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    stop: Sequence[str] = (),
    **options: Unpack[Decoding],
) -> Iterator[str]:
    """Pieces of the continuation as they are generated; together they are what `complete` gives.

    `prompt` is one text or one conversation. What may begin a stop string is held back until it is known.

    Raises:
        ValueError: see `complete`.
    """
    check_model(model)
    prefix, stop = options.get("prefix"), check_stop(stop)
    ids = encode_prompt(tokenizer, prompt, prefix)
    ends = options["eos_ids"] = _ends(model, tokenizer, options)
    drawn = stream_tokens(model, ids, **options)

    def tokens() -> Iterator[int]:
        for number, (token, _) in enumerate(drawn):
            _say_if_empty(tokenizer, prompt, number == 0 and token in ends)
            yield token

    return decode_stream(tokenizer, tokens(), text_before(ids, prefix), stop=stop, ends=ends)


def _say_if_empty(tokenizer: Tokenizer, prompt: Prompt, ended: bool) -> None:
    if ended and isinstance(prompt, str) and has_template(tokenizer):
        warn_once(
            "a text ended at its first token, and the tokenizer has a chat template: pass messages, not text"
        )


def as_batch(prompts: Conversation | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts; one conversation is a list of one.

    Raises:
        ValueError: it is one string, one message, or no list.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a list of strings, got one string: pass [prompt]")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be a list of texts or messages, got {prompts!r:.60}: pass [it]")
    batch: list[Any] = list(prompts)
    return [batch] if batch and isinstance(batch[0], Mapping) else batch


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, prefix: Prefix | None = None, *, row: int = 0
) -> list[int]:
    """Token ids of a prompt that begins a row or follows row `row` of a prefix, as if the two were one text.

    Raises:
        ValueError: a conversation follows a prefix of plain text; there is no tokenizer, or no such prefix;
            or see `templates.write`.
    """
    check_tokenizer(tokenizer)
    if prefix is None:
        if isinstance(prompt, str):
            return encode(tokenizer, prompt)
        return encode_conversation(tokenizer, prompt)
    check_prefix(prefix)
    if prefix.turn:
        said = user_turn(prompt) if isinstance(prompt, str) else prompt
        return encode_after(tokenizer, _tail(prefix, row), continue_turn(tokenizer, said))
    if not isinstance(prompt, str):
        raise ValueError(
            "the prefix is plain text, which no conversation can follow: pass text, or read the prefix as a "
            "conversation (kivi-jax cache save --chat)"
        )
    return encode_after(tokenizer, _tail(prefix, row), prompt)


def text_before(ids: Sequence[int], prefix: Prefix | None, *, row: int = 0) -> list[int]:
    """The tokens before a continuation on which its first characters depend."""
    return [*(() if prefix is None else _tail(prefix, row)), *ids][-CONTEXT:]


def _tail(prefix: Prefix, row: int) -> list[int]:
    return [token for token in np.asarray(prefix.tail[row % prefix.rows]).tolist() if token >= 0]


def decode_after(tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]) -> str:
    """What the tokens `new` add to the text of the tokens `before`: `Detokenizer`, all at once."""
    whole, known = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*before, *new], list(before))
    )
    return whole[len(known) :]


def _ends(model: Llama, tokenizer: Tokenizer, options: Decoding) -> tuple[int, ...]:
    given = options.get("eos_ids")
    return ending_ids(model.config, tokenizer) if given is None else end_ids(model, given)


def stream_tokens(
    model: Llama,
    prompt: Sequence[int],
    *,
    cache: CacheStrategy | str | None = None,
    prefix: Prefix | None = None,
    max_new_tokens: int,
    **options: Unpack[Drawing],
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
    warn_if_long(model, lengths, prefix, max_new_tokens)
    start = read(model, tokens, lengths, cache=strategy, prefix=prefix, room=max_new_tokens)
    yield from stream_after(model, start, max_new_tokens=max_new_tokens, **options)


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
    sampler = check_sampler(sampler)
    ends = end_ids(model, eos_ids)
    held, logits, decode = start.cache, start.logits, model.decoder()
    state, finite = start_drawing(sampler, row_keys(key, 1), start.seen), jnp.ones(1, bool)
    try:
        for index in range(max_new_tokens):
            token, state, finite = _draw(sampler, logits, state, np.int32(index), finite)
            drawn = int(on_host(token)[0])
            yield drawn, held
            if drawn in ends or index == max_new_tokens - 1:
                return
            logits, held = decode(token, held)
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
