"""Committed benchmarks; each is also a command, `python -m kivi_jax.bench.NAME`."""
