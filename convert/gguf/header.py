"""What stands before the values in a GGUF file: metadata, and where each tensor is. Read `file.py` next.

The `gguf` package's reader makes two arrays of each token of a vocabulary: 6 s and 170 MB for 50,000.
"""

import mmap
from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np

from convert.errors import CheckpointError

_MAGIC, _VERSIONS = 0x46554747, (2, 3)
_TYPES = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "string", "array", "<u8", "<i8", "<f8")


class Placed(NamedTuple):
    """A tensor, and where its values begin after all that is said of tensors."""

    name: str
    shape: tuple[int, ...]  # rows first, as in torch
    kind: Any  # gguf.GGMLQuantizationType
    start: int


class Header(NamedTuple):
    """A file's metadata by key, its tensors by name, and where the first one's values are."""

    metadata: dict[str, Any]
    tensors: dict[str, Placed]
    data: int


def read_header(file: FilePath) -> Header:
    """All that a GGUF file says about its values.

    Raises:
        CheckpointError: it is of another byte order.
        ValueError, RecursionError: it is cut or damaged, no such file, or of another version.
        OSError: it cannot be read.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        values = _Values(content)
        if values.number("<u4") != _MAGIC:
            raise ValueError("GGUF magic invalid")
        if (version := values.number("<u4")) not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise CheckpointError(f"{file} is of another byte order: download the little-endian file")
            raise ValueError(f"its version is {version}, not {' or '.join(map(str, _VERSIONS))}")
        tensors, keys = values.number("<u8"), values.number("<u8")
        metadata = _by_name((values.string(), values.typed()) for _ in range(keys))
        described = (values.tensor() for _ in range(tensors))
        placed = _by_name((tensor.name, tensor) for tensor in described)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}")
        return Header(metadata, placed, -(-values.offset // alignment) * alignment)


class _Values:
    """Reads one value after the other."""

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.offset = 0

    def numbers(self, kind: str, count: int) -> list[Any]:
        dtype = np.dtype(kind)
        taken = self._take(count * dtype.itemsize)
        return np.frombuffer(taken, dtype).tolist()

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        return self._take(self.number("<u8")).decode()

    def typed(self) -> Any:
        return self._of(self._type())

    def tensor(self) -> Placed:
        from gguf import GGMLQuantizationType

        name = self.string()
        shape = tuple(reversed(self.numbers("<u8", self.number("<u4"))))
        return Placed(name, shape, GGMLQuantizationType(self.number("<u4")), self.number("<u8"))

    def _of(self, kind: str) -> Any:
        if kind == "string":
            return self.string()
        if kind != "array":
            return self.number(kind)
        element, count = self._type(), self.number("<u8")
        if element in ("string", "array"):
            return [self._of(element) for _ in range(count)]
        return self.numbers(element, count)

    def _type(self) -> str:
        if (kind := self.number("<u4")) >= len(_TYPES):
            raise ValueError(f"it has a value of unknown type {kind}")
        return _TYPES[kind]

    def _take(self, length: int) -> bytes:
        start, self.offset = self.offset, self.offset + length
        if self.offset > len(self.content):
            raise ValueError("it ends early")
        return self.content[start : self.offset]


def _by_name(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in items:
        if name in found:
            raise ValueError(f"it holds {name} twice")
        found[name] = item
    return found
