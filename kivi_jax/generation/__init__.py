"""From prompts to tokens and text, and what is read once and kept. Start with `generate.py`."""
