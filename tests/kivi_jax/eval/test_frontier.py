"""`kivi-jax eval frontier`: what a cache costs beside what it weighs."""

import json

import numpy as np
import pytest

from kivi_jax.eval.frontier import Point, pareto
from kivi_jax.eval.statistics import Estimate
from tests.convert.checkpoints import LLAMA, write_checkpoint

pytest.importorskip("matplotlib", reason="plots need the extra eval")

KIVI = "kivi2r:group_size=8:residual_length=8"


@pytest.mark.slow
def test_the_table_joins_perplexity_distance_and_passkeys(command, tmp_path):
    """A full cache is no distance from itself; a packed one is; and nothing is computed twice."""
    config = LLAMA | dict(eos_token_id=None, num_hidden_layers=1)
    model = write_checkpoint(tmp_path / "model", config, tokens=61)
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"w{i * i % 53}" for i in range(100)))
    out = tmp_path / "out"
    sizes = ("--length", 40, "--windows", 2, "--passkey", 60, "--problems", 2, "--batch", 2)
    arguments = ("eval", "frontier", "--model", model, "--data", text, "--out", out, "--cache", KIVI, *sizes)
    code, shown, error = command(*arguments)
    assert code == 0, error
    assert "kivi2r:group_size=8" in shown
    assert "passkey 60" in shown
    records = {}
    for name in ("full", KIVI.replace(":", ",")):
        lines = (out / "frontier" / f"{name}.jsonl").read_text().splitlines()
        records[name] = [json.loads(line) for line in lines[1:]]
    full, packed = records.values()
    assert [record["id"] for record in full] == ["book-0", "book-1"]
    assert all(abs(record["divergence"]) < 1e-5 and record["agreement"] == 1 for record in full)
    assert all(a["divergence"] < b["divergence"] for a, b in zip(full, packed, strict=True))
    assert len(full[0]["nll"]) == len(packed[0]["nll"]) == 39
    first = [np.array(rows[0]["nll"])[:8] for rows in (full, packed)]
    np.testing.assert_allclose(*first, atol=1e-4)  # before anything is packed
    assert command(*arguments)[1] == shown


def test_the_front_is_what_nothing_beats():
    def point(size, cost):
        return Point(size, {"a": Estimate(cost, cost, cost)}, 0.0, 1.0, {})

    found = {"big": point(9, 0.0), "small": point(2, 0.3), "worse": point(5, 0.4), "middle": point(5, 0.1)}
    assert pareto(found) == ["small", "middle", "big"]
