"""mkdocs hook: puts into a page, when the site is built, what it shows of the code."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from kivi_jax.commands.app import app

MODEL = Path(__file__).parents[1] / "kivi_jax" / "demo" / "model"


def command_line() -> str:
    """The help of every command."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="kivi-jax")
    return re.sub(r"^(.+:)  (kivi-jax .+)$", r"\1 `\2`", text, flags=re.MULTILINE)  # examples, as code


def model_card() -> str:
    """The demo model's card."""
    return (MODEL / "MODEL_CARD.md").read_text("utf-8")


GENERATED = {"reference/cli.md": command_line, "demo-model.md": model_card}


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the picture in the model's card."""
    files.append(File.generated(config, "curve.png", abs_src_path=str(MODEL / "curve.png")))


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Add to a page what is generated, less its title, for which the page has its own."""
    if (generate := GENERATED.get(page.file.src_uri)) is None:
        return markdown
    return f"{markdown}\n{re.split(r'^# .*$', generate(), maxsplit=1, flags=re.MULTILINE)[1]}"
