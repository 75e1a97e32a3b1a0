"""RULER's needle-in-a-haystack tasks, from files that RULER's own scripts write (arXiv 2404.06654)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kivi_jax.eval.samples import Sample, as_texts, data_files, read_rows
from kivi_jax.eval.scoring import all_found

_SPLITS = ("validation", "test", "train")  # RULER's scripts write TASK/validation.jsonl


def read_samples(data: str | Path, *, limit: int | None, max_new_tokens: int) -> list[Sample]:
    """Up to `limit` samples of every file in a folder, or of the one file.

    Files of one task, as of several lengths, are told apart by the folders they are in.

    Raises:
        ValueError: there are none, or a row is not RULER's.
    """
    path = Path(data)
    files = data_files(path, "*.jsonl") if path.is_dir() else [path]
    places = {file: _place(file, path if path.is_dir() else path.parent) for file in files}
    common = Counter(task for task, _ in places.values())
    samples: list[Sample] = []
    for file, (task, folders) in places.items():
        name = f"{task} {'/'.join(folders)}".strip() if common[task] > 1 else task
        rows = read_rows(file, "input", "outputs")[:limit]
        samples += build_samples(name, rows, max_new_tokens=max_new_tokens)
    if not samples:
        raise ValueError(
            f"there are no samples in {data}: pass a folder of niah_*.jsonl files, or one of them"
        )
    return samples


def _place(file: Path, folder: Path) -> tuple[str, tuple[str, ...]]:
    """The task of a file, and the folders that it is in besides."""
    inside = file.relative_to(folder).parts[:-1]
    if file.stem not in _SPLITS:
        return file.stem, inside
    return (inside[-1], inside[:-1]) if inside else (folder.resolve().name, ())


def build_samples(task: str, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> list[Sample]:
    """A sample per row: `input`, `outputs`, and in newer files `answer_prefix`, the answer's beginning.

    Raises:
        ValueError: an answer is empty, which would be found in any prediction.
    """
    if not all(answer.strip() for row in rows for answer in as_texts(row["outputs"])):
        raise ValueError(f"{task} has a row with an empty answer: leave it out")
    return [
        Sample(
            id=f"{task}-{row.get('index', index)}",
            task=task,
            prompt=f"{row['input']}{row.get('answer_prefix') or ''}",
            answers=as_texts(row["outputs"]),
            max_new_tokens=max_new_tokens,
            answer_prefix=row.get("answer_prefix") or "",
        )
        for index, row in enumerate(rows)
    ]


def score(record: Mapping[str, Any]) -> float:
    """The share of the needles that were found."""
    return all_found(record["prediction"], record["answers"])
