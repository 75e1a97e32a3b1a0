"""RULER's needle-in-a-haystack tasks, from files that RULER's own scripts write (arXiv 2404.06654)."""

from collections.abc import Mapping, Sequence
from typing import Any

from kivi_jax.eval.samples import Sample
from kivi_jax.eval.scoring import all_found


def build_samples(task: str, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> list[Sample]:
    """A sample per row with `input` and `outputs`."""
    return [
        Sample(
            id=f"{task}-{row.get('index', index)}",
            task=task,
            prompt=row["input"],
            answers=list(row["outputs"]),
            max_new_tokens=max_new_tokens,
        )
        for index, row in enumerate(rows)
    ]


def score(record: Mapping[str, Any]) -> float:
    """The share of the needles that were found."""
    return all_found(record["prediction"], record["answers"])
