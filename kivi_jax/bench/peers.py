"""Models of others that ours are timed beside."""

import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kivi_jax.config import ModelConfig

Record = dict[str, Any]

# Names of transformers' for caches; quanto's of 2 bits as KIVI has them.
_CACHES: dict[str, dict[str, Any]] = {
    "DynamicCache": {},
    "StaticCache, compiled": {"cache_implementation": "static"},
    "QuantizedCache, quanto": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 2, "q_group_size": 32, "residual_length": 128},
    },
}
_FEW, _MANY = 8, 72  # tokens, of whose generations the difference is timed


def llama_config(config: ModelConfig, **others: Any) -> Any:
    """transformers' config of a Llama of the same shape; `others` are fields of its own."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        **others,
    )


def torch_llama(config: ModelConfig, dtype: DTypeLike) -> Any:
    """transformers' Llama with PyTorch's fused attention, of random weights, on the GPU if there is one."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    shape = llama_config(config, dtype=jnp.dtype(dtype).name, attn_implementation="sdpa")
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:  # a CPU draws 8B numbers for minutes
        return AutoModelForCausalLM.from_config(shape).eval().requires_grad_(False)


def random_ids(model: Any, config: ModelConfig, rows: int, tokens: int) -> Any:
    """Prompts for `torch_llama`."""
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, tokens))
    return next(model.parameters()).new_tensor(ids).long()


def decoding(config: ModelConfig, context: int, dtype: DTypeLike) -> Iterator[Record]:
    """Milliseconds of one row's token in transformers' `generate` after a prompt of `context` tokens.

    Yields for each cache: contender, ms; or contender, reason, where it cannot run.
    """
    model = torch_llama(config, dtype)
    ids = random_ids(model, config, 1, context)

    def seconds(tokens: int, options: dict[str, Any]) -> float:
        begin = time.perf_counter()
        out = model.generate(
            ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
        )
        out[0, -1].item()  # waits for the device
        return time.perf_counter() - begin

    for name, options in _CACHES.items():
        try:
            for tokens in (_FEW, _MANY):
                seconds(tokens, options)
            times = [seconds(_MANY, options) - seconds(_FEW, options) for _ in range(2)]
        except (ImportError, RuntimeError, ValueError) as reason:
            yield {"contender": name, "reason": (str(reason) or type(reason).__name__).splitlines()[0]}
        else:
            yield {"contender": name, "ms": 1e3 * min(times) / (_MANY - _FEW)}
