"""Shared test setup: cheap compiling, strict dtypes and ranks, and the original code's recorded outputs."""

import gc
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("KIVI_JAX_SHARED", ROOT.parent / "shared"))
MAPPINGS = Path("/proc/self/maps")  # Linux's; one a line
MANY = 4_000  # a worker's programs are 2 GB then

# Most of a test's time is XLA's compiling, of programs that run once and briefly: LLVM's optimizations and
# the fusion emitters are two thirds of it. Parts that compile side by side repeat what they share, a fifth
# of what is left, and find no free core beside other workers. The caller's flags come last, and win.
# Subprocesses inherit these.
CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jax").startswith("0.10."):  # XLA ends the process over a flag it does not know
    CHEAP += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{CHEAP} {os.environ.get('XLA_FLAGS', '')}"
# Programs are kept on disk for the other workers, modules, Pythons and runs. Delete the folder to free it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Torch's threads spin while they wait, and those of several workers stall one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Make JAX strict about dtypes and ranks, where tests run: xdist's own process need not import it."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    import jax  # a plugin may have imported it before this file

    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs",
        float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
    )
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded outputs and real inputs; it stands beside a checkout, not inside it."""
    if not SHARED.is_dir():
        pytest.skip(f"no recorded outputs: {SHARED} is absent (set KIVI_JAX_SHARED to its path)")
    return SHARED


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, for transformers to compute what ours is compared with."""
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import only files that name a marker that is asked for, as by `-m slow`."""
    names = set(re.findall(r"\w+", config.option.markexpr)) - {"or", "and"}
    if not names or "not" in names or not collection_path.match("test_*.py"):
        return None
    return not names & set(re.findall(r"\w+", collection_path.read_text("utf-8"))) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark those that need PyTorch, so that they can be chosen; tests of the longest fixture run first.

    The first tests are one worker's; later ones another may take over, which would make the fixture once
    more, or start it when all else is done.
    """
    for item in items:
        if "torch" in getattr(item, "fixturenames", ()):
            item.add_marker("torch")
    items.sort(key=lambda item: "found_slowly" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """Take modules and tests out of what is looked through for garbage: they stay to the end."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # what tracing makes lasts: 4 % of the time went into looking through it


@pytest.fixture(scope="module", autouse=True)
def free_programs() -> Iterator[None]:
    """Free the programs that tests have compiled once they are many: that takes a second each time.

    Each holds a few memory mappings; Linux allows a process 65,530, beyond which XLA's compiler crashes.
    """
    import jax

    yield
    if not MAPPINGS.exists() or MAPPINGS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()
