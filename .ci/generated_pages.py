"""mkdocs hook: pages made from the code, so that they cannot differ from it."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from kivi_jax.cli import app

CARD = Path(__file__).parents[1] / "kivi_jax" / "demo" / "model"


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the reference of the command line, and the card of the demo's model with its picture."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="kivi-jax", title="Command line")
    text = re.sub(r"^(.+:)  (kivi-jax .+)$", r"\1 `\2`", text, flags=re.MULTILINE)  # examples, as code
    files.append(File.generated(config, "reference/cli.md", content=text))
    files.append(File.generated(config, "demo-model.md", abs_src_path=str(CARD / "MODEL_CARD.md")))
    files.append(File.generated(config, "curve.png", abs_src_path=str(CARD / "curve.png")))
