"""LongGenBench: published generations score as published, and built prompts are what the papers ask."""

import itertools
import json

import pytest

from kivi_jax.eval import longgenbench
from kivi_jax.eval.samples import read_rows


def records(shared, task):
    path = shared / "data" / "longgenbench" / "generations_4k" / task / "ALLKV.json"
    for row in map(json.loads, path.read_text("utf-8").splitlines()):
        first = longgenbench.first_number(row["prompt"], len(row["answers"]))
        yield {
            "task": longgenbench.TASKS[task],
            "prediction": row["pred"],
            "answers": row["answers"],
            "first": first,
        }


@pytest.mark.parametrize(("task", "score"), [("gsm8k", 53.2558), ("csqa", 71.6667)])
def test_published_generations_score_as_published(shared, task, score):
    scores = [longgenbench.published(record) for record in records(shared, task)]
    assert round(100 * sum(scores) / len(scores), 4) == score


def test_one_unreadable_answer_shifts_the_published_scorer_but_not_ours():
    record = {
        "task": "GSM8K+",
        "prediction": "Answer_9: answer is $64.\nAnswer_10: answer is 5.\nAnswer_11: answer is 1,000.",
        "answers": ["#### 64", "#### 5", "#### 1000"],
        "first": 9,
    }
    assert longgenbench.published(record) == 0
    assert longgenbench.by_number(record) == 1


def test_answers_are_found_by_number_the_first_readable_one():
    record = {
        "task": "CSQA+",
        "prediction": "Answer_7: The answer is (B).\n\nThe answer is unknown.\nAnswer_7: The answer is (C).",
        "answers": ["A", "B"],
        "first": 6,
    }
    assert longgenbench.by_number(record) == 0.5


def test_built_prompts_hold_every_question_once_and_what_is_recorded_finds_their_numbers(shared):
    rows = read_rows(shared / "data/gsm8k/test.jsonl")[:70]
    samples = longgenbench.build_samples(
        "gsm8k", rows, examples=rows[60:], example_count=8, questions_per_prompt=30, max_new_tokens=10
    )
    assert [len(sample.answers) for sample in samples] == [30, 30]
    assert [sample.info["first"] for sample in samples] == [9, 9]
    for i, row in enumerate(rows[:60]):
        number = 9 + i % 30
        assert samples[i // 30].prompt.count(f"Question_{number}:\n{row['question']}\n") == 1
    recorded = read_rows(shared / "data/longgenbench/data/gsm8k/gsm8k_30.jsonl")
    read = longgenbench.read_samples("gsm8k", recorded, max_new_tokens=10)[0]
    assert (read.info["first"], len(read.answers)) == (9, 30)
    assert read.answers == samples[0].answers


CSQA = {  # as the hub has it
    "question": "Where is a doormat likely to be in front of?",
    "choices": {"label": ["A", "B", "C"], "text": ["facade", "front door", "doorway"]},
    "answerKey": "B",
}
MMLU = {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4"], "answer": 1}
GSM8K = {"question": "How many?", "answer": "Twice 3 is <<2*3=6>>6.\n#### 6"}


@pytest.mark.parametrize(
    ("task", "row", "text", "shown"),
    [
        ("gsm8k", GSM8K, "How many?", "Twice 3 is 6.\nThe answer is 6."),
        ("csqa", CSQA, f"{CSQA['question']}\n(A) facade (B) front door (C) doorway", "The answer is (B)."),
        ("mmlu", MMLU, "2 + 2?\n(A) 3 (B) 4", "The answer is (B)."),
        ("mmlu", MMLU | {"rationale": "Count."}, "2 + 2?\n(A) 3 (B) 4", "Count. The answer is (B)."),
    ],
)
def test_base_data_sets_become_questions_whose_shown_answers_score(task, row, text, shown):
    """What an example shows is what scorers read: a model that copies the form is scored right."""
    (sample,) = longgenbench.build_samples(
        task, [row, row], examples=[row], example_count=8, questions_per_prompt=2, max_new_tokens=10
    )
    assert f"Question_1:\n{text}\n\nAnswer_1:\n{shown}\n\n" in sample.prompt
    assert sample.prompt.endswith(f"Question_2:\n{text}\nQuestion_3:\n{text}\n\n")
    record = {"task": sample.task, "answers": sample.answers, **sample.info}
    record["prediction"] = f"Answer_2:\n{shown}\n\nAnswer_3:\n{shown}\n\n"
    assert longgenbench.published(record) == longgenbench.by_number(record) == 1


def test_prompts_stay_within_a_subject():
    rows = [MMLU | {"subject": name, "question": f"{name} {i}?"} for i in range(3) for name in ("law", "art")]
    samples = longgenbench.build_samples(
        "mmlu", rows, examples=rows, example_count=1, questions_per_prompt=2, max_new_tokens=10
    )
    assert [sample.id for sample in samples] == ["mmlu-law-0", "mmlu-art-0"]
    assert "law" not in samples[1].prompt
    with pytest.raises(ValueError, match="no examples of the subject art"):
        longgenbench.build_samples(
            "mmlu", rows, examples=rows[:1], example_count=1, questions_per_prompt=2, max_new_tokens=10
        )


def test_the_papers_prompts_have_these_numbers_of_questions(shared):
    for task, most in itertools.product(longgenbench.TASKS, (4096, 8192)):
        count = longgenbench.papers_questions(task, most)
        row = read_rows(shared / f"data/longgenbench/data/{task}/{task}_{count}.jsonl")[0]
        assert len(row["answers"]) == count


def test_prompts_without_numbered_questions_or_readable_answers_are_refused():
    with pytest.raises(ValueError, match="no Question_1: build prompts"):
        longgenbench.read_samples("gsm8k", [{"prompt": "2 + 2?", "answers": ["4"]}], max_new_tokens=1)
    with pytest.raises(ValueError, match="the answer 'four' has neither a number nor a letter"):
        longgenbench.read_samples("gsm8k", [{"prompt": "Question_1:", "answers": ["four"]}], max_new_tokens=1)
    (one,) = longgenbench.read_samples(
        "gsm8k", [{"prompt": "Question_1:", "answers": "34"}], max_new_tokens=1
    )
    assert one.answers == ["34"]  # and not 3 and 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 7}, "the answer 7 is none of the choices"),
        ({"answer": -1}, "the answer -1 is none of the choices"),
        ({"answer": "E"}, "the answer 'E' is none of the choices"),
        ({"choices": []}, "the answer 1 is none of the choices"),
        ({"choices": "ab"}, "choices must be a list of texts, or lists of label and text"),
        ({"choices": {"x": 1}}, "choices must be a list of texts, or lists of label and text"),
    ],
)
def test_an_answer_is_one_of_the_choices(row, message):
    with pytest.raises(ValueError, match=message):
        longgenbench.read_question(MMLU | row)


def test_too_few_questions_are_refused():
    options = dict(example_count=1, questions_per_prompt=2, max_new_tokens=1)
    with pytest.raises(ValueError, match="1 questions do not fill one prompt"):
        longgenbench.build_samples("gsm8k", [GSM8K], examples=[GSM8K], **options)
    with pytest.raises(ValueError, match="no field answer or answerKey, but question"):
        longgenbench.build_samples("gsm8k", [{"question": "q"}], examples=[GSM8K], **options)
