"""LongGenBench: published generations score as published, and built prompts are what the papers ask."""

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
        "gsm8k", rows, examples=rows[60:68], questions_per_prompt=30, max_new_tokens=10
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


def test_too_few_questions_are_refused():
    rows = [{"question": "q", "answer": "a"}]
    with pytest.raises(ValueError, match="do not fill one prompt"):
        longgenbench.build_samples("mmlu", rows, examples=[], questions_per_prompt=2, max_new_tokens=1)
