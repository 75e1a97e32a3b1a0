"""A model on a mesh: what eight simulated devices compute, and say to each other, in one other process."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

from convert.hf import abstract_parameters
from kivi_jax.model.sharding import axes_of, fits
from kivi_jax.plan.shapes import SHAPES

CACHES = ("full", "kivi2", "scope", "kivi2+scope")
MESHES = ((1, 1), (2, 1), (1, 2), (1, 4), (1, 8), (2, 4))
FEW = ("compare:full:1:2", "compare:kivi2+scope:2:4")
ENGINE = "engine:kivi2:2:2"
ENGINES = (
    *(f"engine:{cache}" for cache in ("full:1:2", "kivi2:2:1", "scope:2:2", "kivi2+scope:2:2")),
    *(f"engine:{cache}:2:4" for cache in ("scope", "draws")),
)
MANY = (
    *(f"compare:{cache}:{data}:{model}" for cache in CACHES for data, model in MESHES),
    "compare:draws:2:4",
    "compare:scope:2:4:6",
)


def on_eight_devices(*parts):
    """What `on_mesh.py` finds, by part; of the same devices, sums and products as here."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kivi_jax.model.on_mesh", *parts],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found():
    return on_eight_devices("refusals", "files", "engines_that_cannot_be", ENGINE, *FEW)


@pytest.fixture(scope="module")
def found_slowly():
    return on_eight_devices("generated", "commands", "families", "benched", *ENGINES, *MANY)


def check(part, facts):
    """Tokens are one device's, each device holds its share, and a step asks the others for nothing else."""
    _, cache, data, model, kv_heads = (*part.split(":"), "2")[:5]
    data, model, kv_heads = int(data), int(model), int(kv_heads)
    assert facts["tokens equal"]
    assert facts["shapes equal"]
    assert facts["error"] < 1e-5
    parts = math.gcd(kv_heads, model)
    assert facts["parts"] == [data * parts]
    weighs = cache in ("scope", "kivi2+scope") and model > parts
    spread = {
        "all-reduce": 3 if weighs else 2,
        "all-gather": 1,
    }  # of one layer; weights of replicas are added
    if kv_heads == 6:  # whose vocabulary is a prime
        spread.pop("all-gather")
    assert facts["collectives"] == (spread if model > 1 else {})


@pytest.mark.parametrize("part", FEW)
def test_tokens_are_those_of_one_device(found, part):
    check(part, found[part])


@pytest.mark.slow
@pytest.mark.parametrize("part", MANY)
def test_every_cache_on_every_mesh(found_slowly, part):
    check(part, found_slowly[part])


def test_files_are_read_to_their_devices(found):
    assert len(found["files"]) == 6
    assert all(found["files"].values())


def test_meshes_that_do_not_fit_are_refused(found):
    heads, wide, many, none = found["refusals"]
    assert heads == (
        "8 heads (2 of keys) and 48 MLP columns do not divide over model=3 devices: "
        "make a mesh with model=2, or one of 1, 2, 4, 8"
    )
    assert wide == (
        "12 heads (6 of keys) and 48 MLP columns do not divide over model=8 devices: "
        "make a mesh with model=6, or one of 1, 2, 3, 4, 6, 12"
    )
    assert many == (
        "a mesh of data=3 times model=3 needs 9 devices, there are 8: pass numbers whose product is at most 8"
    )
    assert none == "data=0 and model=1 of a mesh must be positive"


def check_engine(part, facts):
    """Requests get what they get alone; slots lie over devices, and in a burst no cache moves."""
    _, cache, data, model = part.split(":")
    data, model = int(data), int(model)
    assert facts["tokens"] == facts["alone"]
    assert [len(tokens) for tokens in facts["tokens"]].count(12) >= 6  # but for one that was cancelled
    shared = {"full": 34, "kivi2": 34, "scope": 32}  # nothing where every query of a prompt counts
    assert facts["cached tokens"] == shared.get(cache, 0)
    assert facts["compiled"] == []
    assert facts["parts"] == [data * min(model, 2)]
    assert facts["order"] == ([0, 2, 1, 3] if data == 2 else [0, 1, 2, 3])
    said = facts["collectives"]
    assert said.pop("all-gather", 0) == (model > 1)  # logits
    weighs = cache == "scope" and model > 2
    ended = 2 * (data > 1)  # whether any row has, and whether all have
    assert said.pop("all-reduce") <= (2 + weighs) * (model > 1) + ended
    assert said == {}


def test_an_engine_gives_what_one_device_does(found):
    check_engine(ENGINE, found[ENGINE])


@pytest.mark.slow
@pytest.mark.parametrize("part", ENGINES)
def test_every_engine_gives_what_one_device_does(found_slowly, part):
    check_engine(part, found_slowly[part])


def test_slots_divide_over_devices(found):
    slots, memory, cache, weights = found["engines_that_cannot_be"]
    assert slots == "slots=3 do not divide over data=2 devices: pass slots=4, or a mesh of another data="
    assert "leaves no room for a slot of" in memory
    assert cache == pytest.approx(0.5, abs=0.01)  # of a row: a head on each of two devices
    assert 0.5 < weights < 0.7  # embeddings are on every device


@pytest.mark.slow
def test_every_way_to_continue_a_text_gives_one_device_s(found_slowly):
    """Also of a prefix that was read on one mesh and is continued on another."""
    facts = found_slowly["generated"]
    assert facts["generate"]
    assert facts["prefix"] == [facts["prefix"][0]] * 3
    assert facts["chat"] == [facts["chat"][0]] * 2
    assert facts["stream"] == [facts["stream"][0]] * 2


@pytest.mark.slow
def test_commands_say_what_they_say_on_one_device(found_slowly):
    (said, numbers, scores), (said_on, numbers_on, scores_on) = found_slowly["commands"].values()
    assert said_on == said
    assert len(numbers) > 1
    assert numbers_on == pytest.approx(numbers, abs=1e-4)
    assert scores_on == pytest.approx(scores, abs=1e-4)


@pytest.mark.slow
def test_every_family(found_slowly):
    assert {name: error for name, error in found_slowly["families"].items() if error > 1e-5} == {}


@pytest.mark.slow
def test_the_benchmark_divides_bytes(found_slowly):
    """Of the cache all but lengths, of the weights all but norms and embeddings."""
    one, four = found_slowly["benched"]
    assert (four["data"], four["model"]) == (2, 2)
    assert 4 <= one["cache_bytes"] / four["cache_bytes"] * 1.02 < 4.1
    assert 1.5 < one["weights_bytes"] / four["weights_bytes"] < 2
    assert one["sums_ms"] == 0 < four["sums_ms"]
    assert all(record["ms"] > 0 for record in (one, four))


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_says_what_its_axes_are(name):
    config = dataclasses.replace(SHAPES[name], num_layers=1)
    for path, leaf in abstract_parameters(config, "bfloat16").items():
        assert len(axes_of(path, config)) == leaf.ndim


def test_where_heads_divide():
    """KV heads of Llama-3.1-8B over up to 8 devices, then a quarter of their query heads each."""
    assert [n for n in range(1, 65) if fits(SHAPES["llama-8b"], n)] == [1, 2, 4, 8, 16, 32]
    assert [n for n in range(1, 65) if fits(SHAPES["phi-4"], n)] == [1, 2, 4, 5, 8, 10, 20, 40]
