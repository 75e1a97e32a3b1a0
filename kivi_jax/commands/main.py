"""`kivi-jax`: where the process begins, before anything slow is imported."""

from kivi_jax.signals import end_at_signals


def main() -> None:
    """The entry point of `kivi-jax`."""
    end_at_signals()
    from kivi_jax import console
    from kivi_jax.commands.app import app

    console.main(app)


if __name__ == "__main__":
    main()
