"""Directories that are complete or absent, and how to notice a file that is not what was written."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath

from convert.errors import CheckpointError


@contextmanager
def replacing(destination: FilePath, *, overwrite: bool) -> Iterator[FilePath]:
    """A new directory that takes `destination`'s place if the block succeeds and vanishes if it fails.

    Raises:
        CheckpointError: `destination` is a file, or not empty and `overwrite` is false.
    """
    if destination.is_file():
        raise CheckpointError(f"{destination} is a file: choose a directory to write to")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise CheckpointError(f"{destination} is not empty: choose another directory, or pass --overwrite")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        workspace = FilePath(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror}") from error
    # A folder inside: the workspace itself is private to the user, what is published should not be.
    partial, replaced = workspace / "new", workspace / "old"
    partial.mkdir()
    try:
        yield partial
        if destination.exists():
            destination.rename(replaced)
        partial.rename(destination)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def file_sizes(directory: FilePath) -> dict[str, int]:
    """Bytes of every file below a directory, by its path in it."""
    files = (file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.stat().st_size for file in sorted(files)}


def find_damage(directory: FilePath, sizes: Mapping[str, int]) -> str | None:
    """What is wrong with the files that had these `sizes` when they were written; None if all still have.

    Cheap, and it comes before orbax, which reports an incomplete copy at length, and with tracebacks.
    """
    found = file_sizes(directory)
    for name, size in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes, not {size:,}"
    return None
