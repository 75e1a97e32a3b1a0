"""`kivi-jax serve` and `kivi-jax batch`: a model behind OpenAI's interface, over HTTP or from a file."""

import importlib.util
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from kivi_jax import options

if TYPE_CHECKING:
    from kivi_jax.generation.engine import Engine

NEEDED = ("openai", "prometheus_client", "starlette", "uvicorn")
LOCAL = ("127.0.0.1", "localhost", "::1")
SlotsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Rows decoded together; by default 8, for each part of a mesh's data."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Instead of --slots: as many as fit, weights included, in 24GiB a device."),
]
ContextOption = Annotated[int, typer.Option(min=2, help="The most tokens of a prompt and its answer.")]
NameOption = Annotated[
    str | None, typer.Option(help="What requests call the model; by default its last part, such as llama-8b.")
]


def serve(
    model: options.ModelArgument,
    cache: options.CacheOption = options.DEFAULT_CACHE,
    slots: SlotsOption = None,
    memory: MemoryOption = None,
    context: ContextOption = 4096,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    key: Annotated[
        str | None, typer.Option(envvar="KIVI_JAX_API_KEY", help="What clients must know: their API key.")
    ] = None,
    name: NameOption = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask; may be repeated.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Rows that may wait; more are refused.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.001, help="The most seconds of an answer.")] = 600.0,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that SIGTERM leaves to answers.")] = 30,
    max_body: Annotated[str, typer.Option(help="The most bytes of a request.")] = "4MiB",
    dtype: options.DtypeOption = None,
    mesh: options.MeshOption = None,
) -> None:
    """Answer OpenAI's clients over HTTP; a chat for the browser is at /.

    Example:  kivi-jax serve ./llama-8b-instruct --slots 16 --context 8192

    Example:  kivi-jax serve demo --cache kivi2 --context 512
    """
    check_installed("serve")
    from kivi_jax.commands.hints import say
    from kivi_jax.console import parse_bytes
    from kivi_jax.serve.app import create_app
    from kivi_jax.serve.listening import listen, run
    from kivi_jax.serve.service import Service

    most_bytes = parse_bytes(max_body)
    listening = listen(host, port)
    name = name or FilePath(model).name
    with listening, open_engine(model, cache, slots, memory, context, queue, dtype, mesh) as engine:
        service = Service(engine, name=name, fingerprint=fingerprint(model, engine, dtype), timeout=timeout)
        app = create_app(service, key=key, origins=cors or (), most_bytes=most_bytes)
        if key is None and host not in LOCAL:
            say("hint: whoever reaches this machine can ask; --key KEY or KIVI_JAX_API_KEY lets others not")
        shown = f"[{host}]" if ":" in host else host
        say(f"{name} at http://{shown}:{listening.getsockname()[1]} (a chat), /v1 for OpenAI's clients")
        run(app, listening, drain=drain)


def batch(
    model: options.ModelArgument,
    source: Annotated[FilePath, typer.Argument(help="Requests in OpenAI's batch format, one a line.")],
    destination: Annotated[
        FilePath,
        typer.Option("--out", help="The file for answers; the same command again goes on in it."),
    ],
    cache: options.CacheOption = options.DEFAULT_CACHE,
    slots: SlotsOption = None,
    memory: MemoryOption = None,
    context: ContextOption = 4096,
    name: NameOption = None,
    dtype: options.DtypeOption = None,
    mesh: options.MeshOption = None,
) -> None:
    """Answer a file of requests, in OpenAI's batch format, as fast as the slots allow.

    Example:  kivi-jax batch ./llama-8b-instruct in.jsonl --out out.jsonl
    """
    check_installed("batch")
    from kivi_jax.commands.hints import say
    from kivi_jax.eval.run import progress_bar
    from kivi_jax.serve.batch import answer_batch, read_questions
    from kivi_jax.serve.service import Service

    name = name or FilePath(model).name
    questions = read_questions(source, name)
    if destination.exists() and destination.samefile(source):
        raise ValueError(f"{destination} is the file of requests: choose another for the answers")
    with open_engine(model, cache, slots, memory, context, 2**16, dtype, mesh) as engine:
        service = Service(engine, name=name, fingerprint=fingerprint(model, engine, dtype), timeout=None)
        with progress_bar() as progress:
            refused = answer_batch(
                service, questions, destination, together=2 * engine.slots, progress=progress
            )
    say(f"{len(questions):,} answers in {destination}" + f", {refused:,} of them refusals" * bool(refused))


def check_installed(command: str) -> None:
    """Refuse to begin without the extra `serve`.

    Raises:
        ValueError: a package of it is not installed.
    """
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise ValueError(f"kivi-jax {command} needs {', '.join(missing)}: pip install 'kivi-jax[serve]'")


def open_engine(
    model: str,
    cache: str,
    slots: int | None,
    memory: str | None,
    context: int,
    queue: int,
    dtype: options.Dtype | None,
    mesh: str | None,
) -> "Engine":
    """The engine that a command line asks for, compiled.

    Raises:
        ValueError: an option is wrong, both slots and memory are given, or the model cannot be used.
    """
    from kivi_jax.cache.names import parse_cache
    from kivi_jax.console import parse_bytes
    from kivi_jax.generation.engine import Engine
    from kivi_jax.generation.loading import open_model
    from kivi_jax.mesh import ROWS, parts_of

    if slots is not None and memory is not None:
        raise ValueError("--slots and --memory both say how many rows there are: pass one")
    strategy = parse_cache(cache)
    memory_bytes = None if memory is None else parse_bytes(memory)
    llama, tokenizer = open_model(model, dtype, mesh)
    usual = 8 * parts_of(llama.mesh, ROWS) if memory is None else None
    return Engine(
        llama,
        tokenizer,
        cache=strategy,
        slots=usual if slots is None else slots,
        memory_bytes=memory_bytes,
        context=context,
        queue=queue,
        progress=True,
    )


def fingerprint(model: str, engine: "Engine", dtype: options.Dtype | None) -> str:
    """Names all that answers depend on besides the request: model, cache, context and dtype."""
    import hashlib
    import json

    from convert.hub import resolve
    from kivi_jax.cache.names import cache_name
    from kivi_jax.eval import contents
    from kivi_jax.generation.loading import dtype_name

    parts = [
        contents.of_model(resolve(model)),
        cache_name(engine.strategy),
        engine.context,
        dtype_name(dtype),
    ]
    return f"fp_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
