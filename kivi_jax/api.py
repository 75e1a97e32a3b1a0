"""The public names of `kivi_jax`, which has them from here."""

from kivi_jax.cache.decode_selectors import (
    GKV,
    Adaptive,
    DecodeSelector,
    Discontinuous,
    Random,
    Slide,
    Slots,
    VaSE,
)
from kivi_jax.cache.names import parse_cache
from kivi_jax.cache.prompt_selectors import (
    ExpectedAttention,
    ExpectedQueries,
    KeepAll,
    KeyDiff,
    Prompt,
    PromptSelector,
    PyramidInfer,
    PyramidKV,
    SnapKV,
)
from kivi_jax.cache.stores import PoolQuantization
from kivi_jax.cache.strategy import CacheStrategy, KVCache, cache_bytes, full, kivi, scope
from kivi_jax.cache.unified_selectors import H2O, StreamingLLM
from kivi_jax.config import ModelConfig, RopeConfig
from kivi_jax.generation.chat import Chat
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.generate import Generation, generate
from kivi_jax.generation.loading import load
from kivi_jax.generation.prefix import Prefix
from kivi_jax.generation.prefix_files import load_prefix, save_prefix
from kivi_jax.generation.requests import Request
from kivi_jax.generation.sampling import Greedy, Sample
from kivi_jax.generation.text import Completion, complete, completions, read_prefix, stream, stream_tokens
from kivi_jax.mesh import make_mesh
from kivi_jax.model.llama import Llama
from kivi_jax.plan.memory import largest_batch, plan_cache

__all__ = [
    "GKV",
    "H2O",
    "Adaptive",
    "CacheStrategy",
    "Chat",
    "Completion",
    "DecodeSelector",
    "Discontinuous",
    "Engine",
    "ExpectedAttention",
    "ExpectedQueries",
    "Generation",
    "Greedy",
    "KVCache",
    "KeepAll",
    "KeyDiff",
    "Llama",
    "ModelConfig",
    "PoolQuantization",
    "Prefix",
    "Prompt",
    "PromptSelector",
    "PyramidInfer",
    "PyramidKV",
    "Random",
    "Request",
    "RopeConfig",
    "Sample",
    "Slide",
    "Slots",
    "SnapKV",
    "StreamingLLM",
    "VaSE",
    "cache_bytes",
    "complete",
    "completions",
    "full",
    "generate",
    "kivi",
    "largest_batch",
    "load",
    "load_prefix",
    "make_mesh",
    "parse_cache",
    "plan_cache",
    "read_prefix",
    "save_prefix",
    "scope",
    "stream",
    "stream_tokens",
]
