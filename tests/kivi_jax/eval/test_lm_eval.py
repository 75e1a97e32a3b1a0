"""The lm-evaluation-harness on our models: its numbers are transformers', its texts are `complete`'s."""

import importlib
import json
import pkgutil
import subprocess
import sys

import numpy as np
import pytest

import kivi_jax as kj
from kivi_jax.cache.names import parse_cache
from tests.convert.checkpoints import LLAMA, write_checkpoint

KIVI = "kivi2:group_size=8:residual_length=8"


@pytest.fixture(scope="module")
def adapter():
    """`kivi_jax.eval.lm_eval`: the harness takes seven seconds to import, of workers that need it."""
    pytest.importorskip("lm_eval", reason="the harness is not installed (extra eval)")
    return importlib.import_module("kivi_jax.eval.lm_eval")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = LLAMA | dict(num_hidden_layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("lm_eval") / "model", config, tokens=61)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i, metadata=("t", i, 1))
        for i, pair in enumerate(arguments)
    ]


def transformers_log_probs(model, context, continuation):
    """Log-probabilities of a continuation's tokens, and whether each was the likeliest."""
    import torch

    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([context + continuation])).logits[0], -1).numpy()
    rows = np.arange(len(continuation)) + len(context) - 1
    return log_probs[rows, continuation], log_probs[rows].argmax(-1) == continuation


TEXTS = [("w3 w1 w4 w1", " w5 w9"), ("w2 w7", " w1"), ("w8 " * 30 + "w3", " w1 w4"), ("", "w6 w5")]


@pytest.mark.usefixtures("torch")
def test_log_likelihoods_under_a_full_cache_are_transformers(adapter, checkpoint):
    from transformers import LlamaForCausalLM

    ours = adapter.KiviJax(str(checkpoint), batch_size=3)
    answers = ours.loglikelihood(requests("loglikelihood", *TEXTS), disable_tqdm=True)
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    for (context, continuation), (log_prob, greedy) in zip(TEXTS, answers, strict=True):
        start = ours.tok_encode(context) or [2]  # there is no begin token: the text's end stands for it
        log_probs, likeliest = transformers_log_probs(model, start, ours.tok_encode(continuation))
        assert log_prob == pytest.approx(log_probs.sum(), abs=1e-3)
        assert greedy == likeliest.all()


@pytest.mark.usefixtures("torch")
def test_a_trained_models_log_likelihoods_are_transformers(adapter, shared):
    """Texts of GSM8K, with a tokenizer that puts a token before each; and rolling over several windows."""
    from transformers import LlamaForCausalLM

    directory = shared / "models" / "stories260K"
    ours = adapter.KiviJax(str(directory), batch_size=2, max_length=100)
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    rows = [
        json.loads(line) for line in (shared / "data/gsm8k/test.jsonl").read_text("utf-8").split("\n")[:2]
    ]
    pairs = [(row["question"][-60:], " " + row["answer"][:40]) for row in rows]
    answers = ours.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (log_prob, _) in zip(pairs, answers, strict=True):
        whole, start = ours.tok_encode(context + continuation), ours.tok_encode(context)
        assert start[0] == whole[0] == 1
        log_probs, _ = transformers_log_probs(model, start, whole[len(start) :])
        assert log_prob == pytest.approx(log_probs.sum(), abs=1e-3)
    (rolled,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", (rows[0]["question"],)), True)
    ids = ours.tok_encode(rows[0]["question"])
    windows = [([1], ids[:100]), (ids[len(ids) - 101 : 100], ids[100:])]  # the last has a full context
    expected = sum(transformers_log_probs(model, *window)[0].sum() for window in windows)
    assert len(ids) < 200
    assert rolled == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_bits_change_log_likelihoods_and_rolling_ones_are_sums_over_windows(adapter, checkpoint):
    full, packed = (
        adapter.KiviJax(str(checkpoint), cache=cache, batch_size=2, max_length=40) for cache in ("full", KIVI)
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


@pytest.mark.parametrize("cache", ["full", pytest.param(KIVI, marks=pytest.mark.slow)])
def test_generation_equals_complete_and_stops_where_told(adapter, checkpoint, cache):
    lm = adapter.KiviJax(str(checkpoint), cache=cache, batch_size=2)
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


CACHES = [
    "kivi4:group_size=8:residual_length=16:scale_dtype=bfloat16",
    "scope:window=8:recent=4",
    "scope:prompt=snapkv:prompt_budget=8:prompt_window=2:prompt_pooling=max:decode=keepall",
    "scope:prompt=h2o:prompt_budget=8:prompt_recent=2:decode=h2o:budget=10:recent=4",
    "scope:prompt=streamingllm:prompt_sinks=2:prompt_recent=4:decode=streamingllm:sinks=2:recent=6",
    "kivi2+scope:group_size=8:residual_length=8:prompt=pyramidkv:prompt_budget=8:prompt_window=2:window=8:recent=4",
    "kivi2+scope:group_size=8:residual_length=8:prompt=pyramidinfer:prompt_budget=8:prompt_window=2:decode="
    "adaptive:window=8:recent=4:max_new_tokens=20:pool_bits=4:pool_group_size=8",
    "scope:decode=discontinuous:window=8:recent=4:max_new_tokens=20:pool_bits=2:pool_group_size=8",
]


READERS = {  # of the harness
    "python": "lm_eval.utils.simple_parse_args_string",
    "command": "lm_eval._cli.utils.key_val_to_dict",
}


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("cache", CACHES)
def test_model_args_carry_the_name_of_every_cache(reader, cache):
    """Through both of the harness's readers, to the strategy that the name means."""
    read = pkgutil.resolve_name(READERS[reader])
    assert read(f"pretrained=x,cache={cache},max_length=64") == {
        "pretrained": "x",
        "cache": cache,
        "max_length": 64,
    }
    assert parse_cache(cache) != kj.full()


@pytest.mark.slow
@pytest.mark.parametrize("cache", [CACHES[3], CACHES[5], CACHES[7]])
def test_selecting_caches_generate_as_complete_does_and_score_what_they_hold(adapter, checkpoint, cache):
    lm = adapter.KiviJax(str(checkpoint), cache=cache, batch_size=2)
    text = "w3 w1 w4 " * 8
    (answer,) = lm.generate_until(
        requests("generate_until", (text, {"until": [], "max_gen_toks": 20, "do_sample": False})), True
    )
    model, tokenizer = kj.load(checkpoint)
    assert [answer] == kj.complete(model, tokenizer, [text], cache=parse_cache(cache), max_new_tokens=20)
    pair = (text, " ".join(f" w{i * i % 61}" for i in range(20)))
    ((log_prob, _),) = lm.loglikelihood(requests("loglikelihood", pair), True)
    ((full, _),) = adapter.KiviJax(str(checkpoint), batch_size=2).loglikelihood(
        requests("loglikelihood", pair), True
    )
    assert log_prob != full
    assert log_prob == pytest.approx(full, rel=0.05)


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


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["full", KIVI])
def test_the_harness_runs_a_local_task_over_gsm8k_offline(adapter, shared, tmp_path, cache, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

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


def test_what_cannot_be_used_is_refused(adapter, checkpoint):
    with pytest.raises(ValueError, match="batch_size='auto'"):
        adapter.KiviJax(str(checkpoint), batch_size="auto")
    with pytest.raises(ValueError, match="model_args of kivi-jax has no cahce: take pretrained, cache"):
        adapter.KiviJax(str(checkpoint), cahce="kivi2")
    with pytest.raises(ValueError, match="value_group_size=32 must divide"):
        adapter.KiviJax(str(checkpoint), cache="kivi2:group_size=32")
    lm = adapter.KiviJax(str(checkpoint), max_length=8)
    options = {"until": [], "max_gen_toks": 8}
    with pytest.raises(ValueError, match="leaves no room"):
        lm.generate_until(requests("generate_until", ("w1", options)), True)


def test_a_greedy_task_may_ask_for_a_repetition_penalty(adapter, checkpoint):
    lm = adapter.KiviJax(str(checkpoint))
    options = {"until": [], "max_gen_toks": 8, "do_sample": False, "repetition_penalty": 1.5}
    (answer,) = lm.generate_until(requests("generate_until", ("w3 w1", options)), True)
    model, tokenizer = kj.load(checkpoint)
    sampler = kj.Greedy(repetition_penalty=1.5)
    assert [answer] == kj.complete(
        model, tokenizer, ["w3 w1"], cache=kj.full(), max_new_tokens=8, sampler=sampler
    )


@pytest.mark.slow
def test_a_mistake_on_the_command_line_ends_in_one_line(adapter, checkpoint, tmp_path, monkeypatch, capfd):
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", "none.jsonl").replace("CACHE", str(tmp_path)))
    model_args = f"pretrained={checkpoint},cache=kivi3"
    arguments = ["run", "--model", "kivi-jax", "--tasks", "questions", "--include_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--model_args", model_args])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        adapter.main()
    error = capfd.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: unknown cache 'kivi3'")


def test_the_package_does_not_need_the_harness():
    code = "import sys; sys.modules['lm_eval'] = None; import kivi_jax.commands.app, kivi_jax.eval.command"
    subprocess.run([sys.executable, "-c", code], check=True)
