"""LongGenBench as SCOPE uses it: many questions in one prompt, all to be answered in one long output.

Score files and new generations alike: `published` is the papers' scorer, defects included, so that its
numbers are comparable; `by_number` is what it means to measure. The published scorer pairs the n-th answer
it finds with the n-th question, so one answer that it cannot read ("The answer is $64") shifts all after it.

Source: SCOPE (arXiv 2412.13649) section 5; LongGenBench (arXiv 2410.04199).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kivi_jax.eval.samples import Sample

TASKS = {"gsm8k": "GSM8K+", "mmlu": "MMLU+", "csqa": "CSQA+"}
SYSTEM = (
    "Answer each question step by step, in the format of the examples. Begin each answer with 'Answer_' and "
    "its number, and close it with 'The answer is'. Do not repeat the questions. Answer all of them."
)


def published(record: Mapping[str, Any]) -> float:
    """The share of questions answered right, by the scorer whose numbers the papers print."""
    if record["task"] == "GSM8K+":
        found = re.findall(r"Answer_\d+:\s*.*?answer is (\d+)", record["prediction"], re.DOTALL)
        expected = [
            match[1] if (match := re.search(r"####\s*(\d+)", answer)) else None
            for answer in record["answers"]
        ]
    else:
        found = re.findall(r"Answer_\d+:\s*.*?answer is \((.*?)\)", record["prediction"])
        expected = record["answers"]
    right = sum(predicted == answer for predicted, answer in zip(found, expected, strict=False))
    return right / len(expected)


def by_number(record: Mapping[str, Any]) -> float:
    """The share of questions whose own answer, found by its number, is right; $ and , in numbers are read."""
    given = _numbered_answers(record["prediction"])
    expected = [_value(answer) for answer in record["answers"]]
    right = sum(given.get(record["first"] + i) == answer for i, answer in enumerate(expected))
    return right / len(expected)


def _numbered_answers(prediction: str) -> dict[int, str]:
    """The first readable "answer is" of each Answer_N, and of each N the first."""
    given: dict[int, str] = {}
    for number, text in re.findall(r"Answer_(\d+):(.*?)(?=Answer_\d+:|\Z)", prediction, re.DOTALL):
        values = [_value(closing) for closing in re.findall(r"answer is\s*(.*)", text)]
        given.setdefault(int(number), next((value for value in values if value), ""))
    return given


def _value(text: str) -> str:
    """A choice's letter, or the number behind #### or the first one, without signs of money or thousands."""
    if choice := re.search(r"\(([A-Z])\)|^([A-Z])$", text.strip()):
        return choice[1] or choice[2]
    number = re.search(r"-?\d+(\.\d+)?", text.split("####")[-1].replace(",", ""))
    return f"{float(number[0]):g}" if number else ""


def build_samples(
    task: str,
    questions: Sequence[Mapping[str, Any]],
    *,
    examples: Sequence[Mapping[str, Any]],
    questions_per_prompt: int,
    max_new_tokens: int,
) -> list[Sample]:
    """Prompts of `questions_per_prompt` questions each, after answered `examples`; a rest is left out.

    Questions and examples are mappings with `question` and `answer`; an example's answer is its text.

    Raises:
        ValueError: there are fewer questions than a prompt has.
    """
    if len(questions) < questions_per_prompt:
        raise ValueError(f"{len(questions)} questions do not fill one prompt of {questions_per_prompt=}")
    shown = "".join(f"Question_{i}:\n{example['question']}\n\n" for i, example in enumerate(examples, 1))
    shown += "".join(f"Answer_{i}:\n{example['answer']}\n\n" for i, example in enumerate(examples, 1))
    first = len(examples) + 1
    samples: list[Sample] = []
    for begin in range(0, len(questions) - questions_per_prompt + 1, questions_per_prompt):
        chunk = questions[begin : begin + questions_per_prompt]
        asked = "".join(f"Question_{i}:\n{row['question']}\n" for i, row in enumerate(chunk, first))
        samples.append(
            Sample(
                id=f"{task}-{begin}",
                task=TASKS[task],
                prompt=f"{SYSTEM}\n\nExamples:\n{shown}Following Question:\n{asked}\n",
                answers=[str(row["answer"]) for row in chunk],
                max_new_tokens=max_new_tokens,
                info={"first": first},
            )
        )
    return samples


def read_samples(task: str, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> list[Sample]:
    """Samples of prompts that were built before (rows with prompt, questions and answers)."""
    return [
        Sample(
            id=f"{task}-{index}",
            task=TASKS[task],
            prompt=f"{SYSTEM}\n\n{row['prompt']}",
            answers=list(row["answers"]),
            max_new_tokens=max_new_tokens,
            info={"first": first_number(row["prompt"], len(row["answers"]))},
        )
        for index, row in enumerate(rows)
    ]


def first_number(prompt: str, questions: int) -> int:
    """The number of the first question that is to be answered, from a prompt that ends with them."""
    return max(int(number) for number in re.findall(r"Question_(\d+):", prompt)) - questions + 1
