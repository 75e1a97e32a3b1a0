"""Hugging Face directory -> model, one tensor at a time. Read `orbax.py` next."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from convert.errors import CheckpointError
from convert.rules import Path, is_derived, model_config, sources_of
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama

Progress = Callable[[int, int], None]  # tensors done, tensors in all

_FLOATS = {"F64", "F32", "F16", "BF16"}


def read_config(directory: FilePath) -> ModelConfig:
    """The config of a Hugging Face directory.

    Raises:
        CheckpointError: there is none, it is not JSON, or see `rules.model_config`.
    """
    generation = directory / "generation_config.json"
    return model_config(
        _read_json(directory / "config.json"), _read_json(generation) if generation.exists() else None
    )


def load_hf(directory: FilePath, *, dtype: DTypeLike, progress: Progress | None = None) -> Llama:
    """A model with the weights of a Hugging Face directory, cast to `dtype`.

    Tensors are read one at a time, so host memory stays close to the model's own size.

    Raises:
        CheckpointError: config or files are missing or unreadable; or, all listed together, parameters
            without a tensor, tensors without a parameter, wrong shapes and types that are not floats.
    """
    config = read_config(directory)
    check_tokenizer(directory, config)
    files = _tensor_files(directory)
    abstract = abstract_parameters(config, dtype)
    sources = {path: sources_of(path, config) for path in abstract}
    shapes = {
        source.name: jax.eval_shape(source.part_of, abstract[path]).shape
        for path, parts in sources.items()
        for source in parts
    }
    _check_coverage(config, files, shapes)
    if config.tie_word_embeddings and "lm_head.weight" in files:
        _check_tied(files, sources["embed", "embedding"][0].name)
    filled: dict[Path, jax.Array] = {}
    done = 0
    # Largest first: reading needs a tensor's size more, which is least when the model is nearly whole.
    for path in sorted(sources, key=lambda path: -abstract[path].size):
        parts: list[jax.Array] = []
        for source in sources[path]:
            tensor = _read_tensor(files[source.name][0], source.name)
            parts.append(jnp.asarray(tensor.T if source.transpose else tensor, dtype))
            done += 1
            if progress is not None:
                progress(done, len(shapes))
        filled[path] = jnp.concatenate(parts, axis=-1)
    return build(config, filled, dtype)


def abstract_parameters(config: ModelConfig, dtype: DTypeLike) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its path, without making any."""
    state = nnx.state(nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0))))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def build(config: ModelConfig, parameters: Mapping[Path, jax.Array], dtype: DTypeLike) -> Llama:
    """The model whose parameters are those given, all of them."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0))))

    def pick(path: tuple[Any, ...], _: Any) -> jax.Array:
        return parameters[tuple(str(key.key) for key in path)]

    pure = jax.tree_util.tree_map_with_path(pick, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graphdef, state)


def check_tokenizer(directory: FilePath, config: ModelConfig) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for.

    Raises:
        CheckpointError: it can, or its file cannot be read.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return
    from tokenizers import Tokenizer

    try:
        largest = max(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has ids up to {largest}, but config.json says vocab_size={config.vocab_size}: "
            "tokenizer and weights are not of the same model"
        )


def _read_json(file: FilePath) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: a Hugging Face checkpoint needs it")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _tensor_files(directory: FilePath) -> dict[str, tuple[FilePath, tuple[int, ...], str]]:
    """File, shape and type of every tensor."""
    found: dict[str, tuple[FilePath, tuple[int, ...], str]] = {}
    for file in _weight_files(directory):
        for name, shape, kind in _tensors_in(file):
            if name in found:
                raise CheckpointError(f"tensor {name} is in {found[name][0].name} and in {file.name}")
            found[name] = (file, shape, kind)
    return found


def _weight_files(directory: FilePath) -> list[FilePath]:
    # As transformers chooses. Some directories hold the same weights again in another layout.
    if (single := directory / "model.safetensors").exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} must map tensors to files in its weight_map")
        files = sorted({directory / name for name in shards.values()})
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(f"{directory} lacks shards that its index names: {', '.join(missing)}")
        return files
    if files := sorted(directory.glob("*.safetensors")):
        return files
    pickled = sorted(file.name for ending in ("*.bin", "*.pth", "*.pt") for file in directory.glob(ending))
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights ({pickled[0]}), which can run code when loaded: save it as "
            "safetensors first, in transformers with model.save_pretrained(folder)"
        )
    raise CheckpointError(f"{directory} holds no *.safetensors weights")


def _tensors_in(file: FilePath) -> Iterator[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                view = tensors.get_slice(name)
                yield name, tuple(view.get_shape()), view.get_dtype()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error


def _read_tensor(file: FilePath, name: str) -> np.ndarray:
    # Opened anew for every tensor: pages of a file that stays mapped would count as our memory.
    with safe_open(file, framework="numpy") as tensors:
        return tensors.get_tensor(name)


def _check_tied(files: Mapping[str, tuple[FilePath, tuple[int, ...], str]], embedding: str) -> None:
    """Some tools save a tied head again; transformers does not tie it if it differs, so refuse that."""
    head = "lm_head.weight"
    if not np.array_equal(_read_tensor(files[embedding][0], embedding), _read_tensor(files[head][0], head)):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {head} differs from {embedding}: "
            "set tie_word_embeddings to false if the model was trained with its own head"
        )


def _check_coverage(
    config: ModelConfig,
    files: Mapping[str, tuple[FilePath, tuple[int, ...], str]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Every parameter is filled and every tensor used, exactly once; all errors in one message."""
    ignored = {name for name in files if is_derived(name)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")  # see _check_tied
    problems = [f"{name} is missing" for name in sorted(expected.keys() - files.keys())]
    problems += [
        f"{name} is not a tensor of this model" for name in sorted(files.keys() - expected.keys() - ignored)
    ]
    for name in sorted(expected.keys() & files.keys()):
        _, shape, kind = files[name]
        if shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, config.json asks for {list(expected[name])}")
        if kind not in _FLOATS:
            problems.append(f"{name} has type {kind}, not a float")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the weights do not fit config.json: {shown}")
