"""Every family computes what transformers computes; real configs say what their models' cards say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kivi_jax as kj
from convert.errors import CheckpointError
from convert.families import FAMILIES
from convert.hf import load_hf
from convert.rules import model_config
from kivi_jax.checks import warn_once
from kivi_jax.config import RopeConfig
from kivi_jax.plan.shapes import SHAPES
from tests.convert.checkpoints import family_tensors, write_checkpoint
from tests.convert.families import CARDS, CONTEXT, VARIANTS, random_model, raw_config

CASES = [(model_type, name) for model_type, variants in VARIANTS.items() for name in variants]
PROMPT, STEPS = 24, 40


def test_every_family_has_a_variant():
    assert VARIANTS.keys() == FAMILIES.keys()


def ids(rows, length):
    return np.random.default_rng(0).integers(0, 61, (rows, length), np.int32)


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_logits_equal_transformers(torch, tmp_path, model_type, name):
    """Within the trained context and far beyond it, past every window."""
    theirs = random_model(model_type, name)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, dtype="float32")
    for length in (CONTEXT - 8, 3 * CONTEXT):
        tokens = ids(2, length)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-4)


LAST = [(model_type, list(variants)[-1]) for model_type, variants in VARIANTS.items()]


def tiny(folder, model_type, name):
    """Our model of a variant with a layer of each kind, for which transformers is not needed.

    What a matrix multiplies keeps its size, as in real models: errors do not grow by the layer.
    """
    raw = raw_config(model_type, name)
    config = model_config(raw)
    raw["num_hidden_layers"] = 1 + max(config.first_like(layer) for layer in range(config.num_layers))
    tensors = {name: 0.6 * t if t.ndim == 2 else t for name, t in family_tensors(raw).items()}
    return load_hf(write_checkpoint(folder, raw, tensors), dtype="float32")


CACHES = {
    "full": kj.full(),
    "8 bits": kj.kivi(8, 4, 8),
    "kivi2": kj.kivi(2, 4, 8),
    "scope": kj.scope(prompt=kj.SnapKV(budget=12, window=4), decode=kj.Slide(window=8, recent=4)),
    "kivi2+scope": kj.kivi(2, 4, 8, decode=kj.Slide(window=8, recent=4)),
}
CLOSE = {"full": 1e-4, "8 bits": 5e-2}  # to one forward


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("model_type", "name"), LAST)
def test_a_row_is_the_same_alone_and_in_a_batch(tmp_path, model_type, name, cache):
    """Token for token for 40 steps, past the window; layers with one hold it, the others pack and select.

    Alone, a row fills the batch, whose programs serve for both. Through the full cache logits are those of
    one forward, through 8 bits nearly.
    """
    model, prompts, lengths = tiny(tmp_path, model_type, name), ids(3, PROMPT), np.array([3, 17, PROMPT])

    def greedy(rows):
        """These rows' new tokens, and the logits that chose them."""
        logits, held = model.prefill(
            prompts[rows], lengths[rows], cache=CACHES[cache], capacity=PROMPT + STEPS, block_tokens=8
        )
        chosen = [np.asarray(logits)]
        for _ in range(STEPS - 1):
            logits, held = model.decode(chosen[-1].argmax(-1).astype(np.int32), held)
            chosen.append(np.asarray(logits))
        return np.argmax(chosen, -1).T, np.swapaxes(chosen, 0, 1)

    together, logits = greedy(np.arange(3))
    for row in range(3):
        alone, _ = greedy(np.full(3, row))
        np.testing.assert_array_equal(alone[0], together[row])
    if cache in CLOSE:
        whole = np.pad(prompts, ((0, 0), (0, STEPS)))
        new = lengths[:, None] + np.arange(STEPS)
        np.put_along_axis(whole, new, together.astype(np.int32), axis=1)
        expected = np.take_along_axis(np.asarray(model(jnp.asarray(whole))), new[..., None] - 1, axis=1)
        np.testing.assert_allclose(logits, expected, atol=CLOSE[cache])


def test_the_text_part_of_a_model_of_several_is_read(tmp_path, caplog):
    """As Gemma3ForConditionalGeneration names its tensors today, and as it did; images are left out."""
    warn_once.cache_clear()
    raw = raw_config("gemma3_text", "pattern") | {"tie_word_embeddings": True}
    tensors = family_tensors(raw)
    expected = nnx.state(load_hf(write_checkpoint(tmp_path / "text", raw, tensors), dtype="float32"))
    for prefix in ("language_model.model.", "model.language_model."):
        parts = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        parts["vision_tower.patches.weight"] = np.ones(3, np.float32)
        config = {"model_type": "gemma3", "text_config": raw, "vision_config": {}}
        model = load_hf(write_checkpoint(tmp_path / prefix, config, parts), dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), expected)
    assert "only the text model is read; left out: vision_tower" in caplog.text


@pytest.mark.parametrize("shape", CARDS)
def test_the_config_files_of_real_models_are_their_shapes(shape):
    assert replace(model_config(CARDS[shape]), eos_ids=()) == SHAPES[shape]


def test_layers_of_another_kind_are_refused():
    text = CARDS["gemma3-12b"]["text_config"]
    with pytest.raises(CheckpointError, match="layer_types of chunked_attention are not supported"):
        model_config({**text, "num_hidden_layers": 1, "layer_types": ["chunked_attention"]})
    with pytest.raises(CheckpointError, match=r"attn_logit_softcapping=50\.0"):
        model_config({**text, "attn_logit_softcapping": 50.0})
    with pytest.raises(CheckpointError, match="text_config must be a JSON object, got 3"):
        model_config({"model_type": "gemma3", "text_config": 3})


def test_mistral_3_says_which_model_its_text_part_is():
    text = {"model_type": "ministral3", "num_attention_heads": 8}
    yarn = dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=16384, rope_theta=1e6)
    yarn |= dict(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1, beta_fast=32.0, beta_slow=1.0)
    config = model_config({"model_type": "mistral3", "text_config": text | {"rope_parameters": yarn}})
    assert (config.rope.query_beta, config.rope.kind, config.tie_word_embeddings) == (0.1, "yarn", False)
    small = model_config({"model_type": "mistral3", "text_config": {"sliding_window": None}})
    assert (small.sliding_window, small.rope, small.tie_word_embeddings) == (None, RopeConfig(), False)
