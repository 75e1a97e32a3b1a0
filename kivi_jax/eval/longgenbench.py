"""LongGenBench as SCOPE uses it: many questions in one prompt, all to be answered in one long output.

Score files and new generations alike: `published` is the papers' scorer, defects included, so that its
numbers are comparable; `by_number` is what it means to measure. The published scorer pairs the n-th answer
it finds with the n-th question, so one answer that it cannot read ("The answer is $64") shifts all after it.

Source: SCOPE (arXiv 2412.13649) section 5; LongGenBench (arXiv 2410.04199).
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kivi_jax.eval.samples import Sample, as_texts

TASKS = {"gsm8k": "GSM8K+", "mmlu": "MMLU+", "csqa": "CSQA+"}
QUESTIONS = {"gsm8k": 30, "mmlu": 30, "csqa": 40}  # in a prompt, for 4,096 new tokens
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


class Question(NamedTuple):
    """A question with its choices, its answer as scorers want it, and the answer as an example shows it."""

    text: str
    answer: str
    shown: str
    subject: str | None


def read_question(row: Mapping[str, Any]) -> Question:
    """A row of GSM8K, of MMLU or of CommonsenseQA as their authors publish them.

    Answers shown end with "The answer is": that is where scorers look. Where an answer is a choice, a row may
    bring the reasoning before it as `rationale`; else the example shows none.

    Raises:
        ValueError: the row has no answer that can be read, or none of its choices.
    """
    choices, answer = row.get("choices"), row.get("answerKey", row.get("answer"))
    if answer is None:
        raise ValueError(f"a question has no field answer or answerKey, but {', '.join(row)}")
    if choices is None:
        reasoning, mark, number = str(answer).partition("####")
        reasoning = re.sub(r"<<.*?>>", "", reasoning).strip()  # GSM8K's notes for a calculator
        shown = f"{reasoning}\nThe answer is {number.strip()}." if mark else reasoning
        return Question(row["question"], str(answer), shown, row.get("subject"))
    by_letter = _by_letter(choices)
    letter = dict(enumerate(by_letter)).get(answer) if isinstance(answer, int) else str(answer)
    if letter not in by_letter:
        raise ValueError(f"the answer {answer!r} is none of the choices {choices!r:.60}")
    listed = " ".join(f"({label}) {text}" for label, text in by_letter.items())
    shown = f"{row.get('rationale', '')} The answer is ({letter}).".strip()
    return Question(f"{row['question']}\n{listed}", letter, shown, row.get("subject"))


def _by_letter(choices: Any) -> dict[str, Any]:
    """A list of texts (MMLU's), or lists of labels and of texts (CommonsenseQA's)."""
    if not isinstance(choices, Mapping):
        choices = {"label": list(string.ascii_uppercase), "text": choices}
    labels, texts = choices.get("label"), choices.get("text")
    if not (isinstance(labels, list) and isinstance(texts, list)):
        raise ValueError(f"choices must be a list of texts, or lists of label and text, got {choices!r:.60}")
    return dict(zip(labels, texts, strict=False))


def build_samples(
    task: str,
    questions: Sequence[Mapping[str, Any]],
    *,
    examples: Sequence[Mapping[str, Any]],
    example_count: int,
    questions_per_prompt: int,
    max_new_tokens: int,
) -> list[Sample]:
    """Prompts of `questions_per_prompt` questions each, after answered examples; a rest is left out.

    Rows that name a `subject`, as MMLU's do, share prompts within it, after examples of the same one.
    `read_question` says what rows may be.

    Raises:
        ValueError: there are fewer questions than a prompt has, or no examples for them.
    """
    by_subject: dict[str | None, list[Question]] = {}
    for row in questions:
        question = read_question(row)
        by_subject.setdefault(question.subject, []).append(question)
    known = [read_question(row) for row in examples]
    samples: list[Sample] = []
    for subject, asked in by_subject.items():
        shown = [example for example in known if example.subject in (None, subject)][:example_count]
        if not shown:
            raise ValueError(f"there are no examples of the subject {subject}: add some to those of --build")
        for begin in range(0, len(asked) - questions_per_prompt + 1, questions_per_prompt):
            chunk = asked[begin : begin + questions_per_prompt]
            _check_readable([question.answer for question in chunk])
            samples.append(
                Sample(
                    id="-".join(str(part) for part in (task, subject, begin) if part is not None),
                    task=TASKS[task],
                    prompt=_prompt(shown, chunk),
                    answers=[question.answer for question in chunk],
                    max_new_tokens=max_new_tokens,
                    info={"first": len(shown) + 1},
                )
            )
    if not samples:
        raise ValueError(f"{len(questions)} questions do not fill one prompt of {questions_per_prompt=}")
    return samples


def _prompt(examples: Sequence[Question], asked: Sequence[Question]) -> str:
    shown = "".join(f"Question_{i}:\n{example.text}\n\n" for i, example in enumerate(examples, 1))
    shown += "".join(f"Answer_{i}:\n{example.shown}\n\n" for i, example in enumerate(examples, 1))
    following = "".join(f"Question_{i}:\n{row.text}\n" for i, row in enumerate(asked, len(examples) + 1))
    return f"{SYSTEM}\n\nExamples:\n{shown}Following Question:\n{following}\n"


def papers_questions(task: str, max_new_tokens: int) -> int:
    """Questions in a prompt of the papers' 4K setting or, for more new tokens than that, of their 8K one."""
    return QUESTIONS[task] * (1 if max_new_tokens <= 4096 else 2)


def read_samples(task: str, rows: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> list[Sample]:
    """Samples of prompts that were built before (rows with prompt and answers).

    Raises:
        ValueError: an answer cannot be read; or see `first_number`.
    """
    for row in rows:
        _check_readable(as_texts(row["answers"]))
    return [
        Sample(
            id=f"{task}-{len(answers)}-{index}",
            task=TASKS[task],
            prompt=f"{SYSTEM}\n\n{row['prompt']}",
            answers=answers,
            max_new_tokens=max_new_tokens,
            info={"first": first_number(row["prompt"], len(answers))},
        )
        for index, row in enumerate(rows)
        for answers in [as_texts(row["answers"])]
    ]


def _check_readable(answers: Sequence[str]) -> None:
    """An answer that the scorer cannot read would be right for a prediction that it cannot read."""
    if unread := [answer for answer in answers if not _value(answer)]:
        raise ValueError(f"the answer {unread[0]!r:.60} has neither a number nor a letter: leave the row out")


def first_number(prompt: str, questions: int) -> int:
    """The number of the first question that is to be answered, from a prompt that ends with them.

    Raises:
        ValueError: the prompt numbers no questions.
    """
    if not (numbers := re.findall(r"Question_(\d+):", prompt)):
        raise ValueError("a prompt has no Question_1: build prompts from plain questions with --build")
    return max(map(int, numbers)) - questions + 1
