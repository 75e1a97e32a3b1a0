"""The decoder: positions, attention over a prompt, layers. Start with `llama.py`."""
