"""Where a model and its caches lie on a mesh, and running a part on every device. Read `llama.py` next.

One declaration says what the axes of every parameter are (`axes_of`), one table which axes of the mesh they
lie over (`_LIES_OVER`), and one rule does it for caches: rows first, then KV heads, then what never leaves a
device. Shardings, the order of columns at load, and what a device's own part is follow from these.

A model of N query and K KV heads on `model` devices lies over gcd(K, model) parts of its KV heads, and each
part over so many replicas as are left, which hold the same keys and values for different query heads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from kivi_jax.checks import warn_once
from kivi_jax.config import ModelConfig
from kivi_jax.mesh import KV_HEADS, PARTS, REPLICAS, ROWS

T = TypeVar("T")
M = TypeVar("M", bound="OnMesh")
Shape = Mesh | AbstractMesh  # where the devices do not matter
Path = tuple[str, ...]  # of a parameter in the model: ("layers", "0", "mlp", "gate", "kernel")

_LIES_OVER: dict[str | None, Any] = {
    None: None,
    "queries, keys, values": PARTS,
    "query heads": PARTS,
    "KV heads": KV_HEADS,
    "MLP columns": PARTS,
    "vocabulary": PARTS,
}
_KERNELS = {  # [in, out]; a bias has the last
    "query_key_value": (None, "queries, keys, values"),
    "output": ("query heads", None),
    "gate": (None, "MLP columns"),
    "up": (None, "MLP columns"),
    "down": ("MLP columns", None),
    "lm_head": (None, "vocabulary"),
}
_PROJECTION_NORMS = {"query_norm": "query heads", "key_norm": "KV heads"}


@runtime_checkable
class OnMesh(Protocol):
    """A model: what it is, and where."""

    config: ModelConfig
    mesh: Mesh | None


def axes_of(path: Path, config: ModelConfig) -> tuple[str | None, ...]:
    """What each axis of a parameter is; None: nothing that lies over devices.

    A table of embeddings that is also the head is a matrix to multiply with. One that is only looked up costs
    no time, but an all-reduce if it were spread: every device has it whole.
    """
    *_, module, field = path
    if module == "embed":
        return ("vocabulary" if config.tie_word_embeddings else None, None)
    if field == "scale":
        return (_PROJECTION_NORMS.get(module) if config.qk_norm == "projection" else None,)
    axes = _KERNELS[module]
    return axes if field == "kernel" else axes[1:]


def split(mesh: Mesh, config: ModelConfig) -> Mesh:
    """A mesh of `make_mesh` as this model lies on it: its `model` devices by KV heads, and their replicas.

    Raises:
        ValueError: see `laid_out`.
    """
    shape = laid_out(mesh, config)
    return Mesh(mesh.devices.reshape(shape.axis_sizes), shape.axis_names)


def laid_out(mesh: Shape, config: ModelConfig) -> AbstractMesh:
    """`split`, of whatever devices.

    Raises:
        ValueError: its axes are others, or the model's heads or MLP columns do not divide over it.
    """
    if tuple(mesh.axis_names) != ("data", "model"):
        raise ValueError(f"mesh with axes {mesh.axis_names} must have data and model: pass make_mesh(...)")
    data, model = mesh.shape["data"], mesh.shape["model"]
    if not fits(config, model):
        most = [n for n in range(1, config.num_heads + 1) if fits(config, n)]
        raise ValueError(
            f"{config.num_heads} heads ({config.num_kv_heads} of keys) and {config.intermediate_size} MLP "
            f"columns do not divide over {model=} devices: make a mesh with model="
            f"{max(n for n in most if n < model)}, or one of {', '.join(map(str, most))}"
        )
    parts = math.gcd(config.num_kv_heads, model)
    return AbstractMesh((data, parts, model // parts), (ROWS, KV_HEADS, REPLICAS))


def fits(config: ModelConfig, model: int) -> bool:
    """Whether heads and MLP columns divide over so many devices."""
    replicas = model // math.gcd(config.num_kv_heads, model)
    queries = config.num_heads // config.num_kv_heads
    return queries % replicas == 0 and config.intermediate_size % model == 0


def part_of(config: ModelConfig, mesh: Shape | None) -> ModelConfig:
    """What one device computes, as a model: its own heads and columns."""
    if mesh is None:
        return config
    model = mesh.shape[KV_HEADS] * mesh.shape[REPLICAS]
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // model,
        num_kv_heads=config.num_kv_heads // mesh.shape[KV_HEADS],
        intermediate_size=config.intermediate_size // model,
    )


def spec_of(path: Path, config: ModelConfig, mesh: Shape) -> PartitionSpec:
    """How a parameter lies on a mesh. A vocabulary that does not divide over devices is whole on each."""
    axes = axes_of(path, config)
    if config.vocab_size % (mesh.shape[KV_HEADS] * mesh.shape[REPLICAS]):
        axes = tuple(None if axis == "vocabulary" else axis for axis in axes)
    return PartitionSpec(*(_LIES_OVER[axis] for axis in axes))


def order_of(path: Path, config: ModelConfig, mesh: Shape) -> tuple[int, np.ndarray] | None:
    """An axis of a parameter, and which of its entries on disk stand where on a mesh; None: as on disk.

    Entries are in the order of the devices. Of the projection to queries, keys and values, each device has
    its own queries beside the keys and values that they attend to, which replicas therefore have, too.
    """
    axes = axes_of(path, config)
    kind = next((axis for axis in axes if axis in ("queries, keys, values", "query heads")), None)
    if kind is None:
        return None
    parts, replicas = mesh.shape[KV_HEADS], mesh.shape[REPLICAS]
    shape = (parts, config.num_kv_heads // parts, replicas, -1)
    queries = np.arange(config.num_heads).reshape(shape).swapaxes(1, 2).reshape(parts, replicas, -1)
    heads = queries
    if kind == "queries, keys, values":
        own = np.arange(config.num_kv_heads).reshape(parts, 1, -1).repeat(replicas, 1) + config.num_heads
        heads = np.concatenate([queries, own, own + config.num_kv_heads], axis=-1)
    entries = (heads.reshape(-1, 1) * config.head_dim + np.arange(config.head_dim)).reshape(-1)
    return None if np.array_equal(entries, np.arange(entries.size)) else (axes.index(kind), entries)


def shape_of(path: Path, shape: tuple[int, ...], config: ModelConfig, mesh: Shape) -> tuple[int, ...]:
    """The whole shape of a parameter on a mesh, with what replicas have, too; `shape` is that on disk."""
    if (order := order_of(path, config, mesh)) is None:
        return shape
    axis, entries = order
    return (*shape[:axis], entries.size, *shape[axis + 1 :])


def place(path: Path, parameter: Shaped[Any, "..."], config: ModelConfig, mesh: Mesh) -> Array:
    """A parameter of the host's, as on disk, on a mesh: each device is given its own part."""
    order, shape = order_of(path, config, mesh), shape_of(path, parameter.shape, config, mesh)

    def part(index: Any) -> np.ndarray:
        if order is None:
            return np.asarray(parameter)[index]
        axis, entries = order
        others = (*index[:axis], slice(None), *index[axis + 1 :])
        return np.take(np.asarray(parameter)[others], entries[index[axis]], axis)

    sharding = NamedSharding(mesh, spec_of(path, config, mesh))
    return jax.make_array_from_callback(shape, sharding, part)


def spread(model: M, mesh: Mesh) -> M:
    """A model that is on one device, on a mesh of `make_mesh`.

    Raises:
        ValueError: see `split`.
    """
    config, mesh = model.config, split(mesh, model.config)
    leaves, module = jax.tree.flatten_with_path(model)
    placed = jax.tree.unflatten(module, [place(_names(path), leaf, config, mesh) for path, leaf in leaves])
    placed.mesh = mesh
    return placed


def as_on_disk(path: Path, parameter: Array, config: ModelConfig, mesh: Mesh | None) -> Array:
    """A parameter of a model, on a mesh or not, in the order of files."""
    order = None if mesh is None else order_of(path, config, mesh)
    if order is None:
        return parameter
    axis, entries = order
    return parameter.take(np.unique(entries, return_index=True)[1], axis)


def as_stored(
    path: Path, parameter: jax.ShapeDtypeStruct, config: ModelConfig, mesh: Mesh
) -> jax.ShapeDtypeStruct:
    """How to read a parameter, in the order of files, to a mesh: as it will lie, or else in equal parts."""
    spec = spec_of(path, config, mesh)
    if order_of(path, config, mesh) is not None:
        parts = mesh.shape[KV_HEADS] * mesh.shape[REPLICAS]
        even = [axis for axis, size in enumerate(parameter.shape) if size % parts == 0][:1]
        spec = PartitionSpec(*(PARTS if axis in even else None for axis in range(len(parameter.shape))))
    return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=NamedSharding(mesh, spec))


def as_laid_out(path: Path, parameter: Array, config: ModelConfig, mesh: Mesh) -> Array:
    """A parameter that `as_stored` has read, in the order of the devices, each of which has its own part."""
    if (order := order_of(path, config, mesh)) is None:
        return parameter
    axis, entries = order
    arrange = jax.jit(
        lambda x: x.take(entries, axis), out_shardings=NamedSharding(mesh, spec_of(path, config, mesh))
    )
    return arrange(parameter)


def rows_over(mesh: Shape, rows: int) -> str | None:
    """The axis that rows lie over. Of a number that does not divide, every part of the mesh computes all."""
    if rows % (parts := mesh.shape[ROWS]) == 0:
        return ROWS
    warn_once(f"{rows=} do not divide over data={parts} devices: each of them computes all rows")
    return None


def cache_sharding(shape: tuple[int, ...], mesh: Mesh, rows: int) -> NamedSharding:
    """How an array of a cache lies on a mesh: its rows, then its KV heads."""
    axes = rows_over(mesh, rows), KV_HEADS
    return NamedSharding(mesh, PartitionSpec(*axes[: len(shape)]))


def placed_cache(cache: T, mesh: Mesh | None, rows: int) -> T:
    """A cache, wherever it lies, on a mesh."""
    if mesh is None:
        return cache
    return jax.device_put(cache, jax.tree.map(lambda x: cache_sharding(x.shape, mesh, rows), cache))


def laid(tree: T, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> T:
    """Shapes of arrays, each with its first axes over these of a mesh, and whole along the others."""
    if mesh is None:
        return tree

    def lay(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes[: len(leaf.shape)]))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(lay, tree)


def by_device(
    run: Callable[..., T], mesh: Mesh | None, inputs: tuple[Any, ...], outputs: Any
) -> Callable[..., T]:
    """`run` by each device of a mesh, of its parts: arrays lie as `inputs` do, and results as `outputs`."""
    if mesh is None:
        return run
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, (inputs, outputs))
    return jax.shard_map(run, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def bytes_of_device(tree: Any) -> int:
    """Bytes that each device has of arrays, or would have of shapes that are `laid`."""
    leaves = jax.tree.leaves(tree)
    shapes = [
        leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape) for leaf in leaves
    ]
    return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in zip(leaves, shapes, strict=True))


def over_mesh(
    run: Callable[..., tuple[Any, T]], model: OnMesh, cache: T | None, *by_row: Array
) -> tuple[Any, T]:
    """`run(model, cache, *by_row)`: arrays of rows, and a cache; on a mesh, each device computes its part.

    Inside, the model's parameters, the cache and the rows are those of the device.
    """
    if (mesh := model.mesh) is None:
        return run(model, cache, *by_row)
    rows = by_row[0].shape[0]
    over_rows = PartitionSpec(rows_over(mesh, rows))
    over_heads = PartitionSpec(*over_rows, KV_HEADS)
    parameters, module = jax.tree.flatten_with_path(model)
    specs = [spec_of(_names(path), model.config, mesh) for path, _ in parameters]
    held, structure = jax.tree.flatten(cache)

    def of_device(parameters: list[Array], held: list[Array], by_row: tuple[Array, ...]) -> tuple[Any, Any]:
        nonlocal structure
        part = jax.tree.unflatten(module, parameters)
        out, cache = run(part, jax.tree.unflatten(structure, held), *by_row)
        leaves, structure = jax.tree.flatten(cache)
        counts = {i: leaf for i, leaf in enumerate(leaves) if leaf.ndim == 1}
        return out, (counts, {i: leaf for i, leaf in enumerate(leaves) if i not in counts})

    out, (counts, panels) = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(specs, [over_rows if leaf.ndim == 1 else over_heads for leaf in held], over_rows),
        out_specs=(over_rows, (over_rows, over_heads)),
        check_vma=False,  # what kernels write is not followed
    )([leaf for _, leaf in parameters], held, by_row)
    leaves: Mapping[int, Array] = counts | panels
    return out, jax.tree.unflatten(structure, [leaves[i] for i in range(len(leaves))])


def _names(path: tuple[Any, ...]) -> Path:
    """The path of a parameter that is at `path` in the tree of a module, where its value is below it."""
    return tuple(jax.tree_util.keystr(path[:-1], simple=True, separator="/").split("/"))
