"""GGUF files, llama.cpp's format: metadata, tensors and tokenizer in one. Read `header.py` first."""
