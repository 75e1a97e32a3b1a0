import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("optax", reason="training needs the extra `train`")

from kivi_jax.demo import tokenizer
from kivi_jax.demo.batches import encode, training_batch
from kivi_jax.demo.export import export
from kivi_jax.demo.initialize import initialize
from kivi_jax.demo.recipe import EVEN, Cycle, Recipe, Stage, model_config
from kivi_jax.demo.tasks import Problem
from kivi_jax.demo.train import TrainState, make_optimizer, train, update
from kivi_jax.generation.loading import load
from kivi_jax.model.layer import query_key_value_columns
from kivi_jax.model.rope import apply_rope, rope_frequencies

pytestmark = pytest.mark.slow

STAGES = Stage(steps=2, rows=4, tokens=96), Stage(steps=2, rows=4, tokens=128)
SHORT = Recipe(cycles=(Cycle(STAGES, rates=((0, 0.0), (1, 1.0), (3, 1.0), (4, 0.0))),))


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_batches_weigh_answers_only():
    encoder = tokenizer.build()
    batch = encode(encoder, [Problem("Copy: moon.\nCopied:", " moon.")], 12)
    assert encoder.decode(batch.tokens[0].tolist()) == "Copy: moon.\nCopied: moon."
    assert (batch.weights[0] > 0).tolist() == [False] * 8 + [True] * 3 + [False]
    np.testing.assert_allclose(batch.weights.sum(), 3**0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="a problem has 11 tokens, more than 10"):
        encode(encoder, [Problem("Copy: moon.\nCopied:", " moon.")], 10)


def test_training_batches_differ_by_step_and_never_by_run():
    encoder = tokenizer.build()
    first, again, second = (
        training_batch(encoder, step, rows=4, tokens=96, names=EVEN).tokens for step in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != second).any()


def test_every_step_has_its_cycle_and_stage():
    first, second = Stage(steps=2, rows=4, tokens=96), Stage(steps=1, rows=4, tokens=128)
    recipe = Recipe(cycles=(Cycle((first, second), rates=()), Cycle((first,), rates=())))
    expected = [(0, first), (0, first), (0, second), (1, first), (1, first)]
    assert [recipe.find(step) for step in range(recipe.steps)] == expected
    assert [recipe.first_step(cycle) for cycle in (0, 1)] == [0, 3]
    with pytest.raises(ValueError, match="step=5 must be below 5"):
        recipe.find(5)


def test_a_cycle_needs_only_the_model_that_the_one_before_ends_with(tmp_path):
    cycle = Cycle(STAGES[:1], rates=((0, 0.0), (1, 1.0), (2, 0.0)))
    recipe = Recipe(cycles=(cycle, cycle))
    whole, _ = train(recipe, tmp_path / "whole", measure_every=4)
    first, _ = train(Recipe(cycles=(cycle,)), tmp_path / "first", measure_every=4)
    second, curve = train(recipe, tmp_path / "second", start=first, cycle=1, measure_every=4)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(second))
    assert [measure["step"] for measure in curve] == [4]

    mean, _ = train(
        Recipe(cycles=(cycle, dataclasses.replace(cycle, average=True))),
        tmp_path / "mean",
        start=first,
        cycle=1,
    )
    jax.tree.map(
        lambda got, a, b: np.testing.assert_allclose(got, (a + b) / 2, atol=1e-6),
        *(nnx.state(model) for model in (mean, first, second)),
    )


def test_a_step_lowers_the_loss():
    graph, parameters = nnx.split(initialize(model_config(), 0))
    optimizer = make_optimizer(SHORT, 0)
    state = TrainState(parameters, optimizer.init(parameters), began=jax.tree.map(jnp.copy, parameters))
    batch = training_batch(tokenizer.build(), 0, rows=4, tokens=96, names=EVEN)
    losses = []
    for _ in range(SHORT.steps):
        state, loss = update(graph, optimizer, state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_queries_keys_and_values_are_changed_as_matrices_of_their_own():
    """The first change of each is orthogonal, as far as Muon makes it so: singular values around 1."""
    _, parameters = nnx.split(initialize(model_config(), 0))
    optimizer = make_optimizer(dataclasses.replace(SHORT, cycles=(Cycle(STAGES, rates=((0, 1.0),)),)), 0)
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), parameters)
    change, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
    assert jax.tree.structure(change) == jax.tree.structure(parameters)
    kernel = change["layers"][0]["attention"]["query_key_value"]["kernel"][...] / SHORT.muon_rate
    for part in query_key_value_columns(model_config()):
        columns = kernel[:, part]
        scale = max(1, columns.shape[1] / columns.shape[0]) ** 0.5  # Muon's, for wide matrices
        values = np.linalg.svd(columns / scale, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.3


def test_the_circuit_is_in_place_before_training():
    """A model that has seen nothing attends, in layer 1, to what followed the current word before."""
    model = initialize(model_config(), 0)
    encoder = tokenizer.build()
    tokens = jnp.array([encoder.encode(" moon owl fox kite fern lamp owl").ids])
    pattern = attention(model, tokens)
    assert pattern[0, 7].argmax() == 3  # the second "owl" looks at "fox"
    assert pattern[2, 7].argmax() == 4  # and, by the other head, at "kite"


def attention(model, tokens):
    """Layer 1's attention weights [N, T, T], written out plainly."""
    length = tokens.shape[1]
    frequencies, scaling = rope_frequencies(model.config, model.config.rope, jnp.array([length]))
    rotate = partial(apply_rope, positions=jnp.arange(length)[None], frequencies=frequencies, scaling=scaling)
    causal = np.tril(np.ones((length, length), bool))

    def weights(query, key):
        scores = np.einsum("tnh,snh->nts", query[0], np.repeat(key[0], 2, axis=1)) / 8
        scores = np.exp(np.where(causal, scores, -np.inf))
        return scores / scores.sum(-1, keepdims=True)

    x = model.embed(tokens)
    query, key, value = model.layers[0].project(x, rotate)
    attended = np.einsum("nts,snh->tnh", weights(query, key), np.repeat(value[0], 2, axis=1))
    x = model.layers[0].finish(x, jnp.asarray(attended)[None])
    query, key, _ = model.layers[1].project(x, rotate)
    return weights(query, key)


def test_the_circuit_needs_its_heads():
    with pytest.raises(ValueError, match="needs two layers"):
        initialize(dataclasses.replace(model_config(), num_layers=1), 0)


def test_training_resumes_where_it_stopped(tmp_path):
    whole, curve = train(SHORT, tmp_path, checkpoint_every=2, measure_every=2)
    shutil.rmtree(tmp_path / "checkpoints" / "4")  # as if stopped after step 2
    resumed, again = train(SHORT, tmp_path, checkpoint_every=2, measure_every=2)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole), nnx.state(resumed))
    assert [measure["step"] for measure in curve] == [2, 4]
    assert [measure | {"seconds": 0} for measure in again] == [measure | {"seconds": 0} for measure in curve]


def test_an_exported_model_loads_with_its_weights_rounded(tmp_path):
    model = initialize(model_config(), 0)
    export(model, tmp_path)
    loaded, encoder = load(tmp_path, dtype=jnp.bfloat16)
    assert loaded.config == model.config
    assert encoder is not None
    assert encoder("moon")["input_ids"] == tokenizer.build().encode("moon").ids
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), rounded)
