"""Several devices: the mesh, and what a device that computes a part asks of the others.

The decoder runs as it is on every device, on that device's heads, MLP columns and rows (`model/sharding.py`);
what follows is all that it must say to the others. On one device, outside of `jax.shard_map`, the sums have
one term, and the program is the one without a mesh.

    rows       the rows of a batch, `data`
    kv_heads   KV heads, as far as there are any for every device of `model`
    replicas   devices of `model` that hold the same KV heads, each with a part of their query heads
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from kivi_jax.checks import whole

T = TypeVar("T")

ROWS, KV_HEADS, REPLICAS = "rows", "kv_heads", "replicas"
PARTS = (KV_HEADS, REPLICAS)  # the devices that a layer's heads and columns are spread over


def make_mesh(*, data: int = 1, model: int = 1) -> Mesh:
    """The first `data * model` devices: rows of a batch lie over `data`, heads and MLP columns over `model`.

    Raises:
        ValueError: a number is not positive, there are fewer devices, or other hosts have more.
    """
    data, model = whole("data", data), whole("model", model)
    _check_sizes(data, model)
    devices, needed = jax.devices(), data * model
    if needed > len(devices):
        raise ValueError(
            f"a mesh of {data=} times {model=} needs {needed} devices, there are {len(devices)}: "
            f"pass numbers whose product is at most {len(devices)}"
        )
    if jax.process_count() > 1 and needed < len(devices):
        raise ValueError(
            f"a mesh of {data=} times {model=} leaves some of the {len(devices)} devices of "
            f"{jax.process_count()} hosts out: pass numbers whose product is {len(devices)}"
        )
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices[:needed])


def named_mesh(text: str) -> Mesh:
    """`make_mesh` of what "data=2,model=4" says.

    Raises:
        ValueError: see `read_mesh` and `make_mesh`.
    """
    return make_mesh(**read_mesh(text).shape)


def read_mesh(text: str) -> AbstractMesh:
    """The mesh that "data=2,model=4" means, of no devices.

    Raises:
        ValueError: it means none.
    """
    fields = [part.strip().partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in fields if size.isdecimal()}
    if not sizes.keys() <= {"data", "model"} or len(sizes) < len(fields):
        raise ValueError(f"cannot read {text!r} as a mesh: write for example data=2,model=4")
    data, model = sizes.get("data", 1), sizes.get("model", 1)
    _check_sizes(data, model)
    return AbstractMesh((data, model), ("data", "model"))


def _check_sizes(data: int, model: int) -> None:
    if data < 1 or model < 1:
        raise ValueError(f"{data=} and {model=} of a mesh must be positive")


def parts_of(mesh: Mesh | None, axis: str) -> int:
    """How many parts there are of what lies over an axis."""
    return 1 if mesh is None else mesh.shape[axis]


def on_every_device(tree: T, mesh: Mesh | None) -> T:
    """The same arrays, each of them whole on every device of a mesh, so that every host can read them."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def on_host(array: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """An array of which other hosts may have parts; all of them ask at once."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(array, tiled=True)


def add_parts(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The sum over the devices that a layer is spread over: its all-reduce."""
    axes = _spread_over(PARTS)
    return jax.lax.psum(x, axes) if axes else x


def mean_of_parts(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The mean over the devices that a layer is spread over."""
    axes = _spread_over(PARTS)
    return jax.lax.pmean(x, axes) if axes else x


def join_parts(x: Float[Array, "*B V"]) -> Float[Array, "*B W"]:
    """The columns of all devices that a layer is spread over, side by side."""
    axes = _spread_over(PARTS)
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) if axes else x


def add_replicas(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The sum over the devices that hold the same KV heads, of what each says for its query heads."""
    axes = _spread_over((REPLICAS,))
    return jax.lax.psum(x, axes) if axes else x


def is_first_replica() -> Bool[Array, ""]:
    """Whether this device is the first of those that hold the same KV heads."""
    axes = _spread_over((REPLICAS,))
    return jax.lax.axis_index(axes) == 0 if axes else jnp.bool_(True)


def has_replicas() -> bool:
    """Whether `add_replicas` adds what several devices say."""
    return bool(_spread_over((REPLICAS,)))


def mean_of_replicas(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The mean over the devices that hold the same KV heads."""
    axes = _spread_over((REPLICAS,))
    return jax.lax.pmean(x, axes) if axes else x


def first_row_of(parts: int) -> Int[Array, ""]:
    """Where this device's `parts` rows of something that lies over a layer's devices begin."""
    axes = _spread_over(PARTS)
    return jax.lax.axis_index(axes) * parts if axes else jnp.int32(0)


def any_row(x: Bool[Array, "B"]) -> Bool[Array, ""]:
    """Whether it holds for any row, those of other devices included."""
    axes = _spread_over((ROWS,))
    return jax.lax.pmax(x.any().astype(jnp.int32), axes) > 0 if axes else x.any()


def has_rows_elsewhere() -> bool:
    """Whether other devices have other rows."""
    return bool(_spread_over((ROWS,)))


def first_row(held: int) -> Int[Array, ""]:
    """The number of the first of the `held` rows of this device."""
    axes = _spread_over((ROWS,))
    return jax.lax.axis_index(axes) * held if axes else jnp.int32(0)


def first_kv_head(held: int) -> Int[Array, ""]:
    """The number of the first of the `held` KV heads of this device."""
    axes = _spread_over((KV_HEADS,))
    return jax.lax.axis_index(axes) * held if axes else jnp.int32(0)


def _spread_over(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Of these axes, those of the `shard_map` that we are in which have more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in axes if name in mesh.manual_axes and mesh.shape[name] > 1)
