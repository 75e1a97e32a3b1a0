"""What a GGUF file holds: metadata, and tensors by llama.cpp's names, as the `gguf` package dequantizes them.

Tensors are read from the file when they are asked for: pages of a mapped file would count as our memory.
"""

import math
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from convert.errors import CheckpointError, brief
from convert.gguf.header import read_header

_BLOCK = 1 << 20  # elements that are dequantized at a time: float32 values of a whole tensor take much room


class Block(NamedTuple):
    """Where the bytes of a tensor stand in the file, and how they are to be read."""

    file: FilePath
    offset: int
    shape: tuple[int, ...]  # of the values, rows first as in torch
    row_bytes: int
    kind: Any  # gguf.GGMLQuantizationType

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes

    def read(self, dtype: DTypeLike | None) -> np.ndarray:
        """The values, dequantized some rows at a time and cast to `dtype`, by default float32.

        Raises:
            CheckpointError: the `gguf` package cannot dequantize this type.
        """
        import gguf

        values = np.empty(self.shape, np.float32 if dtype is None else dtype)
        rows = values.reshape(-1, self.shape[-1])
        step = max(1, _BLOCK // rows.shape[1])
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            offset = self.offset + start * self.row_bytes
            stored = np.fromfile(self.file, np.uint8, len(part) * self.row_bytes, offset=offset)
            try:
                part[:] = gguf.dequantize(stored.reshape(len(part), self.row_bytes), self.kind)
            except NotImplementedError as error:
                raise CheckpointError(f"{self.file} cannot be dequantized: {brief(error)}") from error
        return values


class GGUF(NamedTuple):
    """A file's metadata by key, and its tensors by name."""

    file: FilePath
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Block]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the family; its keys begin with it."""
        return self.metadata.get("general.architecture", "")


def read_gguf(file: FilePath) -> GGUF:
    """Metadata and tensors of a file, whose values are not read.

    Raises:
        CheckpointError: the file is damaged, one of several that make a model, or of another byte order.
    """
    import gguf

    try:
        metadata, placed, data = read_header(file)
        tensors = {
            name: Block(
                file,
                data + start,
                shape,
                gguf.quant_shape_to_byte_shape(shape[-1:], kind)[0],
                kind,
            )
            for name, (_, shape, kind, start) in placed.items()
        }
        end = max((block.end for block in tensors.values()), default=data)
        if end > file.stat().st_size:
            raise ValueError("it ends early")
    except CheckpointError:
        raise
    except (ValueError, IndexError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{file} cannot be read as GGUF ({brief(error)}): copy or download it again"
        ) from error
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file} is one of {metadata['split.count']} files of a model: merge them with llama-gguf-split"
        )
    return GGUF(file, metadata, tensors)
