"""Tensors of a checkpoint, named and described but not read. Read `hf.py` next."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from convert.errors import CheckpointError

_FLOATS_8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


class Stored(NamedTuple):
    """A tensor in a file. `read` gives its values as a type, or as they are; nothing keeps them."""

    file: FilePath
    shape: tuple[int, ...]
    kind: str  # as safetensors names types: F32, BF16, I32, F8_E4M3
    read: Callable[[DTypeLike | None], np.ndarray]


def stored_tensors(directory: FilePath) -> dict[str, Stored]:
    """Every tensor in the safetensors files of a directory.

    Raises:
        CheckpointError: there are none, one cannot be read, or two hold the same tensor.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(directory):
        for name, stored in _tensors_in(file):
            if name in found:
                raise CheckpointError(f"tensor {name} is in {found[name].file.name} and in {file.name}")
            found[name] = stored
    return found


def read_json(file: FilePath) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is no such file, or something else is in it.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: a Hugging Face checkpoint needs it")
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _weight_files(directory: FilePath) -> list[FilePath]:
    # As transformers chooses. Some directories hold the same weights again in another layout.
    if (single := directory / "model.safetensors").exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} must map tensors to files in its weight_map")
        if outside := sorted(name for name in shards.values() if FilePath(name).name != name):
            raise CheckpointError(f"{index} names {outside[0]!r}, which is no file beside it")
        files = sorted({directory / name for name in shards.values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"{directory} lacks shards that its index names: {', '.join(missing)}")
        return files
    if files := sorted(directory.glob("*.safetensors")):
        return files
    pickled = sorted(file.name for ending in ("*.bin", "*.pth", "*.pt") for file in directory.glob(ending))
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights ({pickled[0]}), which can run code when loaded: save it as "
            "safetensors first, in transformers with model.save_pretrained(folder)"
        )
    raise CheckpointError(f"{directory} holds no *.safetensors weights")


def _tensors_in(file: FilePath) -> Iterator[tuple[str, Stored]]:
    if not file.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{file} is no regular file: copy or download it again")
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                view = tensors.get_slice(name)
                shape, kind = tuple(view.get_shape()), view.get_dtype()
                yield name, Stored(file, shape, kind, functools.partial(_read, file, name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error


def _read(file: FilePath, name: str, dtype: DTypeLike | None) -> np.ndarray:
    # Opened anew for every tensor: pages of a file that stays mapped would count as our memory.
    with safe_open(file, framework="numpy") as tensors:
        kind = tensors.get_slice(name).get_dtype()
        values = _read_bytes(file, name, _FLOATS_8[kind]) if kind in _FLOATS_8 else tensors.get_tensor(name)
    return values if dtype is None else values.astype(dtype, copy=False)


def _read_bytes(file: FilePath, name: str, dtype: type) -> np.ndarray:
    """NumPy has no floats of 8 bits, so the safetensors package does not give them."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        said = json.loads(content.read(length))[name]
    begin, end = said["data_offsets"]
    values = np.fromfile(file, np.uint8, end - begin, offset=8 + length + begin)
    return values.view(dtype).reshape(said["shape"])
