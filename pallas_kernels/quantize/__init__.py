"""Packed tensors: the bit layout, and numbers to codes and back. Start with `packing.py`."""
