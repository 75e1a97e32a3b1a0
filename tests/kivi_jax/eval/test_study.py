"""The study's one pass is what a KIVI cache does token by token, and its measures mean what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.eval.likelihood import continuation_log_probs
from kivi_jax.eval.perplexity import read_windows
from kivi_jax.eval.study import (
    Setting,
    Study,
    all_settings,
    attend_cached,
    attend_quantized,
    draw,
    forward,
    table,
)
from kivi_jax.generation.loading import load_tokenizer
from tests.models import config, random_llama, stories

KIVI = Setting(bits=2, group_size=8, residual_length=16, keys="channel", values="token")


def tokens(rows=1):
    return jnp.asarray(np.random.default_rng(0).integers(3, 61, (rows, 128)), jnp.int32)


@pytest.mark.parametrize("window", [None, pytest.param(40, marks=pytest.mark.slow)])
def test_it_equals_decoding_with_the_cache(window):
    model = random_llama(config(num_layers=1, sliding_window=window))
    text = tokens()

    def attend(query, key, value, window):
        return attend_quantized(query, key, value, KIVI, window)

    logits = jax.jit(lambda model: forward(model, text, attend))(model)[0, :-1]
    expected = jax.nn.log_softmax(logits)[jnp.arange(127), text[0, 1:]]
    ids = text[0].tolist()
    cache = kj.kivi(2, group_size=8, residual_length=16)
    (row,) = continuation_log_probs(model, [ids[:1]], [ids[1:]], cache=cache)
    np.testing.assert_allclose(row.log_probs, expected, atol=2e-5)


def test_without_quantization_it_is_the_model():
    model = random_llama(config(num_layers=1, sliding_window=24))
    text = tokens(rows=2)
    logits = forward(model, text, lambda q, k, v, window: attend_cached(q, k, v, k, v, window))
    np.testing.assert_allclose(logits, model(text), atol=1e-5)


def test_errors_shrink_with_bits_and_vanish_within_the_residual():
    study = Study(random_llama(config(num_layers=1)), tokens())
    measured = [
        study.measure(Setting(bits=bits, group_size=8, residual_length=R, keys="channel", values="token"))
        for bits, R in ((2, 16), (4, 16), (2, 128))
    ]
    errors, divergences = ([row[name] for row in measured] for name in ("attention_error", "logit_kl"))
    assert errors[0] > 2 * errors[1] > 0
    assert divergences[0] > divergences[1] > 0
    assert errors[2] == 0
    assert divergences[2] == pytest.approx(0, abs=1e-6)
    assert measured[0]["bits_per_element"] == 2 + 32 / 8


@pytest.mark.slow
def test_keys_want_channels_on_a_trained_model(shared):
    """KIVI's table 2: with 2 bits, keys per channel and values per token."""
    model = stories(shared)
    words = (shared / "data/tinystories/tinystories_valid_30k.txt").read_text("utf-8")
    windows = read_windows(load_tokenizer(shared / "models/stories260K"), words[:3000], 256)[:4]
    study = Study(model, jnp.asarray([text for _, _, text in windows], jnp.int32))
    records = [
        study.measure(setting)
        for setting in all_settings(model.config, bits=[2], group_sizes=[8], residual_lengths=[16])
    ]
    by_direction = {(row["keys"], row["values"]): row["logit_kl"] for row in records}
    assert min(by_direction, key=by_direction.get) == ("channel", "token")
    assert by_direction["channel", "token"] < by_direction["token", "token"] / 2
    assert "in 1 of 1" in str(table("title", records).caption)


def test_settings_of_which_a_cut_left_a_part_are_left_out():
    row = dict(bits=2, group_size=8, residual_length=8, attention_error=0.5, logit_kl=0.5)
    axes = ("channel", "token")
    records = [row | dict(keys=keys, values=values) for keys in axes for values in axes]
    cut = [*records, *(record | {"bits": 4} for record in records[:3])]
    assert table("title", cut).row_count == 1
    assert len(draw("title", cut).axes[0].patches) == 4


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must divide the residual length"):
        all_settings(config(), bits=[2], group_sizes=[8], residual_lengths=[12])
    with pytest.raises(ValueError, match="head_dim=8"):
        all_settings(config(), bits=[2], group_sizes=[3], residual_lengths=[9])
    with pytest.raises(ValueError, match="no whole pages"):
        Study(random_llama(config(num_layers=1)), tokens()[:, :100])
