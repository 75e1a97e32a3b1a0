"""Rings of the newest tokens, and the kernels that write to a cache in place. Start with `ring.py`."""
