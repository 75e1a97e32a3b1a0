"""`kivi-jax eval`: the papers' evaluations, and their reports."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from kivi_jax.cache.names import parse_cache
from kivi_jax.console import print_table
from kivi_jax.eval.run import Run, print_report, progress_bar, read_text
from kivi_jax.options import ChatOption, DtypeOption, MeshOption

if TYPE_CHECKING:
    from kivi_jax.eval.samples import Sample

evaluate = typer.Typer(
    help="""Run the papers' evaluations, or the demo's tasks, through any caches.

    Those of data sets keep predictions as they come: run the same command again after a cut.

    Example:  kivi-jax eval passkey --model demo --tokens 2048 --cache kivi2
    """,
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="A checkpoint's directory, a hub name, or demo.")]
Caches = Annotated[
    list[str] | None, typer.Option("--cache", help="May be repeated; by default full, kivi4, kivi2.")
]
Data = Annotated[str, typer.Option(help="A local file or folder, or a data set's name on the hub.")]
Out = Annotated[Path, typer.Option(help="The folder for predictions; a folder for each evaluation.")]
Limit = Annotated[int | None, typer.Option(min=1, help="The most samples (of each task); by default all.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows computed together.")]
NewTokens = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]


@evaluate.command()
def perplexity(
    model: Model,
    data: Annotated[str, typer.Option(help="A text file.")],
    out: Out,
    cache: Caches = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    limit: Limit = None,
    batch: Batch = 8,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """Perplexity by position in a long text, every token decoded from the cache.

    Example:  kivi-jax eval perplexity --model demo --data book.txt --out results
    """
    from kivi_jax.eval.perplexity import read_windows, score_windows

    run = Run("perplexity", model, data, out, dtype, mesh=mesh)
    llama, tokenizer = run.loaded
    windows = read_windows(tokenizer, read_text(data), length)[:limit]

    def compute(name: str, path: Path, settings: dict[str, Any], progress: Progress) -> None:
        score_windows(
            llama,
            windows,
            cache=parse_cache(name),
            path=path,
            settings=settings,
            batch_size=batch,
            progress=progress,
        )

    run.compare(compute, cache, length=length)


@evaluate.command()
def longbench(
    model: Model,
    data: Data,
    out: Out,
    cache: Caches = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="The folder of dataset2prompt.json and dataset2maxlen.json."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longer prompts lose their middle; by default what fits.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated; by default all in --data, and on the hub KIVI's 15."),
    ] = None,
    chat: ChatOption = False,
    limit: Limit = None,
    batch: Batch = 1,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """LongBench, the tasks of KIVI's tables: NAME.jsonl files in --data.

    Example:  kivi-jax eval longbench --model ./llama-8b --data ./data --out out
    """
    from kivi_jax.eval.longbench import LONGEST_ANSWER, prompt_files, read_samples

    samples = read_samples(data, prompts, limit=limit, tasks=task or ())
    run = Run("longbench", model, data, out, dtype, beside=prompt_files(data, prompts), mesh=mesh)
    if max_length is None:  # the same for all tasks, which may run one by one
        positions = run.loaded[0].config.max_position_embeddings
        max_length = positions - LONGEST_ANSWER
        if max_length < 2:
            raise ValueError(
                f"the model has {positions} positions, no more than answers need: pass --max-length"
            )
    run.generate(samples, cache, batch=batch, max_length=max_length, chat=chat)


@evaluate.command()
def longgenbench(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Folder of built prompts (gsm8k_30.jsonl), or with --build questions.")
    ],
    out: Out,
    cache: Caches = None,
    task: Annotated[
        list[str] | None, typer.Option(help="gsm8k, mmlu or csqa; may be repeated; by default gsm8k.")
    ] = None,
    build: Annotated[
        str | None,
        typer.Option(
            help="Build prompts: questions from --data (GSM8K, MMLU, CommonsenseQA), examples from here."
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(min=1, help="Questions in a prompt; by default 30 (csqa 40), twice that for 8K."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples in a prompt, with --build.")] = 8,
    max_new_tokens: NewTokens = 4096,
    chat: ChatOption = False,
    limit: Limit = None,
    batch: Batch = 1,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """LongGenBench: many questions in one prompt, answered in one long output (SCOPE's evaluation).

    Tasks run one after another into one folder are reported together.

    Example:  kivi-jax eval longgenbench --model ./llama-8b --data ./lgb --out out
    """
    from kivi_jax.eval import longgenbench as bench
    from kivi_jax.eval.samples import find_file, read_rows

    tasks = list(dict.fromkeys(task or ["gsm8k"]))
    if unknown := [name for name in tasks if name not in bench.TASKS]:
        raise ValueError(f"unknown task {', '.join(unknown)}: choose from {', '.join(bench.TASKS)}")
    if len(tasks) > 1 and (build is not None or not Path(data).is_dir()):
        raise ValueError("several tasks need --data a folder of built prompts: run them one by one otherwise")
    samples: list[Sample] = []
    for name in tasks:
        count = questions or bench.papers_questions(name, max_new_tokens)
        if build is None:
            rows = read_rows(find_file(data, f"{name}_{count}.jsonl"), "prompt", "answers")
            samples += bench.read_samples(name, rows[:limit], max_new_tokens=max_new_tokens)
        else:
            samples += bench.build_samples(
                name,
                read_rows(data, "question"),
                examples=read_rows(build, "question"),
                example_count=examples,
                questions_per_prompt=count,
                max_new_tokens=max_new_tokens,
            )[:limit]
    settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens, chat=chat, questions=questions)
    if build is not None:
        settings |= dict(build=build, examples=examples)
    beside = {} if build is None else {"build": build}
    run = Run("longgenbench", model, data, out, dtype, beside=beside, mesh=mesh)
    run.generate(samples, cache, batch=batch, **settings)


@evaluate.command()
def needle(
    model: Model,
    out: Out,
    cache: Caches = None,
    data: Annotated[
        str | None,
        typer.Option(help="A text to hide keys in, or recorded prompts (.jsonl)."),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a prompt; may be repeated.")
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Places of the key, from start to end.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per length and depth.")] = 1,
    max_new_tokens: NewTokens = 8,
    chat: ChatOption = False,
    limit: Limit = None,
    batch: Batch = 4,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """A pass key hidden at every depth of prompts of every length; a heat map per cache.

    Example:  kivi-jax eval needle --model demo --length 1024 --depths 5 --out out
    """
    from kivi_jax.eval.needle import build_samples, read_samples
    from kivi_jax.eval.samples import read_rows

    run = Run("needle", model, data or "made-up text", out, dtype, mesh=mesh)
    _, tokenizer = run.loaded
    settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens)
    if data is not None and data.endswith(".jsonl"):
        samples = read_samples(tokenizer, read_rows(data, "input", "target"), max_new_tokens=max_new_tokens)
    else:
        lengths = length or [256, 512, 1024]
        samples = build_samples(
            tokenizer,
            lengths=lengths,
            depths=depths,
            repeats=repeats,
            haystack=None if data is None else read_text(data),
            max_new_tokens=max_new_tokens,
        )
        settings |= dict(depths=depths)
    run.generate(samples[:limit], cache, batch=batch, chat=chat, **settings)


@evaluate.command()
def ruler(
    model: Model,
    data: Data,
    out: Out,
    cache: Caches = None,
    max_new_tokens: NewTokens = 128,
    chat: ChatOption = False,
    limit: Limit = None,
    batch: Batch = 1,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """RULER's needle tasks, from the files of its own scripts (TASK/validation.jsonl), or TASK.jsonl.

    Example:  kivi-jax eval ruler --model ./llama-8b --data ./ruler --out results
    """
    from kivi_jax.eval.ruler import read_samples

    samples = read_samples(data, limit=limit, max_new_tokens=max_new_tokens)
    run = Run("ruler", model, data, out, dtype, mesh=mesh)
    run.generate(samples, cache, batch=batch, max_new_tokens=max_new_tokens, chat=chat)


@evaluate.command()
def gsm8k(
    model: Model,
    data: Annotated[str, typer.Option(help="Folder of train.jsonl and test.jsonl, or openai/gsm8k:main.")],
    out: Out,
    cache: Caches = None,
    examples: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 5,
    max_new_tokens: NewTokens = 256,
    chat: ChatOption = False,
    limit: Limit = None,
    batch: Batch = 4,
    dtype: DtypeOption = None,
    mesh: MeshOption = None,
) -> None:
    """GSM8K with worked examples in the prompt, as in KIVI's example.

    Example:  kivi-jax eval gsm8k --model ./llama-8b --data ./gsm8k --out results
    """
    from kivi_jax.eval.gsm8k import build_samples
    from kivi_jax.eval.samples import read_rows

    path = Path(data)
    shown, asked = (
        read_rows(path / f"{split}.jsonl" if path.is_dir() else f"{data}:{split}", "question", "answer")
        for split in ("train", "test")
    )
    samples = build_samples(asked[:limit], examples=shown[:examples], max_new_tokens=max_new_tokens)
    run = Run("gsm8k", model, data, out, dtype, mesh=mesh)
    settings = dict(examples=examples, max_new_tokens=max_new_tokens, chat=chat)
    run.generate(samples, cache, batch=batch, **settings)


@evaluate.command()
def study(
    model: Model,
    data: Annotated[str, typer.Option(help="A text file.")],
    out: Out,
    bits: Annotated[list[int] | None, typer.Option(help="May be repeated; by default 2 and 4.")] = None,
    group_size: Annotated[list[int] | None, typer.Option(help="May be repeated; by default 32.")] = None,
    residual_length: Annotated[
        list[int] | None, typer.Option(help="May be repeated; by default 32 and 128.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 4,
    dtype: DtypeOption = None,
) -> None:
    """The quantizer's errors on real activations, keys and values per channel and per token.

    Example:  kivi-jax eval study --model demo --data book.txt --out results
    """
    import jax.numpy as jnp

    from kivi_jax.eval.jobs import finish
    from kivi_jax.eval.perplexity import read_windows
    from kivi_jax.eval.study import FIELDS, Study, all_settings

    run = Run("study", model, data, out, dtype)
    llama, tokenizer = run.loaded
    wanted = all_settings(
        llama.config,
        bits=bits or [2, 4],
        group_sizes=group_size or [32],
        residual_lengths=residual_length or [32, 128],
    )
    texts = read_windows(tokenizer, read_text(data), length)[:windows]
    rows = [(context + tokens)[:length] for _, context, tokens in texts]
    measured = Study(llama, jnp.asarray(rows, jnp.int32))
    with progress_bar() as progress:
        finish(
            run.folder / "study.jsonl",
            run.settings(length=length, windows=len(rows)),
            [[setting] for setting in wanted],
            lambda batch: [measured.measure(setting) for setting in batch],
            identify=lambda setting: setting.name,
            progress=progress,
            fields=FIELDS,
        )
    print_report([run.folder])


@evaluate.command()
def kept(
    model: Model = "demo",
    cache: Annotated[list[str] | None, typer.Option(help="May be repeated; by default SCOPE's.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Of the demo's task of numbered questions.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of the problem.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for the plots.")] = Path("kept"),
    dtype: DtypeOption = None,
) -> None:
    """Which tokens caches hold while decoding, against what full attention looks at; and its drift.

    Example:  kivi-jax eval kept --model demo --cache scope:window=64:recent=32
    """
    from kivi_jax.demo import tasks
    from kivi_jax.eval.kept import draw_drift, draw_maps, drift, kept_weight, study, table
    from kivi_jax.figures import check_place, save_figure
    from kivi_jax.generation.loading import open_model

    maps, drifts = out / "kept.png", out / "drift.png"
    for file in (maps, drifts):
        check_place(file)
    llama, tokenizer = open_model(model, dtype)
    problem = tasks.questions(seed, count=questions)
    prompt = tokenizer(problem.prompt)["input_ids"]
    answer = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
    equal = len(prompt) + 64  # as many tokens as the others hold in all
    names = cache or [
        "scope:window=64:recent=32",
        f"scope:decode=adaptive:window=64:recent=32:max_new_tokens={len(answer)}",
        f"scope:decode=discontinuous:window=64:recent=32:max_new_tokens={len(answer)}",
        f"scope:decode=h2o:budget={equal}:recent=32",
    ]
    caches = {name: parse_cache(name) for name in names}
    for strategy in caches.values():  # a mistake in the last one should not cost the time of the first
        strategy.check(llama.config)
    with progress_bar() as progress:
        bar = progress.add_task("decoding", total=len(caches) * len(answer))
        weights, held = study(llama, prompt, answer, caches, lambda: progress.advance(bar))
    print_table(Console(), table({name: kept_weight(weights, seen) for name, seen in held.items()}))
    last = llama.config.num_layers - 1
    heads = [(0, 0), (last // 2, 0), (last, 0)]
    save_figure(draw_maps(weights, held, heads), maps)
    counts = [count for count in (16, 32, 64) if count < len(prompt)]
    save_figure(draw_drift({n: drift(weights, len(prompt), n) for n in counts}), drifts)
    Console(stderr=True).print(f"wrote {maps} and {drifts}", markup=False)


@evaluate.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that evaluations were written to.")],
) -> None:
    """Print the tables of finished evaluations, and draw their plots beside them.

    Example:  kivi-jax eval report results
    """
    print_report(folders)
