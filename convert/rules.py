"""How a Hugging Face Llama or Mistral corresponds to ours: names and config. Read `hf.py` next."""

import copy
from collections.abc import Mapping, Set
from typing import Any, NamedTuple, get_args

from convert.errors import CheckpointError
from kivi_jax.config import ModelConfig, RopeConfig, RopeKind
from kivi_jax.model.llama import query_key_value_columns

Path = tuple[str, ...]  # of a parameter in the model: ("layers", "0", "mlp", "gate", "kernel")

# The modules whose outputs, side by side, are those of ours.
_LAYER_MODULES = {
    ("attention", "query_key_value"): ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("attention", "output"): ("self_attn.o_proj",),
    ("mlp", "gate"): ("mlp.gate_proj",),
    ("mlp", "up"): ("mlp.up_proj",),
    ("mlp", "down"): ("mlp.down_proj",),
    ("attention_norm",): ("input_layernorm",),
    ("mlp_norm",): ("post_attention_layernorm",),
}
_MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_FIELDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# Attributes of config.json that we read, those that do not change what is computed, and those that are
# harmless with one value only.
_READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters"),
}
_READ_BY_TYPE = {"llama": {"attention_bias", "mlp_bias"}, "mistral": {"sliding_window"}}
_IGNORED = {
    *("architectures", "bos_token_id", "pad_token_id", "unk_token_id", "torch_dtype", "dtype"),
    *("transformers_version", "use_cache", "initializer_range", "attention_dropout", "is_llama_config"),
    *("_name_or_path", "_attn_implementation", "_commit_hash", "max_length", "tokenizer_class"),
}
_ONLY = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    # Which of these a model type has, _READ_BY_TYPE says; transformers ignores them in the other type.
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_ROPE_FIELDS: dict[str, type] = {
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), float),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), float),
    "original_max_position_embeddings": int,
    "truncate": bool,
}
_ROPE_NAMES = {"type", "rope_type", "rope_theta", "finetuned", "partial_rotary_factor"}


class Source(NamedTuple):
    """A tensor of a checkpoint, and the part of a parameter that it fills."""

    name: str
    columns: slice  # on the parameter's last axis
    transpose: bool  # torch keeps linear weights [out, in], we [in, out]

    def part_of(self, parameter: Any) -> Any:
        """The part of a whole parameter, as the checkpoint holds it. Of a NumPy array it is a view."""
        part = parameter[..., self.columns]
        return part.T if self.transpose else part


def sources_of(path: Path, config: ModelConfig) -> tuple[Source, ...]:
    """Where the parts of a parameter come from in a Hugging Face checkpoint."""
    *module, field = path
    if module[0] == "layers":
        names = [f"model.layers.{module[1]}.{name}" for name in _LAYER_MODULES[tuple(module[2:])]]
    else:
        names = [_MODULES[module[0]]]
    columns = query_key_value_columns(config) if module[-1] == "query_key_value" else (slice(None),)
    return tuple(
        Source(f"{name}.{_FIELDS[field]}", part, transpose=field == "kernel")
        for name, part in zip(names, columns, strict=True)
    )


def is_derived(name: str) -> bool:
    """Whether a checkpoint's tensor holds nothing that its config does not say."""
    return name.endswith("rotary_emb.inv_freq")


def model_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The `ModelConfig` that a config.json, and a generation_config.json if there is one, describe.

    Attributes left out of the file take transformers' defaults for the model type.

    Raises:
        CheckpointError: the model is of another type, or has an attribute that changes what is computed
            and that we do not know, or a value we do not support.
    """
    from transformers import LlamaConfig, MistralConfig  # slow to import; only conversion needs it

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig}
    model_type = raw.get("model_type")
    if model_type not in kinds:
        raise CheckpointError(f"{model_type=} is not supported: choose a checkpoint of {' or '.join(kinds)}")
    _refuse_unknown(raw, _READ | _READ_BY_TYPE[model_type] | _IGNORED, kinds[model_type]().to_dict())
    try:
        _refuse_unknown_rope(raw)
        config = kinds[model_type](**copy.deepcopy(dict(raw)))  # it writes into the rope it is given
        heads = config.num_attention_heads
        eos = (generation or {}).get("eos_token_id", config.eos_token_id)
        return ModelConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads or heads,
            head_dim=config.head_dim or config.hidden_size // heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=float(config.rms_norm_eps),
            rope=_rope(config.rope_parameters or {}, config.max_position_embeddings),
            attention_bias=getattr(config, "attention_bias", False),
            mlp_bias=getattr(config, "mlp_bias", False),
            tie_word_embeddings=config.tie_word_embeddings,
            sliding_window=getattr(config, "sliding_window", None),
            eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers' checks and its arithmetic share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"config.json does not describe a {model_type} model: {reason}") from error


def _refuse_unknown(raw: Mapping[str, Any], known: Set[str], defaults: Mapping[str, Any]) -> None:
    """An attribute we do not know is harmless only where it says what is assumed anyway."""
    harmless = {**defaults, **_ONLY}
    unknown = sorted(
        name
        for name, value in raw.items()
        if name not in known and (name not in harmless or value != harmless[name])
    )
    if unknown:
        raise CheckpointError(
            "config.json has attributes that may change what the model computes and that are not supported: "
            + ", ".join(f"{name}={raw[name]!r}" for name in unknown)
        )


def _refuse_unknown_rope(raw: Mapping[str, Any]) -> None:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' order
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"rope_parameters and rope_scaling must be JSON objects, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise CheckpointError(
            f"rope_type={kind!r} is not supported: choose one of {', '.join(get_args(RopeKind))}"
        )
    if unknown := sorted(set(rope) - set(_ROPE_FIELDS) - _ROPE_NAMES):
        raise CheckpointError(f"rope attributes that are not supported: {', '.join(unknown)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported: only 1 is"
        )


def _rope(rope: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # JSON may say 8 for 8.0
    fields = {name: number(rope[name]) for name, number in _ROPE_FIELDS.items() if rope.get(name) is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn" and "factor" not in fields and "original_max_position_embeddings" in fields:
        fields["factor"] = max_positions / fields["original_max_position_embeddings"]
    if kind not in ("default", "yarn") and "factor" not in fields:
        raise CheckpointError(f"rope_type={kind!r} needs a factor")
    return RopeConfig(kind=kind, theta=float(rope.get("rope_theta", 10000.0)), **fields)
