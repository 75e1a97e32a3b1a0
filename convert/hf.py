"""Hugging Face directory -> model, one tensor at a time. Read `orbax.py` next."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from convert.errors import CheckpointError
from convert.quantized import dequantized
from convert.rules import Path, is_derived, model_config, sources_of
from convert.stored import Stored, read_json, stored_tensors
from convert.tensors import named_as_llama
from kivi_jax.checks import warn_once
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import Llama, abstract_llama
from kivi_jax.model.sharding import place, split
from pallas_kernels.pytree import tree_bytes

Progress = Callable[[int, int], None]  # tensors done, tensors in all

_FLOATS = {"F64", "F32", "F16", "BF16"}
_ALIGNMENT = 64  # bytes
_ROWS = 256  # copied at a time: where they become columns, they stay in a processor's cache
_LARGEST = 65504.0  # of float16, in which all trained weights can be kept
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(directory: FilePath) -> ModelConfig:
    """The config of a Hugging Face directory.

    Raises:
        CheckpointError: there is none, it is not JSON, or see `rules.model_config`.
    """
    generation = directory / "generation_config.json"
    raw = read_json(directory / "config.json")
    raw.pop("quantization_config", None)  # how weights are stored, not what they compute
    return model_config(raw, read_json(generation) if generation.exists() else None)


def load_hf(
    directory: FilePath, *, dtype: DTypeLike, progress: Progress | None = None, mesh: Mesh | None = None
) -> Llama:
    """A model with the weights of a Hugging Face directory, cast to `dtype`; on a `mesh`, if given.

    Tensors are read one at a time, so host memory stays close to the model's own size.

    Raises:
        CheckpointError: config or files are missing or unreadable; or, all listed together, parameters
            without a tensor, tensors without a parameter, wrong shapes and types that are not floats; or a
            value is infinite or not a number, or becomes so in `dtype`.
    """
    config = read_config(directory)
    check_tokenizer(directory, config)
    tensors = stored_tensors(directory)
    if quantization := read_json(directory / "config.json").get("quantization_config"):
        tensors = dequantized(tensors, quantization)
    tensors = named_as_llama(tensors, config)
    _check_layers(config, tensors)
    if config.tie_word_embeddings and _EMBEDDING not in tensors and _HEAD in tensors:
        tensors[_EMBEDDING] = tensors[_HEAD]  # some tools keep the one matrix under the head's name
    return fill(config, lambda _: tensors, dtype=dtype, progress=progress, mesh=mesh)


def fill(
    config: ModelConfig,
    stored: Callable[[Iterable[str]], Mapping[str, Stored]],
    *,
    dtype: DTypeLike,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Llama:
    """The model of this config whose parameters are what is `stored` by the names that are asked for.

    On a `mesh`, a tensor is on the host until it is whole, and then each device is given its part.

    Raises:
        CheckpointError: names, shapes or types differ from what the config asks for; all listed together.
        ValueError: the model does not divide over the mesh.
    """
    mesh = None if mesh is None else split(mesh, config)
    abstract = abstract_parameters(config, dtype)
    sources = {path: sources_of(path, config) for path in abstract}
    shapes = {
        source.name: jax.eval_shape(source.part_of, abstract[path]).shape
        for path, parts in sources.items()
        for source in parts
    }
    tensors = stored(shapes)
    _check_coverage(config, tensors, shapes)
    if config.tie_word_embeddings and _HEAD in tensors:
        _check_tied(tensors)
    filled: dict[Path, jax.Array] = {}
    done = 0
    # Largest first: reading needs a tensor's size more, which is least when the model is nearly whole.
    for path in sorted(sources, key=lambda path: -abstract[path].size):
        parameter = _empty(abstract[path])
        for source in sources[path]:
            _copy(tensors[source.name], source.part_of(parameter), source.name)
            done += 1
            if progress is not None:
                progress(done, len(shapes))
        filled[path] = jax.device_put(parameter) if mesh is None else place(path, parameter, config, mesh)
    return build(config, filled, dtype, mesh)


def _empty(like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Room for a parameter, aligned so that JAX on a CPU takes it for its own and copies nothing.

    Put together of JAX's arrays, freed parts would stay with the threads that allocated them: a fifth more.
    """
    size = like.size * like.dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(like.dtype).reshape(like.shape)


def _copy(stored: Stored, part: np.ndarray, name: str) -> None:
    """Read a tensor into the part of a parameter that it fills; the tensor itself is let go."""
    with np.errstate(over="ignore"):  # said below
        tensor = stored.read(part.dtype)
    largest = _largest(tensor)
    if not np.isfinite(largest):
        raise _not_finite(name, stored.read(None), part.dtype)
    if largest > _LARGEST:  # files have no checksums
        warn_once(
            f"{name} has values up to {largest:.1e}, as no trained weights have: the file may be damaged, so "
            "compare its checksum with its origin's"
        )
    for start in range(0, len(tensor), _ROWS):
        part[start : start + _ROWS] = tensor[start : start + _ROWS]


def _largest(tensor: np.ndarray) -> float:
    """The largest absolute value, or not a number. But for their signs, floats order as their bits do."""
    bits = np.dtype(f"uint{8 * tensor.itemsize}")
    unsigned = bits.type(np.iinfo(bits).max >> 1)
    blocks = (tensor[start : start + _ROWS] for start in range(0, len(tensor), _ROWS))
    return float(np.array(max((block.view(bits) & unsigned).max() for block in blocks)).view(tensor.dtype))


def abstract_parameters(config: ModelConfig, dtype: DTypeLike) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its path, without making any."""
    state = nnx.to_pure_dict(nnx.state(abstract_llama(config, dtype)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def parameter_bytes(config: ModelConfig, dtype: DTypeLike) -> int:
    """What a model's parameters take."""
    return tree_bytes(list(abstract_parameters(config, dtype).values()))


def not_finite(model: Llama) -> list[str]:
    """The names of parameters with a value that is infinite or not a number."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return ["/".join(str(key.key) for key in path) for path, leaf in leaves if not _all_finite(leaf)]


@jax.jit
def _all_finite(array: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(array).all()


def _not_finite(name: str, stored: np.ndarray, dtype: np.dtype) -> CheckpointError:
    if np.isfinite(stored).all():
        return CheckpointError(f"{name} has values too large for {dtype}: choose bfloat16 or float32")
    return CheckpointError(f"{name} has values that are infinite or no numbers: copy or download it again")


def _check_layers(config: ModelConfig, tensors: Mapping[str, Stored]) -> None:
    """Before shapes are made of what may be a million layers."""
    found = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    if config.num_layers > len(found):
        raise CheckpointError(
            f"config.json says num_hidden_layers={config.num_layers}, but there are weights of {len(found)}"
        )


def build(
    config: ModelConfig, parameters: Mapping[Path, jax.Array], dtype: DTypeLike, mesh: Mesh | None = None
) -> Llama:
    """The model whose parameters are those given, all of them, as they lie on the mesh, if there is one."""
    graphdef, state = nnx.split(abstract_llama(config, dtype))

    def pick(path: tuple[Any, ...], _: Any) -> jax.Array:
        return parameters[tuple(str(key.key) for key in path)]

    pure = jax.tree_util.tree_map_with_path(pick, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    model = nnx.merge(graphdef, state)
    model.mesh = mesh
    return model


def check_tokenizer(directory: FilePath, config: ModelConfig) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for.

    Raises:
        CheckpointError: it can, or its file cannot be read.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    beyond = {token: number for token, number in vocabulary.items() if number >= config.vocab_size}
    # Fine-tuning adds a padding token and no embedding for it. No text becomes it.
    if beyond.keys() - {_padding_token(directory)}:
        raise CheckpointError(
            f"the tokenizer has ids up to {max(beyond.values())}, but config.json says "
            f"vocab_size={config.vocab_size}: tokenizer and weights are not of the same model"
        )


def _padding_token(directory: FilePath) -> str | None:
    file = directory / "tokenizer_config.json"
    token = read_json(file).get("pad_token") if file.is_file() else None
    return token.get("content") if isinstance(token, dict) else token


def _check_tied(tensors: Mapping[str, Stored]) -> None:
    """Some tools save a tied head again; transformers does not tie it if it differs, so refuse that."""
    if not np.array_equal(tensors[_EMBEDDING].read(None), tensors[_HEAD].read(None)):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}: "
            "set tie_word_embeddings to false if the model was trained with its own head"
        )


def _check_coverage(
    config: ModelConfig,
    tensors: Mapping[str, Stored],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Every parameter is filled and every tensor used, exactly once; all errors in one message."""
    ignored = {name for name in tensors if is_derived(name)}
    if config.tie_word_embeddings:
        ignored.add(_HEAD)  # see _check_tied
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [
        f"{name} is not a tensor of this model" for name in sorted(tensors.keys() - expected.keys() - ignored)
    ]
    for name in sorted(expected.keys() & tensors.keys()):
        _, shape, kind, _ = tensors[name]
        if shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, config.json asks for {list(expected[name])}")
        if kind not in _FLOATS:
            problems.append(f"{name} has type {kind}, not a float")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the weights do not fit config.json: {shown}")
