"""Where a checkpoint is: a local directory or GGUF file, a download from the hub, or in this package."""

import re
from importlib.resources import files
from pathlib import Path as FilePath

from convert.errors import CheckpointError
from kivi_jax.checks import path

_FILES = ["*.safetensors", "*.json", "tokenizer*", "chat_template*", "additional_chat_templates/*"]
_COPIES = ["consolidated*", "original/*"]  # the same weights in the trainer's own layout


def resolve(source: str | FilePath) -> FilePath:
    """The local directory or GGUF file of a checkpoint given by path or by hub name.

    Of a repository `org/name` safetensors are downloaded, of `org/name/FILE.gguf` that file.

    A directory with one GGUF file and nothing else to load stands for that file, and the name `demo` for the
    small trained model that ships with this package.

    Raises:
        CheckpointError: there is no such directory, and no such name or no network to download it; or there
            are several GGUF files to choose from.
    """
    if source == "demo":  # a directory of that name is ./demo
        return FilePath(str(files("kivi_jax"))) / "demo" / "model"
    directory = path("model", source).expanduser()
    if directory.is_dir():
        return _the_gguf_in(directory) or directory
    if directory.suffix == ".gguf" and directory.is_file():
        return directory
    if directory.exists():
        raise CheckpointError(f"{source} is a file: pass the checkpoint's directory, or a GGUF file")
    on_hub = re.fullmatch(r"(?P<name>\w[\w.-]*/[\w.-]+)(/(?P<file>[\w./-]+\.gguf))?", str(source))
    if on_hub is None:
        raise CheckpointError(f"{source} does not exist: pass a directory or a hub name (org/name), or demo")
    try:
        return FilePath(_download(**on_hub.groupdict()))
    except Exception as error:  # hub, network and proxy errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{source} is neither here nor could it be downloaded: {reason}") from error


def _download(name: str, file: str | None) -> str:
    from huggingface_hub import hf_hub_download, snapshot_download

    if file is not None:
        return hf_hub_download(name, file)
    return snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_COPIES)


def _the_gguf_in(directory: FilePath) -> FilePath | None:
    files = sorted(directory.glob("*.gguf"))
    if not files or any(directory.glob("*.safetensors")) or (directory / "kivi_jax.json").exists():
        return None
    if len(files) > 1:
        raise CheckpointError(f"{directory} holds several GGUF files: pass one of them, as {files[0].name}")
    return files[0]
