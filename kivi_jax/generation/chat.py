"""A conversation that keeps its cache: a new turn is appended to what has been read, which is never re-read.

The first message is read as a prompt (a prompt selector of SCOPE selects from it); all that follows is
decoded, messages and replies alike.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.generation.prefix import Prefix, prefill
from kivi_jax.generation.sampling import Sampler
from kivi_jax.generation.text import Tokenizer, append, encode, pad_prompts, stream_after
from kivi_jax.model.llama import Llama

REPLY = "\u241e"  # stands for a reply where only what a template writes after it is wanted


class Chat:
    """One row of tokens, messages and replies in turn, and the cache of all of them but the last."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        cache: CacheStrategy | str,
        context: int,
        sampler: Sampler | None = None,
    ):
        """Start a conversation of up to `context` tokens.

        Raises:
            ValueError: the strategy does not fit the model, or `context` is not positive.
        """
        if context < 1:
            raise ValueError(f"{context=} must be positive")
        self.model, self.tokenizer, self.cache = model, tokenizer, strategy_of(cache)
        self.cache.check(model.config)
        self.context, self.sampler = context, sampler
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens: list[int] = []
        self.prefix: Prefix | None = None  # the first `cached` tokens
        self.cached = 0

    def reply(self, message: str, *, max_new_tokens: int, key: Key[Array, ""] | None = None) -> Iterator[int]:
        """Tokens of the reply as they are generated, the one that ends it included.

        It is cut short where the context ends.

        Raises:
            ValueError: the message leaves no room for a reply; the conversation is as it was.
        """
        turn = turn_tokens(self.tokenizer, message, first=not self.tokens)
        room = self.context - len(self.tokens) - len(turn)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(self.tokens)} tokens and the message {len(turn)}, which leaves "
                f"no room for a reply in a context of {self.context}: reset the conversation (/reset), or "
                "start one with a larger context (--context)"
            )
        eos_ids = self.model.config.eos_ids
        if self.tokens and self.tokens[-1] in eos_ids and turn[0] in eos_ids:
            self.tokens.pop()  # the template ends the reply by itself
        self.tokens += turn
        start = self._read()
        tokens = stream_after(
            self.model, start, max_new_tokens=min(max_new_tokens, room), sampler=self.sampler, key=key
        )
        for token, held in tokens:
            self.prefix, self.cached = dataclasses.replace(start, cache=held), len(self.tokens)
            self.tokens.append(token)
            yield token

    def _read(self) -> Prefix:
        """Everything so far, of which only what is new is read."""
        new = self.tokens[self.cached :]
        if self.prefix is not None:
            seen = np.zeros(self.prefix.seen.shape, bool)
            seen[0, self.tokens] = True
            return append(self.model, dataclasses.replace(self.prefix, seen=jnp.asarray(seen)), new)
        tokens, lengths = (jnp.asarray(x) for x in pad_prompts([new]))
        return prefill(
            self.model,
            tokens[:, : self.context],
            lengths,
            cache=self.cache,
            capacity=self.context,
        )


def turn_tokens(tokenizer: Tokenizer, message: str, *, first: bool) -> list[int]:
    """What a message adds to a conversation, up to where its reply begins.

    With the tokenizer's chat template, if it has one: what that writes from the end of the last reply on.
    Otherwise the message itself, on a line of its own.

    Raises:
        ValueError: the message has no tokens, or the template does not show replies as they are.
    """
    if not getattr(tokenizer, "chat_template", None):
        ids = encode(tokenizer, message if first else f"\n{message}", begins=first)
    else:
        turns = [{"role": "user", "content": message}]
        if not first:
            past = [{"role": "user", "content": "."}, {"role": "assistant", "content": REPLY}]
            turns = past + turns
        templated: Any = tokenizer
        text = templated.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if not first and REPLY not in text:
            raise ValueError(
                "the tokenizer's chat template leaves replies out: a turn cannot be appended to it"
            )
        ids = encode(tokenizer, text if first else text.rpartition(REPLY)[2], begins=False)
    if not ids:
        raise ValueError("the message has no tokens: write something")
    return ids
