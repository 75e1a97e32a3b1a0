"""Decode attention on a GPU: is every implementation right, and how fast is it against bfloat16?

Each stage returns records that are written as they come (`--out`), so a run that is cut has not been in
vain. Times of JAX programs are the profiler's: the sum of all kernels of a call, in turns over buffers that
together exceed the L2 cache. PyTorch's are of a CUDA graph of such calls.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.table import Table

from kivi_jax.bench import aot
from pallas_kernels import partials
from pallas_kernels.device import compute_capability
from pallas_kernels.heads import query_dtype
from pallas_kernels.quantize.quantization import dequantize
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_attention.cases import CORRECTNESS, GPU, Case
from pallas_kernels.quantized_attention.tuning import Tuning
from pallas_kernels.residual.ring import Token, newest_token

IMPLEMENTATIONS = ("pallas_triton", "triton")
COMPILERS = 16  # programs compiled at a time
ROTATED_BYTES = 160e6  # three times the L2 cache of an H100
SAMPLES = 11
_LEAST_CALLS = 24

Record = dict[str, Any]


def environment(*, copied: int = 2**30, side: int = 8192) -> list[Record]:
    """Versions, the device, and its two ceilings: bytes copied and bfloat16 operations per second.

    They are measured on `copied` float32 numbers, and on the product of two matrices of side `side`.
    """
    from importlib import metadata

    names = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "triton", "jax-triton", "torch", "transformers")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    copy_seconds = _wall_seconds(lambda x: x + 1, jnp.ones(copied, jnp.float32))
    product_seconds = _wall_seconds(jnp.dot, square, square)
    return [
        {
            "device": jax.devices()[0].device_kind,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions,
            "copy_gigabytes_per_s": 2 * 4 * copied / copy_seconds / 1e9,
            "bfloat16_teraflops": 2 * side**3 / product_seconds / 1e12,
        }
    ]


def correctness(
    cases: Sequence[Case] = (*CORRECTNESS, *GPU[:1]),
    implementations: Sequence[str] = ("xla", *IMPLEMENTATIONS),
    *,
    interpret: bool = False,
) -> Iterator[Record]:
    """The relative error of norms of every implementation against float32 on the same codes.

    Keys: case, implementation, error (a number, or why the implementation refuses the case). Memory that
    outputs are likely to get is filled with NaN before, so that an element nobody writes is not a zero.
    With `interpret`, kernels that Pallas can interpret run on a CPU.
    """

    def attention(case: Case, implementation: str) -> Callable[..., Any]:
        if interpret and implementation.startswith("pallas"):
            module = importlib.import_module(f"pallas_kernels.quantized_attention.{implementation}")
            return functools.partial(module.attend, scale=case.head_dim**-0.5, interpret=True)
        return functools.partial(quantized_attention, implementation=implementation)  # pyright: ignore[reportArgumentType]

    def check(case: Case, implementation: str) -> Record:
        record: Record = {"case": case.name, "implementation": implementation}
        query, (key, value) = case.query(), jax.jit(case.pack)(*case.dense()[1:])
        start, end = case.token_ranges()
        try:
            attend = jax.jit(attention(case, implementation))
            compiled = attend.lower(query, key, value, start=start, end=end).compile()
        except NotImplementedError as reason:
            return record | {"error": f"refused: {reason}"}
        _poison()
        got = partials.normalize(compiled(query, key, value, start=start, end=end))
        with jax.default_matmul_precision("highest"):
            expected = _reference(query, dequantize(key), dequantize(value), start, end)
        norm = jnp.maximum(jnp.linalg.norm(expected), 1e-30)
        return record | {"error": float(jnp.linalg.norm(got - expected) / norm)}

    yield from _in_parallel(check, itertools.product(cases, implementations))


def speed(cases: Sequence[Case] = GPU, implementations: Sequence[str] = IMPLEMENTATIONS) -> Iterator[Record]:
    """Microseconds of every contender on every case: bfloat16 ones, and `implementations` on packed tokens.

    Keys: case, contender, us, bytes (of the tokens it reads), gigabytes_per_s, kernels (name -> us). A
    contender that is not installed or refuses the case has `reason` instead.
    """
    for case in cases:
        jobs = [(case, name, implementations) for name in _contenders(case, implementations)]
        programs = dict(zip((name for _, name, _ in jobs), _in_parallel(_build, jobs), strict=True))
        for name, built in programs.items():
            record: Record = {"case": case.name, "contender": name}
            try:
                if isinstance(built, str):
                    raise NotImplementedError(built)
                kernels, nbytes = built()
            except Exception as reason:
                yield record | {"reason": f"{type(reason).__name__}: {str(reason)[:200]}"}
                continue
            us = sum(kernels.values()) * 1e6
            parts = {kernel: seconds * 1e6 for kernel, seconds in kernels.items()}
            yield record | {"us": us, "bytes": nbytes, "gigabytes_per_s": nbytes / us / 1e3, "kernels": parts}


def sweep(
    cases: Sequence[Case] = GPU,
    tunings: Sequence[Tuning] | None = None,
    implementation: str = "pallas_triton",
) -> Iterator[Record]:
    """Microseconds of tunings of every case. Keys: case, the fields of `Tuning`, us, kernels (or reason).

    Where Triton's compiler is installed, tunings with which the kernel spills registers are not run.
    """
    attend = importlib.import_module(f"pallas_kernels.quantized_attention.{implementation}").attend

    def build(case: Case, tuning: Tuning) -> Any:
        if spilled := _spilled(case, tuning, implementation):
            return f"{spilled} bytes are spilled"
        call = functools.partial(attend, scale=case.head_dim**-0.5, tuning=tuning)
        try:
            shapes = jax.eval_shape(lambda: _packed_buffers(case, count=1)[0])
            return jax.jit(functools.partial(_as_a_layer_does, call)).lower(*shapes[0]).compile()
        except Exception as reason:
            return f"{type(reason).__name__}: {str(reason)[:200]}"

    with contextlib.suppress(ImportError):  # its modules import each other: not in several threads at a time
        importlib.import_module("triton.compiler")
    jobs = [(case, tuning) for case in cases for tuning in tunings or _tunings(case)]
    programs = list(zip(jobs, _in_parallel(build, jobs), strict=True))  # before the first is timed
    for case, group in itertools.groupby(programs, key=lambda program: program[0][0]):
        buffers, _ = _packed_buffers(case)
        for (_, tuning), compiled in group:
            record = {"case": case.name, **dataclasses.asdict(tuning)}
            if isinstance(compiled, str):
                yield record | {"reason": compiled}
                continue
            kernels = {name: s * 1e6 for name, s in kernel_seconds(compiled, buffers).items()}
            yield record | {"us": sum(kernels.values()), "kernels": kernels}


def _tunings(case: Case) -> list[Tuning]:
    """Tiles of all sizes, and numbers of splits from half of to twice what is chosen.

    Of many query heads, a program may also answer fewer, or be of more warps.
    """
    default = aot.tuning_for(case, jax.devices()[0].device_kind)
    wide = [(8, 1), (16, 1), (16, 2)] if case.query_groups > 8 else [(default.heads, default.warps)]
    found = set()
    for pages, stages, (heads, warps) in itertools.product((1, 2, 4, 8), (2, 3), wide):
        tiles, usual = case.slots // (32 * pages), default.splits * heads // default.heads
        for splits in (usual // 2, usual, 2 * usual):
            splits = max(1, min(splits, tiles))
            found.add(Tuning(splits=splits, pages=pages, heads=heads, warps=warps, stages=stages))
    return sorted(found, key=dataclasses.astuple)


def _spilled(case: Case, tuning: Tuning, implementation: str) -> int:
    """Bytes that the kernel spills, compiled for the device; 0 where Triton's compiler is not installed."""
    if importlib.util.find_spec("triton") is None:
        return 0
    capability = round(10 * compute_capability(jax.devices()[0]))
    return aot.record(case, capability, implementation, tuning)["spill_bytes"]


def best_tunings(records: Sequence[Record]) -> Table:
    """The three fastest tunings of every case of a sweep."""
    fields = [field.name for field in dataclasses.fields(Tuning)]
    table = Table("case", *fields, "us", title="fastest tunings")
    timed = [record for record in records if "us" in record]
    for _, group in itertools.groupby(timed, key=lambda record: record["case"]):
        for record in sorted(group, key=lambda record: record["us"])[:3]:
            table.add_row(record["case"], *(str(record[name]) for name in fields), f"{record['us']:.1f}")
    return table


def error_table(records: Sequence[Record]) -> Table:
    """What `correctness` found: a row for each case."""
    names = list(dict.fromkeys(record["implementation"] for record in records))
    out = Table("case", *names, title="relative error against float32 on the same codes")
    for case, group in itertools.groupby(records, key=lambda record: record["case"]):
        errors = [record["error"] for record in group]
        out.add_row(case, *(e if isinstance(e, str) else f"{e:.1e}" for e in errors))
    return out


def table(records: Sequence[Record]) -> Table:
    """What `speed` found, relative to the fastest bfloat16 contender of each case."""
    out = Table("case", "contender", title="decode attention on a GPU")
    for heading in ("us", "MB", "GB/s", "x fastest bf16"):
        out.add_column(heading, justify="right")
    for _, group in itertools.groupby(records, key=lambda record: record["case"]):
        timed = list(group)
        dense = [r["us"] for r in timed if "us" in r and "bfloat16" in r["contender"]]
        for r in timed:
            if "us" not in r:
                out.add_row(r["case"], r["contender"], r["reason"][:60])
                continue
            times = f"{min(dense) / r['us']:.2f}" if dense else ""
            numbers = (f"{r['us']:.1f}", f"{r['bytes'] / 1e6:.1f}", f"{r['gigabytes_per_s']:.0f}", times)
            out.add_row(r["case"], r["contender"], *numbers)
    return out


def kernel_seconds(compiled: Any, buffers: Sequence[tuple[Any, ...]]) -> dict[str, float]:
    """Seconds of each GPU kernel in a call of `compiled`, by the kernel's name, as the profiler saw them.

    Without a GPU, the seconds of a whole call, named "wall clock": good for a rehearsal.
    """
    calls = list(buffers) * max(1, round(_LEAST_CALLS / len(buffers)))
    jax.block_until_ready(compiled(*calls[0]))
    begin = time.perf_counter()
    found = profiled(lambda: [jax.block_until_ready(compiled(*arguments)) for arguments in calls])
    found = found or {"wall clock": time.perf_counter() - begin}
    return {name: seconds / len(calls) for name, seconds in found.items()}


def profiled(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds that a GPU spends on kernels and copies while `work` is done, by name; empty without a GPU."""
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(work())
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            found[event.name] += int(event.duration_ns)
    return {name: nanoseconds / 1e9 for name, nanoseconds in found.items()}


def _wall_seconds(f: Callable[..., Any], *arguments: Any) -> float:
    compiled = jax.jit(f).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    samples = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _in_parallel(f: Callable[..., Any], arguments: Any) -> Iterator[Any]:
    """Results of `f(*arguments)` in order, several computed at a time (compilation takes most of it)."""
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        yield from pool.map(lambda argument: f(*argument), list(arguments))


def _poison() -> None:
    """Leave NaN in the memory that is allocated next."""
    jax.block_until_ready([jnp.full((2**n,), jnp.nan) for n in range(8, 24)])


def _reference(query: Array, key: Array, value: Array, start: Array, end: Array) -> Array:
    """Float32 attention over the tokens [start, end) of a ring."""
    visible = (newest_token(end, key.shape[2]) >= jnp.maximum(start, 0)[:, None])[:, None]
    scale = query.shape[-1] ** -0.5
    return partials.normalize(partials.attend(query.astype(jnp.float32), key, value, visible, scale=scale))


def _as_a_layer_does(attend: Callable[..., Any], *arguments: Any) -> Array:
    query, key, value, own, start, end = arguments
    attended = attend(query, key, value, start=start, end=end, own=own)
    return partials.normalize(attended).astype(own.value.dtype)


def copies(nbytes: int) -> range:
    """Seeds of so many buffers of `nbytes` that they exceed the L2 cache, or 24."""
    return range(min(24, max(2, -(-int(ROTATED_BYTES) // nbytes))))


def _packed_buffers(case: Case, count: int | None = None) -> tuple[list[tuple[Any, ...]], int]:
    """Arguments of several calls, as a layer has them, and the bytes of one call's packed tokens."""

    @jax.jit
    def make(seed: Any) -> tuple[Any, ...]:
        (query, *dense), dtype = case.dense(seed), jnp.dtype(case.query_dtype)
        own = Token(*(x[:, :, 0].astype(dtype) for x in dense))
        return query.astype(query_dtype(dtype)), *case.pack(*dense), own

    _, key, value, _ = jax.eval_shape(make, 0)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((key, value)))
    seeds = copies(size) if count is None else range(count)
    return [(*make(seed), *case.token_ranges()) for seed in seeds], size


def _dense_buffers(case: Case, count: int | None = None) -> tuple[list[tuple[Any, ...]], int]:
    make = jax.jit(lambda seed: tuple(x.astype(jnp.bfloat16) for x in case.dense(seed)))
    size = 2 * 2 * case.batch * case.kv_heads * case.slots * case.head_dim
    return [make(seed) for seed in (copies(size) if count is None else range(count))], size


def _contenders(
    case: Case, implementations: Sequence[str]
) -> dict[str, tuple[Callable[..., Array], bool] | str]:
    """Ways to compute the case: a function and whether it reads packed tokens; or a backend of PyTorch."""

    def xla(query: Array, key: Array, value: Array) -> Array:
        visible = jnp.ones((case.batch, 1, case.slots), bool)
        found = partials.attend(query, key, value, visible, scale=case.head_dim**-0.5)
        return partials.normalize(found).astype(query.dtype)

    def packed(implementation: str) -> Callable[..., Array]:
        attend = functools.partial(quantized_attention, implementation=implementation)  # pyright: ignore[reportArgumentType]
        return functools.partial(_as_a_layer_does, attend)

    return {
        "bfloat16, XLA": (xla, False),
        "bfloat16, torch cuDNN": "CUDNN_ATTENTION",
        "bfloat16, torch flash": "FLASH_ATTENTION",
        **{f"packed, {name}": (packed(name), True) for name in implementations},
    }


def _build(
    case: Case, contender: str, implementations: Sequence[str]
) -> Callable[[], tuple[dict[str, float], int]] | str:
    """What measures a contender, compiled: returns seconds by kernel, and the bytes of the tokens read."""
    found = _contenders(case, implementations)[contender]
    if isinstance(found, str):
        return functools.partial(_torch_seconds, case, found)
    attend, is_packed = found
    buffers_of = _packed_buffers if is_packed else _dense_buffers
    try:
        shapes = jax.eval_shape(lambda: buffers_of(case, count=1)[0])
        compiled = jax.jit(attend).lower(*shapes[0]).compile()
    except Exception as reason:
        return f"{type(reason).__name__}: {str(reason)[:200]}"

    def measure() -> tuple[dict[str, float], int]:
        buffers, size = buffers_of(case)
        return kernel_seconds(compiled, buffers), size

    return measure


def _torch_seconds(case: Case, backend: str) -> tuple[dict[str, float], int]:
    """PyTorch's scaled_dot_product_attention in a CUDA graph; the faster of two ways to group heads."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    store = (case.batch, case.kv_heads, case.slots, case.head_dim)
    size = 2 * 2 * case.batch * case.kv_heads * case.slots * case.head_dim
    tokens = [(random(*store), random(*store)) for _ in copies(size)]
    heads = case.kv_heads * case.query_groups
    # Query heads as heads that share keys, or as several positions of one head.
    layouts = {
        "heads": (random(case.batch, heads, 1, case.head_dim), True),
        "positions": (random(case.batch, case.kv_heads, case.query_groups, case.head_dim), False),
    }
    found = []
    for query, grouped in layouts.values():

        def calls(query: Any = query, grouped: bool = grouped) -> None:
            attend = torch.nn.functional.scaled_dot_product_attention
            for key, value in tokens:
                attend(query, key, value, enable_gqa=grouped and case.query_groups > 1)

        with contextlib.suppress(RuntimeError), sdpa_kernel(getattr(SDPBackend, backend)):
            found.append(_torch_graph_seconds(torch, calls) / len(tokens))
    if not found:
        raise NotImplementedError("torch refuses both layouts")
    return {"graph": min(found)}, size


def _torch_graph_seconds(torch: Any, calls: Callable[[], None]) -> float:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    samples = []
    for _ in range(SAMPLES + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples[2:])
