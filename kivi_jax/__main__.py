"""`python -m kivi_jax`: the same as `kivi-jax`."""

from kivi_jax.commands.main import main

main()
