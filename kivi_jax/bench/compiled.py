"""XLA's programs for an NVIDIA GPU, read without one: what is launched, and what does it move?

A GPU's driver takes microseconds for every kernel it launches, so a decode step of small kernels costs by
their number. XLA compiles for a GPU that is only described (an H100 here), where `jax[cuda13]` is installed.
"""

import collections
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from rich.table import Table

from kivi_jax.bench.decode import Workload, greedy_steps, room
from kivi_jax.cache.strategy import CacheStrategy
from kivi_jax.config import ModelConfig
from kivi_jax.model.llama import abstract_llama
from pallas_kernels.pytree import tree_bytes
from pallas_kernels.quantize.quantization import GroupAxis, Implementation, quantize

_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_ITEM_BYTES = {"pred": 1, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "sufc" for bits in (8, 16, 32, 64)
}
# What a program does without launching a kernel for it.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}


class Launch(NamedTuple):
    """One kernel of a program."""

    name: str
    kind: str  # "fusion", "copy", "custom-call", ...
    bytes: int  # of its operands and results; too many where it updates a part of one in place


def described_gpu() -> Any:
    """The GPU of this machine, or else an H100 that can only be compiled for.

    Raises:
        NotImplementedError: JAX's CUDA plugin is not installed.
    """
    # The plugin would refuse to load where it finds no driver.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if jax.default_backend() == "gpu":
        return jax.devices()[0]
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise NotImplementedError("compiling for a GPU needs JAX's CUDA plugin: pip install 'kivi-jax[cuda]'")
    from jax.experimental import topologies

    found = topologies.get_topology_desc("described", "cuda", topology="1x1x1", target_config=_H100)
    return found.devices[0]


def compile_for(device: Any, f: Any, *arguments: Any) -> str:
    """The optimized program of the jitted `f(*arguments)`, arrays or their shapes, as text."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with jax.default_device(device):
        return f.lower(*jax.tree.map(placed, arguments)).compile().as_text()


def launches(program: str) -> list[Launch]:
    """The kernels of a compiled program's entry, in order; a loop or a conditional counts as one."""
    entry = program[program.index("\nENTRY ") :]
    sizes: dict[str, int] = {}
    found = []
    for name, shape, kind, rest in re.findall(
        r"^  (?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$", entry, re.M
    ):
        sizes[name] = _shape_bytes(shape)
        if kind not in _FREE:
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            found.append(Launch(name, kind, sizes[name] + sum(sizes.get(operand, 0) for operand in operands)))
    return found


def _shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, as XLA writes its shape: (f32[8,128]{1,0}, pred[])."""
    total = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        total += _ITEM_BYTES.get(kind, 0) * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def packing(device: Any, *, tokens: int = 32768) -> Iterator[dict[str, Any]]:
    """Quantizing a prompt's keys and values, bfloat16 [1, 8, tokens, 128], to 2 bits in groups of 32.

    Keys: what, implementation, kernels, bytes that these move, and least_bytes: of one read and one write.
    Implementations that the device cannot have are left out.
    """
    x = jax.ShapeDtypeStruct((1, 8, tokens, 128), jnp.bfloat16)
    axes: dict[str, GroupAxis] = {"keys": "token", "values": "channel"}
    for (what, axis), implementation in itertools.product(axes.items(), get_args(Implementation)):
        pack = functools.partial(
            quantize, bits=2, group_size=32, group_axis=axis, implementation=implementation
        )
        with contextlib.suppress(NotImplementedError):
            found = launches(compile_for(device, jax.jit(pack), x))
            packed = jax.eval_shape(functools.partial(pack, implementation="xla"), x)
            yield {
                "what": what,
                "implementation": implementation,
                "kernels": len(found),
                "bytes": sum(launch.bytes for launch in found),
                "least_bytes": tree_bytes((x, packed)),
            }


def steps(
    device: Any, config: ModelConfig, strategies: Mapping[str, CacheStrategy], *, context: int
) -> Iterator[dict[str, Any]]:
    """A decode step of one bfloat16 row, per cache. Keys: cache, kernels, and how many are of each kind."""
    dtype, capacity = jnp.bfloat16, room(context, 1)
    model = abstract_llama(config, dtype)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    for name, strategy in strategies.items():
        workload = Workload(config, strategy, context, capacity, 1, dtype)
        cache = jax.eval_shape(workload.fill_cache)
        found = launches(compile_for(device, greedy_steps, model, token, cache))
        kinds = collections.Counter(launch.kind for launch in found)
        yield {"cache": name, "kernels": len(found), "kinds": dict(kinds)}


def packing_table(records: list[dict[str, Any]]) -> Table:
    """What `packing` found."""
    columns = ("a prompt's", "by", "kernels", "MB moved", "MB at least")
    out = Table(*columns, title="quantize and pack, as compiled")
    for record in records:
        megabytes = (f"{record[key] / 1e6:.0f}" for key in ("bytes", "least_bytes"))
        out.add_row(record["what"], record["implementation"], str(record["kernels"]), *megabytes)
    return out


def steps_table(records: list[dict[str, Any]]) -> Table:
    """What `steps` found."""
    out = Table("cache", "kernels a step", "of them", title="a decode step, as XLA compiles it")
    for record in records:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(record["kinds"].items()))
        out.add_row(record["cache"], str(record["kernels"]), kinds)
    return out
