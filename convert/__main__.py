"""`python -m convert SRC DST`."""

from kivi_jax.signals import end_at_signals


def main() -> None:
    """Convert as the command line says."""
    end_at_signals()
    import typer

    from convert.command import convert
    from kivi_jax import console

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(convert)
    console.main(app)


if __name__ == "__main__":
    main()
