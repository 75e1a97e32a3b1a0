"""KIVI and SCOPE key/value caches for Llama and Mistral in JAX.

import kivi_jax as kj
model, tokenizer = kj.load("path/to/checkpoint")
texts = kj.complete(model, tokenizer, ["Once upon a time"], cache=kj.kivi(bits=2), max_new_tokens=64)
"""

from kivi_jax.cache import CacheStrategy as CacheStrategy
from kivi_jax.cache import KVCache as KVCache
from kivi_jax.cache import PoolQuantization as PoolQuantization
from kivi_jax.cache import cache_bytes as cache_bytes
from kivi_jax.cache import full as full
from kivi_jax.cache import kivi as kivi
from kivi_jax.cache import scope as scope
from kivi_jax.config import ModelConfig as ModelConfig
from kivi_jax.config import RopeConfig as RopeConfig
from kivi_jax.generation import Generation as Generation
from kivi_jax.generation import generate as generate
from kivi_jax.llama import Llama as Llama
from kivi_jax.loading import load as load
from kivi_jax.prefix import Prefix as Prefix
from kivi_jax.prefix_files import load_prefix as load_prefix
from kivi_jax.prefix_files import save_prefix as save_prefix
from kivi_jax.sampling import Greedy as Greedy
from kivi_jax.sampling import Sample as Sample
from kivi_jax.selection import H2O as H2O
from kivi_jax.selection import Adaptive as Adaptive
from kivi_jax.selection import DecodeSelector as DecodeSelector
from kivi_jax.selection import Discontinuous as Discontinuous
from kivi_jax.selection import KeepAll as KeepAll
from kivi_jax.selection import PromptSelector as PromptSelector
from kivi_jax.selection import PyramidInfer as PyramidInfer
from kivi_jax.selection import PyramidKV as PyramidKV
from kivi_jax.selection import Slide as Slide
from kivi_jax.selection import SnapKV as SnapKV
from kivi_jax.selection import StreamingLLM as StreamingLLM
from kivi_jax.text import complete as complete
from kivi_jax.text import read_prefix as read_prefix
from kivi_jax.text import stream as stream
