"""A request that an engine has taken, from the queue to its end. Read `engine.py` next."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Array, Float

from kivi_jax.generation.requests import Finished, Handle, Reason, Request, Token
from kivi_jax.generation.slots import LogProbs
from kivi_jax.generation.stops import Decoder


@dataclass(eq=False)
class Row:
    """First it waits, then its prompt is read, then it has a slot; `handle` tells whoever asked."""

    handle: Handle
    ends: tuple[int, ...]
    decoder: Decoder | None  # none without a tokenizer
    asked_at: float = field(default_factory=time.monotonic)
    begun_at: float | None = None
    read_at: float | None = None
    read: int = 0  # tokens of the prompt
    cached: int = 0  # those of them that another prompt began with
    logits: Float[Array, "1 V"] | None = None  # of the first new token, from the prompt's end to the slot
    prompt_tokens: list[Token] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.handle.request

    @property
    def prompt(self) -> tuple[int, ...]:
        """The request's tokens."""
        return tuple(self.request.tokens)

    @property
    def overdue(self) -> Reason | None:
        """Why it is to end before its time, if it is."""
        if self.handle.cancelled:
            return "cancelled"
        late = self.request.deadline is not None and time.monotonic() >= self.request.deadline
        return "deadline" if late else None

    def take_prompt(self, read: int, likely: LogProbs) -> None:
        """Note how likely the tokens after the ones just read are."""
        following = self.prompt[self.read + 1 : self.read + 1 + read]
        self.prompt_tokens += _tokens(following, likely, self.request.log_probs)

    def take(self, ids: Sequence[int], likely: LogProbs, *, ended: bool) -> Reason | None:
        """Hand on tokens, up to a stop string; the last of them has `ended` the row. Why it has, if so."""
        asks, decoder = self.request.log_probs, self.decoder
        new: list[Token] = []
        reason: Reason | None = None
        for number, token in enumerate(_tokens(ids, None if asks is None else likely, asks)):
            text = "" if decoder is None else decoder.push(token.id)
            if ended and number == len(ids) - 1:
                reason = "stop" if token.id in self.ends else "length"
                text += "" if decoder is None else decoder.finish()
            if decoder is not None and decoder.stopped:
                reason = "stop"
            self.tokens.append(token.id)
            self.text.append(text)
            new.append(Token(token.id, text, token.log_prob, token.top))
            if reason:
                break
        self.handle.push(new, self._finished(reason) if reason else None)
        return reason

    def end(self, reason: Reason) -> None:
        """Say that there are no more tokens."""
        if self.decoder is not None:
            self.text.append(self.decoder.finish())
        self.handle.push([], self._finished(reason))

    def _finished(self, reason: Reason) -> Finished:
        now, request = time.monotonic(), self.request
        begun, read = self.begun_at or now, self.read_at or now
        scored = (Token(request.tokens[0], ""), *self.prompt_tokens) if request.prompt_log_probs else None
        return Finished(
            reason=reason,
            tokens=tuple(self.tokens),
            text="".join(self.text),
            prompt_tokens=len(request.tokens),
            cached_tokens=self.cached,
            prompt_log_probs=scored,
            queued_s=begun - self.asked_at,
            read_s=read - begun,
            decode_s=now - read,
        )


def _tokens(ids: Sequence[int], likely: LogProbs | None, top: int | None) -> list[Token]:
    """Tokens without text, and how likely they were if that is known, with `top` alternatives."""
    if likely is None:
        return [Token(token, "") for token in ids]
    found = (ids, likely.token.tolist(), likely.top.tolist(), likely.top_log_probs.tolist())
    return [
        Token(token, "", log_prob, tuple(zip(best, those, strict=True))[: top or 0])
        for token, log_prob, best, those in zip(*found, strict=False)  # a chunk's padding comes last
    ]
