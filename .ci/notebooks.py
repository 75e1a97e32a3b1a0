"""Check that the two files of every notebook hold the same cells, then execute them."""

import asyncio
import os
import sys
import time
from pathlib import Path

import jax
import jupytext
from nbclient import NotebookClient
from nbformat import NotebookNode

# Nearly all of a notebook's time is XLA's compiling, of programs that run once and briefly.
CHEAP = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # XLA ends the process over a flag it does not know
    CHEAP += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", CHEAP)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


def cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    """What a reader sees of a notebook's input; outputs and metadata may differ between its two files."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


async def execute(notebooks: dict[str, NotebookNode]) -> None:
    """Run all of them, as many at a time as there are cores: the last ones first, which take longer."""
    free = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(name: str, notebook: NotebookNode) -> None:
        async with free:
            start = time.monotonic()
            resources = {"metadata": {"path": str(NOTEBOOKS)}}
            await NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources=resources
            ).async_execute()
            print(f"{name}: {len(notebook.cells)} cells executed in {time.monotonic() - start:.0f} s")

    await asyncio.gather(*(run(name, notebook) for name, notebook in reversed(notebooks.items())))


def main() -> None:
    """Check and execute every notebook.

    Raises:
        SystemExit: a file of a pair is missing, or its cells differ from the other's.
    """
    checked: dict[str, NotebookNode] = {}
    files = [*NOTEBOOKS.glob("*.py"), *NOTEBOOKS.glob("*.ipynb")]
    for stem in sorted({path.with_suffix("") for path in files}):
        text, rendered = stem.with_suffix(".py"), stem.with_suffix(".ipynb")
        if missing := [path.name for path in (text, rendered) if not path.exists()]:
            sys.exit(f"{missing[0]} is missing: run `jupytext --sync` on the other file of the pair")
        notebook = jupytext.read(text)
        if cells(notebook) != cells(jupytext.read(rendered)):
            sys.exit(f"{text.name} and {rendered.name} hold different cells: run `jupytext --sync`")
        checked[text.name] = notebook
    asyncio.run(execute(checked))


if __name__ == "__main__":
    main()
