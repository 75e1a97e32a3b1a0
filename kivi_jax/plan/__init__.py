"""What a cache will weigh, before there is one. Start with `memory.py`."""
