"""What an evaluation asks of a model, and where rows of data come from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kivi_jax.eval.jobs import is_ours

TEXTS = ("input", "context", "prompt", "question", "answer", "target")  # fields of rows
LISTS = ("answers", "outputs", "all_classes")  # of texts or numbers; one text is a list of one


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what is expected of it.

    `task` is the column it counts for. `stop` are strings that end the prediction, themselves left out.
    `truncate` says that a prompt too long for the model loses its middle; `chat` that it is put into the
    tokenizer's chat template where that is asked for; then the reply begins with `answer_prefix`, the end of
    the prompt, and the message is what stands before. `info` is copied to the record, for the scorer.
    """

    id: str
    task: str
    prompt: str
    answers: list[str]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    truncate: bool = False
    chat: bool = True
    answer_prefix: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


def read_rows(source: str | Path, *fields: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, or of a data set on the hub: "name:config:split" (test by default).

    Raises:
        ValueError: there is neither, or no row; a line is not a JSON object, or one of `fields` is missing
            in a row, or no text or list of texts where it is one.
    """
    path = Path(source)
    rows = _read_lines(path) if path.is_file() else _load_hub(str(source))
    if not rows:
        raise ValueError(f"{source} holds no rows: there is nothing to ask")
    for number, row in enumerate(rows, 1):
        if missing := [name for name in fields if name not in row]:
            raise ValueError(
                f"{source}: row {number} has no field {', '.join(missing)}, but {', '.join(row)}: "
                "this evaluation reads other data"
            )
        if odd := [name for name in fields if name in TEXTS and not isinstance(row[name], str)]:
            raise ValueError(
                f"{source}: row {number} has no text in its field {odd[0]}, but {row[odd[0]]!r:.60}"
            )
        if odd := [name for name in fields if name in LISTS and not _are_texts(row[name])]:
            raise ValueError(
                f"{source}: row {number} has no list of texts in its field {odd[0]}, but {row[odd[0]]!r:.60}"
            )
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        # Not splitlines(): a line of JSON may hold other separators of lines (as MMLU's questions do).
        lines = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
        rows = [_read_line(number, line) for number, line in enumerate(lines, 1)]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of JSON lines: {error}") from None
    if any(not isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a file of JSON lines: a line is not an object of named fields")
    return rows


def _read_line(number: int, line: str) -> Any:
    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"row {number} has its field {twice} more than once: keep one")
        return found

    row = json.loads(line, object_pairs_hook=fields)
    return _well_formed(row) if "\\u" in line else row


def _well_formed(value: Any) -> Any:
    """With U+FFFD for halves of surrogate pairs, which JSON can escape and no tokenizer can read."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_well_formed(item) for item in value]
    if isinstance(value, dict):
        return {_well_formed(name): _well_formed(item) for name, item in value.items()}
    return value


def _are_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(
        isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts
    )


def as_texts(value: Any) -> list[str]:
    """The texts in a field of `LISTS`: one text is one, not its letters."""
    return [str(text) for text in (value if isinstance(value, list) else [value])]


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
    except Exception as error:  # datasets has errors of many kinds; a script is a plain RuntimeError
        copy = " (Xnhyacinth/LongBench is a copy without a script)" if name.endswith("/LongBench") else ""
        raise ValueError(
            f"{source} is neither a file nor a data set that can be loaded: {error}{copy}"
        ) from error


def data_files(folder: Path, pattern: str) -> list[Path]:
    """The files anywhere in a folder of data, but for results of ours, which may stand in it, too."""
    return [file for file in sorted(folder.rglob(pattern)) if file.is_file() and not is_ours(file)]


def find_file(source: str | Path, name: str) -> str | Path:
    """`source`, or where it is a folder the file `name` anywhere in it.

    Raises:
        ValueError: the folder has no such file.
    """
    path = Path(source)
    if not path.is_dir():
        return source
    if found := data_files(path, name):
        return found[0]
    raise ValueError(f"there is no {name} in {path}")


def files_by_task(source: str | Path, names: Mapping[str, Any]) -> dict[str, Path]:
    """The files of a folder (or the one file) whose name begins with one of `names`, by that name.

    A file of exactly that name goes before others that begin with it: qasper.jsonl before qasper_e.jsonl.

    Raises:
        ValueError: there are none, or several of one name.
    """
    path = Path(source)
    found: dict[str, list[Path]] = {}
    for file in data_files(path, "*.jsonl") if path.is_dir() else [path]:
        # the longest name: "2wikimqa_e" before "2wikimqa"
        if matching := [name for name in names if file.name.startswith(name)]:
            found.setdefault(max(matching, key=len), []).append(file)
    if not found:
        raise ValueError(f"no file in {path} is named after one of {', '.join(names)} (NAME.jsonl)")
    chosen: dict[str, Path] = {}
    for name, files in found.items():
        best = [file for file in files if file.stem == name] or files
        if len(best) > 1:
            raise ValueError(f"several files are of {name}: {', '.join(map(str, best))}: name one of them")
        chosen[name] = best[0]
    return chosen
