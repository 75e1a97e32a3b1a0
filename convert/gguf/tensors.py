"""The tensors of a GGUF file under the names, and with the values, that a Hugging Face checkpoint has."""

import functools
from collections.abc import Iterable

import numpy as np
from jax.typing import DTypeLike

from convert.errors import CheckpointError
from convert.gguf.config import ARCHITECTURES
from convert.gguf.file import GGUF, Block
from convert.stored import Stored
from convert.tensors import fused

# What config.json says of them, `config_of` has read.
_IN_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def tensors_of(gguf: GGUF, wanted: Iterable[str]) -> dict[str, Stored]:
    """The file's tensors by the names that are `wanted` for them; others keep the file's.

    What a family fuses keeps its fused name: see `convert.tensors.named_as_llama`.

    Raises:
        CheckpointError: two wanted names stand for the same tensor.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == gguf.architecture)
    translate = get_tensor_name_map(kind, gguf.metadata[f"{gguf.architecture}.block_count"])
    names: dict[str, str] = {}
    if ARCHITECTURES[gguf.architecture].fused:
        wanted = dict.fromkeys(fused(name) for name in wanted)
    for name in wanted:
        module, _, field = name.rpartition(".")
        ours = f"{translate.get_name(module)}.{field}"
        if ours in names:
            raise CheckpointError(f"{gguf.file}: {name} and {names[ours]} are both {ours}")
        names[ours] = name
    return {
        names.get(name, name): _stored(gguf, names.get(name, name), block)
        for name, block in gguf.tensors.items()
        if name not in _IN_CONFIG
    }


def _stored(gguf: GGUF, name: str, block: Block) -> Stored:
    architecture = ARCHITECTURES[gguf.architecture]
    read = block.read
    for projection, key in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
        if architecture.permuted and f"self_attn.{projection}." in name:
            said = f"{gguf.architecture}.attention."
            heads = gguf.metadata.get(said + key, gguf.metadata[f"{said}head_count"])
            read = functools.partial(_halves, block, heads)
    if architecture.norm_offset and "norm" in name:
        read = functools.partial(_less, block, architecture.norm_offset)
    return Stored(block.file, block.shape, "F32", read)  # a float, whatever it is packed as


def _halves(block: Block, heads: int, dtype: DTypeLike | None) -> np.ndarray:
    """Rows of interleaved rotary pairs (0, 1), (2, 3) back to halves (0, d/2), (1, d/2 + 1)."""
    rows = block.read(dtype)
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _less(block: Block, offset: float, dtype: DTypeLike | None) -> np.ndarray:
    """Subtracted in float32: near one, a 16-bit type keeps little of the difference."""
    return (block.read(np.float32) - np.float32(offset)).astype(np.float32 if dtype is None else dtype)
