"""What each model_type of transformers has beyond Llama: one row per family. Read `rules.py` next.

For a model_type in this table, transformers' modeling code is the definition. A row says which attributes
of config.json that code reads beyond those that all read, and what they mean as fields of `ModelConfig`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from convert.errors import CheckpointError

_NONE: Mapping[str, Any] = MappingProxyType({})


class Family(NamedTuple):
    """How a model_type differs from Llama."""

    reads: frozenset[str] = frozenset()  # attributes that `fields` translates
    fields: Callable[[Any], dict[str, Any]] = lambda config: {}  # of `ModelConfig`, from transformers' config
    only: Mapping[str, tuple[Any, ...]] = _NONE  # attributes it reads, and the values that we compute
    rope: Mapping[str, str] = _NONE  # attributes of rope that it alone reads, and our names for them
    ropes_by_kind: bool = False  # whether layers with a window have a rope of their own


def _biases(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias}


def _mlp_biases(config: Any) -> dict[str, Any]:
    return {"mlp_bias": config.mlp_bias}


def _window(config: Any) -> dict[str, Any]:
    """One window for every layer."""
    return {"sliding_window": config.sliding_window}


def _windows(config: Any) -> dict[str, Any]:
    """A window for the layers that layer_types names."""
    if unknown := sorted(set(config.layer_types) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(f"layer_types of {', '.join(unknown)} are not supported")
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(windowed):
        return {}
    return {"sliding_window": config.sliding_window, "windowed": _shortest_pattern(windowed)}


def _no_rope(config: Any) -> dict[str, Any]:
    rotated = [bool(rope) for rope in config.no_rope_layers[: config.num_hidden_layers]]
    return {"rotated": _shortest_pattern(rotated)}


def _granite(config: Any) -> dict[str, Any]:
    return {
        "embedding_multiplier": float(config.embedding_multiplier),
        "attention_multiplier": float(config.attention_multiplier),
        "residual_multiplier": float(config.residual_multiplier),
        "logits_multiplier": 1 / config.logits_scaling,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    return {
        "qk_norm": "head",
        "norm_placement": "both",
        "norm_offset": 1.0,
        "embedding_multiplier": config.hidden_size**0.5,
        "attention_multiplier": config.query_pre_attn_scalar**-0.5,
        "logits_softcap": config.final_logit_softcapping,
    }


def _olmo(config: Any) -> dict[str, Any]:
    del config
    return {"qk_norm": "projection", "norm_placement": "post"}


def _all(*rows: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """The fields of all `rows` together."""
    return lambda config: {name: value for row in rows for name, value in row(config).items()}


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_WINDOWS = frozenset({"sliding_window", "layer_types"})
_QWEN = _WINDOWS | {"use_sliding_window", "max_window_layers"}
_BIASES = frozenset({"attention_bias"})

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_BIASES | {"mlp_bias"}, _all(_biases, _mlp_biases), only={"sliding_window": (None,)}),
    "mistral": Family(frozenset({"sliding_window"}), _window),
    "ministral": Family(_WINDOWS, _windows),
    "ministral3": Family(frozenset({"sliding_window"}), _window, rope={"llama_4_scaling_beta": "query_beta"}),
    "qwen2": Family(_QWEN, _all(_windows, lambda _: {"attention_bias": True, "output_bias": False})),
    "qwen3": Family(_QWEN | _BIASES, _all(_windows, _biases, lambda _: {"qk_norm": "head"})),
    "smollm3": Family(
        _QWEN | _BIASES | {"mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
        _all(_windows, _biases, _mlp_biases, _no_rope),
    ),
    "phi3": Family(
        frozenset({"sliding_window", "partial_rotary_factor"}),
        _window,
        rope={"partial_rotary_factor": "partial"},
    ),
    "gemma3_text": Family(
        _WINDOWS
        | _BIASES
        | {"query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq"}
        | {"sliding_window_pattern"},
        _all(_windows, _biases, _gemma3),
        ropes_by_kind=True,
        only={
            "hidden_activation": tuple(ACTIVATIONS),
            "use_bidirectional_attention": (False, None),
            "attn_logit_softcapping": (None,),
        },
    ),
    "granite": Family(
        _BIASES
        | {"mlp_bias", "embedding_multiplier", "attention_multiplier", "residual_multiplier"}
        | {"logits_scaling"},
        _all(_biases, _mlp_biases, _granite),
    ),
    "olmo2": Family(_BIASES, _all(_biases, _olmo)),
    "olmo3": Family(_WINDOWS | _BIASES, _all(_windows, _biases, _olmo), ropes_by_kind=True),
}

# Models of several parts: what their `text_config` means where it does not say it. transformers ties a head
# that Mistral's says nothing of, unless the checkpoint has one of its own, as these have.
WRAPPERS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text", "tie_word_embeddings": True},
    "mistral3": {"model_type": "mistral", "tie_word_embeddings": False},
}

_SOFTCAP = "its attention scores have a soft cap, which no kernel of ours applies"
_EXPERTS = "it is a mixture of experts"
_HYBRID = "some of its layers are not attention over keys and values"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("gemma2", "vaultgemma", "t5gemma"), _SOFTCAP),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "phimoe"), _EXPERTS),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "gpt_oss", "llama4", "llama4_text"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "mistral4", "glm4_moe", "ernie4_5_moe"), _EXPERTS),
    **dict.fromkeys(("granitemoehybrid", "bamba", "jamba", "zamba2", "falcon_h1", "nemotron_h"), _HYBRID),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "recurrent_gemma", "lfm2"), _HYBRID),
    **dict.fromkeys(("olmo_hybrid", "mamba", "mamba2", "rwkv", "minimax"), _HYBRID),
}


def _shortest_pattern(kinds: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest beginning that, repeated, gives all of `kinds`."""
    beginnings = (tuple(kinds[:length]) for length in range(1, len(kinds) + 1))
    return next((b for b in beginnings if all(kind == b[i % len(b)] for i, kind in enumerate(kinds))), ())
