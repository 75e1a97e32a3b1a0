"""How a Hugging Face Llama or Mistral corresponds to ours: names and config. Read `hf.py` next."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from convert.attributes import READS, ROPE_FIELDS, effective_attributes
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
        CheckpointError: the model is of another type, or an attribute that changes what is computed has a
            value that we do not support, or one that is impossible.
    """
    from transformers import LlamaConfig, MistralConfig  # slow to import; only conversion needs it

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig}
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in kinds:
        raise CheckpointError(f"{model_type=} is not supported: choose a checkpoint of {' or '.join(READS)}")
    read = effective_attributes(raw, kinds[model_type]().to_dict())
    try:
        _refuse_unknown_rope(read)
        config = kinds[model_type](**copy.deepcopy(read))  # it writes into the rope it is given
        heads = config.num_attention_heads
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
            eos_ids=_eos_ids((generation or {}).get("eos_token_id", config.eos_token_id)),
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers' checks and its arithmetic share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"config.json does not describe a {model_type} model: {reason}") from error


def _eos_ids(eos: Any) -> tuple[int, ...]:
    """One id, several, or none. A token's text is none of them."""
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if wrong := [token for token in ids if type(token) is not int]:
        raise CheckpointError(f"eos_token_id must be a token's number or several, got {wrong[0]!r}")
    return tuple(ids)


def _refuse_unknown_rope(raw: Mapping[str, Any]) -> None:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' order
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"rope_parameters and rope_scaling must be JSON objects, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise CheckpointError(
            f"rope_type={kind!r} is not supported: choose one of {', '.join(get_args(RopeKind))}"
        )
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise CheckpointError(f"rope parameters by kind of layer are not supported: {', '.join(nested)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported: only 1 is"
        )


def _rope(rope: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # JSON may say 8 for 8.0
    fields = {name: number(rope[name]) for name, number in ROPE_FIELDS.items() if rope.get(name) is not None}
    if not isinstance(rope.get("truncate", True), bool):
        raise CheckpointError(f"rope's truncate must be true or false, got {rope['truncate']!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "yarn" and "factor" not in fields and "original_max_position_embeddings" in fields:
        fields["factor"] = max_positions / fields["original_max_position_embeddings"]
    if kind not in ("default", "yarn") and "factor" not in fields:
        raise CheckpointError(f"rope_type={kind!r} needs a factor")
    return RopeConfig(kind=kind, theta=float(rope.get("rope_theta", 10000.0)), **fields)
