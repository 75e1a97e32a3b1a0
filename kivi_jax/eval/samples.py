"""What an evaluation asks of a model, and where rows of data come from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what is expected of it.

    `task` is the column it counts for. `stop` are strings that end the prediction, themselves left out.
    `truncate` says that a prompt too long for the model loses its middle; `chat` that it is put into the
    tokenizer's chat template where that is asked for. `info` is copied to the record, for the scorer.
    """

    id: str
    task: str
    prompt: str
    answers: list[str]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    truncate: bool = False
    chat: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)


def read_rows(source: str | Path, *fields: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, or of a data set on the hub: "name:config:split" (test by default).

    Raises:
        ValueError: there is neither, a line is not a JSON object, or one of `fields` is missing in a row.
    """
    path = Path(source)
    rows = _read_lines(path) if path.is_file() else _load_hub(str(source))
    for number, row in enumerate(rows, 1):
        if missing := [name for name in fields if name not in row]:
            raise ValueError(
                f"{source}: row {number} has no field {', '.join(missing)}, but {', '.join(row)}: "
                "this evaluation reads other data"
            )
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        # Not splitlines(): a line of JSON may hold other separators of lines (as MMLU's questions do).
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not a file of JSON lines: {error}") from None
    if any(not isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file of JSON lines: a line is not an object of named fields")
    return rows


def _load_hub(source: str) -> list[dict[str, Any]]:
    path = Path(source)
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    if path.exists() or path.suffix in (".jsonl", ".json", ".txt") or name.count("/") > 1:
        raise ValueError(f"{path} is not a file of JSON lines: pass one, or a data set's name on the hub")
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path} is not a file; to read it as a data set from the hub, pip install 'kivi-jax[eval]'"
        ) from None
    try:
        return [dict(row) for row in load_dataset(name, config or None, split=split or "test")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is neither a file nor a data set that can be loaded: {error}") from error


def find_file(source: str | Path, name: str) -> str | Path:
    """`source`, or where it is a folder the file `name` anywhere in it.

    Raises:
        ValueError: the folder has no such file.
    """
    path = Path(source)
    if not path.is_dir():
        return source
    if found := sorted(path.rglob(name)):
        return found[0]
    raise ValueError(f"there is no {name} in {path}")


def files_by_task(source: str | Path, names: Mapping[str, Any]) -> dict[str, Path]:
    """The files of a folder (or the one file) whose name begins with one of `names`, by that name.

    Raises:
        ValueError: there are none.
    """
    path = Path(source)
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    found: dict[str, Path] = {}
    for file in files:
        # the longest name: "2wikimqa_e" before "2wikimqa"
        if matching := [name for name in names if file.name.startswith(name)]:
            found.setdefault(max(matching, key=len), file)
    if not found:
        raise ValueError(f"no file in {path} is named after one of {', '.join(names)} (NAME.jsonl)")
    return found
