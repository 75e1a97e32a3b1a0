"""Random tiny models of every family, saved by transformers: each variant names a config class and fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROPE = {"rope_theta": 10000.0}
CONTEXT, WINDOW = 32, 9
YARN = {
    **ROPE,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
_LONG = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
    "partial_rotary_factor": 0.75,
}
_SWA = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
_KINDS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

# By model_type: what our tiny models of it vary.
VARIANTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {"biases": dict(attention_bias=True, mlp_bias=True, head_dim=20)},
    "mistral": {"window": dict(sliding_window=WINDOW), "small": dict(sliding_window=None, head_dim=16)},
    "ministral": {
        "every other layer a window": dict(sliding_window=WINDOW, head_dim=8, **_KINDS),
    },
    "ministral3": {
        "queries that grow": dict(
            head_dim=8,
            rope_parameters={
                **YARN,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        )
    },
    "qwen2": {"plain": {}, "window": dict(**_SWA)},
    "qwen3": {
        "wide heads": dict(head_dim=12),
        "biases, window": dict(head_dim=8, attention_bias=True, tie_word_embeddings=True, **_SWA),
    },
    "smollm3": {
        "plain": dict(no_rope_layer_interval=2),
        "window, biases": dict(
            no_rope_layers=[1, 0],
            use_sliding_window=True,
            sliding_window=WINDOW,
            attention_bias=True,
            mlp_bias=True,
        ),
    },
    "phi3": {
        "plain": {},
        "window": dict(sliding_window=WINDOW),
        "partial, longrope": dict(
            max_position_embeddings=4 * CONTEXT,
            original_max_position_embeddings=CONTEXT,
            rope_parameters=_LONG,
        ),
    },
    "gemma3_text": {
        "pattern": dict(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=13, **_KINDS),
        "two ropes, softcap": dict(
            head_dim=12,
            num_hidden_layers=3,
            sliding_window_pattern=3,
            sliding_window=WINDOW,
            final_logit_softcapping=2.0,
            attention_bias=True,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    },
    "granite": {
        "multipliers": dict(
            attention_bias=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.2,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        )
    },
    "olmo2": {"norms": {}, "biases": dict(attention_bias=True, num_key_value_heads=4)},
    "olmo3": {
        "yarn where there is no window": dict(
            num_hidden_layers=4,
            sliding_window=WINDOW,
            rope_parameters={
                "full_attention": dict(YARN),
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        )
    },
}


def random_model(model_type: str, fields: Mapping[str, Any], seed: int = 0) -> Any:
    """transformers' model, with weights large enough to tell."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "initializer_range": 0.3,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **fields,
        }
    )
    torch.manual_seed(seed)
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def randomize(model: Any) -> Any:
    """Biases start at 0 and scales at 1: move both."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save(model: Any, directory: Path) -> Path:
    """The directory, with the model as transformers saves it."""
    model.save_pretrained(directory)
    return directory
