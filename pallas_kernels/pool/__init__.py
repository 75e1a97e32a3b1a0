"""A step of a bounded pool of tokens on NVIDIA GPUs: attending to its slots, and taking one of them."""
