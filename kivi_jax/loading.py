"""`load`: a checkpoint on disk becomes a model and its tokenizer."""

from pathlib import Path

from jax.typing import DTypeLike

from kivi_jax.llama import Llama
from kivi_jax.text import Tokenizer


def load(path: str | Path, *, dtype: DTypeLike | None = None) -> tuple[Llama, Tokenizer | None]:
    """The model at `path`, and its tokenizer if there is one.

    `path` is a Hugging Face directory, a converted one, or a hub name (org/name). `dtype` is by default
    float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: the checkpoint cannot be found or used; the message says why.
    """
    from convert import load_model  # orbax takes seconds to import; only loading needs it

    model, directory = load_model(path, dtype=dtype)
    return model, load_tokenizer(directory)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a directory, or None if there are no tokenizer files.

    Raises:
        ValueError: there are, but they cannot be read.
    """
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer  # takes seconds to import, too

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from error
