"""A file of requests in OpenAI's batch format becomes a file of answers in that format, resumed after a cut.

A line's `id` is a digest of all that its answer depends on, so what was computed otherwise is told apart.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from convert.files import locked, writing
from kivi_jax.eval.jobs import append, repeated
from kivi_jax.eval.samples import read_rows
from kivi_jax.serve.answers import dump
from kivi_jax.serve.errors import Refused, as_error
from kivi_jax.serve.schema import ChatRequest, Request, TextRequest, read
from kivi_jax.serve.service import Service

KINDS: dict[str, type[Request]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": TextRequest}
_BEGIN = '{"id": "batch_req_'


@dataclass(frozen=True)
class Question:
    """One line of the input."""

    custom_id: str
    url: str
    body: Mapping[str, Any]

    def digest(self, fingerprint: str) -> str:
        """Names what is asked, and what it is asked of."""
        asked = json.dumps([fingerprint, self.custom_id, self.url, self.body], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:24]


def read_questions(source: Path, model: str) -> list[Question]:
    """The requests in a file, which all ask for `model`.

    Raises:
        ValueError: it is no file of JSON lines, or a line is no request that can be answered here, or two
            have one `custom_id`.
    """
    if not source.is_file():
        raise ValueError(f"{source} is no file of requests: pass one, with a JSON object a line")
    questions = [
        _question(row, f"{source}: row {number}", model) for number, row in enumerate(read_rows(source), 1)
    ]
    if twice := repeated(question.custom_id for question in questions):
        raise ValueError(f"{source} has the custom_id {twice} twice: give each request its own")
    return questions


def _question(row: Mapping[str, Any], place: str, model: str) -> Question:
    match row:
        case {"custom_id": str(name), "method": "POST", "url": str(url), "body": dict(body)}:
            if url not in KINDS:
                raise ValueError(f"{place} asks {url!r:.60}: only {' and '.join(KINDS)} are answered")
            if (asked := body.get("model")) != model:
                raise ValueError(
                    f"{place} asks for the model {asked!r:.60}, not {model!r}: change it, or pass --name"
                )
            if body.get("stream"):
                raise ValueError(f"{place} wants a stream, which a file cannot have: leave stream out")
            return Question(name, url, body)
    raise ValueError(
        f"{place} is no request of a batch: it must have custom_id, method POST, url and body, "
        f"not {', '.join(row)}"
    )


def answer_batch(
    service: Service, questions: Sequence[Question], destination: Path, *, together: int, progress: Progress
) -> int:
    """Answer what `destination` does not hold, `together` at once, and append as it comes.

    What the schema or the model refuses is answered so. Gives how many of all answers are refusals.

    Raises:
        ValueError: `destination` is a directory, or holds what was not computed from these questions by this
            service, or another process writes to it, or it cannot be written; or the engine broke.
    """
    if destination.is_dir():
        raise ValueError(f"{destination} is a directory: name a file in it for the answers")
    wanted = {question.digest(service.fingerprint): question for question in questions}
    with writing(destination):
        destination = destination.resolve()  # whatever links to one file has one lock
        destination.parent.mkdir(parents=True, exist_ok=True)
    with locked(destination.with_name(f".{destination.name}.lock"), destination):
        held, end = _held(destination, wanted)
        with writing(destination), destination.open("ab") as file:
            file.truncate(end)
        bar = progress.add_task(destination.stem, total=len(wanted), completed=len(held))
        refused = sum(status != 200 for status in held.values())
        left = ((name, question) for name, question in wanted.items() if name not in held)

        async def work() -> int:
            return sum(
                await asyncio.gather(
                    *(_answer_all(service, left, destination, progress, bar) for _ in range(together))
                )
            )

        return refused + asyncio.run(work())


async def _answer_all(
    service: Service, left: Iterator[tuple[str, Question]], destination: Path, progress: Progress, bar: Any
) -> int:
    """Answer one after the other of what is left, beside others that do; how many were refusals."""
    refused = 0
    for name, question in left:
        try:
            pending = await service.start(read(KINDS[question.url], json.dumps(question.body).encode()))
            status, body = 200, json.loads(dump(await service.whole(pending)))
        except Refused as error:
            if error.status == 429 or error.status >= 500:  # of the engine, not of what was asked
                raise ValueError(f"{question.custom_id} was not answered: {error}") from error
            status, body = error.status, as_error(error)
            refused += 1
        line = {
            "id": f"batch_req_{name}",
            "custom_id": question.custom_id,
            "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
            "error": None,
        }
        with writing(destination):
            append(destination, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        progress.advance(bar)
    return refused


def _held(path: Path, wanted: Mapping[str, Question]) -> tuple[dict[str, int], int]:
    """The status of every answer that a file has already, and where its last whole line ends.

    Raises:
        ValueError: a whole line is none of ours, or answers something else.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    lines, torn = data[:whole].decode(errors="replace").split("\n")[:-1], data[whole:]
    begin = _BEGIN.encode()
    if torn[: len(begin)] != begin[: len(torn)]:
        raise ValueError(f"{path} is not what a cut run left: choose another place, or move it away")
    held: dict[str, int] = {}
    for line in lines:
        try:
            found = json.loads(line)
            name, status = found["id"].removeprefix("batch_req_"), found["response"]["status_code"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{path} holds what is no answer of a batch: choose another place") from None
        if name not in wanted:
            raise ValueError(
                f"{path} holds an answer for {found.get('custom_id')!r:.60} that is to another request, or "
                "of another model, cache, context or dtype: choose another place, or move it away"
            )
        held[name] = status
    return held, whole
