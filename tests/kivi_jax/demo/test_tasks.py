import re

import pytest

from kivi_jax.demo import tasks, tokenizer
from kivi_jax.demo.batches import SMALLEST, TASKS


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_a_problem_is_a_function_of_its_seed(make):
    assert make(7, 200) == make(7, 200)
    assert make(7, 200) != make(8, 200)


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("tokens", [SMALLEST, 199, 640])
def test_a_problem_fits_the_tokens_asked_for(make, tokens):
    problem = make(3, tokens)
    assert tasks.count_tokens(problem.prompt + problem.answer) + 2 <= tokens


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_only_the_right_answer_scores_one(make):
    problem = make(3, 200)
    assert problem.score(problem.answer) == 1
    assert problem.score(problem.answer + "\n") == 1
    assert problem.score("") == 0
    assert problem.score(make(4, 200).answer) < 0.5


def test_part_of_an_answer_scores_its_fraction():
    problem = tasks.recall(0, pairs=4)
    assert problem.score(", ".join(problem.answer.split(", ")[:3])) == 0.75


def test_the_key_is_hidden_once_and_asked_for_at_the_end():
    problem = tasks.passkey(11, tokens=500)
    (key,) = re.findall(r"The pass key is (\d{5})\. Remember it", problem.prompt)
    assert problem.answer == f" {key}."
    assert problem.prompt.endswith("What is the pass key? The pass key is")


def test_passkey_fills_its_tokens_to_within_a_sentence():
    problem = tasks.passkey(11, tokens=2048)
    assert 2040 < tasks.count_tokens(problem.prompt + problem.answer) + 2 <= 2048


def test_arithmetic_is_right():
    for line in tasks.questions(5, count=60).answer.splitlines():
        a, sign, b, _, *right = line.split(": ")[1]
        assert int("".join(right)) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]


def test_recall_asks_for_every_pair_in_another_order():
    problem = tasks.recall(2, pairs=20)
    listed = problem.prompt.splitlines()[0].removeprefix("Pairs: ").strip(".").split(", ")
    asked = problem.answer.strip(" .").split(", ")
    assert asked != listed
    assert sorted(asked) == sorted(listed)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (tasks.passkey, 20),
        (tasks.recall, 0),
        (tasks.recall, 129),
        (tasks.questions, 100),
        (tasks.copying, 0),
        (tasks.numbers, 0),
    ],
)
def test_impossible_sizes_are_refused(make, size):
    with pytest.raises(ValueError, match="must be"):
        make(0, size)


def test_what_follows_the_answer_does_not_matter():
    problem = tasks.passkey(0, tokens=200)
    assert problem.score(problem.answer + " Remember it. And") == 1
    assert problem.score(problem.answer.lstrip()) == 1
    assert problem.score(problem.answer.replace(".", "7.")) == 0


def test_task_text_has_a_token_per_piece():
    encoder = tokenizer.build()
    for make in TASKS.values():
        text = make(5, 300).prompt + make(5, 300).answer
        assert len(encoder.encode(text).ids) == tasks.count_tokens(text) + 1
