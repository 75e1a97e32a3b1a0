"""KIVI and SCOPE key/value caches for Llama and Mistral in JAX.

import kivi_jax as kj
model, tokenizer = kj.load("path/to/checkpoint")
texts = kj.complete(model, tokenizer, ["Once upon a time"], cache=kj.kivi(bits=2), max_new_tokens=64)
"""

from kivi_jax.cache.decode_selectors import GKV as GKV
from kivi_jax.cache.decode_selectors import Adaptive as Adaptive
from kivi_jax.cache.decode_selectors import DecodeSelector as DecodeSelector
from kivi_jax.cache.decode_selectors import Discontinuous as Discontinuous
from kivi_jax.cache.decode_selectors import Random as Random
from kivi_jax.cache.decode_selectors import Slide as Slide
from kivi_jax.cache.decode_selectors import Slots as Slots
from kivi_jax.cache.decode_selectors import VaSE as VaSE
from kivi_jax.cache.prompt_selectors import ExpectedAttention as ExpectedAttention
from kivi_jax.cache.prompt_selectors import ExpectedQueries as ExpectedQueries
from kivi_jax.cache.prompt_selectors import KeepAll as KeepAll
from kivi_jax.cache.prompt_selectors import KeyDiff as KeyDiff
from kivi_jax.cache.prompt_selectors import Prompt as Prompt
from kivi_jax.cache.prompt_selectors import PromptSelector as PromptSelector
from kivi_jax.cache.prompt_selectors import PyramidInfer as PyramidInfer
from kivi_jax.cache.prompt_selectors import PyramidKV as PyramidKV
from kivi_jax.cache.prompt_selectors import SnapKV as SnapKV
from kivi_jax.cache.stores import PoolQuantization as PoolQuantization
from kivi_jax.cache.strategy import CacheStrategy as CacheStrategy
from kivi_jax.cache.strategy import KVCache as KVCache
from kivi_jax.cache.strategy import cache_bytes as cache_bytes
from kivi_jax.cache.strategy import full as full
from kivi_jax.cache.strategy import kivi as kivi
from kivi_jax.cache.strategy import scope as scope
from kivi_jax.cache.unified_selectors import H2O as H2O
from kivi_jax.cache.unified_selectors import StreamingLLM as StreamingLLM
from kivi_jax.config import ModelConfig as ModelConfig
from kivi_jax.config import RopeConfig as RopeConfig
from kivi_jax.generation.generate import Generation as Generation
from kivi_jax.generation.generate import generate as generate
from kivi_jax.generation.loading import load as load
from kivi_jax.generation.prefix import Prefix as Prefix
from kivi_jax.generation.prefix_files import load_prefix as load_prefix
from kivi_jax.generation.prefix_files import save_prefix as save_prefix
from kivi_jax.generation.sampling import Greedy as Greedy
from kivi_jax.generation.sampling import Sample as Sample
from kivi_jax.generation.text import complete as complete
from kivi_jax.generation.text import read_prefix as read_prefix
from kivi_jax.generation.text import stream as stream
from kivi_jax.model.llama import Llama as Llama
