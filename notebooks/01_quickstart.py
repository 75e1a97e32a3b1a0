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
# A key/value cache in 2 or 4 bits (KIVI), bounded while decoding (SCOPE), or both, for Llama-like models in JAX. First
# with the small trained model that comes with the package, then with a Hugging Face model of your own. Runs on a CPU,
# a T4, an A100 or a TPU: what fits is computed below.
#
# On Colab: choose *File > Upload notebook*, and take this file. The first cell asks for the package: a
# wheel, which `pip wheel --no-deps .` makes in the repository; or set `SOURCE`. Elsewhere, install the package before
# (`pip install '.[notebooks]'`); the cell then does nothing.

# %%
import os
import re
import subprocess
import sys

SOURCE = ""  # for Colab: what pip installs, such as a git+https address; empty: a wheel that you upload

if "google.colab" in sys.modules:
    from google.colab import files

    smi = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True).stdout
    cuda = re.search(r"CUDA Version: (\d+)", smi)
    jax_for_device = f"jax[cuda{cuda[1]}]" if cuda else "jax[tpu]" if "COLAB_TPU_1VM" in os.environ else "jax"
    package = SOURCE or next(iter(files.upload()))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, jax_for_device], check=True)

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
# ## Conversations, and where an answer ends
#
# Messages are written by the tokenizer's chat template, as an instruct model was trained to read them. The demo's model
# has none, so it gets one here, which makes every message its task of copying. `stop` strings end an answer and are left
# out of it; `completions` says besides how each ended.

# %%
import copy

copying = copy.deepcopy(tokenizer)
copying.chat_template = (
    "{{ bos_token }}{% for said in messages %}Copy: {{ said.content }}.\nCopied:{% endfor %}"
)
conversation = [{"role": "user", "content": "moon owl lemon"}]
for stop in ([], [" lemon"]):
    (answer,) = kj.completions(
        model, copying, conversation, stop=stop, cache=caches["kivi2"], max_new_tokens=8
    )
    print(f"{answer.text!r} ended by {answer.finish_reason} after {len(answer.tokens)} tokens")

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
# ## What fits on this device
#
# `plan_cache` computes a cache's bytes from the shapes of its arrays, before any is made; `largest_batch` adds the
# weights. Parameters are float32 on a CPU, whose bfloat16 products are slow, float16 on GPUs older than Ampere (a T4),
# which have no bfloat16, and bfloat16 elsewhere.

# %%
from rich.console import Console
from rich.table import Table

from kivi_jax.cache.names import parse_cache
from kivi_jax.console import format_bytes
from kivi_jax.plan.memory import largest_batch, parameter_count, plan_cache
from kivi_jax.plan.shapes import SHAPES

device = jax.devices()[0]
limit = (device.memory_stats() or {}).get("bytes_limit")  # a CPU does not say
memory = limit or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
if device.platform == "cpu":
    dtype = "float32"
elif device.platform == "gpu" and float(device.compute_capability) < 8:
    dtype = "float16"
else:
    dtype = "bfloat16"
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": SHAPES["llama-8b"],
    "mistralai/Mistral-7B-Instruct-v0.3": SHAPES["mistral-7b"],
    "meta-llama/Llama-3.2-1B-Instruct": SHAPES["llama-1b"],
}
names = ("full", "kivi4", "kivi2", "kivi2+scope")
context, prompt_tokens = 8192, 6144

table = Table(title=f"rows of {context:,} tokens, {prompt_tokens:,} of them the prompt's; {dtype}")
for column in ("model", "weights", *names):
    table.add_column(column, justify="left" if column == "model" else "right")
fitting = []
for name, shape in MODELS.items():
    rows = {
        cache: largest_batch(
            shape,
            parse_cache(cache),
            context=context,
            dtype=dtype,
            memory_bytes=memory,
            prompt_tokens=prompt_tokens,
        )
        for cache in names
    }
    weights = parameter_count(shape) * jax.numpy.dtype(dtype).itemsize
    table.add_row(name, format_bytes(weights), *(f"{count:,}" for count in rows.values()))
    fitting += [name] if rows["kivi2"] else []
console = Console(width=110)
console.print(table)
print(
    f"{device.device_kind}: {format_bytes(memory)}. Fits, the largest first:", *fitting or ["none of these"]
)

# %% [markdown]
# ## Your own model
#
# Set `MODEL` to a directory with a checkpoint or a GGUF file, or to a name on the Hugging Face hub, such as one above;
# it is downloaded on first use (Llama's need an access token: `huggingface_hub.login()`). While it is empty the small
# model stands in, so that what follows runs everywhere.
#
# First the plan for its own shape, then a conversation. The cache is kept between turns: a new message is appended to
# what has been read, and nothing is read twice.

# %%
MODEL = ""  # for example fitting[0]

own, own_tokenizer = kj.load(MODEL, dtype=dtype) if MODEL else (model, tokenizer)
context = min(8192, own.config.max_position_embeddings)
strategy = kj.kivi(bits=2, residual_length=128 if MODEL else 32)
for name, cache in {"full": kj.full(), "kivi2": strategy}.items():
    total = plan_cache(own.config, cache, batch=1, context=context, dtype=dtype)["total"]
    rows = largest_batch(own.config, cache, context=context, dtype=dtype, memory_bytes=memory)
    print(f"{name:6} {format_bytes(total)} a row of {context:,} tokens; largest batch here: {rows:,}")

# %%
from kivi_jax.generation.chat import Chat
from kivi_jax.generation.stops import decode_stream

if MODEL:
    messages = ["Name three uses of a key/value cache.", "Which of them needs the most memory, and why?"]
else:
    messages = [problem.prompt, "What is the pass key? The pass key is"]
talk = Chat(own, own_tokenizer, cache=strategy, context=context)
for message in messages:
    print(f"> {message[:60]} ... {message[-60:]}" if len(message) > 130 else f"> {message}")
    for piece in decode_stream(own_tokenizer, talk.reply(message, max_new_tokens=128)):
        print(piece, end="", flush=True)
    held = kj.cache_bytes(talk.prefix.cache)["total"]
    print(f"\n[{len(talk.tokens)} tokens; the cache weighs {format_bytes(held)}]\n")
assert held == plan_cache(own.config, strategy, batch=1, context=context, dtype=dtype)["total"]  # as planned

# %% [markdown]
# In a terminal, `kivi-jax chat` is the same conversation and `kivi-jax inspect` the same plan. Next:
# [KIVI explained](02_kivi_explained.ipynb), [SCOPE explained](03_scope_explained.ipynb),
# [performance](04_performance.ipynb), [convert and evaluate](05_convert_and_evaluate.ipynb).
