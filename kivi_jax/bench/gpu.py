"""Everything that is to be learned from a GPU, in stages: is it right, how fast, and as predicted?

Each stage is a process of its own with a limit on its time: one that crashes or hangs costs nothing but
itself, and memory is whole again for the next. Its file holds what it has found so far, whenever it ends:

    {"stage": "speed", "complete": true, "seconds": 211.5, "records": [...]}

and if something went wrong "error", the reason. `REHEARSAL` runs the same stages on a CPU, with sizes that
take seconds, interpreted kernels, and XLA where the GPU's compilers would be needed.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kivi_jax.bench import agreement, decode, kernels, packing, peers, predictions, prompts
from kivi_jax.cache.names import parse_cache
from kivi_jax.config import ModelConfig
from kivi_jax.plan.shapes import SHAPES
from pallas_kernels.quantized_attention.cases import CORRECTNESS, GPU, Case

Record = dict[str, Any]

SECONDS = 460.0  # that a stage may take: 8 minutes, with what starting and ending it takes
CACHES = ("full", "kivi4", "kivi2", "scope", "kivi2+scope")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    copied: int  # float32 numbers
    side: int  # of a square matrix
    correctness: tuple[Case, ...]
    speed: tuple[Case, ...]
    implementations: tuple[str, ...]  # that are timed on packed tokens
    packed: int  # tokens of a prompt that is quantized
    model: ModelConfig
    dtype: str
    contexts: tuple[int, int]  # for one row
    batch_context: int  # for the most rows
    million: int  # tokens of the longest context
    prompts: tuple[tuple[int, int], ...]  # (rows, tokens) that are read
    product: ModelConfig  # whose logits are compared with a CPU's
    ragged: tuple[int, ...]  # tokens of its rows
    new_tokens: int
    caches: tuple[str, ...]
    memory: int | None  # for the most rows, in bytes; None: what the device has
    interpret: bool


FULL = Sizes(
    copied=2**30,
    side=8192,
    correctness=(*CORRECTNESS, *GPU[:1]),
    speed=GPU,
    implementations=kernels.IMPLEMENTATIONS,
    packed=32768,
    model=SHAPES["llama-8b"],
    dtype="bfloat16",
    contexts=(32768, 131072),
    batch_context=8192,
    million=2**20,
    prompts=((1, 2048), (8, 2048), (1, 8192), (1, 32768), (1, 131072)),
    product=dataclasses.replace(
        SHAPES["125m"], vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_layers=4, num_heads=8,
        num_kv_heads=2, head_dim=128,
    ),
    ragged=(700, 300, 129, 64),
    new_tokens=32,
    caches=CACHES,
    memory=None,
    interpret=False,
)  # fmt: skip

REHEARSAL = Sizes(
    copied=2**20,
    side=256,
    correctness=tuple(case for case in CORRECTNESS if case.name in ("one_page", "tiles_empty_row")),
    speed=(Case("rehearsal", 1, 2, 2, 64, 256, query_dtype="bfloat16"),),
    implementations=("xla",),
    packed=256,
    model=dataclasses.replace(
        SHAPES["125m"], vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=64,
    ),
    dtype="float32",
    contexts=(256, 512),
    batch_context=256,
    million=1024,
    prompts=((2, 64),),
    product=dataclasses.replace(
        SHAPES["125m"], vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=4,
        num_kv_heads=2, head_dim=64,
    ),
    ragged=(40, 9),
    new_tokens=4,
    caches=CACHES,
    memory=8 * 2**20,
    interpret=True,
)  # fmt: skip


# Tokens of a row, rows (None: as many as fit) and caches of whole steps, by stage.
StepCase = Callable[[Sizes], tuple[int, int | None, tuple[str, ...]]]
STEPS: dict[str, StepCase] = {
    "steps-short": lambda sizes: (sizes.contexts[0], 1, sizes.caches),
    "steps-long": lambda sizes: (sizes.contexts[1], 1, sizes.caches),
    "steps-most": lambda sizes: (sizes.batch_context, None, sizes.caches),
    "million": lambda sizes: (sizes.million, 1, ("kivi2",)),
}


def predicted(sizes: Sizes) -> Iterator[Record]:
    """Limits of all that `speed` and the steps measure. Needs no GPU, but Triton's compiler for kernels."""
    implementations = [name for name in sizes.implementations if name in kernels.IMPLEMENTATIONS]
    yield from predictions.kernels(sizes.speed, implementations)
    for case in STEPS.values():
        context, batch, caches = case(sizes)
        yield from predictions.steps(
            sizes.model,
            {name: parse_cache(name) for name in caches},
            context=context,
            capacity=decode.room(context, sizes.new_tokens, programs=decode.PROGRAMS),
            batch=batch,
            dtype=sizes.dtype,
        )


def _correct(sizes: Sizes) -> Iterator[Record]:
    names = ("xla", *kernels.IMPLEMENTATIONS)
    yield from kernels.correctness(sizes.correctness, names, interpret=sizes.interpret)


def _correct_mosaic(sizes: Sizes) -> Iterator[Record]:
    """By itself: Mosaic's compiler can abort the process it runs in."""
    yield from kernels.correctness(sizes.correctness, ("pallas_mosaic",), interpret=sizes.interpret)


def _product(sizes: Sizes) -> Iterator[Record]:
    yield from agreement.run(
        sizes.product, (*sizes.caches, "kivi42r"), lengths=sizes.ragged, steps=sizes.new_tokens
    )


def _steps(case: StepCase, sizes: Sizes) -> Iterator[Record]:
    context, batch, caches = case(sizes)
    found = decode.throughput(
        sizes.model,
        {name: parse_cache(name) for name in caches},
        context=context,
        new_tokens=sizes.new_tokens,
        dtype=sizes.dtype,
        batch=batch,
        memory=sizes.memory,
    )
    weights = predictions.weights_read(sizes.model, sizes.dtype)
    for record in found:
        yield {
            "case": predictions.step_case(context, batch),
            "contender": record["cache"],
            "us": record["ms"] * 1e3 / record["batch"],
            "gigabytes_per_s": (weights + record["cache_bytes"]) / record["ms"] / 1e6,
            **record,
        }


STAGES: dict[str, Callable[[Sizes], Iterator[Record]]] = {
    "predictions": predicted,
    "environment": lambda sizes: iter(kernels.environment(copied=sizes.copied, side=sizes.side)),
    "correctness": _correct,
    "correctness-mosaic": _correct_mosaic,
    "speed": lambda sizes: kernels.speed(sizes.speed, sizes.implementations),
    "packing": lambda sizes: packing.run(sizes.packed, interpret=sizes.interpret),
    **{name: functools.partial(_steps, case) for name, case in STEPS.items()},
    "product": _product,
    # kivi2 first: the peak so far is then not yet the full cache's.
    "prompts": lambda sizes: prompts.ours(sizes.model, sizes.prompts, ("kivi2", "full"), sizes.dtype),
    # Not the longest: what transformers keeps of it does not fit beside its weights.
    "prompts-transformers": lambda sizes: prompts.transformers(sizes.model, sizes.prompts[:4], sizes.dtype),
    "peers": lambda sizes: peers.decoding(sizes.model, sizes.contexts[0], sizes.dtype),
}
PROMPTS = ("prompts", "prompts-transformers")


def run(
    out: Path, names: Sequence[str], *, rehearse: bool, seconds: float = SECONDS
) -> Iterator[tuple[str, Record]]:
    """Run stages one after the other, each for at most so many seconds: its name and its file's content.

    Raises:
        ValueError: there is no such stage; or there is no GPU, and this is no rehearsal.
    """
    for name in names:
        if name not in STAGES:
            raise ValueError(f"unknown stage {name!r}: choose some of {', '.join(STAGES)}")
    if not rehearse and set(names) - {"predictions"} and (backend := _backend()) != "gpu":
        raise ValueError(
            f"JAX computes on {backend!r}, not a GPU: pass --rehearse, or only --stage predictions"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        yield name, _run_apart(out / f"{name}.json", name, rehearse, seconds)


def read(path: Path) -> list[Record]:
    """The records in a stage's file; none where there is no file."""
    return json.loads(path.read_text())["records"] if path.exists() else []


def _backend() -> str:
    """What JAX computes on, asked in another process: this one must not take the GPU's memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def _run_apart(path: Path, name: str, rehearse: bool, seconds: float) -> Record:
    """One stage in a process of its own."""
    path.unlink(missing_ok=True)
    # Rows fill nine tenths of the memory, and JAX takes three quarters unless told otherwise.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"} | os.environ
    if rehearse:
        environment |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "kivi_jax.bench.gpu", name, str(path), *(["--rehearse"] * rehearse)]
    begin = time.perf_counter()
    error = None
    try:
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=seconds
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            error = f"exit status {done.returncode}: {' '.join(lines[-1:])[:500]}"
    except subprocess.TimeoutExpired:
        error = f"cut after {seconds:.0f} s"
    found = {"stage": name, "complete": error is None, "records": read(path)}
    found["seconds"] = time.perf_counter() - begin
    if error:
        found["error"] = error
    _write(path, found)
    return found


def _write(path: Path, content: Record) -> None:
    """All or nothing, so that a process that is killed meanwhile leaves the file of before."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def write_stage(name: str, path: Path, sizes: Sizes) -> None:
    """Run a stage in this process, and write its records as they come."""
    records: list[Record] = []
    for record in STAGES[name](sizes):
        records.append(record)
        _write(path, {"stage": name, "complete": False, "records": records})


if __name__ == "__main__":
    stage, file, *flags = sys.argv[1:]
    write_stage(stage, Path(file), REHEARSAL if flags == ["--rehearse"] else FULL)
