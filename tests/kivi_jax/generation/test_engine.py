"""`Engine`: whatever shares its slots, a request gets what it gets alone; and how requests begin and end."""

import asyncio
import contextlib
import copy
import functools
import itertools
import threading
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kivi_jax as kj
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.requests import EngineClosed, QueueFull, Request, TooLong
from kivi_jax.generation.shared_prefixes import SharedPrefixes
from kivi_jax.generation.stops import find_stop
from tests import models

# An engine's thread draws random numbers meanwhile, which Hypothesis takes for a strategy's.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")
CONTEXT, PROMPT, NEW = 64, 40, 24  # one width of prompts and one number of tokens for `generate` alone
MODEL = models.random_llama(models.config())
TEXT = models.AsciiTokenizer()
CACHES = {
    "full": "full",
    "kivi2": "kivi2:group_size=8:residual_length=8",
    "scope": "scope:window=12:recent=4:prompt=snapkv:prompt_budget=16:prompt_window=4",
    "kivi2+scope": "kivi2+scope:group_size=8:residual_length=8:window=12:recent=4",
}
OTHERS = {
    "unified": "scope:decode=h2o:budget=80:recent=8",
    "every query": "scope:prompt=h2o:prompt_budget=16:prompt_recent=4:window=12:recent=4",
    "expected queries": "kivi4r+scope:group_size=8:residual_length=8:prompt=expectedattention"
    ":prompt_budget=16:prompt_recent=4:window=12:recent=4:pool_bits=4:pool_group_size=8",
    "pyramid, growing": "kivi2r+scope:group_size=8:residual_length=8:decode=keepall:prompt=pyramidkv"
    ":prompt_budget=16:prompt_window=4",
}
FAMILIES = {
    "windows": models.config(sliding_window=12, windowed=(True, False)),
    "dynamic rope": models.config(max_position_embeddings=24, rope=kj.RopeConfig(kind="dynamic", factor=2.0)),
}


@pytest.fixture(scope="module")
def engine():
    """Engines by cache and model, compiled once: three slots, two widths of prompts, chunks of one."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(cache: str, model: kj.Llama = MODEL) -> Engine:
            numbers = dict(slots=3, context=CONTEXT, chunk_tokens=32, prefix_bytes=100_000)
            return stack.enter_context(Engine(model, TEXT, cache=cache, **numbers))

        yield start


def generated(cache: str, prompt: tuple[int, ...], model: kj.Llama = MODEL, **options: Any) -> list[int]:
    """`generate`'s tokens."""
    padded = np.zeros((1, PROMPT), np.int32)
    padded[0, : len(prompt)] = prompt
    usual = dict(cache=cache, max_new_tokens=NEW, eos_ids=())
    return kj.generate(model, padded, [len(prompt)], **(usual | options)).tokens[0].tolist()


alone = functools.cache(generated)


def prompt_of(length: int, seed: int = 0, shared: int = 0) -> tuple[int, ...]:
    """Random tokens; the first `shared` are those of any other seed."""
    document = np.random.default_rng(1000).integers(0, 61, PROMPT)
    own = np.random.default_rng(seed).integers(0, 61, PROMPT)
    return tuple(np.where(np.arange(PROMPT) < shared, document, own)[:length].tolist())


class Asked(NamedTuple):
    """A request, how it ends after some token, and when it arrives."""

    prompt: tuple[int, ...]
    new: int
    ends_by: str
    after: int
    wait_ms: int

    def request(self, tokens: list[int]) -> Request:
        at = self.after % self.new
        ids = [tokens[at]] if self.ends_by == "stop id" else ()
        strings = [TEXT.decode(tokens[at : at + 2], skip_special_tokens=True)] * (self.ends_by == "string")
        return Request(tokens=self.prompt, max_new_tokens=self.new, stop_ids=ids, stop=strings)


asked = st.builds(
    Asked,
    st.builds(prompt_of, st.integers(1, PROMPT), st.integers(0, 9), st.sampled_from([0, 0, 20, 35])),
    st.integers(1, NEW),
    st.sampled_from(["length", "length", "stop id", "string", "cancelled"]),
    st.integers(0, NEW),
    st.sampled_from([0, 0, 0, 3, 20]),
)


def check_alike(engine: Engine, cache: str, batch: list[Asked], model: kj.Llama = MODEL) -> None:
    """Every answer is what `generate` gives alone, up to where the request ends."""
    expected = [alone(cache, one.prompt, model) for one in batch]
    requests = [one.request(tokens) for one, tokens in zip(batch, expected, strict=True)]
    handles = []
    for one, request in zip(batch, requests, strict=True):
        time.sleep(one.wait_ms / 1000)
        handles.append(engine.submit(request))
    for one, handle in zip(batch, handles, strict=True):
        if one.ends_by == "cancelled":
            for _ in zip(range(one.after), handle, strict=False):
                pass
            handle.cancel()
    for one, request, handle, tokens in zip(batch, requests, handles, expected, strict=True):
        out, tokens = handle.result(60.0), tokens[: one.new]
        text = TEXT.decode(tokens, skip_special_tokens=True)
        if out.reason == "cancelled":
            assert one.ends_by == "cancelled"
            assert len(out.tokens) >= min(one.after, one.new - 1)
            tokens = tokens[: len(out.tokens)]
            text = TEXT.decode(tokens, skip_special_tokens=True)
        elif request.stop_ids:
            assert out.reason == "stop"
            tokens = tokens[: tokens.index(request.stop_ids[0]) + 1]
            text = TEXT.decode(tokens[:-1], skip_special_tokens=True)
        elif (at := find_stop(text, request.stop)) is not None:
            assert out.reason == "stop"
            tokens, text = tokens[: at + len(request.stop[0])], text[:at]
        else:
            assert out.reason == "length"
        assert list(out.tokens) == tokens
        assert out.text == text
        assert [token.id for token in handle] == tokens
        assert out.reason == "cancelled" or "".join(token.text for token in handle) == text


@pytest.mark.parametrize("cache", CACHES)
@settings(max_examples=12, deadline=None)
@given(batch=st.lists(asked, min_size=1, max_size=9))
def test_every_request_gets_what_it_gets_alone(engine, cache, batch):
    check_alike(engine(CACHES[cache]), CACHES[cache], batch)


@pytest.mark.slow
@pytest.mark.parametrize("cache", OTHERS)
@settings(max_examples=12, deadline=None)
@given(batch=st.lists(asked, min_size=4, max_size=9))
def test_any_cache_does(engine, cache, batch):
    check_alike(engine(OTHERS[cache]), OTHERS[cache], batch)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["full", "kivi2"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(batch=st.lists(asked, min_size=4, max_size=9))
def test_any_family_does(engine, family, cache, batch):
    model = models.random_llama(FAMILIES[family])
    check_alike(engine(CACHES[cache], model), CACHES[cache], batch, model)


def test_a_row_that_samples_draws_what_it_draws_alone(engine):
    prompt, key = prompt_of(20), jax.random.key(2**32 - 5)[None]
    numbers = dict(temperature=3.0, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2)
    other = Request(tokens=prompt_of(9), max_new_tokens=NEW, temperature=9.0, stop_ids=())
    mine = Request(tokens=prompt, max_new_tokens=NEW, seed=2**32 - 5, stop_ids=(), **numbers)
    greedy = Request(tokens=prompt, max_new_tokens=NEW, stop_ids=())
    out = engine("full").complete([other, mine, greedy, mine])
    assert list(out[1].tokens) == generated("full", prompt, sampler=kj.Sample(**numbers), key=key)
    assert out[1].tokens == out[3].tokens
    assert list(out[2].tokens) == alone("full", prompt)


forward = jax.jit(lambda tokens: jax.nn.log_softmax(MODEL(tokens)[0]))


def log_softmax(tokens):
    """Of every position, by the model without a cache."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(padded))[: len(tokens)]


def test_log_probabilities_of_prompt_and_new_tokens(engine):
    prompt = prompt_of(40, seed=3)
    request = Request(tokens=prompt, max_new_tokens=8, log_probs=3, prompt_log_probs=True, stop_ids=())
    [out, own, none] = handles = [
        engine("full").submit(r)
        for r in (
            request,
            Request(tokens=prompt, max_new_tokens=0, log_probs=0, prompt_log_probs=True),
            Request(tokens=prompt, max_new_tokens=4, stop_ids=()),
        )
    ]
    done = [handle.result(60.0) for handle in handles]
    exact = log_softmax([*prompt, *done[0].tokens])
    scored = [*done[0].prompt_log_probs[1:], *out]
    assert [token.id for token in scored] == [*prompt[1:], *done[0].tokens]
    for position, token in enumerate(scored):
        best = np.argsort(-exact[position])[:3]
        np.testing.assert_allclose(token.log_prob, exact[position, token.id], atol=1e-4)
        assert [id for id, _ in token.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in token.top], exact[position, best], atol=1e-4)
    assert done[0].prompt_log_probs[0].log_prob is None
    assert done[1].reason == "length"
    assert not done[1].tokens
    assert list(own) == []
    assert [t.log_prob for t in done[1].prompt_log_probs] == [t.log_prob for t in done[0].prompt_log_probs]
    assert not any(token.top for token in done[1].prompt_log_probs)
    assert done[2].prompt_log_probs is None
    assert [token.log_prob for token in none] == [None] * 4


def test_bias_and_penalties_change_what_is_likeliest(engine):
    prompt, bias = prompt_of(6, seed=4), {5: 1.5, 17: -3.0}
    penalties = dict(presence_penalty=0.4, frequency_penalty=0.3)
    asks = Request(tokens=prompt, max_new_tokens=NEW, logit_bias=bias, stop_ids=(), **penalties)
    plain = Request(tokens=prompt, max_new_tokens=NEW, stop_ids=())
    got, *_ = engine("full").complete([asks, plain])
    tokens, often = list(prompt), np.zeros(61)
    for _ in range(NEW):
        logits = log_softmax(tokens)[-1] - 0.3 * often - 0.4 * (often > 0)
        for token, added in bias.items():
            logits[token] += added
        tokens.append(int(logits.argmax()))
        often[tokens[-1]] += 1
    assert list(got.tokens) == tokens[len(prompt) :]
    assert list(got.tokens) != alone("full", prompt)


def test_what_prompts_begin_with_is_read_once(engine):
    running, document = engine(CACHES["kivi2"]), prompt_of(38, seed=50)  # no other test reads it
    first, again, other = (
        Request(tokens=(*document[:cut], *ids), max_new_tokens=2, stop_ids=())
        for cut, ids in ((38, ()), (38, (1, 2)), (36, (3,)))
    )
    before = running.stats()
    out = [running.submit(request).result(60.0) for request in (first, again, other)]
    after = running.stats()
    assert [one.cached_tokens for one in out] == [0, 37, 36]
    assert after.prompt_tokens - before.prompt_tokens == 38 + 3 + 1
    assert after.prefix_hits - before.prefix_hits == 2
    assert 0 < after.prefix_bytes <= 100_000
    for request, one in zip((first, again, other), out, strict=True):
        assert list(one.tokens) == alone(CACHES["kivi2"], request.tokens)[:2]


def test_shared_prefixes_keep_what_was_used_last():
    shared, kept = SharedPrefixes(80), ((jnp.zeros(5), jnp.zeros(5)),)  # 40 bytes
    assert not shared.wants((1,), 81)
    for prompt in ((1, 2, 3), (4, 5, 6)):
        assert shared.wants(prompt, 40)
        shared.add(prompt, kept)
    assert not shared.wants((4, 5), 40)  # part of what is kept
    assert shared.find((1, 2, 9, 9), most=4, least=2).tokens == 2
    assert shared.find((1, 2, 9, 9), most=4, least=3) is None
    assert shared.find((1, 2, 9, 9), most=1, least=1).tokens == 1
    shared.add((7, 8), kept)
    assert (len(shared), shared.bytes) == (2, 80)
    assert shared.find((4, 5, 6), most=3, least=1) is None  # the least recently used
    shared.add((1, 2, 3, 4), kept)  # in place of its beginning
    assert (len(shared), shared.bytes) == (2, 80)
    assert shared.find((7, 8), most=2, least=1).tokens == 2


def test_nothing_is_compiled_after_the_start(engine):
    running, compiled = engine(CACHES["kivi2+scope"]), []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3 + len(compiled))(jnp.float32(1))
        assert len(compiled) >= 1  # it listens
        compiled.clear()
        kinds = (
            {},
            dict(temperature=0.7, top_k=5, top_p=0.9, seed=-1),
            dict(log_probs=20, prompt_log_probs=True),
            dict(presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=1.3, logit_bias={3: 1.0}),
            dict(stop=("zz",), stop_ids=(1, 2)),
        )
        requests = [
            Request(tokens=prompt_of(length, seed, 25), max_new_tokens=new, **kind)
            for seed, kind in enumerate(kinds)
            for length, new in ((1, 5), (30, 20), (40, 0), (40, 24))
        ]
        handles = [running.submit(request) for request in requests]
        handles[3].cancel()
        for handle in handles:
            handle.result(60.0)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_running_row_waits_for_one_program_of_a_prompt_at_a_time(engine, monkeypatch):
    """For a chunk, or for what makes a row of a prompt, after which nobody waits long for the first token."""
    running, calls, submitted = engine("full"), [], threading.Event()
    for name in ("read", "place", "burst"):
        inner = getattr(running._programs, name)

        def call(*args: Any, name: str = name, inner: Any = inner, **options: Any) -> Any:
            if name == "burst":
                assert submitted.wait(60.0)
            calls.append((name, options.get("most")))
            return inner(*args, **options)

        monkeypatch.setattr(running._programs, name, call)
    long = running.submit(Request(tokens=prompt_of(1, seed=6), max_new_tokens=60, stop_ids=()))
    others = [Request(tokens=prompt_of(40, seed), max_new_tokens=1, stop_ids=()) for seed in (70, 71, 72)]
    handles = [running.submit(request) for request in others]
    submitted.set()
    for handle in (*handles, long):
        handle.result(60.0)
    names = [name for name, _ in calls]
    assert (names.count("read"), names.count("place")) == (1 + 3 * 2, 1 + 3)
    assert names[:2] == ["read", "place"]  # no row runs yet
    assert all("burst" in pair for pair in itertools.pairwise(names[1:]))
    assert [most for (name, _), (_, most) in itertools.pairwise(calls) if name == "place"] == [1] * 4


def test_late_and_cancelled_requests_end_wherever_they_are(engine):
    running, prompt = engine("full"), prompt_of(5, seed=8)
    endless = [Request(tokens=prompt, max_new_tokens=59, stop_ids=()) for _ in range(3)]
    late = Request(tokens=prompt, max_new_tokens=3, deadline=time.monotonic() - 1)
    handles = [running.submit(request) for request in (late, *endless)]
    handles[1].cancel()
    out = [handle.result(60.0) for handle in handles]
    assert (out[0].reason, out[0].tokens) == ("deadline", ())
    assert out[1].reason == "cancelled"
    assert [one.reason for one in out[2:]] == ["length", "length"]
    assert list(out[1].tokens)[:NEW] == alone("full", prompt)[: len(out[1].tokens)]
    handles[2].cancel()  # too late, and no harm
    assert handles[2].finished is out[2]


def test_nothing_is_in_a_slot_whose_row_has_ended(engine):
    running = engine(CACHES["kivi2+scope"])
    running.complete(Request(tokens=prompt_of(20, seed), max_new_tokens=seed, stop_ids=()) for seed in (2, 7))
    running._programs.burst(np.zeros(running.slots, bool), most=1, stops=False)
    counts = [leaf for leaf in jax.tree.leaves(running._programs.slots.cache) if leaf.ndim == 1]
    assert len(counts) > MODEL.config.num_layers
    assert not any(count.any() for count in counts)


def test_tokens_come_to_asyncio(engine):
    running, prompt = engine("full"), prompt_of(7, seed=9)

    async def read() -> list[int]:
        handle = running.submit(Request(tokens=prompt, max_new_tokens=NEW, stop_ids=()))
        ids = [token.id async for token in handle]
        assert list((await handle.wait()).tokens) == ids
        return ids

    async def both() -> list[list[int]]:
        return await asyncio.gather(read(), read())

    assert asyncio.run(both()) == [alone("full", prompt)] * 2


def test_a_queue_is_bounded_and_an_engine_drains_and_closes(engine):
    running = engine("full")
    blocked = Request(tokens=prompt_of(3), max_new_tokens=61, stop_ids=())
    usual = running.queue
    running.queue = 2
    try:
        with pytest.raises(QueueFull, match="2 requests wait already"):
            [running.submit(blocked) for _ in range(100)]
        many = [Request(tokens=prompt_of(3), max_new_tokens=2, stop_ids=())] * 20
        assert [len(out.tokens) for out in running.complete(many)] == [2] * 20
    finally:
        running.queue = usual
    assert running.stats().refused == 1


def test_what_cannot_be_answered_is_refused(engine):
    running = engine("full")
    for request, message in (
        (Request(tokens=[61], max_new_tokens=1), "token 61 is not in the model's vocabulary"),
        (Request(tokens=[1], max_new_tokens=1, logit_bias={99: 1.0}), "token 99 is not in"),
        (Request(tokens=[1], max_new_tokens=1, stop_ids=[77]), "eos_ids=77 is not in"),
    ):
        with pytest.raises(ValueError, match=message):
            running.submit(request)
    with pytest.raises(TooLong, match="60 tokens and 5 new ones are more than the engine's context of 64"):
        running.submit(Request(tokens=[1] * 60, max_new_tokens=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(slots=0), "slots=0 must be at least 1"),
        (dict(slots=1, memory_bytes=10**9), "pass either slots="),
        (dict(), "pass either slots="),
        (dict(slots=1, context=0), "context=0 must be at least 1"),
        (dict(slots=1, prefix_bytes=-1), "prefix_bytes=-1 must not be negative"),
        (dict(memory_bytes=10_000), "leaves no room for a slot"),
    ],
)
def test_engines_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, cache="full", **(dict(context=CONTEXT) | options))


def test_devices_of_several_hosts_are_refused():
    model = copy.copy(MODEL)
    model.mesh = types.SimpleNamespace(is_multi_process=True)
    with pytest.raises(NotImplementedError, match="an engine runs on devices of one host"):
        Engine(model, cache="full", slots=1)


def test_an_engine_fills_the_memory_it_is_given_and_ends_when_it_breaks(monkeypatch, caplog):
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(MODEL))
    row = kj.plan_cache(MODEL.config, "full", batch=1, context=16, dtype="float32")["total"]
    with Engine(MODEL, cache="full", memory_bytes=weights + 8 * row, prefix_bytes=0, context=16) as running:
        assert running.slots == 4  # beside a buffer for 32 tokens, and what a row is drawn with
        stats = running.stats()
        assert stats.cache_bytes == stats.full_cache_bytes == running.slots * row
        monkeypatch.setattr(running._programs, "burst", None)
        handle = running.submit(Request(tokens=[1], max_new_tokens=3))
        with pytest.raises(EngineClosed, match="broke down: TypeError"):
            handle.result(60.0)
        with pytest.raises(EngineClosed, match="broke down: TypeError"):
            list(handle)
        assert not running.stats().healthy
        with pytest.raises(EngineClosed, match="broke down"):
            running.submit(Request(tokens=[1], max_new_tokens=3))
        with pytest.raises(ValueError, match="there is no tokenizer"):
            running.submit(Request(tokens=[1], max_new_tokens=3, stop=["a"]))
    assert "the engine broke down" in caplog.text
