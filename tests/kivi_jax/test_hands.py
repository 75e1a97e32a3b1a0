"""Mistakes at the Python interface end in one clear sentence.

In a process of its own: the types that tests check at run time would refuse many of them first.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MISTAKES = {
    "kj.kivi(bits=2.0)": "key_bits=2.0 must be a whole number",
    "kj.kivi(residual_length=128.0)": "residual_length=128.0 must be a whole number",
    "kj.kivi(bits='2')": "key_bits='2' must be a whole number",
    "kj.PoolQuantization(bits=4.0)": "pool_bits=4.0 must be a whole number",
    "kj.Slide(window=8.0, recent=4)": "window=8.0 must be a whole number",
    "kj.SnapKV(budget=64, window=32.0)": "window=32.0 must be a whole number",
    "kj.SnapKV(budget=64, kernel=5.0)": "kernel=5.0 must be a whole number",
    "kj.PyramidKV(budget=64, beta=2.5)": "beta=2.5 must be a whole number",
    "kj.Adaptive(window=8, recent=4, max_new_tokens=16.0)": "max_new_tokens=16.0 must be a whole number",
    "kj.StreamingLLM(sinks=2.0, recent=4)": "sinks=2.0 must be a whole number",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2.0)": "max_new_tokens=2.0 must be a whole",
    "kj.generate(model, [[1.5]], [1], cache=full, max_new_tokens=2)": "tokens must be whole numbers",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2, eos_ids='2')": "eos_ids='2' must be",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2, key=0)": "key is no PRNG key",
    "kj.generate(model, [], [], cache=full, max_new_tokens=2)": "must have 2 axes",
    "kj.generate(model, [[]], [0], cache=full, max_new_tokens=2)": "every length must be from 1 to 0",
    "kj.complete(model, None, ['a'], cache=full, max_new_tokens=2)": "there is no tokenizer",
    "next(kj.stream(model, None, 'a', cache=full, max_new_tokens=2))": "there is no tokenizer",
    "kj.read_prefix(model, None, ['a'], cache=full)": "there is no tokenizer",
    "kj.complete(model, len, {'role': 'user', 'content': 'a'}, cache=full, max_new_tokens=2)": "pass [it]",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2, sampler=kj.Sample)": "is no sampler: pass",
    "kj.Chat(model, len, cache=full, context=8, sampler='greedy')": "sampler='greedy' is no sampler: pass",
    "kj.Chat(model, len, cache=full, context=8, system=3)": "system is of type int, not str: pass a text",
    "model([[1, -1]])": "token -1 is not in the model's vocabulary, 0 to 60",
    "model(np.array([[61]]))": "token 61 is not in the model's vocabulary, 0 to 60",
    "model([1, 2])": "tokens of shape (2,) must have 2 axes",
    "model.decode([1], None)": "cache is of type NoneType, not KVCache: pass what prefill or decode gave",
    "other.decode([1], model.prefill([[1]], [1], cache=full, capacity=8)[1])": (
        "the cache has 1 layers of 2 KV heads of 8 channels, the model 1 layers of 1 KV heads of 8 channels"
    ),
    "kj.kivi(rotate_keys='no')": "rotate_keys is of type str, not bool: pass True or False",
    "kj.plan_cache('llama-8b', 'kivi2', batch=1, context=8, dtype='float32')": "config is of type str, not "
    "ModelConfig: pass a model's, or one of kivi_jax.plan.shapes.SHAPES",
    "config(eos_ids=5)": "eos_ids is of type int, not tuple: pass a tuple of token ids",
    "config(eos_ids=('a',))": "eos_ids='a' must be a whole number",
    "config(rope=None)": "rope is of type NoneType, not RopeConfig: pass a RopeConfig",
    "config(rms_norm_eps='1e-5')": "rms_norm_eps='1e-5' must be a number",
    "kj.load(None)": "model=None is no path: pass a text or a Path",
    "kj.load(['demo'])": "model=['demo'] is no path",
    "kj.load(b'demo')": "model=b'demo' is no path",
    "kj.load_prefix(None, model)": "path=None is no path",
    "kj.save_prefix(3, prefix, model)": "path=3 is no path",
    "kj.complete(model, len, [1], cache=full, max_new_tokens=2)": "a prompt is a text or a list of messages,",
    "kj.complete(model, len, [b'a'], cache=full, max_new_tokens=2)": "a prompt is a text or a list of messa",
    "kj.complete(model, len, 3, cache=full, max_new_tokens=2)": "must be a list of texts or messages, got 3",
    "next(kj.stream(model, len, 'a', stop=5, cache=full, max_new_tokens=2))": "stop strings must be strings",
    "next(kj.stream(model, len, 'a', stop=None, cache=full, max_new_tokens=2))": "stop strings must be",
    "kj.complete('llama', len, ['a'], cache=full, max_new_tokens=2)": "model is of type str, not Llama",
    "kj.complete(len, model, ['a'], cache=full, max_new_tokens=2)": "model is of type builtin_function_or_m",
    "kj.complete(model, model, ['a'], cache=full, max_new_tokens=2)": "tokenizer is of type Llama: pass what",
    "next(kj.stream(model, 'x', 'a', cache=full, max_new_tokens=2))": "tokenizer is of type str: pass what",
    "kj.read_prefix(len, model, ['a'], cache=full)": "not Llama: pass what load gave, the model before",
    "kj.generate(len, [[1]], [1], cache=full, max_new_tokens=2)": "model is of type builtin_function",
    "kj.Chat(len, model, cache=full, context=8)": "not Llama: pass what load gave, the model before",
    "kj.load_prefix('p', 'model')": "model is of type str, not Llama",
    "kj.generate(model, [[1]], [1], prefix='x', max_new_tokens=2)": "prefix is of type str, not Prefix",
    "kj.complete(model, len, ['a'], prefix='x', max_new_tokens=2)": "prefix is of type str, not Prefix",
    "kj.save_prefix('p', 'x', model)": "prefix is of type str, not Prefix: pass what read_prefix or load",
    "kj.save_prefix('p', prefix, model, overwrite='no')": "overwrite is of type str, not bool: pass True or",
    "kj.cache_bytes(None)": "cache is of type NoneType, not KVCache: pass what prefill or decode gave",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2, ends='x')": "ends='x' is no function: pass",
    "next(kj.Chat(model, len, cache=full, context=8).reply(None, max_new_tokens=2))": "message is of type",
    "next(kj.Chat(model, len, cache=full, context=8).reply('a', max_new_tokens=0))": "must be at least 1",
    "kj.kivi(bits=True)": "key_bits=True must be a whole number",
    "kj.kivi(residual_length=2**32)": "residual_length=4294967296 must be below 2**31",
    "kj.kivi(prompt='snapkv')": "prompt='snapkv' is no prompt of a cache: parse_cache reads names",
    "kj.scope(prompt=full)": "is no prompt of a cache",
    "kj.kivi(decode='slide')": "decode='slide' is no decode of a cache",
    "kj.scope(pool='kivi2')": "pool='kivi2' is no pool of a cache",
    "kj.parse_cache(3)": "cache=3 is no text",
    "kj.generate(model, [[1]], [1], cache=3, max_new_tokens=2)": "cache=3 is neither a strategy nor the name",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2, sampler='greedy')": "is no sampler: pass",
    "kj.generate(model, [[1]], [1], cache=full, max_new_tokens=2, eos_ids=[61])": "eos_ids=61 is not in the",
    "kj.plan_cache(model.config, 'full', batch=1.5, context=64, dtype='float32')": "batch=1.5 must be",
    "kj.plan_cache(model.config, 'full', batch=1, context=64, dtype='float13')": "dtype='float13' must be",
    "kj.plan_cache(model.config, 'full', batch=1, context=64, dtype='int8')": "dtype='int8' must be float32",
    "kj.load('demo', dtype='float13')": "dtype='float13' must be float32, bfloat16 or float16",
    "kj.largest_batch(model.config, 'full', context=64, dtype='float32', memory_bytes='24GB')": (
        "memory_bytes='24GB' must be a number"
    ),
    "kj.largest_batch(model.config, 'full', context=64, dtype='float32', memory_bytes=float('nan'))": (
        "memory_bytes=nan must be a number of bytes"
    ),
    "kj.Sample(temperature='hot')": "temperature='hot' must be a number",
    "kj.Sample(top_k=1.5)": "top_k=1.5 must be a whole number",
    "kj.Sample(top_p=None)": "top_p=None must be a number",
    "kj.RopeConfig(theta='1e4')": "theta='1e4' must be a number",
    "config(vocab_size=61.5)": "vocab_size=61.5 must be a whole number",
    "kj.Chat(model, None, cache=full, context=8)": "there is no tokenizer",
    "kj.Chat(model, len, cache=full, context=1.5)": "context=1.5 must be a whole number",
    "model.decode([1], model.prefill([[1]], [1], cache=full, capacity=8)[1], active=[1])": (
        "active of int64 (1,) must be 1 truth values, one per row"
    ),
    "model.decode([1], model.prefill([[1]], [1], cache=full, capacity=8)[1], active=[True, True])": (
        "active of bool (2,) must be 1 truth values"
    ),
    "model.prefill([[1]], [1], cache=full, capacity=2.0)": "capacity=2.0 must be a whole number",
    "model.prefill([[1]], [1], cache=full, capacity=2, block_tokens=1.5)": "block_tokens=1.5 must be a whole",
}
SCRIPT = """
import json, sys
import jax.numpy as jnp
import numpy as np
import kivi_jax as kj
from kivi_jax.generation.prefix import prefill
from tests.models import config, random_llama
model, full = random_llama(config(num_layers=1)), kj.full()
other = random_llama(config(num_layers=1, num_kv_heads=1))
prefix = prefill(model, jnp.ones((1, 1), int), jnp.ones(1, int), cache=full, capacity=8)
said = {}
for mistake in json.load(sys.stdin):
    try:
        eval(mistake)
        said[mistake] = "nothing"
    except Exception as error:
        said[mistake] = f"{type(error).__name__}: {error}"
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(list(MISTAKES)),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(said, mistake):
    assert said[mistake].startswith("ValueError: ")
    assert MISTAKES[mistake] in said[mistake]
    assert "\n" not in said[mistake]
