"""Rows of the engine as they go on: what asks for them may leave at any moment, which frees their slots."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from kivi_jax.generation.engine import Engine
from kivi_jax.generation.requests import EngineClosed, Finished, Handle, QueueFull, Token, TooLong
from kivi_jax.generation.requests import Request as Row
from kivi_jax.serve.errors import Refused


@dataclass
class Written:
    """What one row has written so far."""

    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ended(self) -> Finished:
        """How it finished, once it has."""
        assert self.finished is not None
        return self.finished

    @property
    def shown(self) -> str:
        """The text of its tokens, which may lack an end where the row was cut."""
        return "".join(token.text for token in self.tokens)


def submit(engine: Engine, rows: Sequence[Row]) -> list[Handle]:
    """Queue all rows, or none.

    Raises:
        Refused: the engine takes one of them never, or not now.
    """
    handles: list[Handle] = []
    try:
        for row in rows:
            handles.append(engine.submit(row))
    except (ValueError, QueueFull, EngineClosed) as error:
        cancel(handles)
        raise refused(error) from None
    return handles


def refused(error: Exception) -> Refused:
    """What the engine raised, as what HTTP says."""
    match error:
        case TooLong():
            return Refused(str(error), code="context_length_exceeded")
        case QueueFull():
            return Refused(str(error), status=429, code="queue_full")
        case EngineClosed():
            return Refused(str(error), status=503, code="closed")
    return Refused(str(error))


def cancel(handles: Sequence[Handle]) -> None:
    """Free the slots of those that still run."""
    for handle in handles:
        handle.cancel()


async def follow(handles: Sequence[Handle]) -> AsyncGenerator[tuple[int, Token | Finished]]:
    """The tokens of all rows as they come, each with its row's number, and at last how each row finished.

    Rows are cancelled where the reader stops early.

    Raises:
        Refused: the engine closed meanwhile, or a row waited for a slot until its time was over.
    """
    streams = [aiter(handle) for handle in handles]
    waiting = {asyncio.ensure_future(anext(stream, None)): row for row, stream in enumerate(streams)}
    try:
        while waiting:
            ready, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(ready, key=waiting.__getitem__):
                row = waiting.pop(task)
                token = task.result()
                yield row, _ended(handles[row]) if token is None else token
                if token is not None:
                    waiting[asyncio.ensure_future(anext(streams[row], None))] = row
    except EngineClosed as error:
        raise refused(error) from None
    finally:
        cancel(handles)
        for task in waiting:
            task.cancel()


def _ended(handle: Handle) -> Finished:
    """How a row finished; it may have been cut by the time that it may take, if it has begun."""
    finished = handle.finished
    assert finished is not None
    if finished.reason == "deadline" and not finished.tokens:
        raise Refused("no slot was free in time: ask again later", status=429, code="timeout")
    if finished.reason == "cancelled":
        raise Refused("the server is closing", status=503, code="closed")
    return finished
