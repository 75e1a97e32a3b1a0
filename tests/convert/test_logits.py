"""A converted checkpoint computes what transformers computes: recorded runs, and random tiny models."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from convert.hf import load_hf


@pytest.mark.parametrize("case", ["a_gqa_tied", "c_linear_rope", "e_mistral_sliding16"])
@pytest.mark.parametrize("config", ["config.json", "config_legacy.json"])
def test_logits_equal_the_recorded_ones(shared, tmp_path, case, config):
    """Prompts of both lengths and the 32 tokens transformers chose after each, beyond Mistral's window."""
    folder = shared / "golden" / "hf" / case
    shutil.copy(folder / config, tmp_path / "config.json")
    shutil.copy(folder / "model.safetensors", tmp_path)
    model = load_hf(tmp_path, dtype="float32")
    golden = np.load(folder / "logits.npz")
    for prompt in ("p0", "p1"):
        ids = np.concatenate([golden[f"{prompt}_ids"], golden[f"{prompt}_greedy_ids"]])
        expected = np.concatenate([golden[f"{prompt}_prefill_logits"], golden[f"{prompt}_decode_logits"]])
        np.testing.assert_allclose(model(jnp.asarray(ids)[None])[0], expected, atol=1e-4)


CONTEXT = 32
ROPE = {"rope_theta": 10000.0}
VARIANTS = {
    "GQA": {},
    "MHA": dict(num_key_value_heads=4),
    "MQA": dict(num_key_value_heads=1),
    "attention bias": dict(attention_bias=True),
    "MLP bias": dict(mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=20),
    "epsilon": dict(rms_norm_eps=0.1),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "linear": dict(rope_parameters={**ROPE, "rope_type": "linear", "factor": 3.0}),
    "dynamic": dict(rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 3.0}),
    "llama3": dict(
        rope_parameters={
            **ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
        }
    ),
    "yarn": dict(
        rope_parameters={
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT,
        }
    ),
    "Mistral": dict(sliding_window=None),
    "Mistral window": dict(sliding_window=9),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_random_models_equal_transformers(torch, tmp_path, name):
    """Every variant, at three times the trained context, with weights large enough to tell."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    mistral = name.startswith("Mistral")
    config = (MistralConfig if mistral else LlamaConfig)(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.3,
            **VARIANTS[name],
        },
    )
    torch.manual_seed(0)
    theirs = (MistralForCausalLM if mistral else LlamaForCausalLM)(config).eval()
    with torch.no_grad():  # biases start at 0 and scales at 1
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path, dtype="float32")
    ids = np.random.default_rng(0).integers(0, 61, (2, 3 * CONTEXT), np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(ids)), expected, atol=1e-4)
