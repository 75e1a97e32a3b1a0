"""Texts become token ids, those that begin a row and those that follow one. Read `templates.py` next."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from kivi_jax.cache.segments import round_up
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama

CONTEXT = 32  # tokens before a text that decide how it is spelled
_ANCHORS = ("\n", ".")  # what a text may follow without merging with it


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """A mapping with `input_ids`; text that continues another is read without special tokens."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        ...


def check_tokenizer(tokenizer: Tokenizer | None) -> None:
    """Refuse to read text without a tokenizer.

    Raises:
        ValueError: there is none, or something else.
    """
    if tokenizer is None:
        raise ValueError(
            "there is no tokenizer: copy its files beside the weights, or pass token ids to kj.generate"
        )
    if isinstance(tokenizer, Llama) or not callable(tokenizer):  # a model can be called and decodes, too
        raise ValueError(
            f"tokenizer is of type {type(tokenizer).__name__}: pass what load gave, the model before its "
            "tokenizer"
        )


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that begins a row.

    Special tokens are put before it, unless the text has its begin-of-text token already.

    Raises:
        ValueError: the text has bytes or halves of characters that are no Unicode.
    """
    begin = getattr(tokenizer, "bos_token", None)
    if begin and text.startswith(begin):
        return encode_as_is(tokenizer, text)
    return _ids(tokenizer(_unicode(text)))


def encode_as_is(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text without special tokens around it; those that it names are tokens.

    Raises:
        ValueError: the text has bytes or halves of characters that are no Unicode.
    """
    return _ids(tokenizer(_unicode(text), add_special_tokens=False))


def encode_after(tokenizer: Tokenizer, before: Sequence[int], text: str) -> list[int]:
    """Token ids of a text that follows the tokens `before`: those that it has where both are one text.

    Some tokenizers put a space before whatever they are given, so the text is spelled behind the end of what
    it follows, and that is left out again. Where the two would merge into one token, which cannot be had any
    more, it is spelled behind a character that does not merge.
    """
    if not text:
        return []
    for first in range(max(len(before) - CONTEXT, 0), len(before)):
        known = list(before[first:])
        shown = tokenizer.decode(known, skip_special_tokens=False)
        if encode_as_is(tokenizer, shown) == known:
            if (new := _spell(tokenizer, known, shown, text)) is not None:
                return new
            break
    for anchor in _ANCHORS:
        known = encode_as_is(tokenizer, anchor)
        new = _spell(tokenizer, known, anchor, text)
        if new is not None and tokenizer.decode(known, skip_special_tokens=False) == anchor:
            return new
    return encode_as_is(tokenizer, text)


def _spell(tokenizer: Tokenizer, known: list[int], shown: str, text: str) -> list[int] | None:
    """What `text` adds to the tokens `known` of the text `shown`; None if it changes them."""
    joint = encode_as_is(tokenizer, shown + text)
    return joint[len(known) :] if joint[: len(known)] == known else None


def _unicode(text: str) -> str:
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError(
            "the text holds what is no Unicode (half a character, or not UTF-8): convert it first"
        )
    return text


def _ids(encoding: Any) -> list[int]:
    return list(encoding["input_ids"])


def ending_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end a text: the model's, and the tokenizer's own.

    Fine-tunes of base models often keep the base's end in config.json, so either of them ends a text.
    """
    own = getattr(tokenizer, "eos_token_id", None)
    ends = (*config.eos_ids, *(() if own is None else (int(own),)))
    return tuple(dict.fromkeys(end for end in ends if 0 <= end < config.vocab_size))  # others are never drawn


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, least: int = 1
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """Right-pad token ids to one width, and their lengths, of which each is at least `least`.

    The width is `padded_width`, so that prompts of similar lengths share a compiled program.

    Raises:
        ValueError: there is no prompt, or one has too few tokens.
    """
    if not prompts:
        raise ValueError("there must be at least one prompt")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.min() < least:
        raise ValueError(f"prompt {int(lengths.argmin())} has no tokens: pass at least one")
    tokens = np.zeros((len(prompts), padded_width(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def padded_width(longest: int) -> int:
    """The width of prompts of up to `longest` tokens: at most an eighth more, or a multiple of 32."""
    step = max(32, 1 << max(longest.bit_length() - 4, 0))
    return round_up(longest, step)
