"""`load`: a checkpoint on disk becomes a model and its tokenizer."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from kivi_jax.console import status
from kivi_jax.generation.tokens import Tokenizer, ending_ids
from kivi_jax.mesh import named_mesh
from kivi_jax.model.llama import Llama
from kivi_jax.options import Dtype


def load(
    path: str | Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> tuple[Llama, Tokenizer | None]:
    """The model at `path`, and its tokenizer if there is one; the tokenizer's end is one of the model's.

    `path` is a Hugging Face directory, a converted one, a GGUF file, a hub name (org/name), or `demo`: the
    small trained model that ships with this package. `dtype` is by default float32 on a CPU and bfloat16
    elsewhere. On a `mesh`, see `make_mesh`, weights go from the file to the devices that compute with them.

    Raises:
        ValueError: the checkpoint cannot be found or used, or does not divide over the mesh; the message says
            why.
    """
    from convert import load_model  # orbax takes seconds to import; only loading needs it

    model, directory = load_model(path, dtype=dtype, mesh=mesh)
    tokenizer = load_tokenizer(directory)
    model.config = dataclasses.replace(model.config, eos_ids=ending_ids(model.config, tokenizer))
    return model, tokenizer


def load_with_tokenizer(
    path: str | Path, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> tuple[Llama, Tokenizer]:
    """`load` where text is to be read.

    Raises:
        ValueError: see `load`; or there is no tokenizer.
    """
    model, tokenizer = load(path, dtype=dtype, mesh=mesh)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer files: copy the tokenizer's files there")
    return model, tokenizer


def open_model(name: str, dtype: Dtype | None, mesh: str | None = None) -> tuple[Llama, Tokenizer]:
    """The model that a command line names, and its tokenizer, on the mesh that it names.

    Raises:
        ValueError: it cannot be loaded, or has no tokenizer.
    """
    devices = None if mesh is None else named_mesh(mesh)
    with status("loading"):
        return load_with_tokenizer(name, dtype=dtype_name(dtype), mesh=devices)


def dtype_name(dtype: Dtype | None) -> str:
    """The dtype that a command line asks for, or else that `load` takes here: results depend on it."""
    from convert.loading import default_dtype

    return default_dtype() if dtype is None else dtype.value


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a directory or GGUF file, or None if there is none.

    Raises:
        ValueError: there is one, but it cannot be read.
    """
    if directory.is_file():
        from convert.gguf.load import load_gguf_tokenizer

        return load_gguf_tokenizer(directory)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer  # takes seconds to import, too

    try:
        # Else code of the checkpoint's would run if standard input said yes.
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        tokenizer("")  # what cannot read is said now
        return tokenizer
    except Exception as error:  # transformers checks little, so what it meets may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer in {directory} cannot be read: {reason}") from error
