"""`python -m convert SRC DST`."""

import typer

from convert.command import convert
from kivi_jax.console import main

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)

if __name__ == "__main__":
    main(app)
