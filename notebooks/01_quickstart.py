# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# A key/value cache in 2 or 4 bits (KIVI), bounded while decoding (SCOPE), or both, for Llama and Mistral in JAX. First
# with the small trained model that comes with the package, then with a Hugging Face model of your own. Runs on a CPU,
# a T4, an A100 or a TPU.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("kivi_jax") is None:  # on Colab: the notebook's repository is not installed yet
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", ".."], check=True)

# %%
import jax

import kivi_jax as kj
from kivi_jax.demo import tasks

print(jax.devices())
model, tokenizer = kj.load("demo")
problem = tasks.passkey(seed=0, tokens=512)
print(problem.prompt[:200], "...", problem.prompt[-60:])

# %% [markdown]
# ## Complete
#
# A cache is a strategy that is passed in. All rows of a batch may have different lengths: each gives what it gives alone.

# %%
caches = {
    "full": kj.full(),
    "kivi4": kj.kivi(bits=4, residual_length=32),
    "kivi2": kj.kivi(bits=2, residual_length=32),
    "scope": kj.scope(decode=kj.Slide(window=32, recent=16)),
}
prompts = [problem.prompt, tasks.passkey(seed=1, tokens=256).prompt]
for name, cache in caches.items():
    print(f"{name:6}", kj.complete(model, tokenizer, prompts, cache=cache, max_new_tokens=5))
print("right ", [problem.answer, tasks.passkey(seed=1, tokens=256).answer])

# %% [markdown]
# ## What a cache weighs
#
# `plan_cache` computes it from the shapes of the arrays, before any is made. Here for Llama-3.1-8B's shape.

# %%
from kivi_jax.bench.shapes import SHAPES
from kivi_jax.names import parse_cache
from kivi_jax.plan import plan_cache

for name in ("full", "kivi4", "kivi2", "kivi2+scope:window=512:recent=256"):
    plan = plan_cache(
        SHAPES["llama-8b"], parse_cache(name), batch=1, context=32768, prompt_tokens=28672, dtype="bfloat16"
    )
    print(f"{name:36} {plan['total'] / 2**20:8.0f} MiB")

# %% [markdown]
# ## Read once, ask many times
#
# A prompt's cache can be kept and continued; it can also be saved with `kj.save_prefix` and loaded in another process.

# %%
document, question = problem.prompt.split("\nWhat")
prefix = kj.read_prefix(model, tokenizer, [document], cache=caches["kivi4"])
for asked in ["\nWhat" + question, "\nWhat" + question]:  # the document is not read again
    print(kj.complete(model, tokenizer, [asked], prefix=prefix, max_new_tokens=5))

# %% [markdown]
# ## Your own model
#
# Any Llama or Mistral checkpoint: a directory, or a name on the Hugging Face hub (downloaded on first use; Llama-3.1-8B in
# bfloat16 needs 16 GB for its weights, so an A100, or a T4 with a smaller one). Set `MODEL` to try it.

# %%
MODEL = ""  # "meta-llama/Llama-3.1-8B-Instruct" or "mistralai/Mistral-7B-Instruct-v0.3"
if MODEL:
    own, own_tokenizer = kj.load(MODEL, dtype="bfloat16")
    for piece in kj.stream(own, own_tokenizer, "A KV cache is", cache=kj.kivi(bits=2), max_new_tokens=64):
        print(piece, end="", flush=True)
