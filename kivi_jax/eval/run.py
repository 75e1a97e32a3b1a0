"""What all evaluations' commands do alike: open the model, compute a file of records per cache, report."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kivi_jax.bench.command import machine
from kivi_jax.cache.names import parse_cache
from kivi_jax.console import print_table
from kivi_jax.options import Dtype

if TYPE_CHECKING:
    from kivi_jax.eval.samples import Sample
    from kivi_jax.model.llama import Llama

DEFAULT_CACHES = ("full", "kivi4", "kivi2")


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation of one model: its name, what it reads and where its records go."""

    name: str
    model: str
    data: str
    out: Path
    dtype: Dtype | None
    beside: Mapping[str, str | Path] = dataclasses.field(
        default_factory=dict
    )  # what it reads besides, by name
    mesh: str | None = None

    @functools.cached_property
    def loaded(self) -> "tuple[Llama, Any]":
        """The model and its tokenizer, opened when first asked for: wrong data should not wait for it."""
        from kivi_jax.generation.loading import open_model

        return open_model(self.model, self.dtype, self.mesh)

    @property
    def folder(self) -> Path:
        """Where the evaluation's records stand."""
        return self.out / self.name

    @functools.cached_property
    def contents(self) -> dict[str, Any]:
        """What the files of the model and of the data hold, as settings."""
        from convert.hub import resolve
        from kivi_jax.eval import contents

        sources = {"data": self.data, **self.beside}
        read = {name: contents.of_data(source) for name, source in sources.items()}
        return contents.together(model=contents.of_model(resolve(self.model)), **read)

    def settings(self, **more: Any) -> dict[str, Any]:
        """What records depend on: a run with others may not add to them."""
        from kivi_jax.generation.loading import dtype_name

        dtype = dtype_name(self.dtype)
        named = dict(eval=self.name, model=self.model, data=self.data, dtype=dtype)
        return named | self.contents | more

    def generate(
        self, samples: "Sequence[Sample]", caches: Sequence[str] | None, *, batch: int, **more: Any
    ) -> None:
        """Predict all samples under all caches, and report. `more` is added to the settings."""
        from kivi_jax.eval.generating import predict

        llama, tokenizer = self.loaded

        def compute(cache: str, path: Path, settings: dict[str, Any], progress: Progress) -> None:
            predict(
                llama,
                tokenizer,
                samples,
                cache=parse_cache(cache),
                path=path,
                settings=settings,
                batch_size=batch,
                max_length=settings.get("max_length"),
                chat=settings.get("chat", False),
                progress=progress,
            )

        self.compare(compute, caches, **more)

    def compare(
        self,
        compute: Callable[[str, Path, dict[str, Any], Progress], None],
        caches: Sequence[str] | None,
        peers: Sequence[str] = (),
        **more: Any,
    ) -> None:
        """Compute one file of records per cache, of ours and of others, and report on them.

        `more` is added to the settings.
        """
        names = list(dict.fromkeys(caches or DEFAULT_CACHES))
        for cache in names:  # a mistake in the last one should not cost the time of the first
            parse_cache(cache).check(self.loaded[0].config)
        with progress_bar() as progress:
            for cache in (*names, *peers):
                path = self.folder / f"{cache.replace(':', ',')}.jsonl"
                compute(cache, path, self.settings(**more, cache=cache), progress)
        print_report([self.folder])


def progress_bar() -> Progress:
    """A bar on stderr that leaves nothing behind, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def print_report(folders: Sequence[Path]) -> None:
    """Print the tables of finished evaluations, and draw their plots beside them.

    Raises:
        ValueError: a folder holds no records, or damaged ones.
    """
    from kivi_jax.eval.report import plot, read_comparisons, tables

    console = Console()
    for comparison in read_comparisons(folders):
        for table in tables(comparison):
            print_table(console, table)
        if picture := plot(comparison):
            console.print(f"plot: {picture}", soft_wrap=True, highlight=False, markup=False)
    console.print(machine(), style="dim", highlight=False)


def read_text(path: str) -> str:
    """A text file.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None
