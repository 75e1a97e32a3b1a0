"""Who gets an engine's device, and when: running rows draw tokens between any two other programs."""

import kivi_jax as kj
from kivi_jax.generation.requests import Request
from tests import models

MODEL = models.random_llama(models.config(num_layers=1))


def test_a_running_row_never_waits_for_two_programs_of_a_prompt_s(monkeypatch):
    """A chunk and making a row of what was read are one each; and after the latter nobody waits long."""
    ran = []
    with kj.Engine(MODEL, cache="full", slots=2, context=96, chunk_tokens=16, prefix_bytes=0) as engine:
        programs = engine._programs

        def recorded(name):
            run = getattr(programs, name)

            def note(*args, **options):
                ran.append((name, options.get("most")))
                return run(*args, **options)

            return note

        for name in ("read", "place", "burst"):
            monkeypatch.setattr(programs, name, recorded(name))
        running = engine.submit(Request(tokens=(1,), max_new_tokens=90, stop_ids=()))
        next(iter(running))
        begun = len(ran)
        engine.submit(Request(tokens=(2,) * 64, max_new_tokens=1, stop_ids=())).result()
    names = [name for name, _ in ran[begun:]]
    assert names.count("read") == 4
    assert names.count("place") == 1
    for i, name in enumerate(names[:-1]):
        assert name == "burst" or names[i + 1] == "burst"
    assert ran[begun + names.index("place") + 1] == ("burst", 1)
