"""Prefixes on disk: a long document is read once, and asked in any later process.

DST/prefix.json    format, cache, capacity, tokens of each row, who read it, what arrays and files there are
DST/arrays/        orbax checkpoint, one array per leaf, named by its path

What is loaded continues exactly as what was saved, so it is refused wherever that would not be so: for
another model or dtype, another cache than asked for, another format, or damage.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Shaped, UInt32

from kivi_jax import checks
from kivi_jax.cache.names import cache_name, parse_cache, strategy_of
from kivi_jax.cache.strategy import CacheStrategy, cache_bytes
from kivi_jax.config import ModelConfig, config_from_dict
from kivi_jax.generation.generate import check_model, check_start
from kivi_jax.generation.prefix import Prefix, placed, weights_mark
from kivi_jax.mesh import on_host
from kivi_jax.model.llama import Llama
from kivi_jax.model.sharding import as_on_disk, cache_sharding
from kivi_jax.outputs import seal
from kivi_jax.plan.memory import zero_cache
from pallas_kernels.device import default_device

FORMAT = 3
MANIFEST = "prefix.json"


class SavedPrefix(NamedTuple):
    """What `prefix.json` says."""

    cache: str  # by name, see `names.py`
    capacity: int
    tokens: list[int]  # of each row
    turn: bool  # whether a user's turn is open
    model: str  # `fingerprint`
    config: ModelConfig
    dtype: str
    bytes: dict[str, int]  # `cache_bytes`
    arrays: dict[str, tuple[list[int], str]]  # shape and dtype by name
    checksum: str
    files: dict[str, int]  # bytes of each file of the arrays


def save_prefix(path: str | FilePath, prefix: Prefix, model: Llama, *, overwrite: bool = False) -> None:
    """Write a prefix that `model` has read to the directory `path`, complete or not at all.

    Raises:
        ValueError: `path` exists and is not empty, and `overwrite` is false; or the strategy has a selector
            that is not one of kivi_jax's, which no file can name; or another model has read the prefix.
    """
    from convert.files import replacing, writing

    path = checks.path("path", path)
    check_start(model, None, prefix)
    cache_name(prefix.cache.strategy)  # one that has no name is refused before anything is written
    needed = sum(array.nbytes for array in _named(prefix).values())
    replaced = replacing(path, manifest=MANIFEST, overwrite=overwrite, needed=needed)
    with replaced as partial, writing(path):
        write_prefix(partial, prefix, model)


def write_prefix(folder: FilePath, prefix: Prefix, model: Llama) -> None:
    """`save_prefix` to an empty folder, which whoever made it removes if this fails."""
    import orbax.checkpoint as ocp  # takes seconds to import; only files need it

    from convert.files import file_sizes

    arrays = _named(prefix)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "arrays", arrays)
    saved = SavedPrefix(
        cache=cache_name(prefix.cache.strategy),
        capacity=prefix.cache.capacity,
        tokens=on_host(prefix.cache.lengths).tolist(),
        turn=prefix.turn,
        model=fingerprint(model),
        config=model.config,
        dtype=_dtype(model),
        bytes=cache_bytes(prefix.cache),
        arrays={name: (list(array.shape), array.dtype.name) for name, array in arrays.items()},
        checksum=_digest(arrays),
        files=file_sizes(folder / "arrays"),
    )
    manifest = {"format": FORMAT, **saved._asdict(), "config": dataclasses.asdict(saved.config)}
    manifest["manifest"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def load_prefix(path: str | FilePath, model: Llama, *, cache: CacheStrategy | str | None = None) -> Prefix:
    """The prefix that `save_prefix` wrote.

    Raises:
        ValueError: it is absent, damaged or of another format; it was read by another model than `model`, or
            the same in another dtype; or it is not held as `cache` says, if that is given.
    """
    import orbax.checkpoint as ocp

    from convert.errors import brief
    from convert.files import find_damage

    path = checks.path("path", path)
    check_model(model)
    saved = read_manifest(path)
    strategy = parse_cache(saved.cache)
    if cache is not None and (asked := strategy_of(cache)).fit(model.config) != strategy.fit(model.config):
        raise ValueError(
            f"{path} holds a {saved.cache} cache, not {cache_name(asked)}: ask for that one, or save it anew"
        )
    if saved.dtype != _dtype(model):
        raise ValueError(
            f"{path} was read by a model in {saved.dtype}, this one is in {_dtype(model)}: "
            f"load the model with dtype {saved.dtype}, or save the prefix anew"
        )
    if saved.model != fingerprint(model):
        raise ValueError(
            f"{path} was read by another model ({_describe(saved.config)}; this one: "
            f"{_describe(model.config)}): load that one, or save the prefix anew"
        )
    if damage := find_damage(path / "arrays", saved.files):
        raise _damaged(path, damage)
    rows = len(saved.tokens)
    wanted = {
        name: jax.ShapeDtypeStruct(
            tuple(shape), jnp.dtype(dtype), sharding=_where(name, tuple(shape), rows, model.mesh)
        )
        for name, (shape, dtype) in saved.arrays.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path.absolute() / "arrays", wanted)
    except Exception as error:  # orbax and tensorstore raise plain Exception, too
        raise _damaged(path, brief(error)) from error
    if _digest(arrays) != saved.checksum:
        raise _damaged(path, "the arrays' checksum is another one")
    structure = jax.eval_shape(
        lambda: Prefix(
            zero_cache(
                model.config,
                strategy,
                batch=len(saved.tokens),
                width=1,
                capacity=saved.capacity,
                dtype=saved.dtype,
            ),
            logits=jnp.zeros((1, 1)),
            seen=jnp.zeros((1, 1), bool),
            tail=jnp.zeros((1, 1), jnp.int32),
            turn=saved.turn,
        )
    )
    names = list(_named(structure))
    if set(names) != set(arrays):
        raise _damaged(path, "its arrays are not those of its cache")
    # Pools' packed tokens were once saved with rows and heads as one axis.
    leaves = [x if x.ndim < 3 else x.reshape(rows, -1, *x.shape[2:]) for x in map(arrays.get, names)]
    prefix = placed(jax.tree.unflatten(jax.tree.structure(structure), leaves), model.mesh)
    return dataclasses.replace(prefix, mark=weights_mark(model))


def read_manifest(path: FilePath) -> SavedPrefix:
    """What a saved prefix says about itself.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{path} is not a saved prefix: it has no {MANIFEST}; make one with kivi-jax cache save"
        )
    try:
        manifest = json.loads(file.read_text())
        edited = manifest.pop("manifest", None) != seal(manifest)
        found = manifest.pop("format")
        if found == FORMAT and not edited:
            parse_cache(manifest["cache"])
            return SavedPrefix(**{**manifest, "config": config_from_dict(manifest["config"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST}: {error}") from error
    if found == FORMAT:
        raise _damaged(path, f"{MANIFEST} was edited: its checksum is another one")
    raise ValueError(f"{path} has format {found}, this version of kivi-jax reads {FORMAT}: save it anew")


def fingerprint(model: Llama) -> str:
    """Names a model: equal for equal configs and parameters, in the same dtype."""
    parameters = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    named = {tuple(str(key.key) for key in path): leaf for path, leaf in parameters}
    arrays = {
        "/".join(path): as_on_disk(path, leaf, model.config, model.mesh) for path, leaf in named.items()
    }
    return hashlib.sha256(f"{model.config!r} {_digest(arrays)}".encode()).hexdigest()[:16]


def _digest(arrays: Mapping[str, Array]) -> str:
    """Of names, shapes, dtypes and contents."""
    sums = {name: _checksum(array) for name, array in arrays.items()}
    lines = (f"{name} {arrays[name].shape} {arrays[name].dtype} {int(sums[name])}" for name in sorted(arrays))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@jax.jit
def _checksum(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """The sum, modulo 2**32, of every element's bits times its odd number: any one flipped bit changes it."""
    bits = array.reshape(-1)
    if bits.dtype != jnp.bool_:
        bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * bits.dtype.itemsize}"))
    odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
    return (bits.astype(jnp.uint32) * odd).sum(dtype=jnp.uint32)


def _named(prefix: Prefix) -> dict[str, Any]:
    """Every array of a prefix by its path, but for the mark: the manifest names the model better."""
    leaves = jax.tree_util.tree_leaves_with_path(prefix)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    named.pop("mark", None)
    return named


def _where(name: str, shape: tuple[int, ...], rows: int, mesh: Mesh | None) -> Sharding:
    """Where to read an array of a prefix to, wherever it was when it was saved."""
    if mesh is None:
        return SingleDeviceSharding(default_device())
    if name.startswith("cache") and shape[0] == rows:
        return cache_sharding(shape, mesh, rows)
    return NamedSharding(mesh, PartitionSpec())


def _dtype(model: Llama) -> str:
    return jnp.dtype(model.embed.embedding[...].dtype).name


def _describe(config: ModelConfig) -> str:
    return f"{config.num_layers} layers, hidden size {config.hidden_size}"


def _damaged(path: FilePath, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): save it anew")
