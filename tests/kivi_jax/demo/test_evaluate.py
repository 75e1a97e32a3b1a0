import dataclasses

import jax.numpy as jnp
import pytest

import kivi_jax as kj
from kivi_jax.demo import tasks
from kivi_jax.demo.ablation import AXES, Rounded
from kivi_jax.demo.evaluate import answer, batches, compare
from kivi_jax.plan.memory import plan_cache


@pytest.fixture(scope="module")
def shipped():
    return kj.load("demo", dtype=jnp.float32)


PROBLEMS = [tasks.recall(seed, pairs=4) for seed in range(3)]


def test_batches_have_one_size():
    assert batches(5, 2) == [[0, 1], [2, 3], [4, 0]]
    assert batches(3, 8) == [[0, 1, 2]]


def test_answers_are_what_complete_gives(shipped):
    advanced = []
    given = answer(*shipped, PROBLEMS, kj.full(), batch=2, advance=lambda: advanced.append(1))
    prompts = [problem.prompt for problem in PROBLEMS]
    assert given.texts == kj.complete(*shipped, prompts, cache=kj.full(), max_new_tokens=16)
    assert len(advanced) == 2
    assert given.token_ms > 0


@pytest.mark.slow
def test_a_cache_is_weighed_per_prompt(shipped):
    cache = kj.kivi(2, 32, 32)
    given = answer(*shipped, PROBLEMS, cache, batch=2)
    model, tokenizer = shipped
    prompt, longest = (
        max(len(tokenizer(text)["input_ids"]) for text in texts)
        for texts in ([p.prompt for p in PROBLEMS], [p.answer for p in PROBLEMS])
    )
    width = -(-prompt // 32) * 32
    plan = plan_cache(
        model.config, cache, batch=2, context=width + longest, dtype="float32", prompt_tokens=width
    )
    assert given.row_bytes == plan["total"] // 2


def test_right_is_against_the_answer_and_same_against_the_first_cache(shipped):
    wrong = [dataclasses.replace(problem, answer=" moon 1, owl 2") for problem in PROBLEMS]
    first, again = compare(*shipped, wrong, {"full": kj.full(), "same": kj.full()})
    assert (first.right, first.same) == (0, 1)
    assert (again.right, again.same) == (0, 1)
    assert [first.cache, again.cache] == ["full", "same"]


@pytest.mark.slow
def test_rounding_along_kivis_axes_is_what_its_packed_cache_does(shipped):
    model, tokenizer = shipped
    tokens = jnp.array([tokenizer(tasks.passkey(0, 200).prompt)["input_ids"]])
    lengths = jnp.array([tokens.shape[1]])
    logits = []
    for cache in (kj.kivi(2, 32, 64), Rounded(bits=2, residual_length=64)):
        _, held = model.prefill(tokens, lengths, cache=cache, capacity=tokens.shape[1] + 1)
        logits.append(model.decode(jnp.array([5]), held)[0])
    assert jnp.abs(logits[0] - logits[1]).max() < 1e-3


@pytest.mark.slow
def test_the_axis_of_rounding_matters(shipped):
    model, tokenizer = shipped
    tokens = jnp.array([tokenizer(tasks.passkey(0, 200).prompt)["input_ids"]])
    lengths = jnp.array([tokens.shape[1]])
    _, full = model.prefill(tokens, lengths, cache=kj.full(), capacity=tokens.shape[1])
    for name, axis in AXES.items():
        cache = Rounded(key_axis=axis, bits=2, residual_length=32)
        _, held = model.prefill(tokens, lengths, cache=cache, capacity=tokens.shape[1])
        changed = jnp.abs(held.layers[0][0].keys - full.layers[0][0].keys).max((0, 1, 3)) > 0
        packed = int(changed.nonzero()[0].max()) + 1
        n = tokens.shape[1]
        assert packed == (n // 32 * 32 if name == "per channel" else n - 32)
