"""The lm-evaluation-harness asks the server, and finds what the adapter in its own process finds."""

import json

import pytest

from kivi_jax.generation.engine import Engine
from kivi_jax.serve.app import create_app
from kivi_jax.serve.service import Service
from tests.convert.checkpoints import LLAMA, write_checkpoint

pytest.importorskip("lm_eval", reason="the harness is not installed (extra eval)")
pytest.importorskip("tenacity", reason="the harness's clients are not installed (lm-eval[api])")

TASK = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
doc_to_text: "{{text}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
UNTIL = """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w7", "w21"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.slow
def test_local_completions_find_what_the_adapter_finds(tmp_path, serving, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from kivi_jax.eval import lm_eval as adapter
    from kivi_jax.generation.loading import load

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    checkpoint = write_checkpoint(tmp_path / "model", LLAMA | dict(num_hidden_layers=1), tokens=61)
    rows = [
        {"text": f"w{3 + i} w1 w{4 + i}", "choices": ["w5 w9", "w8", f"w{i}"], "answer": i % 3}
        for i in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in [("choice", CHOICE), ("until", UNTIL)]:
        text = (TASK + kind).replace("NAME", name).replace("DATA", str(data))
        (tmp_path / f"{name}.yaml").write_text(text.replace("CACHE", str(tmp_path / "cache")))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def evaluate(model, arguments):
        found = simple_evaluate(
            model=model, model_args=arguments, tasks=["choice", "until"], task_manager=tasks, batch_size=2
        )
        samples = {
            name: [sample["filtered_resps"] for sample in found["samples"][name]]
            for name in ("choice", "until")
        }
        return found["results"], samples

    assert adapter.KiviJax is not None  # imported: that registers the name
    scores, samples = evaluate("kivi-jax", f"pretrained={checkpoint},cache=full")
    model, tokenizer = load(checkpoint)
    with Engine(model, tokenizer, cache="full", slots=4, context=64, chunk_tokens=32) as engine:
        service = Service(engine, name="tiny", fingerprint="fp_0", timeout=60.0)
        _, address = serving(create_app(service))
        found, asked = evaluate(
            "local-completions",
            f"model=tiny,base_url={address}/v1/completions,tokenizer={checkpoint},tokenizer_backend=huggingface",
        )
    assert found["choice"]["acc,none"] == scores["choice"]["acc,none"]
    assert found["until"]["exact_match,none"] == scores["until"]["exact_match,none"]
    assert asked["until"] == samples["until"]
    for one, other in zip(asked["choice"], samples["choice"], strict=True):
        for (log_prob, greedy), (expected, likeliest) in zip(one, other, strict=True):
            assert log_prob == pytest.approx(expected, abs=1e-4)
            assert greedy == likeliest
