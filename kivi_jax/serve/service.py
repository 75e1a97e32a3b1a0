"""A request's way: read, submitted, answered whole or in chunks. It knows nothing of HTTP."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import AsyncGenerator, Sequence

import anyio
from openai.types import CompletionUsage, Model
from pydantic import BaseModel

from kivi_jax.cache.names import cache_name
from kivi_jax.cache.segments import round_up
from kivi_jax.cache.strategy import CacheStrategy, full
from kivi_jax.config import ModelConfig
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.requests import Finished, Handle, Token
from kivi_jax.generation.templates import has_template
from kivi_jax.generation.tokens import Tokenizer, ending_ids
from kivi_jax.plan.memory import plan_cache
from kivi_jax.serve.answers import Answer, answer_to, dump, usage_of
from kivi_jax.serve.errors import Refused, as_error
from kivi_jax.serve.metrics import Metrics
from kivi_jax.serve.prompts import prompts_of, rows_of
from kivi_jax.serve.rows import Written, cancel, follow, submit
from kivi_jax.serve.schema import Request, TextRequest

_STEP = 128  # tokens by which a cache's weight is told


@dataclasses.dataclass(frozen=True)
class Pending:
    """A request whose rows are queued or run."""

    request: Request
    prompts: Sequence[Sequence[int]]
    handles: Sequence[Handle]
    answer: Answer
    since: float


class Service:
    """One model, under one name."""

    def __init__(self, engine: Engine, *, name: str, fingerprint: str, timeout: float | None):
        """Answer through an engine, each request within `timeout` seconds, waiting included, if given."""
        assert engine.tokenizer is not None
        self.engine, self.name, self.fingerprint, self.timeout = engine, name, fingerprint, timeout
        self.tokenizer: Tokenizer = engine.tokenizer
        self.ends = ending_ids(engine.model.config, self.tokenizer)
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self._dtype = str(engine.model.embed.embedding[...].dtype)
        self._one = anyio.CapacityLimiter(1)  # tokenizers are not made for several threads

    @property
    def model(self) -> Model:
        """What `/v1/models` says: also what a page must know."""
        return Model(
            id=self.name,
            created=self.created,
            object="model",
            owned_by="kivi-jax",
            max_model_len=self.engine.context,  # pyright: ignore[reportCallIssue]: others' name for it
            cache=cache_name(self.engine.strategy),  # pyright: ignore[reportCallIssue]
            chat=has_template(self.tokenizer),  # pyright: ignore[reportCallIssue]
        )

    async def start(self, request: Request) -> Pending:
        """Queue the rows of a request.

        Raises:
            Refused: it cannot be answered, or not now.
        """
        since = time.monotonic()
        if request.model != self.name:
            raise Refused(
                f"there is no model {request.model!r:.60}, but {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        if request.stream and isinstance(request, TextRequest) and request.echo and request.top is not None:
            raise Refused(
                "echo with logprobs is not streamed: leave out stream", param="stream", code="unsupported"
            )
        prepare = functools.partial(prompts_of, self.tokenizer, request)
        prompts = await anyio.to_thread.run_sync(prepare, limiter=self._one)
        rows = rows_of(request, prompts, context=self.engine.context, timeout=self.timeout)
        answer = answer_to(
            request,
            self.tokenizer,
            prompts=prompts,
            ends=self.ends,
            model=self.name,
            fingerprint=self.fingerprint,
        )
        return Pending(request, prompts, submit(self.engine, rows), answer, since)

    async def whole(self, pending: Pending) -> BaseModel:
        """The answer at once. Where the caller is cancelled, so are its rows.

        Raises:
            Refused: see `follow`.
        """
        try:
            rows = [Written() for _ in pending.handles]
            async with contextlib.aclosing(self._written(pending, rows)) as events:
                async for _ in events:
                    pass
            return pending.answer.whole(rows, usage_of(pending.prompts, rows))
        finally:
            cancel(pending.handles)

    async def chunks(self, pending: Pending) -> AsyncGenerator[str]:
        """The data of server-sent events, up to what says that all is done; its reader cancels the rows."""
        options, answer = pending.request.stream_options, pending.answer
        rows = [Written() for _ in pending.handles]

        async def data(chunk: BaseModel) -> str:
            if not (options.include_usage or options.continuous_usage_stats):
                return dump(chunk)
            usage = await self._usage_so_far(pending, rows) if options.continuous_usage_stats else None
            return dump(chunk.model_copy(update={"usage": usage}))

        try:
            for row in range(len(rows)):
                if (first := answer.begin(row)) is not None:
                    yield await data(first)
            async with contextlib.aclosing(self._written(pending, rows)) as events:
                async for row, event in events:
                    if isinstance(event, Finished):
                        yield await data(answer.end(row, event, event.text[len(rows[row].shown) :]))
                    elif (chunk := answer.chunk(row, event)) is not None:
                        yield await data(chunk)
            if options.include_usage:
                yield dump(answer.counted(usage_of(pending.prompts, rows)))
            yield "[DONE]"
        except Refused as error:
            yield json.dumps(as_error(error))

    async def _written(
        self, pending: Pending, rows: Sequence[Written]
    ) -> AsyncGenerator[tuple[int, Token | Finished]]:
        """`follow`, noted in `rows` and in the metrics."""
        began = False
        async with contextlib.aclosing(follow(pending.handles)) as events:
            async for row, event in events:
                if isinstance(event, Finished):
                    rows[row].finished = event
                else:
                    rows[row].tokens.append(event)
                if not began:
                    self.metrics.first.observe(time.monotonic() - pending.since)
                    began = True
                yield row, event
        self.metrics.seconds.observe(time.monotonic() - pending.since)

    async def _usage_so_far(self, pending: Pending, rows: Sequence[Written]) -> CompletionUsage:
        """Also what the caches of these tokens weigh, and what full ones would."""
        usage = usage_of(pending.prompts, rows)
        prompts = [prompt for prompt in pending.prompts for _ in range(pending.request.n)]
        counts = [(len(prompt), len(written.tokens)) for prompt, written in zip(prompts, rows, strict=True)]
        weights = await anyio.to_thread.run_sync(lambda: [self._weigh(*count) for count in counts])
        held, whole = (sum(parts) for parts in zip(*weights, strict=True))
        return usage.model_copy(update={"cache_bytes": held, "full_cache_bytes": whole})

    def _weigh(self, prompt: int, new: int) -> tuple[int, int]:
        """The bytes of a row's cache and of a full one, of a few more tokens than it has."""
        context, config = self.engine.context, self.engine.model.config
        prompt, tokens = (min(round_up(count, _STEP), context) for count in (prompt, prompt + new))
        return weigh(config, self.engine.strategy, self._dtype, prompt, tokens)


@functools.lru_cache(maxsize=1024)
def weigh(
    config: ModelConfig, strategy: CacheStrategy, dtype: str, prompt: int, tokens: int
) -> tuple[int, int]:
    """The bytes of a cache of so many tokens, the first ones of a prompt, and of a full one."""
    plans = (
        plan_cache(config, kind, batch=1, context=tokens, dtype=dtype, prompt_tokens=prompt)
        for kind in (strategy, full())
    )
    held, whole = (plan["total"] for plan in plans)
    return held, whole
