"""What rows have written becomes OpenAI's answers, whole or in chunks: the `openai` package's own types."""

import itertools
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat import chat_completion as chat
from openai.types.chat import chat_completion_chunk as chunks
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from kivi_jax.generation.requests import Finished, Token
from kivi_jax.generation.tokens import Tokenizer
from kivi_jax.serve.rows import Written
from kivi_jax.serve.schema import ChatRequest, Request, TextRequest

UNLIKELY = -9999.0  # OpenAI's minus infinity


@runtime_checkable
class Answer(Protocol):
    """An answer to one request, which has `choices` rows for every prompt."""

    def begin(self, row: int) -> BaseModel | None:
        """The chunk before a row's first token, if there is one."""
        ...

    def chunk(self, row: int, token: Token) -> BaseModel | None:
        """The chunk of a token; None if it shows nothing yet."""
        ...

    def end(self, row: int, finished: Finished, rest: str) -> BaseModel:
        """A row's last chunk, and what was held back of its text until then."""
        ...

    def counted(self, usage: CompletionUsage) -> BaseModel:
        """The chunk that has the usage alone."""
        ...

    def whole(self, rows: Sequence[Written], usage: CompletionUsage) -> BaseModel:
        """All of it at once."""
        ...


class ChatAnswer:
    """`Answer` of `/v1/chat/completions`."""

    def __init__(
        self, request: ChatRequest, tokenizer: Tokenizer, ends: Sequence[int], heading: dict[str, Any]
    ):
        """Of a request; tokens in `ends` are not shown."""
        self.request, self.tokenizer, self.ends, self.heading = request, tokenizer, frozenset(ends), heading

    def begin(self, row: int) -> ChatCompletionChunk:
        """See `Answer`."""
        return self._chunk(row, {"role": "assistant", "content": ""})

    def chunk(self, row: int, token: Token) -> ChatCompletionChunk | None:
        """See `Answer`."""
        shown = self._shown([token])
        if not token.text and not shown:
            return None
        return self._chunk(row, {"content": token.text}, shown)

    def end(self, row: int, finished: Finished, rest: str) -> ChatCompletionChunk:
        """See `Answer`."""
        return self._chunk(row, {"content": rest} if rest else {}, reason=_reason(finished))

    def counted(self, usage: CompletionUsage) -> ChatCompletionChunk:
        """See `Answer`."""
        return ChatCompletionChunk(**self.heading, object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self, rows: Sequence[Written], usage: CompletionUsage) -> ChatCompletion:
        """See `Answer`."""
        choices: list[chat.Choice] = []
        for row, written in enumerate(rows):
            message = ChatCompletionMessage(role="assistant", content=written.ended.text, refusal=None)
            shown = chat.ChoiceLogprobs(content=self._shown(written.tokens), refusal=None)
            choices.append(
                chat.Choice(
                    index=row,
                    message=message,
                    logprobs=None if self.request.top is None else shown,
                    finish_reason=_reason(written.ended),
                )
            )
        return ChatCompletion(**self.heading, object="chat.completion", choices=choices, usage=usage)

    def _chunk(
        self,
        row: int,
        delta: dict[str, Any],
        shown: list[ChatCompletionTokenLogprob] | None = None,
        reason: Literal["stop", "length"] | None = None,
    ) -> ChatCompletionChunk:
        choice = chunks.Choice(
            index=row,
            delta=chunks.ChoiceDelta(**delta),
            finish_reason=reason,
            logprobs=chunks.ChoiceLogprobs(content=shown, refusal=None) if shown else None,
        )
        return ChatCompletionChunk(**self.heading, object="chat.completion.chunk", choices=[choice])

    def _shown(self, tokens: Sequence[Token]) -> list[ChatCompletionTokenLogprob]:
        if self.request.top is None:
            return []
        return [
            ChatCompletionTokenLogprob(
                **self._likely(token.id, token.log_prob),
                top_logprobs=[TopLogprob(**self._likely(*other)) for other in token.top],
            )
            for token in tokens
            if token.id not in self.ends
        ]

    def _likely(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = spelled(self.tokenizer, token)
        # A token that is a part of a character is not known by its bytes.
        found = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "bytes": found, "logprob": finite(log_prob)}


class TextAnswer:
    """`Answer` of `/v1/completions`."""

    def __init__(
        self,
        request: TextRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        heading: dict[str, Any],
    ):
        """Of a request, whose prompts are shown before their continuations if it asks for that."""
        self.request, self.tokenizer, self.prompts, self.heading = request, tokenizer, prompts, heading
        self.offsets: dict[int, int] = {}  # characters that a row has shown

    def begin(self, row: int) -> Completion | None:
        """See `Answer`: with `echo`, the prompt."""
        if not self.request.echo:
            return None
        text = self._prompt(row)
        self.offsets[row] = len(text)
        return self._completion([_choice(row, text, None, None)])

    def chunk(self, row: int, token: Token) -> Completion | None:
        """See `Answer`."""
        logprobs = None
        if self.request.top is not None:
            logprobs = self._logprobs([token], self.offsets.get(row, 0))
            self.offsets[row] = self.offsets.get(row, 0) + self._length(token)
        if not token.text and logprobs is None:
            return None
        return self._completion([_choice(row, token.text, None, logprobs)])

    def end(self, row: int, finished: Finished, rest: str) -> Completion:
        """See `Answer`."""
        return self._completion([_choice(row, rest, _reason(finished), None)])

    def counted(self, usage: CompletionUsage) -> Completion:
        """See `Answer`."""
        return Completion(**self.heading, object="text_completion", choices=[], usage=usage)

    def whole(self, rows: Sequence[Written], usage: CompletionUsage) -> Completion:
        """See `Answer`."""
        choices: list[CompletionChoice] = []
        for row, written in enumerate(rows):
            finished = written.ended
            tokens = [*(finished.prompt_log_probs or ()), *written.tokens]
            text = self._prompt(row) + finished.text if self.request.echo else finished.text
            logprobs = None if self.request.top is None else self._logprobs(tokens, 0)
            choices.append(_choice(row, text, _reason(finished), logprobs))
        return self._completion(choices, usage=usage)

    def _prompt(self, row: int) -> str:
        ids = self.prompts[row // self.request.n]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _completion(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        # Unchecked: the type forgets that a first token has no log-probability, and a chunk no reason.
        return Completion.construct(**self.heading, object="text_completion", choices=choices, **more)

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Logprobs:
        lengths = [self._length(token) for token in tokens]
        offsets = [offset + shown for shown in itertools.accumulate(lengths[:-1], initial=0)]
        return Logprobs.construct(
            tokens=[spelled(self.tokenizer, token.id) for token in tokens],
            token_logprobs=[None if token.log_prob is None else finite(token.log_prob) for token in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=offsets,
        )

    def _length(self, token: Token) -> int:
        """Characters that a token shows, on its own."""
        return len(self.tokenizer.decode([token.id], skip_special_tokens=True))

    def _top(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the one drawn, by their text: of several with one text, the likeliest."""
        if token.log_prob is None:
            return None
        found: dict[str, float] = {}
        for other, log_prob in (*token.top, (token.id, token.log_prob)):
            found.setdefault(spelled(self.tokenizer, other), finite(log_prob))
        return found


def answer_to(
    request: Request,
    tokenizer: Tokenizer,
    *,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    model: str,
    fingerprint: str,
) -> Answer:
    """The answer that a request is to get."""
    kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
    heading = dict(
        id=f"{kind}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model,
        system_fingerprint=fingerprint,
    )
    if isinstance(request, ChatRequest):
        return ChatAnswer(request, tokenizer, ends, heading)
    assert isinstance(request, TextRequest)
    return TextAnswer(request, tokenizer, prompts, heading)


def usage_of(prompts: Sequence[Sequence[int]], rows: Sequence[Written]) -> CompletionUsage:
    """Tokens so far; a prompt counts once, however many choices it has."""
    read = sum(map(len, prompts))
    new = sum(len(row.tokens) if row.finished is None else len(row.finished.tokens) for row in rows)
    choices = len(rows) // len(prompts)
    firsts = [row.finished for row in rows[::choices]]
    cached = sum(row.cached_tokens for row in firsts if row is not None)
    return CompletionUsage(
        prompt_tokens=read,
        completion_tokens=new,
        total_tokens=read + new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """One token alone, as text."""
    return tokenizer.decode([token], skip_special_tokens=False)


def finite(log_prob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return log_prob if log_prob is not None and math.isfinite(log_prob) else UNLIKELY


def dump(answer: BaseModel) -> str:
    """JSON of what was said, be it null, and of nothing else."""
    return answer.model_dump_json(exclude_unset=True, warnings=False)


def _choice(
    row: int, text: str, reason: Literal["stop", "length"] | None, logprobs: Logprobs | None
) -> CompletionChoice:
    return CompletionChoice.construct(index=row, text=text, finish_reason=reason, logprobs=logprobs)


def _reason(finished: Finished) -> Literal["stop", "length"]:
    """Why a row finished; time that was over cut it as its most tokens would have."""
    return "stop" if finished.reason == "stop" else "length"
