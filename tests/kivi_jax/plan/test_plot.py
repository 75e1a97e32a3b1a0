"""Memory plans as pictures."""

import pytest
from matplotlib.figure import Figure

import kivi_jax as kj
from kivi_jax.figures import new_figure, save_figure
from kivi_jax.plan.memory import plan_cache
from kivi_jax.plan.plot import POINTS, contexts_up_to, draw_memory, memory_curves
from tests.models import config

CACHES = {"full": kj.full(), "scope": kj.scope(decode=kj.Slide(window=8, recent=4))}


def test_contexts_are_halves_down_to_one_token():
    assert contexts_up_to(1024) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert contexts_up_to(5) == [1, 2, 5]
    assert len(contexts_up_to(131072)) == POINTS


@pytest.mark.parametrize("prompt", [None, 32])
def test_curves_are_plans(prompt):
    contexts = [16, 64]
    curves = memory_curves(config(), CACHES, contexts, batch=3, dtype="float32", prompt_tokens=prompt)
    for name, strategy in CACHES.items():
        for context, size in zip(contexts, curves[name], strict=True):
            read = context if prompt is None else min(prompt, context)
            plan = plan_cache(
                config(), strategy, batch=3, context=context, dtype="float32", prompt_tokens=read
            )
            assert size == plan["total"]


def test_a_picture_shows_the_curves_and_the_limit():
    (axes,) = draw_memory("a title", [1, 2], {"full": [2**30, 2**31]}, limit=("24GiB", 2**32)).axes
    curve, limit = axes.get_lines()
    assert (curve.get_label(), list(curve.get_xdata()), list(curve.get_ydata())) == ("full", [1, 2], [1, 2])
    assert (limit.get_label(), list(limit.get_ydata())) == ("24GiB", [4, 4])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_limit_below_zero_is_said_and_not_drawn():
    (axes,) = draw_memory("a title", [1, 2], {"full": [1, 2]}, limit=("1GiB", -1)).axes
    assert len(axes.get_lines()) == 1
    assert axes.get_title() == "a title\n1GiB: no room"


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "plot.png"
    save_figure(new_figure(2, 1), file)
    saved = file.read_bytes()
    assert saved.startswith(b"\x89PNG")

    def cut(self, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(KeyboardInterrupt):
        save_figure(new_figure(2, 1), file)
    assert file.read_bytes() == saved
    assert list(tmp_path.iterdir()) == [file]


def test_text_is_no_mathematics(tmp_path, caplog):
    """A folder may be called a$b$^c, and fonts of formulas may not be there."""
    figure = new_figure(2, 2)
    axes = figure.subplots()
    axes.plot([1, 10, 100], [0.1, 1, 10])
    axes.set_title("a$b$^c$\\x$")
    axes.set(xscale="log", yscale="symlog")
    save_figure(figure, tmp_path / "plot.png")
    labels = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
    assert "100" in labels
    assert not any("$" in label for label in labels)
    assert caplog.records == []
