"""LongBench's metrics, against what the packages that the benchmark uses return."""

import pytest

from kivi_jax.eval import gsm8k, longbench, needle, scoring

# Recorded with the packages rouge 1.0.1 and fuzzywuzzy 0.18.0: prediction, answer, ROUGE-L F1, ratio.
RECORDED = [
    ("old talk a", "while water", 0.0, 0.29),
    ("calm boat while water. calm men talk fish sails talk men", "water. the", 0.19999999680000002, 0.24),
    ("fish", "water.", 0.0, 0.0),
    ("fish sails. and while and water. old", "boat boat water sails the Boats", 0.36363635867768596, 0.36),
    (
        "water. a men and over and water. sails. while",
        "while water. boat sails sails. while water.",
        0.5454545408264463,
        0.52,
    ),
    (
        "men the sails talk water harbour old",
        "talk and a fish a harbour Boats calm and water over Boats",
        0.24999999507812506,
        0.39,
    ),
    (
        "men calm harbour while sails. talk old Boats boat while",
        "old water sails old sails. the talk talk water. and talk while old water",
        0.4999999950781251,
        0.44,
    ),
    ("while", "old boat while while calm over", 0.33333333055555564, 0.29),
    (
        "old talk over men talk men old boat a",
        "talk talk sails Boats fish a the the and",
        0.3076923027218935,
        0.34,
    ),
    ("fish over fish while a", "calm water boat a water.", 0.24999999500000009, 0.3),
    (
        "sails. sails. water sails. boat calm the sails. water",
        "fish old boat sails. talk while boat fish calm",
        0.499999995138889,
        0.46,
    ),
]


@pytest.mark.parametrize(("prediction", "answer", "rouge", "ratio"), RECORDED)
def test_summaries_and_code_score_as_recorded(prediction, answer, rouge, ratio):
    assert scoring.rouge_l(prediction, answer) == pytest.approx(rouge, abs=1e-12)
    assert scoring.code_similarity(prediction, answer) == ratio


def test_code_is_the_first_line_that_is_no_comment():
    assert scoring.code_similarity("\n# why\n```python\nx = 1\ny = 2", "x = 1") == 1
    assert scoring.code_similarity("// only a comment", "x = 1") == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The harbour, at dawn!", "harbour at dawn", 1.0),
        ("the", "a", 0.0),
        ("yes yes", "yes", 2 / 3),
        ("", "yes", 0.0),
        ("red green", "green blue", 0.5),
    ],
)
def test_answer_f1_ignores_case_articles_and_punctuation(prediction, answer, score):
    assert scoring.answer_f1(prediction, answer) == pytest.approx(score)


def test_classification_counts_the_classes_named():
    classes = ["City", "Other city", "Date", "Food"]
    assert scoring.classification("City or Date", "City", classes) == 0.5
    assert scoring.classification("Other city", "Other city", classes) == 1  # "City" is part of it
    assert scoring.classification("Date", "Food", classes) == 0
    assert scoring.classification("nothing known", "Food", classes) == 0


def test_counting_and_retrieval_count_numbers():
    assert scoring.count("5 or 6", "5") == 0.5
    assert scoring.count("none", "5") == 0
    assert scoring.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert scoring.retrieval("段落7", "段落27") == 0
    assert scoring.all_found("x ABC y", ["abc", "d"]) == 0.5
    with pytest.raises(ValueError, match="names no paragraph by its number"):
        scoring.retrieval("Paragraph 12", "Paragraph")


def test_longbench_takes_the_best_reference_and_few_shot_tasks_the_first_line():
    record = {"task": "triviaqa", "prediction": "\nParis\nQuestion: next", "answers": ["Rome", "Paris"]}
    assert longbench.score(record) == 1
    record = {"task": "trec", "prediction": "Date\nCity", "answers": ["Date"], "classes": ["Date", "City"]}
    assert longbench.score(record) == 1


def test_gsm8k_reads_the_number_behind_the_mark_or_the_last():
    record = {"prediction": "so 1,200 eggs.\n#### $1,200", "answers": ["work\n#### 1200"]}
    assert gsm8k.strict(record) == gsm8k.flexible(record) == 1
    record = {"prediction": "first 3, then 1200.", "answers": ["work\n#### 1,200"]}
    assert gsm8k.strict(record) == 0
    assert gsm8k.flexible(record) == 1


def test_gsm8k_scores_no_answer_as_wrong_and_takes_answers_without_a_mark():
    record = {"prediction": "no idea", "answers": ["12"]}
    assert gsm8k.strict(record) == gsm8k.flexible(record) == 0
    record = {"prediction": "#### 12", "answers": ["12"]}
    assert gsm8k.strict(record) == gsm8k.flexible(record) == 1


def test_a_needle_is_found_if_it_is_the_first_number():
    assert needle.score({"prediction": " 12345. Remember", "answers": ["12345"]}) == 1
    assert needle.score({"prediction": "1 12345", "answers": ["12345"]}) == 0
