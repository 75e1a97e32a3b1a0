"""The stages of a GPU run, rehearsed on the CPU."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from kivi_jax.bench import gpu
from kivi_jax.commands.app import app

SMALL = dataclasses.replace(
    gpu.REHEARSAL,
    correctness=gpu.REHEARSAL.correctness[:1],
    model=dataclasses.replace(gpu.REHEARSAL.model, num_layers=1),
    caches=("full", "kivi2"),
    new_tokens=2,
)


def staged(name, tmp_path, sizes=SMALL):
    path = tmp_path / f"{name}.json"
    gpu.write_stage(name, path, sizes)
    return gpu.read(path)


@pytest.mark.slow
def test_whole_steps_meet_their_predictions(tmp_path):
    predicted, measured = staged("predictions", tmp_path), staged("steps-most", tmp_path)
    found = gpu.predictions.compare(predicted, measured)
    assert {record["contender"] for record in found} == {"full", "kivi2"}
    assert all(record["ratio"] > 1 for record in found)  # no CPU is faster than an H100's memory
    full, kivi2 = measured
    assert kivi2["batch"] > full["batch"] > 0
    assert full["us"] == pytest.approx(full["ms"] * 1e3 / full["batch"])
    assert full["tokens_per_s"] == pytest.approx(full["batch"] / full["ms"] * 1e3)


def test_kernels_are_timed(tmp_path):
    measured = {record["contender"]: record for record in staged("speed", tmp_path)}
    assert measured["packed, xla"]["us"] > 0
    assert measured["packed, xla"]["bytes"] < measured["bfloat16, XLA"]["bytes"] / 5


def test_prompts_are_timed_beside_transformers(tmp_path, torch):
    records = [record for name in gpu.PROMPTS for record in staged(name, tmp_path)]
    assert [record["contender"] for record in records] == ["kivi2", "full", "transformers"]
    assert all(record["first_s"] > record["s"] > 0 for record in records[:2])
    ratios = list(gpu.prompts.table(records).columns[5].cells)
    assert ratios[2] == "1.00x"


@pytest.mark.slow
def test_every_backend_is_checked(tmp_path):
    errors = {(r["case"], r["implementation"]): r["error"] for r in staged("correctness", tmp_path)}
    assert errors["one_page", "pallas_triton"] < 1e-3
    assert errors["one_page", "xla"] < 1e-5
    assert "refused" in errors["one_page", "triton"]


def test_a_stage_is_a_process_whose_file_says_how_it_ended(tmp_path):
    ((name, found),) = gpu.run(tmp_path, ["environment"], rehearse=True)
    assert (name, found["stage"], found["complete"]) == ("environment", "environment", True)
    assert found == json.loads((tmp_path / "environment.json").read_text())
    (record,) = found["records"]
    assert record["copy_gigabytes_per_s"] > 0


def test_a_stage_that_takes_too_long_is_cut(tmp_path):
    ((_, found),) = gpu.run(tmp_path, ["steps-long"], rehearse=True, seconds=0.1)
    assert not found["complete"]
    assert found["error"].startswith("cut after")


def test_needs_a_gpu_or_a_rehearsal(tmp_path):
    result = CliRunner().invoke(app, ["bench", "gpu", "--out", str(tmp_path), "--stage", "speed"])
    assert isinstance(result.exception, ValueError)
    assert "--rehearse" in str(result.exception)
    result = CliRunner().invoke(app, ["bench", "gpu", "--out", str(tmp_path), "--stage", "everything"])
    assert "choose some of" in str(result.exception)


@pytest.mark.slow
def test_packing_is_timed_and_compared(tmp_path):
    records = staged("packing", tmp_path)
    assert [record["contender"] for record in records] == 3 * ["pallas_triton", "xla"]
    for record in records:
        assert "reason" not in record
        assert record["us"] > 0
        assert record["codes_equal"] == record["scales_equal"] == record["zeros_equal"] == 1
    assert records[0]["bytes"] == 8 * 256 * 128 * 19 // 8  # 16 bits read; 2, and 32 for each group, written
    assert gpu.packing.table(records).row_count == 6
