"""Directories that are complete or absent, and how to notice a file that is not what was written."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path as FilePath

from convert.errors import CheckpointError, brief
from kivi_jax.checks import instance

# What this package writes: a manifest, and a folder. The manifest lists the folder's `files` and those beside
# itself; nothing else is ever replaced, and only by what has the same manifest.
_OURS = {"kivi_jax.json": "parameters", "prefix.json": "arrays"}
_KINDS = {"kivi_jax.json": "a converted model", "prefix.json": "a saved prefix"}


@contextmanager
def replacing(
    destination: FilePath,
    *,
    manifest: str,
    overwrite: bool,
    sources: Sequence[FilePath] = (),
    needed: int = 0,
) -> Iterator[FilePath]:
    """A new directory that takes `destination`'s place if the block succeeds and vanishes if it fails.

    The block writes the file `manifest` there, which says what kind it is. `sources` are what the block
    reads, `needed` the bytes that it will write at least. One process at a time writes to a destination; what
    a killed one left is removed by the next.

    Raises:
        CheckpointError: `destination` is a file, or a mount point; or not empty, and `overwrite` is false or
            this package did not write all of it, or as another kind; or it holds a source, the current or the
            home directory; or another process writes to it; or there is too little space; or what stands
            where the work is done is not ours.
        ValueError: `overwrite` is neither true nor false.
    """
    instance("overwrite", overwrite, bool, "pass True or False")
    _check_replaceable(destination, manifest, overwrite, sources)
    with writing(destination):
        target = destination.resolve()  # of a symbolic link, what it points to is replaced
    workspace = target.parent / f".{target.name}.partial"
    partial, replaced = workspace / "new", workspace / "old"
    with writing(destination):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent / f".{target.name}.lock", destination):
        with writing(destination):
            _clear(workspace, target)
            # A folder inside: the workspace itself is private to the user, what is published should not be.
            workspace.mkdir(mode=0o700)
            partial.mkdir()
        try:
            check_space(partial, needed, destination)
            yield partial
            _check_replaceable(destination, manifest, overwrite, sources)  # much may have happened since
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
        finally:
            _put_back(replaced, target)
            _remove(workspace)


def check_space(folder: FilePath, needed: int, destination: FilePath) -> None:
    """Refuse to begin what does not fit.

    Raises:
        CheckpointError: the disk of `folder`, which becomes `destination`, has fewer than `needed` bytes.
    """
    if needed > (free := shutil.disk_usage(folder).free):
        raise CheckpointError(f"{destination} needs {needed:,} bytes, and {free:,} are free: make space")


def _check_replaceable(
    destination: FilePath, manifest: str, overwrite: bool, sources: Sequence[FilePath]
) -> None:
    if not destination.is_dir():
        if destination.exists():
            raise CheckpointError(f"{destination} is a file: choose a directory to write to")
        return
    target = destination.resolve()
    if os.path.ismount(target):
        raise CheckpointError(
            f"{destination} is a mount point, which cannot be replaced: choose a folder in it"
        )
    for path in [*sources, FilePath.cwd(), FilePath(os.path.expanduser("~"))]:
        if path.exists() and path.resolve().is_relative_to(target):
            raise CheckpointError(
                f"{destination} cannot be replaced, as {path} is in it: choose another directory"
            )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{destination} is not empty: choose another directory, or pass --overwrite")
    kind, listed = _listed(target)
    held = (path for path in sorted(target.rglob("*")) if path.is_symlink() or not path.is_dir())
    if foreign := next((path for path in held if path.relative_to(target).as_posix() not in listed), None):
        raise CheckpointError(
            f"{destination} holds files that kivi-jax did not write ({foreign.relative_to(target)}): "
            "choose another, or move them away"
        )
    if kind is not None and kind != manifest:
        raise CheckpointError(
            f"{destination} is {_KINDS[kind]}, which {_KINDS[manifest]} does not replace: choose another "
            "directory, or remove it"
        )


def _listed(target: FilePath) -> tuple[str | None, set[str]]:
    """The manifest of ours in `target`, if any, and the files that it says were written with it."""
    for name, folder in _OURS.items():
        try:
            manifest = json.loads((target / name).read_bytes())
            if isinstance(manifest["format"], int):
                files = (f"{folder}/{file}" for file in manifest["files"])
                return name, {name, *files, *manifest.get("beside", ())}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None, set()


def _clear(workspace: FilePath, target: FilePath) -> None:
    """Remove what a killed process left, but for what it had already moved away and not yet replaced."""
    if not workspace.exists():
        return
    if not workspace.is_dir() or {path.name for path in workspace.iterdir()} - {"new", "old"}:
        raise _in_the_way(workspace)
    _put_back(workspace / "old", target)
    shutil.rmtree(workspace)


def _put_back(replaced: FilePath, target: FilePath) -> None:
    """Where the work ended between the two renames, what stood there before stands there again."""
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)


def _remove(workspace: FilePath) -> None:
    """After a full disk, orbax's threads may still be writing: what they leave is removed, too."""
    for _ in range(10):
        shutil.rmtree(workspace, ignore_errors=True)
        if not workspace.exists():
            return
        time.sleep(0.1)


@contextmanager
def locked(file: FilePath, what: FilePath) -> Iterator[None]:
    """Hold the lock `file`, which vanishes afterwards; the system releases it when its process dies.

    Raises:
        CheckpointError: another process holds it: that one writes to `what`.
    """
    descriptor = _lock(file, what)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(file: FilePath, what: FilePath) -> int:
    while True:
        with writing(what):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise CheckpointError(
                    f"{what} is being written by another process: wait for it, or choose another place"
                ) from None
            status = os.fstat(descriptor)
            if status.st_size:  # ours are empty
                os.close(descriptor)
                raise _in_the_way(file)
            if status.st_nlink:
                return descriptor
            os.close(descriptor)  # its owner removed it after we opened it


def _in_the_way(path: FilePath) -> CheckpointError:
    return CheckpointError(f"{path} is in the way, and kivi-jax did not make it: move it away")


@contextmanager
def writing(destination: FilePath) -> Iterator[None]:
    """Anything that fails here is that `destination` cannot be written: no permission, or a full disk.

    Raises:
        CheckpointError: something did.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}") from error
    except Exception as error:  # orbax and tensorstore raise plain Exception, too
        raise CheckpointError(f"{destination} cannot be written: {brief(error)}") from error


def file_sizes(directory: FilePath) -> dict[str, int]:
    """Bytes of every file below a directory, by its path in it."""
    return {name: file.stat().st_size for name, file in _files(directory).items()}


def checksums(directory: FilePath) -> dict[str, str]:
    """SHA-256 of every file below a directory, by its path in it."""
    files = _files(directory)
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        return dict(zip(files, pool.map(_sha256, files.values()), strict=True))


def _sha256(path: FilePath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: FilePath) -> dict[str, FilePath]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file for file in files}


def find_damage(
    directory: FilePath, sizes: Mapping[str, int], sums: Mapping[str, str] | None = None
) -> str | None:
    """What is wrong with the files that had these `sizes` (and SHA-256 `sums`, if those were taken) when they
    were written; None if all still have.

    It comes before orbax, which reports an incomplete copy at length, and with tracebacks, and takes any
    bytes of the right number.
    """
    found = file_sizes(directory)
    for name, size in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes, not {size:,}"
    if sums:
        now = checksums(directory)
        if changed := [name for name, value in sums.items() if now.get(name) != value]:
            return f"{changed[0]} is not what was written: its checksum is another one"
    return None
