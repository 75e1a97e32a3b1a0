"""Where a checkpoint is: a local directory, a download from the Hugging Face hub, or in this package."""

import re
from importlib.resources import files
from pathlib import Path as FilePath

from convert.errors import CheckpointError

_FILES = ["*.safetensors", "*.json", "tokenizer*", "chat_template*", "additional_chat_templates/*"]
_COPIES = ["consolidated*", "original/*"]  # the same weights in the trainer's own layout


def resolve(source: str | FilePath) -> FilePath:
    """The local directory of a checkpoint given by path or by hub name (org/name).

    The name `demo` stands for the small trained model that ships with this package.

    Raises:
        CheckpointError: there is no such directory, and no such name or no network to download it.
    """
    if source == "demo":  # a directory of that name is ./demo
        return FilePath(str(files("kivi_jax"))) / "demo" / "model"
    directory = FilePath(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise CheckpointError(f"{source} is a file: pass the checkpoint's directory")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"{source} does not exist: pass a directory or a hub name (org/name), or demo")
    from huggingface_hub import snapshot_download

    try:
        return FilePath(snapshot_download(str(source), allow_patterns=_FILES, ignore_patterns=_COPIES))
    except Exception as error:  # hub, network and proxy errors share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{source} is neither a directory here nor could it be downloaded: {reason}"
        ) from error
