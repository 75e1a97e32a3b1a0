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
# # Convert and evaluate
#
# From a Hugging Face directory to an orbax checkpoint, and from there to numbers: the lm-evaluation-harness on a task of
# your own, and LongGenBench. Everything is made here, from the small model in the package; nothing is downloaded.
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
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", package, jax_for_device, "lm-eval", "datasets"],
        check=True,
    )

# %%
import json
import shutil
import tempfile
from pathlib import Path

import kivi_jax as kj
from kivi_jax.commands.app import app
from kivi_jax.demo import MODEL, tasks

os.environ |= {"COLUMNS": "110", "FORCE_COLOR": "", "LMEVAL_LOG_LEVEL": "ERROR"}
work = Path(tempfile.mkdtemp(prefix="kivi-jax-"))


def run(*words):
    """`!kivi-jax WORDS`, but in this process, which has imported and compiled much of it already."""
    app([str(word) for word in words], standalone_mode=False)


# %% [markdown]
# ## A Hugging Face directory
#
# `config.json`, the weights in safetensors, the tokenizer. Yours may be of any family, a directory or a name on the
# hub; here it is made of the small model's files.

# %%
checkpoint = work / "hugging-face"
shutil.copytree(MODEL, checkpoint, ignore=shutil.ignore_patterns("*.md", "*.png"))
for file in sorted(checkpoint.iterdir()):
    print(f"{file.stat().st_size:10,} {file.name}")
print((checkpoint / "config.json").read_text())

# %% [markdown]
# ## Convert
#
# `kivi-jax convert` (or `python -m convert`) writes an [orbax](https://orbax.readthedocs.io) checkpoint with the config and
# the tokenizer beside it. Every tensor must be used exactly once, and every field of the config must be understood: what
# would change the model is refused, not ignored. `--verify` compares logits with the source, run by transformers where
# torch is installed. The directory is complete or absent, whenever the command is cut.

# %%
converted = work / "converted"
run("convert", checkpoint, converted, "--dtype", "float32", "--verify")
for file in sorted(converted.iterdir()):
    print(file.name)

# %% [markdown]
# A converted directory is used as the original one is, and gives the same text.

# %%
problem = tasks.questions(seed=1, count=10)
texts = []
for path in (checkpoint, converted):
    model, tokenizer = kj.load(path, dtype="float32")
    texts += kj.complete(model, tokenizer, [problem.prompt], cache=kj.kivi(bits=4), max_new_tokens=60)
assert texts[0] == texts[1]
print(texts[1])

# %% [markdown]
# ## The lm-evaluation-harness
#
# `kivi_jax.eval.lm_eval` registers the model `kivi-jax` with EleutherAI's harness; `cache=` names the cache. Its tasks need
# downloads, so here is one of our own: a folder with a YAML file, which says how to ask and how to score, and the data. With
# `--tasks gsm8k` in its place, the command is the same.

# %%
folder = work / "tasks"
folder.mkdir()
problems = [tasks.passkey(seed=seed, tokens=512) for seed in range(8)]
rows = [{"prompt": problem.prompt, "key": problem.answer.strip(" .")} for problem in problems]
(folder / "passkeys.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(folder / "passkeys.yaml").write_text(f"""
task: passkeys
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "passkeys.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: key
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
filter_list:
  - name: digits
    filter: [{{function: regex, regex_pattern: '(\\d+)'}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
""")
command = [
    *(sys.executable, "-m", "kivi_jax.eval.lm_eval", "run", "--model", "kivi-jax"),
    *("--model_args", f"pretrained={converted},cache=kivi4:residual_length=32"),
    *("--include_path", str(folder), "--tasks", "passkeys", "--batch_size", "8"),
]
done = subprocess.run(command, capture_output=True, text=True)
print((done.stdout + done.stderr).strip())
done.check_returncode()

# %% [markdown]
# The same from Python, for several caches.

# %%
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from kivi_jax.eval.lm_eval import KiviJax

manager = TaskManager(include_path=str(folder), include_defaults=False)
for cache in ("full", "kivi2:residual_length=32"):
    lm = KiviJax(str(converted), cache=cache, batch_size=8)
    found = simple_evaluate(lm, tasks=["passkeys"], task_manager=manager, bootstrap_iters=0)
    print(f"{cache:26} {found['results']['passkeys']['exact_match,digits']:.3f} of the keys")

# %% [markdown]
# ## LongGenBench
#
# SCOPE's evaluation: many questions in one prompt, all answered in one long output. `kivi-jax eval longgenbench` builds the
# prompts from a file of questions and a file of worked examples (or reads prompts that were built before), writes every
# prediction to a file, continues there after a cut, and reports with intervals.
#
# The small model has never seen this wording and will answer next to nothing right: here the command is what matters. For
# numbers that mean something, give `--model` a model that follows instructions, and the questions of GSM8K.

# %%
asked = [tasks.questions(seed=seed, count=1).answer.strip() for seed in range(14)]  # "A1: 7-2=5"
rows = []
for line in asked:
    question, _, result = line.partition(": ")[2].rpartition("=")
    rows.append({"question": f"{question}?", "answer": f"{question}={result}\n#### {result}"})
for name, part in {"examples": rows[:2], "questions": rows[2:]}.items():
    (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
run(
    *("eval", "longgenbench", "--model", converted),
    *("--data", work / "questions.jsonl", "--build", work / "examples.jsonl"),
    *("--questions", 6, "--examples", 2, "--max-new-tokens", 96),
    *("--cache", "full", "--cache", "kivi2", "--out", work / "results"),
)

# %% [markdown]
# The same kind of task in the words that the small model knows, through the caches of both papers.

# %%
run(
    *("eval", "longgen", "--model", converted, "--problems", 4),
    *("--cache", "kivi2:residual_length=32", "--cache", "scope:window=32:recent=16"),
)

# %% [markdown]
# `kivi-jax eval --help` lists the others: perplexity, LongBench, needles, RULER, GSM8K. What was measured with them is in
# `docs/results-evals.md`.

# %%
shutil.rmtree(work)
