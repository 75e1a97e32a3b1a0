"""A conversation that keeps its cache: a new turn is appended to what has been read.

Its tokens are always those of the tokenizer's chat template, applied to the whole conversation. Where a
template writes earlier turns anew (it leaves out what a model thought, or spells a reply in other tokens than
it was drawn in), what is held does not begin those tokens any more, and the conversation is read again.

What is read first is read as a prompt (a prompt selector of SCOPE selects from it); all that follows is
decoded, messages and replies alike.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from kivi_jax.cache.names import strategy_of
from kivi_jax.cache.strategy import CacheStrategy, shorten
from kivi_jax.checks import instance, warn_beyond, whole
from kivi_jax.generation.generate import check_count, check_model, check_sampler
from kivi_jax.generation.prefix import Prefix, placed, prefill
from kivi_jax.generation.sampling import Sampler
from kivi_jax.generation.templates import Message, encode_conversation, has_template
from kivi_jax.generation.text import append, decode_after, stream_after
from kivi_jax.generation.tokens import (
    CONTEXT,
    Tokenizer,
    check_tokenizer,
    encode,
    encode_after,
    ending_ids,
    pad_prompts,
)
from kivi_jax.model.llama import Llama


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
        system: str | None = None,
    ):
        """Start a conversation of up to `context` tokens, which begins with what the `system` says.

        Raises:
            ValueError: there is no tokenizer, the strategy does not fit the model, `context` is not positive,
                or there is a system message but no chat template.
        """
        check_model(model)
        check_tokenizer(tokenizer)
        if whole("context", context) < 1:
            raise ValueError(f"{context=} must be positive")
        if system is not None:
            instance("system", system, str, "pass a text")
        check_sampler(sampler)
        if system is not None and not has_template(tokenizer):
            raise ValueError(
                "the model's tokenizer has no chat template, which a system message needs: leave it out"
            )
        self.model, self.tokenizer, self.cache = model, tokenizer, strategy_of(cache)
        self.cache.check(model.config)
        warn_beyond(model.config.context, context)
        self.context, self.sampler, self.system = context, sampler, system
        self.ends = ending_ids(model.config, tokenizer)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.asked: list[Message] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )  # all up to the last reply
        self.tokens: list[int] = []
        self.replied: int | None = None  # where the last reply begins in them
        self.prefix: Prefix | None = None  # the first `cached` tokens
        self.cached = 0

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as it was said."""
        if self.replied is None:
            return list(self.asked)
        before, reply = self.tokens[: self.replied], self.tokens[self.replied :]
        if reply and reply[-1] in self.ends:
            reply.pop()
        text = decode_after(self.tokenizer, before[-CONTEXT:], reply)
        return [*self.asked, {"role": "assistant", "content": text}]

    def reply(self, message: str, *, max_new_tokens: int, key: Key[Array, ""] | None = None) -> Iterator[int]:
        """Tokens of the reply as they are generated, the one that ends it included.

        It is cut short where the context ends, or where the caller stops asking: what was given until then is
        the reply.

        Raises:
            ValueError: the message is no text or leaves no room for a reply, or the template refuses it; the
                conversation is as it was.
        """
        instance("message", message, str, "a reply answers what the user says")
        max_new_tokens = check_count(max_new_tokens)
        asked = [*self.messages, {"role": "user", "content": message}]
        wanted = self._spell(asked)
        room = self.context - len(wanted)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(self.tokens)} tokens and the message "
                f"{len(wanted) - len(self.tokens)}, which leaves no room for a reply in a context of "
                f"{self.context}: reset the conversation (/reset), or start one with a larger context "
                "(--context)"
            )
        start = self._read(wanted)
        self.asked, self.tokens, self.replied = asked, wanted, len(wanted)
        tokens = stream_after(
            self.model,
            start,
            max_new_tokens=min(max_new_tokens, room),
            sampler=self.sampler,
            eos_ids=self.ends,
            key=key,
        )
        last: Prefix | None = None
        for token, held in tokens:
            last, self.cached = dataclasses.replace(start, cache=held), len(self.tokens)
            self.tokens.append(token)
            self.prefix = last
            yield token
            self.prefix = None  # what draws the next token consumes it, and may be interrupted
        self.prefix = last

    def _spell(self, asked: Sequence[Message]) -> list[int]:
        """The tokens of the conversation up to where the reply to its last message begins.

        Without a chat template a message stands on a line of its own after what was said.

        Raises:
            ValueError: the message has no tokens, or the template refuses it.
        """
        if has_template(self.tokenizer):
            return encode_conversation(self.tokenizer, asked)
        message = asked[-1]["content"]
        new = (
            encode_after(self.tokenizer, self.tokens, f"\n{message}")
            if self.tokens
            else encode(self.tokenizer, message)
        )
        if not new:
            raise ValueError("the message has no tokens: write something")
        return self.tokens + new

    def _read(self, wanted: list[int]) -> Prefix:
        """All of `wanted`, of which what is held already is not read again."""
        held, self.prefix = self.prefix, None  # consumed
        known = _common(self.tokens[: self.cached], wanted[:-1])  # the last one's logits are needed
        if held is not None and (cache := shorten(held.cache, known)) is not None:
            seen = np.zeros(held.seen.shape, bool)
            seen[0, wanted[:known]] = True
            held = dataclasses.replace(held, cache=cache, seen=jnp.asarray(seen))
            return append(self.model, placed(held, self.model.mesh), wanted[known:])
        tokens, lengths = (jnp.asarray(x) for x in pad_prompts([wanted]))
        return prefill(
            self.model,
            tokens[:, : self.context],
            lengths,
            cache=self.cache,
            capacity=self.context,
        )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
