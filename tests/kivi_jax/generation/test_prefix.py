"""Prefixes: continued as if just read, by every cache; read once, asked often; on disk and back."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kivi_jax as kj
from kivi_jax.cache.names import cache_name, parse_cache
from kivi_jax.cache.strategy import grow
from kivi_jax.generation.generate import _advance
from kivi_jax.generation.prefix import extend, fork, prefill, weights_mark
from kivi_jax.generation.prefix_files import fingerprint
from kivi_jax.generation.text import append
from kivi_jax.outputs import seal
from kivi_jax.plan.memory import plan_cache, zero_cache
from tests.convert.checkpoints import LLAMA, write_checkpoint
from tests.models import AsciiTokenizer, config, random_llama

SLIDE = kj.Slide(window=12, recent=4)
CACHES = {
    "full": kj.full(),
    "kivi2": kj.kivi(2, 8, 16),
    "scope": kj.scope(prompt=kj.SnapKV(budget=20, window=4), decode=SLIDE),
    "kivi2+scope": kj.kivi(2, 8, 16, prompt=kj.PyramidKV(budget=20, window=4), decode=SLIDE),
    "packed pool": kj.scope(
        decode=kj.Discontinuous(window=12, recent=4, max_new_tokens=64),
        pool=kj.PoolQuantization(bits=4, group_size=8),
    ),
    "unified": kj.scope(prompt=kj.H2O(budget=16, recent=4), decode=kj.H2O(budget=24, recent=4)),
    "selected kivi": kj.kivi(4, 8, 8, rotate_keys=True, sinks=3, prompt=kj.SnapKV(budget=20, window=4)),
}
P, LENGTHS, Q, QUESTIONS, NEW = 40, np.array([40, 17]), 7, np.array([7, 0]), 12
ENOUGH = P + Q + NEW
CASES = [
    ("kivi2+scope", None, ENOUGH),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            *((name, None, ENOUGH) for name in ("full", "kivi2", "scope", "packed pool", "unified")),
            ("selected kivi", None, P),
            ("kivi2", 24, P),
            ("full", 50, P),
        )
    ),
]


def tokens(rows, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, (rows, width)), jnp.int32)


def say(model, logits, cache):
    """The next tokens of every row, step by step."""
    said = []
    for _ in range(NEW):
        said.append(logits.argmax(-1).astype(jnp.int32))
        logits, cache = model.decode(said[-1], cache)
    return np.stack(said, axis=1)


@pytest.mark.parametrize(("name", "window", "capacity"), CASES)
def test_a_loaded_prefix_continues_as_if_just_read(name, window, capacity, tmp_path):
    """Token for token, with ragged prompts and questions, one of them empty; and a second time."""
    model, cache = random_llama(config(num_layers=1, sliding_window=window)), CACHES[name]
    prompts, questions = tokens(2, P), tokens(2, Q, seed=1)
    logits, held = model.prefill(prompts, jnp.asarray(LENGTHS), cache=cache, capacity=ENOUGH)
    for i in range(Q):
        active = jnp.asarray(i < QUESTIONS)
        new, held = model.decode(questions[:, i], held, active)
        logits = jnp.where(active[:, None], new, logits)
    expected = say(model, logits, held)

    read = prefill(model, prompts, jnp.asarray(LENGTHS), cache=cache, capacity=capacity)
    read = dataclasses.replace(read, mark=weights_mark(model))
    kj.save_prefix(tmp_path / "prefix", read, model)
    loaded = kj.load_prefix(tmp_path / "prefix", model, cache=cache)
    assert jax.tree.structure(loaded) == jax.tree.structure(read)
    for got, saved in zip(jax.tree.leaves(loaded), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(got, saved, strict=True)
    for _ in range(2):
        own = fork(loaded, rows=2, more=ENOUGH - capacity)
        asked = extend(model, own, questions, jnp.asarray(QUESTIONS))
        np.testing.assert_array_equal(asked.cache.lengths, LENGTHS + QUESTIONS)
        np.testing.assert_array_equal(say(model, asked.logits, asked.cache), expected)


@pytest.fixture(scope="module")
def document():
    """A byte model, its tokenizer and a text read by it into packed tokens and a packed pool."""
    model, tokenizer = random_llama(config(vocab_size=256, num_layers=1)), AsciiTokenizer()
    cache = kj.kivi(2, 8, 8, decode=SLIDE, pool=kj.PoolQuantization(bits=4, group_size=8))
    return model, tokenizer, kj.read_prefix(model, tokenizer, ["It was a dark night."], cache=cache)


ASKED = ["", "Who?", "What did they say about it?"]


def test_one_prefix_answers_many_questions(document):
    """Together, one by one, and streamed; other questions compile nothing."""
    model, tokenizer, prefix = document
    options = dict(prefix=prefix, max_new_tokens=8, sampler=kj.Greedy(repetition_penalty=1.2), eos_ids=())
    together = kj.complete(model, tokenizer, ASKED, **options)
    assert len(set(together)) == 3
    for text, answer in list(zip(ASKED, together, strict=True))[1:]:
        assert kj.complete(model, tokenizer, [text], **options) == [answer]
        assert "".join(kj.stream(model, tokenizer, text, **options)) == answer
    compiled = _advance._cache_size()
    kj.complete(model, tokenizer, ["another"], **options)
    assert _advance._cache_size() == compiled


def test_a_prefix_and_a_question_are_one_prompt_to_a_full_cache():
    """Also to a sampler that counts the tokens of both."""
    model, tokenizer = random_llama(config(vocab_size=256, num_layers=1)), AsciiTokenizer()
    options = dict(max_new_tokens=16, sampler=kj.Greedy(repetition_penalty=1.5), eos_ids=())
    prefix = kj.read_prefix(model, tokenizer, ["Once upon "], cache=kj.full())
    whole = kj.complete(model, tokenizer, ["Once upon a time"], cache=kj.full(), **options)
    assert kj.complete(model, tokenizer, ["a time"], prefix=prefix, **options) == whole


def test_tokens_may_be_appended_in_any_chunks(document):
    model, _, prefix = document
    ids = np.random.default_rng(3).integers(0, 256, 40).tolist()
    ends = [
        append(model, fork(prefix, rows=1, more=40), ids, chunk_tokens=chunk_tokens)
        for chunk_tokens in (7, 64)
    ]
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["full", "kivi2", "kivi2+scope"])
def test_memory_of_what_is_added_is_as_planned(name):
    options = dict(batch=1, dtype="float32")

    def grown():
        return grow(zero_cache(config(), CACHES[name], width=32, capacity=32, **options), 64)

    planned = plan_cache(config(), CACHES[name], context=96, prompt_tokens=32, **options)
    assert kj.cache_bytes(jax.eval_shape(grown)) == planned


@pytest.mark.parametrize(
    ("cache", "prefix", "message"),
    [
        (None, None, "pass either cache=, a strategy, or prefix="),
        (kj.full(), "two rows", "pass either cache=, a strategy, or prefix="),
        (None, "two rows", "the prefix has 2 rows, which cannot be continued by 1 prompts"),
        (None, "another vocabulary", "read by a model of 8 tokens, this one has 61"),
    ],
    ids=["nothing", "both", "rows", "vocabulary"],
)
def test_what_to_start_from_is_checked(cache, prefix, message, saved):
    model = random_llama(config(num_layers=1))
    loaded = kj.load_prefix(saved, model)
    another = dataclasses.replace(loaded, logits=jnp.zeros((2, 8)), seen=jnp.zeros((2, 8), bool))
    start = {"two rows": loaded, "another vocabulary": another}.get(prefix)
    with pytest.raises(ValueError, match=message):
        kj.generate(model, tokens(1, 8), jnp.asarray([8]), cache=cache, prefix=start, max_new_tokens=1)


def rewrite(path, **changes):
    """As if it had been written so, with a checksum of its own that is right."""
    file = path / "prefix.json"
    manifest = json.loads(file.read_text()) | changes
    del manifest["manifest"]
    file.write_text(json.dumps(manifest | {"manifest": seal(manifest)}))


def edit(path, **changes):
    file = path / "prefix.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip_a_byte(path):
    largest = max(
        (file for file in (path / "arrays").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


DAMAGE = {
    "no manifest": (lambda path: (path / "prefix.json").unlink(), "is not a saved prefix"),
    "half a manifest": (lambda path: (path / "prefix.json").write_text('{"format": 3'), "is damaged"),
    "no field": (
        lambda path: (path / "prefix.json").write_text('{"format": 3, "cache": "full"}'),
        "is damaged",
    ),
    "no object": (lambda path: (path / "prefix.json").write_text("[]"), "is damaged"),
    "another format": (
        lambda path: rewrite(path, format=2),
        "has format 2, this version of kivi-jax reads 3",
    ),
    "no arrays": (lambda path: shutil.rmtree(path / "arrays"), "is damaged"),
    "a flipped byte": (flip_a_byte, "is damaged"),
    "another array": (lambda path: rewrite(path, checksum="0"), "damaged .*checksum"),
    "another cache": (
        lambda path: rewrite(path, cache="kivi2:group_size=8"),
        "damaged .*not those of its cache",
    ),
    "edited capacity": (lambda path: edit(path, capacity=7), "damaged .*was edited"),
    "edited, and its checksum removed": (
        lambda path: edit(path, tokens=[1], manifest=None),
        "damaged .*was edited",
    ),
    "edited tokens": (lambda path: edit(path, tokens=[1]), "damaged .*was edited"),
    "edited to other kinds": (lambda path: edit(path, arrays=[1], tokens="many"), "damaged .*was edited"),
    "too deep to read": (lambda path: (path / "prefix.json").write_text("[" * 200_000), "is damaged"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, path = random_llama(config(num_layers=1)), tmp_path_factory.mktemp("prefix") / "full"
    read = prefill(model, tokens(2, P), jnp.asarray(LENGTHS), cache=kj.full(), capacity=ENOUGH)
    kj.save_prefix(path, read, model)
    return path


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line(kind, saved, tmp_path):
    path, (damage, message) = tmp_path / "prefix", DAMAGE[kind]
    shutil.copytree(saved, path)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        kj.load_prefix(path, random_llama(config(num_layers=1)))
    assert "\n" not in str(caught.value)


def test_another_model_dtype_or_cache_is_refused(saved):
    def load(model, **options):
        return kj.load_prefix(saved, model, **options)

    shape = config(num_layers=1)
    with pytest.raises(
        ValueError, match=r"read by another model \(1 layers, hidden size 32; this one: 1 layers"
    ):
        load(random_llama(shape, seed=1))
    with pytest.raises(ValueError, match="this one: 2 layers"):
        load(random_llama(config()))
    with pytest.raises(
        ValueError, match="in float32, this one is in bfloat16: load the model with dtype float32"
    ):
        load(kj.Llama(shape, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="holds a full cache, not kivi2:group_size=8"):
        load(random_llama(shape), cache=kj.kivi(2, 8))
    assert load(random_llama(shape), cache=kj.full()).rows == 2


def test_what_is_there_is_not_overwritten(saved):
    model = random_llama(config(num_layers=1))
    with pytest.raises(ValueError, match="is not empty"):
        kj.save_prefix(saved, kj.load_prefix(saved, model), model)
    kj.save_prefix(saved, kj.load_prefix(saved, model), model, overwrite=True)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_a_fingerprint_names_weights_and_config():
    shape = config(num_layers=1)
    prints = [
        fingerprint(random_llama(shape)),
        fingerprint(random_llama(shape, seed=1)),
        fingerprint(random_llama(config(num_layers=1, rms_norm_eps=1e-6))),
    ]
    assert len(set(prints)) == 3
    assert fingerprint(random_llama(shape)) == prints[0]


NAMED = {
    **CACHES,
    "mixed": kj.kivi(4, value_bits=2, key_group_size=64, scale_dtype="bfloat16"),
    "default pool": kj.kivi(8, decode=SLIDE, pool=kj.PoolQuantization()),
    "unused pool": kj.kivi(2, pool=kj.PoolQuantization(bits=8)),
    "random": kj.scope(prompt=kj.KeyDiff(budget=99), decode=kj.Random(block=32, seed=7)),
    "remembered": kj.scope(prompt=kj.ExpectedAttention(budget=99, sinks=0), decode=kj.GKV(decay=0.5)),
    "reserved": kj.kivi(4, rotate_keys=True, sinks=0, decode=kj.VaSE(reserve=9)),
    "keys and values": kj.kivi(key_bits=4, value_bits=2, rotate_keys=True, sinks=8),
    "sinks": kj.scope(prompt=kj.StreamingLLM(sinks=2, recent=8), decode=kj.Slide()),
    "infer": kj.scope(prompt=kj.PyramidInfer(budget=99, beta=10), decode=kj.KeepAll()),
    "max": kj.scope(prompt=kj.SnapKV(budget=99, pooling="max"), decode=kj.Adaptive(max_new_tokens=4096)),
}


@pytest.mark.parametrize("kind", NAMED)
def test_a_cache_is_read_from_its_name(kind):
    assert parse_cache(cache_name(NAMED[kind])) == NAMED[kind]


def test_names_are_short():
    names = ["full", "kivi2", "kivi2r", "kivi42r", "scope", "kivi4+scope"]
    assert [cache_name(parse_cache(name)) for name in names] == names


def test_a_selector_of_ones_own_has_no_name():
    class Mine(kj.Slide):
        pass

    with pytest.raises(ValueError, match=r"Mine.* has no name: it is none of slide"):
        cache_name(kj.scope(decode=Mine()))


def test_a_document_is_saved_described_and_asked(command, tmp_path, monkeypatch):
    text, path = tmp_path / "novel.txt", tmp_path / "novel.prefix"
    text.write_text("w3 w1 w4")
    model = write_checkpoint(tmp_path / "model", LLAMA | dict(eos_token_id=None), tokens=61)
    code, out, error = command("cache", "save", model, text, path, "--cache", "full")
    assert (code, out) == (0, "")
    assert "full" in error
    code, out, _ = command("cache", "info", path)
    assert code == 0
    for shown in ("full", "3", " layers, float32"):
        assert shown in out
    code, out, _ = command("generate", model, "w1 w5", "--prefix", path, "--max-new-tokens", "4")
    loaded, tokenizer = kj.load(model)
    read = kj.load_prefix(path, loaded)
    assert code == 0
    assert out == "".join(kj.stream(loaded, tokenizer, "w1 w5", prefix=read, max_new_tokens=4)) + "\n"
    for arguments, message in {
        ("generate", model, "w1", "--prefix", path, "--cache", "kivi2"): "holds a full cache, not kivi2",
        ("generate", model, "w1", "--prefix", text): "is not a saved prefix",
        ("cache", "info", tmp_path): "is not a saved prefix",
        ("cache", "save", model, text, path): "is not empty",
        ("cache", "save", model, tmp_path / "none", tmp_path / "new"): "No such file",
    }.items():
        code, out, error = command(*arguments)
        assert (code, out) == (2, "")
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, _, error = command("cache", "save", model, text, tmp_path / "new", "--cache", "full")
    assert (code, "bytes, and 1,000 are free: make space" in error, error.count("\n")) == (2, True, 1)
    assert not (tmp_path / "new").exists()
