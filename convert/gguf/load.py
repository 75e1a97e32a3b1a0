"""A GGUF file as a model, and as the files that stand beside a converted one."""

import json
from pathlib import Path as FilePath
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike

from convert.errors import CheckpointError
from convert.gguf.config import config_of
from convert.gguf.file import GGUF, read_gguf
from convert.gguf.tensors import tensors_of
from convert.gguf.tokenizer import read_tokenizer
from convert.hf import Progress, fill
from convert.rules import model_config
from convert.tensors import named_as_llama
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama


def is_gguf(path: FilePath) -> bool:
    """Whether a checkpoint is a GGUF file."""
    return path.suffix == ".gguf" and path.is_file()


def read_gguf_config(file: FilePath) -> ModelConfig:
    """The config of the model in a GGUF file.

    Raises:
        CheckpointError: see `read_gguf`, `config_of` and `model_config`.
    """
    return model_config(config_of(read_gguf(file)))


def load_gguf(
    file: FilePath, *, dtype: DTypeLike, progress: Progress | None = None, mesh: Mesh | None = None
) -> Llama:
    """A model with the weights of a GGUF file, dequantized and cast to `dtype`; on a `mesh`, if given.

    Host memory stays close to the model's own size: tensors are dequantized some rows at a time.

    Raises:
        CheckpointError: the file is damaged, or its model or one of its types of tensors is not supported.
    """
    gguf = read_gguf(file)
    config = model_config(config_of(gguf))
    _check(gguf, config)
    return fill(
        config,
        lambda names: named_as_llama(tensors_of(gguf, names), config),
        dtype=dtype,
        progress=progress,
        mesh=mesh,
    )


def load_gguf_tokenizer(file: FilePath) -> Any:
    """The tokenizer in a GGUF file, or None if there is none.

    Raises:
        CheckpointError: see `read_gguf` and `read_tokenizer`.
    """
    return read_tokenizer(read_gguf(file))


def write_beside(file: FilePath, destination: FilePath) -> None:
    """Write config.json and the tokenizer's files, which a GGUF file holds as metadata, to a directory.

    Raises:
        CheckpointError: see `read_gguf`, `config_of` and `read_tokenizer`.
    """
    gguf = read_gguf(file)
    (destination / "config.json").write_text(json.dumps(config_of(gguf), indent=2) + "\n")
    if (tokenizer := read_tokenizer(gguf)) is not None:
        tokenizer.save_pretrained(str(destination))


def _check(gguf: GGUF, config: ModelConfig) -> None:
    """Before shapes are made of what may be a million layers."""
    tokens = len(gguf.metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > config.vocab_size:
        raise CheckpointError(
            f"{gguf.file} has {tokens} tokens, but embeddings of {config.vocab_size}: it is damaged"
        )
    layers = len({name.split(".")[1] for name in gguf.tensors if name.startswith("blk.")})
    if config.num_layers > layers:
        raise CheckpointError(
            f"{gguf.file} says block_count={config.num_layers}, but there are tensors of {layers}: "
            "it is damaged"
        )
