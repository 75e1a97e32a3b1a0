"""A GGUF file's metadata as the config.json that it was made from. Read `tensors.py` next.

llama.cpp's keys say what the computation needs; what it fixes by architecture is said here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from convert.errors import CheckpointError
from convert.gguf.file import GGUF


class Architecture(NamedTuple):
    """What llama.cpp calls a family, in transformers' words."""

    model_type: str
    fused: bool = False  # queries, keys and values are one tensor, and gate and up
    permuted: bool = False  # query and key rows stand in the order of interleaved rotary pairs
    norm_offset: float = 0.0  # added to norms' weights in the file
    fields: Mapping[str, str] = {}  # metadata's key to config.json's, beyond _FIELDS


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", permuted=True),
    "phi3": Architecture("phi3", fused=True, fields={"attention.sliding_window": "sliding_window"}),
    "gemma3": Architecture(
        "gemma3_text",
        norm_offset=1.0,
        fields={"attention.sliding_window": "sliding_window", "rope.freq_base_swa": "rope_local_base_freq"},
    ),
    "granite": Architecture(
        "granite",
        permuted=True,
        fields={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "mistral3": Architecture(  # Ministral 3; Mistral's older models are files of llama
        "ministral3",
        permuted=True,
        fields={
            "attention.temperature_scale": "llama_4_scaling_beta",
            "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
        },
    ),
    "olmo2": Architecture("olmo2", fields={"attention.sliding_window": "sliding_window"}),
}
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_REQUIRED = set(_FIELDS) - {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}
# Read below, or harmless.
_READ = {"vocab_size", "rope.dimension_count", "attention.value_length"}
_PATTERN = "attention.sliding_window_pattern"
_HARMLESS = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
_ROPE = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_of(gguf: GGUF) -> dict[str, Any]:
    """The content of the config.json that describes this file's model.

    Raises:
        CheckpointError: the architecture is not supported, a key that it needs is missing, or one that may
            change what is computed is not known.
    """
    if gguf.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{gguf.file} has architecture {gguf.architecture!r}, which is not supported: choose a file of "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[gguf.architecture]
    prefix = f"{gguf.architecture}."
    said = {key.removeprefix(prefix): value for key, value in gguf.metadata.items() if key.startswith(prefix)}
    names = _FIELDS | dict(architecture.fields)
    _check_keys(gguf, said, set(names))
    config = {name: said[key] for key, name in names.items() if key in said}
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= {
        "model_type": architecture.model_type,
        "vocab_size": _rows(gguf, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **_special_ids(gguf),
    }
    if config.get("sliding_window") == 0:  # so the converter writes that there is none
        config["sliding_window"] = None
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    if architecture.model_type == "gemma3_text":
        # llama.cpp takes the scale of the 27B model from its number of layers, too.
        largest = config["num_hidden_layers"] == 62
        scalar = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
        config["query_pre_attn_scalar"] = scalar
    rotated = said.get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if rope := _rope_scaling(gguf, said, rotated):
        config["rope_scaling"] = rope
        if rope["rope_type"] == "longrope":
            original = rope.pop("original_max_position_embeddings", config["max_position_embeddings"])
            config["original_max_position_embeddings"] = original
    if architecture.model_type == "ministral3":
        config["rope_scaling"] = _ministral3(config)
    windowed = said.get(_PATTERN)
    if architecture.model_type == "olmo2" and (windowed or "sliding_window" in config):
        config |= _olmo3(config, windowed)
    return config


def _ministral3(config: dict[str, Any]) -> dict[str, Any]:
    """Its rope, which holds what the file says elsewhere."""
    moved = {name: config.pop(name) for name in ("llama_4_scaling_beta", "mscale_all_dim") if name in config}
    return {"rope_type": "default", "mscale": 1.0, **config.get("rope_scaling", {}), **moved}


def _olmo3(config: dict[str, Any], windowed: Sequence[bool] | None) -> dict[str, Any]:
    """What OLMo 3's has where it differs from OLMo 2's, whose name its files have."""
    unscaled = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 10000.0)}
    kinds = None if windowed is None else ["sliding_attention" if w else "full_attention" for w in windowed]
    return {
        "model_type": "olmo3",
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": unscaled | config.pop("rope_scaling", {}),
            "sliding_attention": unscaled,
        },
    }


def _check_keys(gguf: GGUF, said: Mapping[str, Any], known: set[str]) -> None:
    if missing := sorted(_REQUIRED - said.keys()):
        raise CheckpointError(f"{gguf.file} lacks metadata that its model needs: {', '.join(missing)}")
    harmless = {
        *known,
        *({_PATTERN} if gguf.architecture == "olmo2" else ()),
        *_READ,
        *(f"rope.scaling.{name}" for name in _ROPE),
        "rope.scaling.finetuned",
    }
    unknown = {
        key: value
        for key, value in said.items()
        if key not in harmless and value != _HARMLESS.get(key, object())
    }
    if (values := said.get("attention.value_length")) != said.get("attention.key_length"):
        unknown["attention.value_length"] = values
    numbers = known | _READ
    unknown |= {key: value for key, value in said.items() if key in numbers and not _is_size(key, value)}
    if unknown:
        raise CheckpointError(
            f"{gguf.file} has metadata that may change what the model computes and that is not supported: "
            + ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        )


def _is_size(key: str, value: Any) -> bool:
    """Whether it is a positive number; a window may be 0."""
    if not isinstance(value, int | float):
        return False
    return value > 0 or (value == 0 and key == "attention.sliding_window")


def _rows(gguf: GGUF, name: str) -> int:
    if name not in gguf.tensors:
        raise CheckpointError(f"{gguf.file} has no tensor {name}: it does not hold a language model")
    return gguf.tensors[name].shape[0]


def _special_ids(gguf: GGUF) -> dict[str, Any]:
    ids = {
        name: gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("pad", "padding"))
    }
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if ids[name] is not None))
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["pad"]}


def _rope_scaling(gguf: GGUF, said: Mapping[str, Any], rotated: int) -> dict[str, Any] | None:
    """The rope_scaling of config.json, of which llama.cpp keeps a part as tensors."""
    rope = {name: said[f"rope.scaling.{key}"] for key, name in _ROPE.items() if f"rope.scaling.{key}" in said}
    factors = {
        name: gguf.tensors[f"{tensor}.weight"].read(np.float32)
        for name, tensor in (
            ("llama3", "rope_freqs"),
            ("long_factor", "rope_factors_long"),
            ("short_factor", "rope_factors_short"),
        )
        if f"{tensor}.weight" in gguf.tensors
    }
    if "long_factor" in factors and "short_factor" in factors:
        lists = {name: factors[name].tolist() for name in ("long_factor", "short_factor")}
        # transformers derives the factor of attention from the lengths, as llama.cpp's converter did.
        rope.pop("attention_factor", None)
        return {**rope, "rope_type": "longrope", **lists}
    if "llama3" in factors:
        theta = said.get("rope.freq_base", 10000.0)
        return _llama3(gguf, factors["llama3"], theta ** (-np.arange(0, rotated, 2) / rotated))
    return rope if rope.get("rope_type", "none") != "none" else None


def _llama3(gguf: GGUF, factors: np.ndarray, frequencies: np.ndarray) -> dict[str, Any]:
    """The file keeps what frequencies are divided by; Llama 3's own values, if they give just that."""
    factor = float(factors.max())
    if np.all(factors == 1):
        return {"rope_type": "default"}
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if len(expected) != len(factors) or not np.allclose(expected, factors, rtol=1e-3):
        raise CheckpointError(
            f"{gguf.file} scales rotary frequencies (rope_freqs.weight) otherwise than Llama 3.1 does, "
            "which is not supported: convert the model's Hugging Face files"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
