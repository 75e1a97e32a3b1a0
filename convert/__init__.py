"""From Hugging Face checkpoints to models, and to and from disk. Read `rules.py` first."""

from pathlib import Path as FilePath

import jax
from jax.typing import DTypeLike

from convert.errors import CheckpointError
from convert.hf import Progress, load_hf, read_config
from convert.hub import resolve
from convert.orbax import is_converted, read_manifest
from convert.orbax import load as load_converted
from kivi_jax.checks import floating
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama

__all__ = [
    "CheckpointError",
    "default_dtype",
    "load_model",
    "read_any_config",
]


def default_dtype() -> str:
    """float32 on a CPU, where bfloat16 matrix products are many times slower; bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def read_any_config(path: str | FilePath) -> ModelConfig:
    """The config of the model at `path`; its weights need not be there.

    Raises:
        CheckpointError: see `load_model`.
    """
    directory = resolve(path)
    return read_manifest(directory).config if is_converted(directory) else read_config(directory)


def load_model(
    path: str | FilePath, *, dtype: DTypeLike | None = None, progress: Progress | None = None
) -> tuple[Llama, FilePath]:
    """The model at `path`, and the local directory it was read from.

    `path` is a Hugging Face directory, a converted one, or a Hugging Face hub name (org/name), which is
    downloaded. `dtype` is by default `default_dtype()`.

    Raises:
        CheckpointError: it cannot be found or used; the message says why.
    """
    directory = resolve(path)
    dtype = floating(default_dtype() if dtype is None else dtype)
    if is_converted(directory):
        return load_converted(directory, dtype=dtype), directory
    return load_hf(directory, dtype=dtype, progress=progress), directory
