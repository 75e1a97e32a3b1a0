"""Random tiny models of every family, saved by transformers: each variant names a config class and fields."""

from collections.abc import Mapping
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

# By model_type: the variants of tiny models. The last of each is also read through caches, so it has a layer
# without a window, and no LongRoPE: transformers rotates a row anew when it becomes long.
VARIANTS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {"biases": dict(attention_bias=True, mlp_bias=True, head_dim=20)},
    "mistral": {"window": dict(sliding_window=WINDOW), "small": dict(sliding_window=None, head_dim=16)},
    "ministral": {"every other layer a window": dict(sliding_window=WINDOW, head_dim=8, **_KINDS)},
    "ministral3": {
        "queries that grow": dict(
            head_dim=8,
            rope_parameters={
                **YARN,
                "factor": 2.0,
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
        "window": dict(sliding_window=WINDOW),
        "partial, longrope": dict(
            max_position_embeddings=4 * CONTEXT,
            original_max_position_embeddings=CONTEXT,
            rope_parameters=_LONG,
        ),
        "plain": {},
    },
    "gemma3_text": {
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
        "pattern": dict(head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=13, **_KINDS),
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
            sliding_window=WINDOW,
            **_KINDS,
            rope_parameters={
                "full_attention": dict(YARN),
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        )
    },
}


# What the config.json of real models says, as far as it counts.
CARDS: Mapping[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "smollm3-3b": {
        "model_type": "smollm3",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "phi-4": {
        "model_type": "phi3",
        "vocab_size": 100352,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
    },
    "gemma3-12b": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_hidden_layers": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
}


def raw_config(model_type: str, name: str) -> dict[str, Any]:
    """The config.json of a variant's tiny model."""
    return {
        "model_type": model_type,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **VARIANTS[model_type][name],
    }


def random_model(model_type: str, name: str) -> Any:
    """transformers' model of a variant, with weights large enough to tell."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**raw_config(model_type, name))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases start at 0 and scales at 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
