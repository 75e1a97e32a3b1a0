"""A checkpoint's tensors under Llama's names and in Llama's parts, whatever its own. Read `hf.py` next."""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
from jax.typing import DTypeLike

from convert.stored import Stored
from kivi_jax.checks import warn_once
from kivi_jax.config import ModelConfig
from kivi_jax.model.layer import query_key_value_columns

# Where models of several parts have their text part, as transformers names it today and as it did.
_TEXT = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_LEFT_OUT = ("vision_tower", "multi_modal_projector")
# Modules that hold the output rows of several.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def named_as_llama(tensors: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """The text model's tensors; what a checkpoint has beside them is named once in a warning."""
    found: dict[str, Stored] = {}
    left_out: set[str] = set()
    for name, stored in tensors.items():
        part = next((part for part in _LEFT_OUT if name.removeprefix("model.").startswith(f"{part}.")), None)
        if part is not None:
            left_out.add(part)
            continue
        prefix = next((prefix for prefix in _TEXT if name.startswith(prefix)), "")
        found |= dict(_parts(_TEXT.get(prefix, "") + name.removeprefix(prefix), stored, config))
    if left_out:
        warn_once(f"only the text model is read; left out: {', '.join(sorted(left_out))}")
    return found


def fused(name: str) -> str:
    """The tensor that has the rows of tensor `name`, and others, in families that fuse them."""
    for module, parts in _FUSED.items():
        for part in parts:
            name = name.replace(f".{part}.", f".{module}.")
    return name


def _parts(name: str, stored: Stored, config: ModelConfig) -> Iterator[tuple[str, Stored]]:
    """A fused tensor in parts, each read on its own; any other tensor as it is."""
    whole = next((module for module in _FUSED if f".{module}." in name), None)
    if whole is None:
        yield name, stored
        return
    queries_keys_values = [part.start for part in query_key_value_columns(config)]
    starts = queries_keys_values if whole == "self_attn.qkv_proj" else [0, config.intermediate_size]
    ends = [*starts[1:], None]  # what does not fit is the last part's, whose shape is then wrong
    for module, start, end in zip(_FUSED[whole], starts, ends, strict=True):
        rows = slice(start, end)
        shape = (len(range(stored.shape[0])[rows]), *stored.shape[1:])
        read = functools.partial(_read, stored, rows)
        yield name.replace(whole, module), stored._replace(shape=shape, read=read)


def _read(stored: Stored, rows: slice, dtype: DTypeLike | None) -> np.ndarray:
    return stored.read(dtype)[rows].copy()  # a view would keep all rows
