"""Files of results: checked before the work, whole or absent; manifests with a checksum of themselves."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_place(path: Path, begin: bytes) -> None:
    """Make the folder of a file that will begin with `begin`, or refuse the place, before the work.

    Raises:
        ValueError: it is a directory or a device, or below what is no directory, or may not be written; or a
            file is there that begins otherwise, so that something else would be lost.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        possible = os.access(path.parent, os.W_OK) and (path.is_file() or not path.exists())
        held = _head(path, len(begin)) if possible and path.exists() else b""
    except OSError:
        possible, held = False, b""
    if not possible:
        raise ValueError(f"{path} cannot be written: choose another file")
    if held not in (b"", begin):
        raise ValueError(f"{path} is a file of another kind, which would be lost: choose another")


def seal(manifest: Mapping[str, Any]) -> str:
    """A checksum of what a manifest says, however it is spelled."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A new file that takes the place of `path` if the block succeeds and vanishes if it fails.

    Raises:
        ValueError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
