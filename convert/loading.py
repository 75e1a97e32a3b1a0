"""A model at a path, whatever it is kept as. Read `rules.py` first."""

from pathlib import Path as FilePath

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.errors import CheckpointError
from convert.gguf.load import is_gguf, load_gguf, read_gguf_config
from convert.hf import Progress, load_hf, read_config
from convert.hub import resolve
from convert.orbax import is_converted, read_manifest
from convert.orbax import load as load_converted
from kivi_jax.checks import floating
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama

__all__ = ["CheckpointError", "default_dtype", "load_model", "read_any_config"]


def default_dtype() -> str:
    """float32 on a CPU, where bfloat16 matrix products are many times slower; bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def read_any_config(path: str | FilePath) -> ModelConfig:
    """The config of the model at `path`; its weights need not be there.

    Raises:
        CheckpointError: see `load_model`.
    """
    checkpoint = resolve(path)
    if is_gguf(checkpoint):
        return read_gguf_config(checkpoint)
    return read_manifest(checkpoint).config if is_converted(checkpoint) else read_config(checkpoint)


def load_model(
    path: str | FilePath,
    *,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> tuple[Llama, FilePath]:
    """The model at `path`, and the local directory or GGUF file it was read from.

    `path` is a Hugging Face directory, a converted one, a GGUF file or a directory with one, or a hub name
    (org/name), which is downloaded. `dtype` is by default `default_dtype()`. On a `mesh`, each tensor goes
    from the file to the devices that compute with it.

    Raises:
        CheckpointError: it cannot be found or used; the message says why.
        ValueError: the model does not divide over the mesh.
    """
    checkpoint = resolve(path)
    dtype = floating(default_dtype() if dtype is None else dtype)
    if is_converted(checkpoint):
        return load_converted(checkpoint, dtype=dtype, mesh=mesh), checkpoint
    load = load_gguf if is_gguf(checkpoint) else load_hf
    return load(checkpoint, dtype=dtype, progress=progress, mesh=mesh), checkpoint
