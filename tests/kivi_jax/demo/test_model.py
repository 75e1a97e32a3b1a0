"""The weights that ship: what they can do, and that they are an ordinary Hugging Face checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.hub import resolve
from kivi_jax.cache.strategy import full, kivi
from kivi_jax.demo import MODEL, tasks
from kivi_jax.demo.evaluate import compare
from kivi_jax.demo.recipe import model_config
from kivi_jax.generation.loading import load


@pytest.fixture(scope="module")
def shipped():
    return load(MODEL, dtype=jnp.float32)


def test_its_name_is_demo(shipped):
    named, tokenizer = load("demo", dtype=jnp.float32)
    assert resolve("demo") == MODEL
    assert tokenizer is not None
    jax.tree.map(np.testing.assert_array_equal, nnx.state(named), nnx.state(shipped[0]))


def test_it_is_the_recipes_architecture(shipped):
    assert shipped[0].config == model_config()


def test_it_weighs_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12e6


@pytest.mark.slow
@pytest.mark.parametrize("cache", [full(), kivi(bits=4, residual_length=32)], ids=["full", "kivi4"])
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: tasks.passkey(seed, tokens=500),
        lambda seed: tasks.recall(seed, pairs=16),
        lambda seed: tasks.questions(seed, count=10),
        lambda seed: tasks.copying(seed, words=32),
    ],
    ids=["passkey", "recall", "questions", "copying"],
)
def test_it_does_the_tasks_on_held_out_seeds(shipped, make, cache):
    (outcome,) = compare(*shipped, [make(seed) for seed in range(500, 504)], {"": cache})
    assert outcome.right >= 0.9


def test_transformers_computes_the_same_logits(torch, shipped):
    from transformers import LlamaForCausalLM

    model, tokenizer = shipped
    tokens = tokenizer(tasks.recall(500, pairs=8).prompt)["input_ids"]
    reference = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(model(jnp.array([tokens])), expected, atol=2e-3)
