"""Decode attention on a GPU: is every implementation right, and how fast is it against bfloat16?

Each stage returns records that are written as they come (`--out`), so a run that is cut has not been in
vain. Times are of a loop in one compiled program, where every call waits for the one before, over buffers
that together exceed the L2 cache: what a call costs while decoding, launches included. The profiler says
how much of it is which kernel.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import itertools
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

from pallas_kernels import partials
from pallas_kernels.quantization import dequantize
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.quantized_attention.cases import CORRECTNESS, GPU, Case
from pallas_kernels.quantized_attention.tuning import Tuning, choose

IMPLEMENTATIONS = ("pallas_triton", "triton")
COMPILERS = 8  # programs compiled at a time
ROTATED_BYTES = 160e6  # three times the L2 cache of an H100
SAMPLES = 11

Record = dict[str, Any]


def environment() -> list[Record]:
    """Versions, the device, and its two ceilings: bytes copied and bfloat16 operations per second."""
    from importlib import metadata

    names = ("jax", "jaxlib", "flax", "triton", "jax-triton", "torch", "transformers")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    size, side = 2**30, 8192
    square = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    copied = _wall_seconds(lambda x: x + 1, jnp.ones(size, jnp.float32))
    multiplied = _wall_seconds(jnp.dot, square, square)
    return [
        {
            "device": jax.devices()[0].device_kind,
            "versions": versions,
            "copy_gigabytes_per_s": 2 * 4 * size / copied / 1e9,
            "bfloat16_teraflops": 2 * side**3 / multiplied / 1e12,
        }
    ]


def correctness(cases: Sequence[Case] = (*CORRECTNESS, *GPU[:1])) -> Iterator[Record]:
    """The relative error of norms of every implementation against float32 on the same codes.

    Keys: case, implementation, error (a number, or why the implementation refuses the case). Memory that
    outputs are likely to get is filled with NaN before, so that an element nobody writes is not a zero.
    """

    def check(case: Case, implementation: str) -> Record:
        record: Record = {"case": case.name, "implementation": implementation}
        query, (key, value) = case.query(), jax.jit(case.pack)(*case.dense()[1:])
        start, end = case.token_ranges()
        try:
            attend = jax.jit(functools.partial(quantized_attention, implementation=implementation))  # pyright: ignore[reportArgumentType]
            compiled = attend.lower(query, key, value, start=start, end=end).compile()
        except NotImplementedError as reason:
            return record | {"error": f"refused: {reason}"}
        _poison()
        got = partials.normalize(compiled(query, key, value, start=start, end=end))
        with jax.default_matmul_precision("highest"):
            expected = _reference(query, dequantize(key), dequantize(value), start, end)
        norm = jnp.maximum(jnp.linalg.norm(expected), 1e-30)
        return record | {"error": float(jnp.linalg.norm(got - expected) / norm)}

    yield from _in_parallel(check, itertools.product(cases, ("xla", *IMPLEMENTATIONS)))


def profile(cases: Sequence[Case] = GPU) -> Iterator[Record]:
    """Microseconds of each kernel of a call. Keys: case, implementation, kernels (name -> us)."""

    def measure(case: Case, implementation: str) -> Record:
        record: Record = {"case": case.name, "implementation": implementation}
        arguments = _packed_buffers(case, copies=1)[0][0]
        attend = functools.partial(quantized_attention, implementation=implementation)  # pyright: ignore[reportArgumentType]
        seconds = kernel_seconds(functools.partial(_normalized, attend), arguments)
        return record | {"kernels": {name: s * 1e6 for name, s in seconds.items()}}

    for case, implementation in itertools.product(cases, IMPLEMENTATIONS):
        yield measure(case, implementation)


def speed(cases: Sequence[Case] = GPU) -> Iterator[Record]:
    """Microseconds of every contender on every case.

    Keys: case, contender, us, bytes (of the tokens it reads), gigabytes_per_s. A contender that is not
    installed or refuses the case has `reason` instead.
    """
    for case in cases:
        for name, measure in _contenders(case).items():
            record: Record = {"case": case.name, "contender": name}
            try:
                seconds, nbytes = measure()
            except Exception as reason:
                yield record | {"reason": f"{type(reason).__name__}: {str(reason)[:200]}"}
                continue
            yield record | {"us": seconds * 1e6, "bytes": nbytes, "gigabytes_per_s": nbytes / seconds / 1e9}


def sweep(cases: Sequence[Case] = GPU, implementation: str = "pallas_triton") -> Iterator[Record]:
    """Microseconds of every tuning of every case. Keys: case, the fields of `Tuning`, us (or reason)."""
    attend = importlib.import_module(f"pallas_kernels.quantized_attention.{implementation}").attend
    for case in cases:
        buffers, _ = _packed_buffers(case)
        rows, bits = case.batch * case.kv_heads, max(case.key_bits, case.value_bits)
        chosen = choose(rows=rows, slots=case.slots, heads=case.query_groups, dim=case.head_dim, bits=bits)
        heads = [chosen.heads] if case.query_groups <= 8 else [8, 16]
        tunings = {
            Tuning(splits=splits, pages=pages, heads=most, stages=stages)
            for pages, stages, most in itertools.product((2, 4, 8), (2, 3, 4), heads)
            for splits in _neighbours(chosen.splits, case.slots // (32 * pages))
        }

        def build(tuning: Tuning, buffers: Any = buffers, scale: float = case.head_dim**-0.5) -> Any:
            call = functools.partial(attend, scale=scale, tuning=tuning)
            try:
                return tuning, _compile(lambda *args: _normalized(call, *args), buffers)
            except Exception as reason:
                return tuning, f"{type(reason).__name__}: {str(reason)[:200]}"

        order = sorted(tunings, key=dataclasses.astuple)
        for tuning, compiled in _in_parallel(build, ((tuning,) for tuning in order)):
            record = {"case": case.name, **dataclasses.asdict(tuning)}
            if isinstance(compiled, str):
                yield record | {"reason": compiled}
            else:
                yield record | {"us": _seconds(compiled, buffers) * 1e6}


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


def seconds_per_call(f: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]) -> float:
    """Seconds of one call of `f`, in turns over `buffers`; `f` returns what its first argument is."""
    return _seconds(_compile(f, buffers), buffers)


def kernel_seconds(f: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of each GPU kernel in one call of `f`, by the kernel's name, as the profiler saw them."""
    compiled = jax.jit(f).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(SAMPLES):
                jax.block_until_ready(compiled(*arguments))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        found[event.name] += event.duration_ns
    return {name: nanoseconds / SAMPLES / 1e9 for name, nanoseconds in found.items()}


def _wall_seconds(f: Callable[..., Any], *arguments: Any) -> float:
    return _median_seconds(jax.jit(f).lower(*arguments).compile(), *arguments)


def _median_seconds(compiled: Any, *arguments: Any) -> float:
    jax.block_until_ready(compiled(*arguments))
    samples = []
    for _ in range(SAMPLES):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _rounds(buffers: Sequence[tuple[Any, ...]]) -> int:
    """So many that the loop takes some milliseconds, which no dispatch can hide."""
    expected = 20e-6 + _nbytes(buffers[0]) / 2e12
    return max(2, int(4e-3 / expected / len(buffers)))


def _compile(f: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]) -> Any:
    def one_round(_: int, last: Array, buffers: Any) -> Array:
        for first, *rest in buffers:
            last = f(first + 0 * last, *rest)
        return last

    def loop(buffers: Any) -> Array:
        body = functools.partial(one_round, buffers=buffers)
        return jax.lax.fori_loop(0, _rounds(buffers), body, jnp.zeros_like(buffers[0][0]))

    return jax.jit(loop).lower(list(buffers)).compile()


def _seconds(compiled: Any, buffers: Sequence[tuple[Any, ...]]) -> float:
    return _median_seconds(compiled, list(buffers)) / (_rounds(buffers) * len(buffers))


def _in_parallel(f: Callable[..., Any], arguments: Any) -> Iterator[Any]:
    """Results of `f(*arguments)` in order, several computed at a time (compilation takes most of it)."""
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        yield from pool.map(lambda argument: f(*argument), list(arguments))


def _neighbours(splits: int, tiles: int) -> set[int]:
    return {min(n, max(1, tiles // 2)) for n in (max(1, splits // 2), splits, 2 * splits)}


def _poison() -> None:
    """Leave NaN in the memory that is allocated next."""
    jax.block_until_ready([jnp.full((2**n,), jnp.nan) for n in range(8, 24)])


def _reference(query: Array, key: Array, value: Array, start: Array, end: Array) -> Array:
    """Float32 attention over the tokens [start, end) of a ring."""
    slots = key.shape[2]
    newest = end[:, None] - 1 - (end[:, None] - 1 - jnp.arange(slots)) % slots
    visible = (newest >= jnp.maximum(start, 0)[:, None])[:, None]
    scale = query.shape[-1] ** -0.5
    return partials.normalize(partials.attend(query.astype(jnp.float32), key, value, visible, scale=scale))


def _normalized(attend: Callable[..., Any], *arguments: Any) -> Array:
    query, key, value, start, end = arguments
    return partials.normalize(attend(query, key, value, start=start, end=end)).astype(query.dtype)


def _copies(nbytes: int) -> range:
    return range(min(24, max(2, -(-int(ROTATED_BYTES) // nbytes))))


def _nbytes(arrays: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def _packed_buffers(case: Case, copies: int | None = None) -> tuple[list[tuple[Any, ...]], int]:
    """Arguments of several calls, and the bytes of one call's packed tokens."""
    make = jax.jit(lambda seed: (case.query(seed), *case.pack(*case.dense(seed)[1:])))
    _, key, value = make(0)
    size = _nbytes((key, value))
    seeds = _copies(size) if copies is None else range(copies)
    return [(*make(seed), *case.token_ranges()) for seed in seeds], size


def _dense_buffers(case: Case) -> tuple[list[tuple[Array, Array, Array]], int]:
    make = jax.jit(lambda seed: tuple(x.astype(jnp.bfloat16) for x in case.dense(seed)))
    size = _nbytes(make(0)[1:])
    return [make(seed) for seed in _copies(size)], size


def _contenders(case: Case) -> dict[str, Callable[[], tuple[float, int]]]:
    """Ways to compute the case: each returns the seconds of a call and the bytes of the tokens it reads."""

    def packed(implementation: str) -> tuple[float, int]:
        buffers, size = _packed_buffers(case)
        attend = functools.partial(quantized_attention, implementation=implementation)  # pyright: ignore[reportArgumentType]
        return seconds_per_call(functools.partial(_normalized, attend), buffers), size

    def xla() -> tuple[float, int]:
        def attend(query: Array, key: Array, value: Array) -> Array:
            visible = jnp.ones((case.batch, 1, case.slots), bool)
            found = partials.attend(query, key, value, visible, scale=case.head_dim**-0.5)
            return partials.normalize(found).astype(query.dtype)

        buffers, size = _dense_buffers(case)
        return seconds_per_call(attend, buffers), size

    def cudnn() -> tuple[float, int]:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return jax.nn.dot_product_attention(query[:, None], key, value, implementation="cudnn")

        buffers, size = _dense_buffers(case)
        # cuDNN wants [B, S, K, H]; the cache is laid out so before the clock starts.
        moved = [(q, k.swapaxes(1, 2).copy(), v.swapaxes(1, 2).copy()) for q, k, v in buffers]
        return seconds_per_call(attend, moved), size

    torch_backends = ("CUDNN_ATTENTION", "FLASH_ATTENTION")
    return {
        "bfloat16, XLA": xla,
        "bfloat16, cuDNN (jax.nn)": cudnn,
        **{f"bfloat16, torch {b}": functools.partial(_torch_seconds, case, b) for b in torch_backends},
        **{f"packed, {name}": functools.partial(packed, name) for name in IMPLEMENTATIONS},
    }


def _torch_seconds(case: Case, backend: str) -> tuple[float, int]:
    """PyTorch's scaled_dot_product_attention in a CUDA graph; the faster of two ways to group heads."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    def random(*shape: int) -> Any:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    store = (case.batch, case.kv_heads, case.slots, case.head_dim)
    size = 2 * 2 * case.batch * case.kv_heads * case.slots * case.head_dim
    tokens = [(random(*store), random(*store)) for _ in _copies(size)]
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
    return min(found), size


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
