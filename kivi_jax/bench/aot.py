"""Compile GPU kernels on a machine without a GPU and read what the compiler made of them.

`pip install triton` brings the whole NVIDIA tool chain (Triton's compiler, ptxas, nvdisasm), and a
CPU-only jaxlib lowers for CUDA. So registers, spills and the number of instructions in the main loop are
known for every architecture before a GPU is at hand, and CI can refuse a change that makes them worse.
XLA carries its own copy of Triton; the instruction counts differ from pip's by a few per cent.

`kivi-jax bench kernels --aot` prints the table of `COMPILED` cases, and of those that are timed on a GPU.
"""

import collections
import contextlib
import dataclasses
import math
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from pallas_kernels.pytree import tree_bytes
from pallas_kernels.quantize import kernel as quantize_kernel
from pallas_kernels.quantize.packing import PAGE
from pallas_kernels.quantize.quantization import GroupAxis
from pallas_kernels.quantized_attention import pallas_triton, split_kv, triton
from pallas_kernels.quantized_attention.cases import COMPILED, Case
from pallas_kernels.quantized_attention.tuning import Tuning, choose

# What Pallas asks of the device while lowering, by compute capability; any device of it would do.
DEVICES = {80: "NVIDIA A100-SXM4-80GB", 89: "NVIDIA L4", 90: "NVIDIA H100 80GB HBM3"}
# What XLA's copy of Triton does, too; left unset, Triton 3.9 warns that its default will change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# What is quantized: bits, groups and head sizes of keys ("token") and values ("channel").
QUANTIZED: tuple[dict[str, Any], ...] = tuple(
    {"group_axis": axis, "bits": bits, "group_size": group_size, "dim": dim}
    for axis in ("token", "channel")
    for bits, group_size, dim in (
        (2, 32, 128),
        (2, 128, 128),
        (4, 32, 128),
        (8, 32, 128),
        (1, 32, 128),
        (2, 64, 256),
    )
)
# Shorter backward branches (waits on a barrier, copies of a remainder) are not the loop over tiles.
_SHORTEST_LOOP = 64


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What one kernel became: resources of a thread, and its loops in program order."""

    name: str
    arch: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int  # of the whole program
    loops: tuple[collections.Counter[str], ...]  # of each loop: how many instructions of each opcode

    def per_code(self, codes: int) -> tuple[float, ...]:
        """Instructions per code in each loop, for loops whose iteration consumes `codes` codes."""
        lanes = 32 * self.warps
        return tuple(loop.total() * lanes / codes for loop in self.loops)


def pallas_reports(
    f: Callable[..., Any], *args: Any, sm: int, names: Sequence[str] | None = None
) -> list[KernelReport]:
    """Compile the Pallas-Triton kernels that `f(*args)` calls for compute capability `sm` (90: H100).

    `args` are arrays or `jax.ShapeDtypeStruct`s; `names` are those of the kernels to compile (None: all).
    """
    modules = (module for module, _ in _pallas_modules(_lower(f, *args, sm=sm)))
    return [_compile_module(*module, sm) for module in modules if names is None or module[0] in names]


def triton_report(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], *, sm: int, warps: int, stages: int
) -> KernelReport:
    """Compile a `triton.jit` function for compute capability `sm`."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, constants, pointers)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return _read(compiled.asm["ptx"], kernel.__name__, warps, compiled.metadata.shared)


def run(
    cases: Sequence[Case] = COMPILED,
    architectures: Sequence[int] = (80, 90),
    kernels: Sequence[str] = ("pallas_triton", "triton"),
) -> list[dict[str, Any]]:
    """One record per kernel, case and architecture: what it becomes with the tuning chosen there.

    Keys: case, kernel, arch, pages, splits, registers, spill_bytes, shared_bytes, instructions_per_code (of
    the loop over tiles without a mask, times the programs that share a KV head's codes), instructions (of the
    whole program), packed_bytes (of all tokens), and what the other kernels of a call have of its bytes and
    of its instructions: other_bytes_share, other_instructions_share (see `_others`). Cases that a kernel
    refuses are left out.
    """
    records = []
    for kernel in kernels:
        for case in cases:
            for sm in architectures:
                with contextlib.suppress(NotImplementedError):
                    records.append(record(case, sm, kernel))
    return records


def record(
    case: Case, sm: int, kernel: str = "pallas_triton", tuning: Tuning | None = None
) -> dict[str, Any]:
    """See `run`; by default with the tuning chosen for the device.

    Raises:
        NotImplementedError: the kernel refuses the case.
    """
    scale, tuning = case.head_dim**-0.5, tuning or tuning_for(case, DEVICES[sm])
    arguments = jax.eval_shape(lambda: (case.query(), *case.pack(*case.dense()[1:]), *case.token_ranges()))
    plan, operands = _plan(arguments, scale, tuning)
    if kernel == "triton":
        from pallas_kernels.quantized_attention import triton_kernels

        triton.check(plan)
        constants = triton.constants(plan, operands)
        warps, stages = tuning.warps, tuning.stages
        report = triton_report(
            triton_kernels.attend_split, triton.pointers(), constants, sm=sm, warps=warps, stages=stages
        )
    else:

        def attend(query: Any, key: Any, value: Any, start: Any, end: Any) -> Any:
            return pallas_triton.attend(query, key, value, start=start, end=end, scale=scale, tuning=tuning)

        (report,) = pallas_reports(attend, *arguments, sm=sm, names=["quantized_attention"])
    codes = 2 * tuning.pages * PAGE * case.head_dim  # of keys and of values, in a tile
    programs = -(-case.query_groups // tuning.heads)
    each = report.per_code(codes)[0] * programs
    packed_bytes = tree_bytes(arguments[1:3])
    all_codes = 2 * case.batch * case.kv_heads * case.slots * case.head_dim
    partials_bytes, other_bytes, other_instructions = _others(plan, operands[2].shape[0])
    return {
        "case": case.name,
        "kernel": kernel,
        "arch": report.arch,
        "pages": tuning.pages,
        "splits": tuning.splits,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "instructions_per_code": each,
        "instructions": report.instructions,
        "packed_bytes": packed_bytes,
        "other_bytes_share": other_bytes / (packed_bytes + partials_bytes + other_bytes),
        "other_instructions_share": other_instructions / (each * all_codes + other_instructions),
    }


def packing(
    quantizers: Sequence[dict[str, Any]] = QUANTIZED, architectures: Sequence[int] = (80, 90)
) -> list[dict[str, Any]]:
    """What quantizing and packing bfloat16 tokens becomes: a record for each quantizer and architecture.

    Keys: what `QUANTIZED` has, arch, registers, spill_bytes, shared_bytes, instructions_per_number.
    """
    return [packing_record(sm=sm, **quantizer) for quantizer in quantizers for sm in architectures]


def packing_record(*, group_axis: GroupAxis, bits: int, group_size: int, dim: int, sm: int) -> dict[str, Any]:
    """See `packing`."""
    x = jax.ShapeDtypeStruct((8, 4096, dim), jnp.bfloat16)

    def pack(x: Any) -> Any:
        return quantize_kernel.quantize(x, bits, group_size, group_axis, jnp.float16)

    ((module, programs),) = _pallas_modules(_lower(pack, x, sm=sm))
    report = _compile_module(*module, sm)
    numbers = x.size // programs
    planes = 8 // bits if group_axis == "token" else 1  # keys: a loop takes them one by one
    again = (planes - 1) * sum(loop.total() for loop in report.loops)
    return {
        "group_axis": group_axis,
        "bits": bits,
        "group_size": group_size,
        "dim": dim,
        "arch": report.arch,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "instructions_per_number": 32 * report.warps * (report.instructions + again) / numbers,
    }


def packing_table(records: list[dict[str, Any]]) -> Table:
    """What `packing` found."""
    out = Table("groups over", "arch", title="quantize and pack, compiled without a GPU")
    for heading in ("bits", "group", "head_dim", "registers", "spilled B", "instr./number"):
        out.add_column(heading, justify="right")
    for r in records:
        numbers = (r[key] for key in ("bits", "group_size", "dim", "registers", "spill_bytes"))
        out.add_row(r["group_axis"], r["arch"], *map(str, numbers), f"{r['instructions_per_number']:.1f}")
    return out


def tuning_for(case: Case, device_kind: str) -> Tuning:
    """How the kernels cut up a case on a device."""
    return choose(
        rows=case.batch * case.kv_heads,
        slots=case.slots,
        heads=case.query_groups,
        dim=case.head_dim,
        bits=max(case.key_bits, case.value_bits),
        group_size=case.key_group,
        device_kind=device_kind,
    )


def _plan(arguments: Any, scale: float, tuning: Tuning) -> tuple[split_kv.Case, Any]:
    """What is static about a call, and the shapes of the arrays that its main kernel reads."""
    plans: list[split_kv.Case] = []

    def operands(query: Any, key: Any, value: Any, start: Any, end: Any) -> tuple[Any, ...]:
        plans.append(split_kv.plan(query, key, value, scale, tuning, interpret=False))
        return split_kv.operands(plans[0], query, key, value, start, end)

    shapes = jax.eval_shape(operands, *arguments)
    return plans[0], shapes


def _others(plan: split_kv.Case, programs: int) -> tuple[int, int, int]:
    """Bytes of the splits' results, which the main kernel writes; bytes and instructions of merging them.

    That reads them and writes one: a load and a multiply-add a number.
    """
    heads = programs * plan.heads
    numbers = heads * (plan.dim + 2)
    partials_bytes = heads * (2 * plan.dim + 2 * 4) * plan.tuning.splits
    return partials_bytes, partials_bytes + 4 * numbers, 2 * numbers * plan.tuning.splits


def table(records: list[dict[str, Any]]) -> Table:
    """The records as a table."""
    out = Table("case", "kernel", "arch", title="decode attention, compiled without a GPU")
    headings = ("pages", "splits", "registers", "spilled B", "instr./code", "other bytes", "other instr.")
    for heading in headings:
        out.add_column(heading, justify="right")
    for r in records:
        numbers = (r["pages"], r["splits"], r["registers"], r["spill_bytes"])
        shares = (r["other_bytes_share"], r["other_instructions_share"])
        rest = (f"{r['instructions_per_code']:.2f}", *(f"{share:.1%}" for share in shares))
        out.add_row(r["case"], r["kernel"], r["arch"], *map(str, numbers), *rest)
    return out


def _lower(f: Callable[..., Any], *args: Any, sm: int) -> Any:
    with _abstract_device(DEVICES[sm]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))


def _abstract_device(kind: str) -> contextlib.AbstractContextManager[Any]:
    from jax import sharding

    # jax 0.10 lowers without knowing the device, and has no way to say it.
    if not hasattr(sharding, "AbstractDevice") or not hasattr(sharding, "use_abstract_mesh"):
        return contextlib.nullcontext()
    device = sharding.AbstractDevice(kind, None, "gpu")
    axis_types = (sharding.AxisType.Explicit,)
    mesh = sharding.AbstractMesh((1,), ("_",), axis_types=axis_types, abstract_device=device)
    return sharding.use_abstract_mesh(mesh)


def _pallas_modules(lowered: Any) -> Iterator[tuple[tuple[str, str, int, int], int]]:
    """(name, Triton IR, warps, stages) of a lowered module's Pallas-Triton kernels, and how many programs."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    calls: list[Any] = []

    def visit(op: Any) -> Any:
        op = getattr(op, "operation", op)
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            calls.append(ir.DictAttr(op.attributes["mhlo.backend_config"]))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    for call in calls:
        with ir.Context() as context:
            dialect.register_dialect(context)
            context.allow_unregistered_dialects = True
            module = ir.Module.parse(ir.StringAttr(call["ir"]).value_bytes, context)
            text = str(module.operation.get_asm(enable_debug_info=False))
        sizes = ("num_warps", "num_stages", "grid_x", "grid_y", "grid_z")
        warps, stages, *grid = (int(ir.IntegerAttr(call[size]).value) for size in sizes)
        yield (ir.StringAttr(call["name"]).value, text, warps, stages), math.prod(grid)


def _compile_module(name: str, text: str, warps: int, stages: int, sm: int) -> KernelReport:
    """Run Triton's stages on a module of Triton IR, as XLA does with its own copy of them."""
    from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget, Language  # pyright: ignore[reportMissingImports]
    from triton.compiler.compiler import make_backend  # pyright: ignore[reportMissingImports]

    backend: Any = make_backend(GPUTarget("cuda", sm, 32))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": warps, "num_stages": stages})
    passes: dict[str, Callable[..., Any]] = {}
    backend.add_stages(passes, options, Language.TRITON)
    with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
        file.write(text)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    metadata: dict[str, Any] = {}
    for stage in ("ttir", "ttgir", "llir", "ptx"):
        module = passes[stage](module, metadata)
    return _read(module, name, warps, metadata["shared"])


def _read(ptx: str, name: str, warps: int, shared_bytes: int) -> KernelReport:
    import triton  # pyright: ignore[reportMissingImports]

    tools = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
    arch = re.search(r"\.target (\w+)", ptx)
    if arch is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        log = _run(tools / "ptxas", "-v", f"-arch={arch[1]}", source, "-o", binary)
        sass = _run(tools / "nvdisasm", "-c", binary)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    code, labels = _instructions(sass)
    return KernelReport(
        name=name,
        arch=arch[1],
        warps=warps,
        registers=max(map(int, registers)),
        spill_bytes=sum(map(int, spills)),
        shared_bytes=shared_bytes,
        instructions=len([text for text in code if text != "NOP"]),  # they only fill up the last line
        loops=_loops(code, labels),
    )


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")
    return done.stdout + done.stderr


def _instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a kernel, and at which of them each label is."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def _loops(code: list[str], labels: dict[str, int]) -> tuple[collections.Counter[str], ...]:
    """The outermost loops of a kernel: spans that end in a branch to their own first instruction."""
    spans: list[tuple[int, int]] = []
    for end, text in enumerate(code):
        target = re.search(r"^BRA.*`\((\.L_\w+)\)", text)
        start = labels.get(target[1], end) if target else end
        if end - start >= _SHORTEST_LOOP:
            spans = [span for span in spans if not start <= span[0]]
            spans.append((start, end))
    return tuple(
        collections.Counter(re.split(r"[. ]", text, maxsplit=1)[0] for text in code[start : end + 1])
        for start, end in spans
    )
