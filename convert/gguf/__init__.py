"""GGUF files, llama.cpp's format: a model's metadata, tensors and tokenizer in one. Read `file.py` first."""
