"""`kivi-jax eval select`: selectors of the output at equal budgets."""

import pytest

from kivi_jax.cache.names import parse_cache
from kivi_jax.eval.select import BASELINE, FULL, SELECTORS, caches

pytest.importorskip("matplotlib", reason="plots need the extra eval")


def test_every_choice_keeps_the_same_number_of_tokens():
    named = caches(100, [12, 50], "scope")
    assert named.pop(FULL) == "full"
    assert {choice[0] for choice in named} == set(SELECTORS)
    for (_, percent), name in named.items():
        assert parse_cache(name).decode.bound == percent
    with pytest.raises(ValueError, match="3 % of the output's 100 tokens are 3: pass from 4 tokens to all"):
        caches(100, [3], "scope")


@pytest.mark.slow
def test_the_table_compares_with_slide_problem_by_problem(command, tmp_path, monkeypatch):
    """Two selectors on the demo's model; a second run computes nothing and says the same."""
    monkeypatch.setattr(
        "kivi_jax.eval.select.SELECTORS", {name: SELECTORS[name] for name in (BASELINE, "random")}
    )
    sizes = ("--questions", 2, "--problems", 2, "--batch", 2, "--percent", 50)
    code, shown, error = command("eval", "select", "--out", tmp_path, *sizes)
    assert code == 0, error
    assert "vs slide" in shown
    assert "random" in shown
    assert (tmp_path / "select" / "select.png").is_file()
    assert command("eval", "select", "--out", tmp_path, *sizes)[1] == shown
