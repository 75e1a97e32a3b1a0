"""A small trained Llama that ships with the package, the tasks it can do, and how it was trained."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # a Hugging Face directory: kivi_jax.load(MODEL)
