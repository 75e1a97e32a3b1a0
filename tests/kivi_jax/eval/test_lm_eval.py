"""The lm-evaluation-harness on our models: its numbers are transformers', its texts are `complete`'s."""

import subprocess
import sys

import numpy as np
import pytest

import kivi_jax as kj
from tests.convert.checkpoints import LLAMA, write_checkpoint

pytest.importorskip("lm_eval", reason="the harness is not installed (extra eval)")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from kivi_jax.eval.lm_eval import KiviJax

KIVI = "kivi2:group_size=8:residual_length=8"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = LLAMA | dict(num_hidden_layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("lm_eval") / "model", config, tokens=61)


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i, metadata=("t", i, 1))
        for i, pair in enumerate(arguments)
    ]


TEXTS = [("w3 w1 w4 w1", " w5 w9"), ("w2 w7", " w1"), ("w8 " * 30 + "w3", " w1 w4"), ("", "w6 w5")]


def test_log_likelihoods_under_a_full_cache_are_transformers(checkpoint):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    ours = KiviJax(str(checkpoint), batch_size=3)
    answers = ours.loglikelihood(requests("loglikelihood", *TEXTS), disable_tqdm=True)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    for (context, continuation), (log_prob, greedy) in zip(TEXTS, answers, strict=True):
        start = ours.tok_encode(context) or [2]  # there is no begin token: the text's end stands for it
        ids = start + ours.tok_encode(continuation)
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()
        rows, tokens = np.arange(len(start), len(ids)) - 1, ids[len(start) :]
        assert log_prob == pytest.approx(log_probs[rows, tokens].sum(), abs=1e-3)
        assert greedy == (log_probs[rows].argmax(-1) == tokens).all()


def test_bits_change_log_likelihoods_and_rolling_ones_are_sums_over_windows(checkpoint):
    full, packed = (
        KiviJax(str(checkpoint), cache=cache, batch_size=2, max_length=40) for cache in ("full", KIVI)
    )
    text = " ".join(f"w{i * i % 61}" for i in range(70))
    rolling = [
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)[0] for lm in (full, packed)
    ]
    assert rolling[0] != rolling[1]
    assert rolling[0] == pytest.approx(rolling[1], rel=0.05)
    ids = full.tok_encode(text)
    windows = [(None, [2], ids[:40]), (None, ids[29:40], ids[40:])]  # the last one has a full context
    assert rolling[0] == pytest.approx(
        sum(answer for answer, _ in full._loglikelihood_tokens(windows)), rel=1e-5
    )


@pytest.mark.parametrize("cache", ["full", KIVI])
def test_generation_equals_complete_and_stops_where_told(checkpoint, cache):
    lm = KiviJax(str(checkpoint), cache=cache, batch_size=2)
    model, tokenizer = kj.load(checkpoint)
    texts = ["w3 w1 w4", "w2 " * 40, "w9"]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    answers = lm.generate_until(requests("generate_until", *((text, options) for text in texts)), True)
    expected = kj.complete(
        model, tokenizer, texts, cache=kj.full() if cache == "full" else kj.kivi(2, 8, 8), max_new_tokens=12
    )
    assert answers == expected
    stop = answers[0].split()[4]
    stopped = lm.generate_until(requests("generate_until", (texts[0], options | {"until": [stop]})), True)
    assert stopped == [answers[0].split(stop)[0]]


TASK = """
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.parametrize("cache", ["full", KIVI])
def test_the_harness_runs_a_local_task_over_gsm8k_offline(shared, tmp_path, cache, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    task = TASK.replace("DATA", str(shared / "data/gsm8k/test.jsonl")).replace(
        "CACHE", str(tmp_path / "cache")
    )
    (tmp_path / "task.yaml").write_text(task)
    directory = shared / "models" / "stories260K"
    results = simple_evaluate(
        model="kivi-jax",
        model_args=f"pretrained={directory},cache={cache},max_length=1024",
        tasks=["questions"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        limit=1,
        batch_size=1,
    )
    assert results["results"]["questions"]["exact_match,none"] == 0
    model, tokenizer = kj.load(directory)
    strategy = kj.full() if cache == "full" else kj.kivi(2, 8, 8)
    for row in results["samples"]["questions"]:
        text = row["arguments"][0][0]
        (expected,) = kj.complete(model, tokenizer, [text], cache=strategy, max_new_tokens=8)
        assert row["resps"] == [[expected.split("Question:")[0]]]


def test_what_cannot_be_used_is_refused(checkpoint):
    with pytest.raises(ValueError, match="batch_size='auto'"):
        KiviJax(str(checkpoint), batch_size="auto")
    lm = KiviJax(str(checkpoint), max_length=8)
    options = {"until": [], "max_gen_toks": 8}
    with pytest.raises(ValueError, match="leaves no room"):
        lm.generate_until(requests("generate_until", ("w1", options)), True)


def test_the_package_does_not_need_the_harness():
    code = "import sys; sys.modules['lm_eval'] = None; import kivi_jax, kivi_jax.cli, kivi_jax.eval.command"
    subprocess.run([sys.executable, "-c", code], check=True)
