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
# # SCOPE explained
#
# [SCOPE](https://arxiv.org/abs/2412.13649) selects tokens of the prompt and tokens of the output separately. The task here
# needs a long output of which each part needs its own part of the prompt: 30 numbered questions, all answered.
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
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

import kivi_jax as kj
from kivi_jax.console import format_bytes
from kivi_jax.demo import tasks
from kivi_jax.demo.evaluate import compare
from kivi_jax.eval.kept import draw_drift, draw_maps, drift, kept_weight, study, table

model, tokenizer = kj.load("demo", dtype="float32")
problem = tasks.questions(seed=0, count=30)
prompt = tokenizer(problem.prompt)["input_ids"]
answer = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
print(problem.prompt[:60], "...", problem.prompt[-40:])
print(problem.answer[:60], "...")
print(len(prompt), "tokens of prompt,", len(answer), "of output")

# %% [markdown]
# ## The strategies
#
# All keep the whole prompt and bound what is decoded.
#
# - **Slide**: a window of the output: its newest tokens (`recent`), and the heaviest of the others.
# - **Adaptive**: the window begins at `recent` and grows as the output does, up to `window`.
# - **Discontinuous**: as adaptive, but chooses only now and then, which costs less time.
#
# Beside them, **unified H2O**, which is what SCOPE improves on: prompt and output compete for one budget, here as many
# tokens as the others hold in all.
#
# The model reads the right answer token by token: once with full attention, which says where every token looks, and once
# through each cache, which says what it still holds.

# %%
window, recent = 64, 32
caches = {
    "slide": kj.scope(decode=kj.Slide(window=window, recent=recent)),
    "adaptive": kj.scope(decode=kj.Adaptive(window=window, recent=recent, max_new_tokens=len(answer))),
    "discontinuous": kj.scope(
        decode=kj.Discontinuous(window=window, recent=recent, max_new_tokens=len(answer))
    ),
    "unified H2O": kj.scope(decode=kj.H2O(budget=len(prompt) + window, recent=recent)),
}
weights, held = study(model, prompt, answer, caches)

# %% [markdown]
# ## Heavy hitters
#
# Sort the prompt's tokens by the attention that the whole output gives them. If a few carried it all, the curves would
# rise at once; the diagonal is attention that falls on all tokens alike.

# %%
onto_prompt = np.asarray(weights)[:, :, -len(answer) :, : len(prompt)].sum(2)  # layers, KV heads, tokens
share = np.cumsum(np.sort(onto_prompt, axis=-1)[..., ::-1], axis=-1)
share = (share / share[..., -1:]).mean(1)
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for layer, curve in enumerate(share):
    axis.plot(100 * np.arange(1, len(prompt) + 1) / len(prompt), 100 * curve, label=f"layer {layer}")
axis.plot([0, 100], [0, 100], color="grey", linestyle=":")
axis.set(xlabel="heaviest tokens of the prompt, %", ylabel="share of attention on the prompt, %")
axis.legend()
plt.show()
tenth = len(prompt) // 10
print(f"the heaviest {tenth} tokens carry", ", ".join(f"{100 * curve[tenth - 1]:.0f} %" for curve in share))

# %% [markdown]
# ## Drift
#
# Heavy hitters change. Of the prompt's tokens that were heaviest when decoding began, how many are among the heaviest
# later? Each question needs tokens of its own, so the two sets drift apart. What is selected from the prompt once must be
# selected generously, and what is selected while decoding must be chosen anew: that is why SCOPE treats the two apart.

# %%
draw_drift({count: drift(weights, len(prompt), count) for count in (16, 32, 64)})

# %% [markdown]
# ## What is kept
#
# Attention while decoding, one row for each strategy; what the cache no longer holds is grey. Left of the white line is
# the prompt: only unified H2O loses parts of it.

# %%
draw_maps(weights, held, [(0, 0), (1, 0), (3, 0)])

# %%
console = Console(width=110)
console.print(table({name: kept_weight(weights, seen) for name, seen in held.items()}))

# %% [markdown]
# ## Answers
#
# Whether the model still answers right when it reads its own output through each cache. A bounded cache may score above the
# full one: lines that are answered are no help any more, and can be mistaken for those that are due. The last row adds
# KIVI's 2 bits for the prompt, which cost this small model much (its card says how much). The bytes are those of one
# prompt and its answer.

# %%
problems = [tasks.questions(seed=seed, count=30) for seed in range(8)]
asked = {"full": kj.full(), **caches}
asked["kivi2 + slide"] = kj.kivi(bits=2, residual_length=32, decode=kj.Slide(window=window, recent=recent))
for outcome in compare(model, tokenizer, problems, asked):
    print(f"{outcome.cache:14} {100 * outcome.right:5.1f} % right   {format_bytes(outcome.row_bytes)}")

# %% [markdown]
# `kivi-jax eval longgen` asks more of these, and `kivi-jax eval kept` draws the pictures for other caches. A small model on
# a small task shows how the strategies differ, not what they cost a large one; the papers' evaluations run through
# [convert and evaluate](05_convert_and_evaluate.ipynb).
