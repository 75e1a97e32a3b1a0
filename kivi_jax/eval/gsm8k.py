"""GSM8K with worked examples in the prompt, as in KIVI's example (its repository's `example.py`)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kivi_jax.eval.samples import Sample


def build_samples(
    questions: Sequence[Mapping[str, Any]], *, examples: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> list[Sample]:
    """A prompt per question: the examples with their answers, then the question.

    Raises:
        ValueError: an answer has no number, so that no prediction could be right.
    """
    for number, row in enumerate(questions, 1):
        if _number(row["answer"]) is None:
            raise ValueError(f"the answer of row {number} has no number, but {row['answer']!r:.60}")
    shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n" for row in examples)
    return [
        Sample(
            id=str(index),
            task="gsm8k",
            prompt=f"{shown}Question: {row['question']}\nAnswer:",
            answers=[row["answer"]],
            max_new_tokens=max_new_tokens,
            stop=("\nQuestion:",),
        )
        for index, row in enumerate(questions)
    ]


def strict(record: Mapping[str, Any]) -> float:
    """1 if the number behind #### is the answer's."""
    return _right(_after_mark(record["prediction"]), record)


def flexible(record: Mapping[str, Any]) -> float:
    """1 if the number behind ####, or else the last number, is the answer's."""
    return _right(_number(record["prediction"]), record)


def _right(found: str | None, record: Mapping[str, Any]) -> float:
    return float(found is not None and found == _number(record["answers"][0]))


# A sign, a dollar, and digits with commas and a point; a point alone only where no word or number ends.
_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)"


def _number(text: str) -> str | None:
    """The number behind ####, or else the last one."""
    numbers = re.findall(_NUMBER, text)
    return _after_mark(text) or (_plain(numbers[-1]) if numbers else None)


def _after_mark(text: str) -> str | None:
    match = re.search(rf"####\s*\$?({_NUMBER})", text)
    return _plain(match[1]) if match else None


def _plain(number: str) -> str:
    return f"{float(number.replace(',', '').replace('$', '')):.10g}"
