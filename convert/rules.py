"""How a Hugging Face model corresponds to ours: names and config. Read `tensors.py` next."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from convert.attributes import ROPE_FIELDS, effective_attributes
from convert.errors import CheckpointError
from convert.families import ACTIVATIONS, FAMILIES, REFUSED, WRAPPERS, Family
from kivi_jax.config import ModelConfig, RopeConfig, RopeKind
from kivi_jax.model.layer import query_key_value_columns

Path = tuple[str, ...]  # of a parameter in the model: ("layers", "0", "mlp", "gate", "kernel")

# The modules whose outputs, side by side, are those of ours.
_LAYER_MODULES = {
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
    "mlp.gate": ("mlp.gate_proj",),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
}
# One name means two norms, by where a family has them.
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}
_MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_FIELDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


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
    """Where the parts of a parameter come from in a Hugging Face checkpoint, as `tensors.py` spells it."""
    *module, field = path
    if module[0] == "layers":
        norm = _NORMS[config.norm_placement].get(module[2])
        modules = (norm,) if norm else _LAYER_MODULES[".".join(module[2:])]
        names = [f"model.layers.{module[1]}.{name}" for name in modules]
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
        CheckpointError: the model is of another type, or an attribute that changes what is computed has a
            value that we do not support, or one that is impossible.
    """
    from transformers import CONFIG_MAPPING, __version__  # slow to import; only conversion needs it

    raw = _text_part(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if reason := REFUSED.get(str(model_type)):
            raise CheckpointError(f"{model_type=} cannot be read: {reason}")
        raise CheckpointError(f"{model_type=} is not supported: choose a checkpoint of {', '.join(FAMILIES)}")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"transformers {__version__} does not know {model_type=}: upgrade it")
    family = FAMILIES[model_type]
    read = effective_attributes(raw, CONFIG_MAPPING[model_type]().to_dict())
    try:
        _check_rope(read)
        config = CONFIG_MAPPING[model_type](**copy.deepcopy(read))  # it writes into the rope it is given
        heads = config.num_attention_heads
        fields: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_layers": config.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": config.num_key_value_heads or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": float(config.rms_norm_eps),
            "activation": ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
            "tie_word_embeddings": config.tie_word_embeddings,
            "eos_ids": _eos_ids((generation or {}).get("eos_token_id", config.eos_token_id)),
        }
        ropes = _ropes(config.rope_parameters or {}, config.max_position_embeddings, family)
        return ModelConfig(**fields | ropes | family.fields(config))
    except CheckpointError:
        raise
    except Exception as error:  # transformers' checks and its arithmetic share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"config.json does not describe a {model_type} model: {reason}") from error


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model, and what a model of several parts says for all of them."""
    wrapper = str(raw.get("model_type"))
    if wrapper not in WRAPPERS:
        return raw
    text = raw.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise CheckpointError(f"text_config must be a JSON object, got {text!r}")
    whole = {name: raw[name] for name in ("tie_word_embeddings", "eos_token_id") if name in raw}
    return {**WRAPPERS[wrapper], **text, **whole}


def _eos_ids(eos: Any) -> tuple[int, ...]:
    """One id, several, or none. A token's text is none of them."""
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if wrong := [token for token in ids if type(token) is not int]:
        raise CheckpointError(f"eos_token_id must be a token's number or several, got {wrong[0]!r}")
    return tuple(ids)


def _check_rope(raw: Mapping[str, Any]) -> None:
    """Before transformers' own code meets what is no object."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' order
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"rope_parameters and rope_scaling must be JSON objects, got {rope!r}")


def _ropes(rope: Mapping[str, Any], max_positions: int, family: Family) -> dict[str, Any]:
    """Of all layers or, where a family says it by kind of layer, of those without and with a window."""
    if not family.ropes_by_kind:
        return {"rope": _rope(rope, max_positions, family)}
    return {
        # transformers looks for truncate beside the kinds of layers, where nothing is.
        name: _rope({**rope[kind], "truncate": True}, max_positions, family)
        for name, kind in (("rope", "full_attention"), ("window_rope", "sliding_attention"))
    }


def _rope(rope: Mapping[str, Any], max_positions: int, family: Family) -> RopeConfig:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise CheckpointError(
            f"rope_type={kind!r} is not supported: choose one of {', '.join(get_args(RopeKind))}"
        )
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise CheckpointError(f"rope parameters by kind of layer are not supported: {', '.join(nested)}")
    if not isinstance(rope.get("truncate", True), bool):
        raise CheckpointError(f"rope's truncate must be true or false, got {rope['truncate']!r}")
    # JSON may say 8 for 8.0
    fields = {name: number(rope[name]) for name, number in ROPE_FIELDS.items() if rope.get(name) is not None}
    fields |= {ours: float(rope[name]) for name, ours in family.rope.items() if rope.get(name) is not None}
    if rope.get("partial_rotary_factor", 1.0) != fields.get("partial", 1.0):
        raise CheckpointError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported: only 1 is"
        )
    if kind == "longrope":
        fields |= {name: tuple(map(float, rope[name])) for name in ("short_factor", "long_factor")}
    original = fields.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope") and "factor" not in fields and original is not None:
        fields["factor"] = max_positions / original
    if kind not in ("default", "yarn") and "factor" not in fields:
        raise CheckpointError(f"rope_type={kind!r} needs a factor")
    return RopeConfig(kind=kind, theta=float(rope.get("rope_theta", 10000.0)), **fields)
