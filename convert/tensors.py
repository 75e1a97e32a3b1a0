"""A checkpoint's tensors under Llama's names and in Llama's parts, whatever its own. Read `hf.py` next."""

import functools
import logging
from collections.abc import Iterator, Mapping

import numpy as np

from convert.stored import Stored
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import query_key_value_columns

_log = logging.getLogger(__name__)

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
        _log.warning("only the text model is read; left out: %s", ", ".join(sorted(left_out)))
    return found


def _parts(name: str, stored: Stored, config: ModelConfig) -> Iterator[tuple[str, Stored]]:
    """A fused tensor in parts, each read on its own; any other tensor as it is."""
    fused = next((module for module in _FUSED if f".{module}." in name), None)
    if fused is None:
        yield name, stored
        return
    columns = query_key_value_columns(config)
    starts = (
        [part.start for part in columns] if fused == "self_attn.qkv_proj" else [0, config.intermediate_size]
    )
    ends: list[int | None] = [
        *starts[1:],
        None,
    ]  # what does not fit is the last part's, whose shape is then wrong
    for module, start, end in zip(_FUSED[fused], starts, ends, strict=True):
        rows = slice(start, end)
        shape = (len(range(stored.shape[0])[rows]), *stored.shape[1:])
        yield (
            name.replace(fused, module),
            stored._replace(shape=shape, read=functools.partial(_read, stored, rows)),
        )


def _read(stored: Stored, rows: slice) -> np.ndarray:
    return stored.read()[rows]
