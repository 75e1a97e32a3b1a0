"""What eight simulated devices compute, beside what one does, as JSON: see `test_mesh.py`.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.kivi_jax.model.on_mesh PART...

In a process of its own, since the number of devices is fixed when JAX starts.
"""

import functools
import importlib.util
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from typer.testing import CliRunner

import kivi_jax as kj
from convert.orbax import save
from kivi_jax.bench import mesh as bench
from kivi_jax.cache.strategy import KVCache
from kivi_jax.commands.app import app
from kivi_jax.generation.engine import Engine
from kivi_jax.generation.programs import shapes
from kivi_jax.model.llama import _decode
from kivi_jax.model.sharding import bytes_of_device, placed_cache, spread
from pallas_kernels.pytree import Flat, tree_bytes
from tests.convert.checkpoints import LLAMA, family_tensors, write_checkpoint
from tests.convert.families import VARIANTS, raw_config
from tests.convert.gguf_files import write_gguf
from tests.models import AsciiTokenizer, config, random_llama

ROWS, WIDTH, STEPS = 4, 21, 12
LENGTHS, ACTIVE = np.array([21, 3, 17, 20]), np.ones(ROWS, bool)
CACHES = {
    "full": kj.full(),
    "kivi2": kj.kivi(2, 8, 8),
    "scope": kj.scope(prompt=kj.SnapKV(budget=12, window=4), decode=kj.Slide(window=8, recent=4)),
    "kivi2+scope": kj.kivi(
        2,
        8,
        8,
        rotate_keys=True,
        sinks=3,
        prompt=kj.H2O(budget=12, recent=4),
        decode=kj.Slide(window=8, recent=4),
        pool=kj.PoolQuantization(bits=4, group_size=8),
    ),
    "draws": kj.scope(
        prompt=kj.ExpectedAttention(budget=12, recent=4), decode=kj.Random(window=8, recent=4, block=2)
    ),
}
MODELS = {  # by KV heads; 6 of these lie over 2 of 4 devices, and that vocabulary over none
    "2": config(num_layers=1, num_heads=8, vocab_size=128),
    "6": config(num_layers=1, num_heads=12, num_kv_heads=6, vocab_size=61),
}
MODEL = MODELS["2"]


def on(model: kj.Llama, data: int, heads: int) -> kj.Llama:
    return spread(model, kj.make_mesh(data=data, model=heads))


def steps(model: kj.Llama, cache: str) -> tuple[np.ndarray, list[KVCache], Any]:
    """Logits of ragged rows at every step of a greedy continuation, the cache at each, and the program."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (ROWS, WIDTH), np.int32)
    logits, held = model.prefill(ids, LENGTHS, cache=CACHES[cache], capacity=WIDTH + STEPS)
    flat = Flat.of(model)  # as `model.decode` has it
    program = _decode.lower(flat, greedy(logits), held, ACTIVE).compile()
    seen, caches = [logits], [jax.tree.map(np.asarray, held)]
    for _ in range(STEPS):
        logits, held = program(flat, greedy(logits), held, ACTIVE)
        seen.append(logits)
        caches.append(jax.tree.map(np.asarray, held))
    return np.stack(seen), [*caches, held], program


def greedy(logits: Any) -> np.ndarray:
    return np.asarray(logits).argmax(-1).astype(np.int32)


@functools.cache
def alone(model: Any, cache: str) -> tuple[np.ndarray, list[KVCache], Any]:
    return steps(random_llama(model), cache)


def collectives(program: Any) -> Counter[str]:
    """How often a compiled step talks to other devices."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()))


def compare(cache: str, data: str, heads: str, kv_heads: str = "2") -> dict[str, Any]:
    shape = MODELS[kv_heads]
    model = on(random_llama(shape), int(data), int(heads))
    (logits, held, program), (expected, caches, _) = steps(model, cache), alone(shape, cache)
    # A sum in another order may round a number to another code, so each step starts from one device's cache.
    errors = [np.abs(logits[0] - expected[0]).max()]
    for before, known, after in zip(expected, caches, expected[1:], strict=False):
        got, _ = program(Flat.of(model), greedy(before), placed_cache(known, model.mesh, ROWS), ACTIVE)
        errors.append(np.abs(got - after).max())
    ours, theirs = (jax.tree.leaves(tree[-1]) for tree in (held, caches))
    return {
        "tokens equal": bool((greedy(logits) == greedy(expected)).all()),
        "error": float(max(errors)),
        "collectives": collectives(program),
        "shapes equal": [x.shape for x in ours] == [x.shape for x in theirs],
        # An array lies over rows, and over KV heads as far as there are any.
        "parts": sorted({x.nbytes / x.addressable_shards[0].data.nbytes for x in ours if x.ndim > 1}),
    }


def engine(cache: str, data: str, heads: str) -> dict[str, Any]:
    """What an engine answers, beside `generate` on one device, and what its programs hold and say."""
    model, numbers = random_llama(MODEL), dict(slots=4, context=48, chunk_tokens=32)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, MODEL.vocab_size, length).tolist() for length in (5, 36, 17, 3, 36, 24, 9)]
    prompts[4][:34] = prompts[1][:34]
    ids, lengths = np.zeros((len(prompts), 36), np.int32), np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    alone = kj.generate(model, ids, lengths, cache=CACHES[cache], max_new_tokens=STEPS, eos_ids=()).tokens
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        compiled.extend([event] * event.endswith("backend_compile_duration"))

    with Engine(on(model, int(data), int(heads)), cache=CACHES[cache], **numbers) as running:
        jax.monitoring.register_event_duration_secs_listener(listen)
        requests = [kj.Request(tokens=prompt, max_new_tokens=STEPS, stop_ids=()) for prompt in prompts]
        handles = [running.submit(request) for request in requests[:3]]
        next(iter(handles[0]))
        handles += [running.submit(request) for request in requests[3:]]
        next(iter(handles[2]))
        handles[2].cancel()
        got = [list(handle.result(100.0).tokens) for handle in handles]
        stats, programs = running.stats(), running._programs
        jax.monitoring.unregister_event_duration_listener(listen)
    leaves = [leaf for leaf in jax.tree.leaves(programs.slots.cache) if leaf.ndim > 1]
    return {
        "tokens": got,
        "alone": [row[: len(tokens)] for row, tokens in zip(alone.tolist(), got, strict=True)],
        "cached tokens": stats.cached_tokens,
        "compiled": compiled,
        "collectives": collectives(programs._compiled["burst", 0]),
        "parts": sorted({leaf.nbytes / leaf.addressable_shards[0].data.nbytes for leaf in leaves}),
        "order": running._order,
    }


def engines_that_cannot_be() -> list[Any]:
    """What is said of numbers that do not fit, and the part of a row and of weights that each device has."""
    said: list[Any] = []
    model = on(random_llama(MODEL), 2, 2)
    row = shapes(model, CACHES["full"], context=16, chunk_tokens=16)[1]
    for numbers in (dict(slots=3), dict(memory_bytes=1000)):
        try:
            Engine(model, cache="full", context=16, **numbers)
        except ValueError as error:
            said.append(str(error))
    return [*said, *(bytes_of_device(tree) / tree_bytes(tree) for tree in (row.cache, model))]


def generated() -> dict[str, Any]:
    """`generate`, `stream` and a prefix that is read on one mesh and continued on another."""
    model, cache, text = random_llama(MODEL), CACHES["kivi2+scope"], "a long text to read"
    tokenizer = AsciiTokenizer()
    model_on, other = on(model, 2, 4), on(model, 1, 2)
    options = dict(max_new_tokens=6, sampler=kj.Sample(temperature=0.7), key=jax.random.key(3))
    texts = [[5, 6, 7], [9, 8], [3], [4, 4, 4]]
    ids, lengths = np.zeros((4, 3), np.int32), np.array([len(row) for row in texts])
    for row, known in zip(ids, texts, strict=True):
        row[: len(known)] = known
    found = [
        np.asarray(kj.generate(m, ids, lengths, cache=cache, **options).tokens) for m in (model, model_on)
    ]
    with tempfile.TemporaryDirectory() as folder:
        kj.save_prefix(
            f"{folder}/prefix", read := kj.read_prefix(model_on, tokenizer, [text], cache=cache), model_on
        )
        loaded = kj.load_prefix(f"{folder}/prefix", other)
    last = dict(max_new_tokens=6, eos_ids=())
    questions = ["b", "cd"]
    alone = kj.read_prefix(model, tokenizer, [text], cache=cache)
    return {
        "generate": bool((found[0] == found[1]).all()),
        "prefix": [
            kj.complete(m, tokenizer, questions, prefix=prefix, **last)
            for m, prefix in ((model, alone), (model_on, read), (other, loaded))
        ],
        "chat": [said(kj.Chat(m, tokenizer, cache="full", context=64)) for m in (model, other)],
        "stream": ["".join(kj.stream(m, tokenizer, "b", cache="full", **last)) for m in (model, other)],
    }


def said(chat: kj.Chat) -> list[list[int]]:
    return [list(chat.reply(message, max_new_tokens=4)) for message in ("ab", "c")]


def files() -> dict[str, Any]:
    """Models read to a mesh from every kind of file, beside those read and then spread."""
    found: dict[str, Any] = {}
    raw = {**LLAMA, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        source = write_checkpoint(Path(folder) / "hf", raw)
        save(kj.load(source)[0], Path(folder) / "orbax")
        gguf = write_gguf(Path(folder) / "model.gguf")
        for path in (source, Path(folder) / "orbax", gguf):
            for sizes in ((1, 4), (2, 2)):
                mesh = kj.make_mesh(data=sizes[0], model=sizes[1])
                pair = kj.load(path, mesh=mesh)[0], spread(kj.load(path)[0], mesh)
                ours, theirs = (jax.tree.leaves(nnx.state(model)) for model in pair)
                found[f"{path.name} {sizes}"] = all(
                    x.sharding == y.sharding and (np.asarray(x) == np.asarray(y)).all()
                    for x, y in zip(ours, theirs, strict=True)
                )
    return found


def benched() -> list[dict[str, Any]]:
    cache = CACHES["kivi2"]
    return list(bench.run(MODEL, cache, [(1, 1), (2, 2)], context=32, new_tokens=2, batch=2, dtype="float32"))


def families() -> dict[str, float]:
    """The largest error of logits of every family on two devices."""
    found: dict[str, float] = {}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 24), np.int32))
    forward = jax.jit(lambda model, tokens: model(tokens))
    for model_type, variants in VARIANTS.items():
        raw = raw_config(model_type, list(variants)[-1])
        with tempfile.TemporaryDirectory() as folder:
            source = write_checkpoint(Path(folder) / "hf", raw, family_tensors(raw))
            model, meshed = kj.load(source)[0], kj.load(source, mesh=kj.make_mesh(model=2))[0]
        found[model_type] = float(np.abs(np.asarray(forward(model, tokens)) - meshed(tokens)).max())
    return found


def commands() -> dict[str, Any]:
    """What the command line and the harness say on two devices, beside what they say on one."""
    found: dict[str, Any] = {}
    raw = {**LLAMA, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_checkpoint(Path(folder) / "hf", raw, tokens=61))
        text = Path(folder) / "text.txt"
        text.write_text(" ".join(f"w{n % 50}" for n in range(400)))
        for mesh in ((), ("--mesh", "data=1,model=2")):
            out, cache = Path(folder) / f"out{len(mesh)}", ("--cache", "kivi2:group_size=8:residual_length=8")
            options = (*cache, *mesh)
            said = [call("chat", model, "--max-new-tokens", 4, *options, stdin="w3 w5\nw7\n")]
            call("cache", "save", model, text, out / "prefix", *options)
            asked = {"model": "hf", "prompt": ["w3 w5", "w7"], "max_tokens": 4, "temperature": 0}
            line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": asked}
            source = Path(folder) / "in.jsonl"
            source.write_text(json.dumps(line))
            call("batch", model, source, "--out", out / "answers", "--context", 32, "--slots", 2, *options)
            [answer] = (out / "answers").read_text().splitlines()
            said.append([one["text"] for one in json.loads(answer)["response"]["body"]["choices"]])
            said.append(
                call("generate", model, "w6", "--prefix", out / "prefix", "--max-new-tokens", 4, *mesh)
            )
            asked = ("--model", model, "--data", text, "--length", 32, "--limit", 2, "--out", out)
            call("eval", "perplexity", *asked, *options)
            lines = [line for path in out.rglob("*.jsonl") for line in path.read_text().splitlines()]
            numbers = [number for line in lines for number in json.loads(line).get("nll", ())]
            found[str(len(mesh))] = said, numbers, scored(model, mesh[-1:])
    return found


def call(*arguments: Any, stdin: str = "") -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def scored(model: str, mesh: tuple[str, ...]) -> list[float]:
    """Log-likelihoods as the harness asks for them; none where it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        return []
    from lm_eval.api.instance import Instance

    from kivi_jax.eval.lm_eval import KiviJax

    adapter = KiviJax(model, mesh=mesh[0].replace(",", ":") if mesh else None)
    asked = Instance(request_type="loglikelihood", doc={}, arguments=("w3 w1", " w5 w9"), idx=0)
    return [float(score) for score, _ in adapter.loglikelihood([asked], disable_tqdm=True)]


def refusals() -> list[str]:
    said: list[str] = []
    for data, heads, shape in ((1, 3, MODEL), (1, 8, MODELS["6"]), (3, 3, MODEL), (0, 1, MODEL)):
        try:
            on(random_llama(shape), data, heads)
        except ValueError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    found: dict[str, Any] = {}
    for part in sys.argv[1:]:
        name, *arguments = part.split(":")
        found[part] = globals()[name](*arguments)
    sys.stdout.write(json.dumps(found))
