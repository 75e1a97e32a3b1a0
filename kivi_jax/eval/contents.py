"""What records were computed from, by content: a file written anew at the same path is another one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kivi_jax.eval.samples import data_files

_DATA = (".jsonl", ".json", ".txt")  # files of a folder that evaluations read
_BRIEF = 2**26  # bytes that are hashed in a moment; larger weights are known by size and time


def of_data(source: str | Path) -> str | None:
    """SHA-256 of a file, or of the files of data in a folder; None where there is neither, but a name."""
    path = Path(source)
    if path.is_file():
        return _sha256(path)
    files = (file for suffix in _DATA for file in data_files(path, f"*{suffix}"))
    return _digest(path, files, brief=False) if path.is_dir() else None


def of_model(checkpoint: Path) -> str:
    """Names a model by its files: tokenizer, configs and manifest, which has checksums of converted weights.

    Other weights are too large to be read for this: a copy of the same, of another time, is another model.
    """
    if checkpoint.is_file():  # GGUF, which holds all of it
        return _digest(checkpoint.parent, [checkpoint], brief=True)
    from convert.orbax import BESIDE, MANIFEST, TEMPLATES, is_converted, read_manifest

    patterns = [*BESIDE, f"{TEMPLATES}/*", MANIFEST, "*.safetensors"]
    if is_converted(checkpoint) and not read_manifest(checkpoint).checksums:
        patterns.append("parameters/**/*")
    files = {file for pattern in patterns for file in checkpoint.glob(pattern) if file.is_file()}
    return _digest(checkpoint, files, brief=True)


def together(**found: str | None) -> dict[str, Any]:
    """The settings of records that were computed from these; what has no file is left out."""
    return {"contents": {name: digest for name, digest in found.items() if digest is not None}}


def _digest(folder: Path, files: Iterable[Path], *, brief: bool) -> str:
    held = {file.relative_to(folder).as_posix(): _mark(file, brief=brief) for file in files}
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _mark(file: Path, *, brief: bool) -> Any:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns] if brief and status.st_size > _BRIEF else _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
