"""KIVI and SCOPE key/value caches for Llama and Mistral in JAX."""
