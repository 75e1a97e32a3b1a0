"""Which attributes of a config.json can change a result: those that transformers' code for its type reads.

That code is the definition of a model. What it does not read changes nothing, however it is spelled, and is
named once in a warning. What it reads and we do not do is refused by name. Read `rules.py` next.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from convert.errors import CheckpointError
from convert.families import ACTIVATIONS, FAMILIES, Family

_log = logging.getLogger(__name__)

# The code of every type, and what types share: rope, masks, the cache, and the loader of weights.
_FIELDS = frozenset(
    {
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *(
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
        ),
        *("tie_word_embeddings", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters"),
        "original_max_position_embeddings",
    }
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": tuple(ACTIVATIONS),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True,),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "layer_types": (None, {"full_attention"}),  # a set stands for a list of these
}
# Of whom and when, how to train, how to write: nobody expects a result to change with them, so no warning.
_METADATA = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "tokenizer_class", "auto_map"),
    *("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset"),
    *("bos_token_id", "pad_token_id", "unk_token_id", "use_cache", "initializer_range", "attention_dropout"),
    *("is_llama_config", "max_length", "_sliding_window_pattern", "resid_pdrop", "embd_pdrop"),
    "cache_implementation",
}
# Of rope_parameters and rope_scaling, whatever the kind.
ROPE_FIELDS: dict[str, type] = {
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), float),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), float),
    "original_max_position_embeddings": int,
    "truncate": bool,
}
_ROPE_NAMES = {"type", "rope_type", "rope_theta", "finetuned", "partial_rotary_factor", "short_factor"}
_ROPE_NAMES |= {"long_factor", "max_position_embeddings"}


def effective_attributes(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that can change a result. What cannot is named in one warning.

    `defaults` are those of transformers' config for the type: an attribute that says them says nothing.

    Raises:
        CheckpointError: attributes that the type's code reads have values that we do not support.
    """
    family = FAMILIES[raw["model_type"]]
    fields, only = reads(family)
    refused = [
        f"{name}={raw[name]!r}"
        for name in sorted(raw.keys() & only.keys())
        if _value(raw[name], only[name]) not in only[name]
    ]
    if refused:
        raise CheckpointError(f"config.json asks for what is not supported: {', '.join(refused)}")
    unread = raw.keys() - fields - only.keys() - _METADATA
    names = [name for name in unread if name not in defaults or raw[name] != defaults[name]]
    read = {name: raw[name] for name in raw.keys() & (fields | only.keys())}
    for field in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := read.get(field), Mapping):
            unread_rope = {name for name in rope if not _is_of_rope(name, rope[name], family)}
            names += [f"{name} of {field}" for name in unread_rope]
            read[field] = {name: value for name, value in rope.items() if name not in unread_rope}
    if names:
        _warn_once(raw["model_type"], ", ".join(sorted(names)))
    return read


def reads(family: Family) -> tuple[frozenset[str], dict[str, tuple[Any, ...]]]:
    """Which attributes the family's code reads: those that are translated, and those of one meaning only."""
    only = {name: values for name, values in _ONLY.items() if name not in family.reads}
    return _FIELDS | family.reads, {**only, **family.only}


def _is_of_rope(name: str, value: Any, family: Family) -> bool:
    """A mapping is the rope of some layers, by their kind."""
    return name in ROPE_FIELDS or name in _ROPE_NAMES or name in family.rope or isinstance(value, Mapping)


def _value(found: Any, supported: tuple[Any, ...]) -> Any:
    """A list where a set is supported is compared as one."""
    if isinstance(found, list) and any(isinstance(value, set) for value in supported):
        return {str(value) for value in found}
    return found


@functools.cache
def _warn_once(model_type: str, names: str) -> None:
    _log.warning(
        "config.json has attributes that a %s model does not read, so they change nothing: %s",
        model_type,
        names,
    )
