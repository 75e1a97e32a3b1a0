"""From Hugging Face checkpoints to models, and back to disk as orbax checkpoints."""
