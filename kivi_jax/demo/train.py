"""Train the demo model again: `python -m kivi_jax.demo.train --out DIR`. It can be stopped, and goes on.

The rows of a batch are split over the devices; to use two CPU cores well, make them two devices:

    XLA_FLAGS='--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false'

Writes checkpoints and `curve.json` as it goes, then the Hugging Face directory `model` with a plot of the
curve.
"""

import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from kivi_jax.demo import batches, tokenizer
from kivi_jax.demo.batches import Batch
from kivi_jax.demo.export import export
from kivi_jax.demo.initialize import initialize
from kivi_jax.demo.recipe import Recipe, model_config
from kivi_jax.figures import new_figure, save_figure
from kivi_jax.generation.loading import load
from kivi_jax.model.layer import query_key_value_columns
from kivi_jax.model.llama import Llama

Measure = dict[str, int | float]  # of one step: its number, seconds since the start, loss, accuracy by task


class TrainState(NamedTuple):
    """What training changes, and what the end of a cycle needs."""

    parameters: optax.Params
    optimizer: optax.OptState
    began: optax.Params  # the parameters when the cycle began


def train(
    recipe: Recipe,
    directory: Path,
    *,
    start: Llama | None = None,
    cycle: int = 0,
    checkpoint_every: int = 100,
    measure_every: int = 20,
) -> tuple[Llama, list[Measure]]:
    """The trained model and its curve, going on from the latest checkpoint in `directory`.

    Where there is no checkpoint, training begins with cycle number `cycle`, from the weights of `start` (by
    default the initial ones). The optimizer begins anew with each cycle, so the model that one ends with is
    all that the next one needs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    encoder = tokenizer.build()
    model = initialize(model_config(), recipe.seed) if start is None else start
    graph, parameters = nnx.split(model)
    rows, everywhere = _placements()
    state = jax.device_put(_fresh(make_optimizer(recipe, cycle), parameters), everywhere)
    with (
        ocp.CheckpointManager(
            directory.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
        ) as manager,
        _progress() as bar,
    ):
        first, state = _restore(manager, state, otherwise=recipe.first_step(cycle))
        curve = _read_curve(directory, first)
        begin = time.monotonic() - (curve[-1]["seconds"] if curve else 0)
        task = bar.add_task("training", total=recipe.steps, completed=first, tokens="")
        for step in range(first, recipe.steps):
            number, stage = recipe.find(step)
            optimizer = make_optimizer(recipe, number)
            if step == recipe.first_step(number):
                state = jax.device_put(_fresh(optimizer, state.parameters), everywhere)
            batch = batches.training_batch(
                encoder, step, rows=stage.rows, tokens=stage.tokens, names=stage.tasks
            )
            state, loss = update(graph, optimizer, state, jax.device_put(batch, rows))
            bar.update(task, advance=1, tokens=stage.tokens)
            done = step + 1
            if recipe.cycles[number].average and done == recipe.first_step(number + 1):
                mean = jax.tree.map(lambda a, b: (a + b) / 2, state.began, state.parameters)
                state = state._replace(parameters=mean)
            if done % measure_every == 0 or done == recipe.steps:
                accuracy = held_out(graph, state.parameters, encoder, stage.tokens)
                seconds = round(time.monotonic() - begin, 1)
                measure = {"step": done, "tokens": stage.tokens, "seconds": seconds, "loss": float(loss)}
                curve.append(measure | accuracy)
                _write_curve(directory, curve)
            if done % checkpoint_every == 0 or done == recipe.steps:
                _save(manager, done, state)
    return nnx.merge(graph, state.parameters), curve


def _fresh(optimizer: optax.GradientTransformation, parameters: optax.Params) -> TrainState:
    own, began = (jax.tree.map(jnp.copy, parameters) for _ in range(2))  # a step consumes its state
    return TrainState(own, optimizer.init(parameters), began)


@functools.cache
def make_optimizer(recipe: Recipe, cycle: int) -> optax.GradientTransformation:
    """Clipped Muon for the matrices between embeddings, Adam for the rest; see `Cycle`."""

    def schedule(peak: float) -> optax.Schedule:
        steps, factors = zip(*recipe.cycles[cycle].rates, strict=True)
        return lambda step: peak * jnp.interp(step, jnp.array(steps), jnp.array(factors))

    def is_matrix(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
        embedding = any(getattr(key, "key", None) == "embed" for key in path)
        return MuonDimensionNumbers() if leaf.ndim == 2 and not embedding else None

    return _projections_apart(
        optax.chain(
            optax.clip_by_global_norm(recipe.clip),
            muon(
                schedule(recipe.muon_rate),
                adam_learning_rate=schedule(recipe.adam_rate),
                adam_b2=0.98,
                muon_weight_dimension_numbers=functools.partial(jax.tree.map_with_path, is_matrix),
            ),
        ),
        query_key_value_columns(model_config()),
    )


def _projections_apart(
    optimizer: optax.GradientTransformation, columns: Sequence[slice]
) -> optax.GradientTransformation:
    """`optimizer`, to which a layer's queries, keys and values are matrices of their own.

    Muon makes the change of every matrix orthogonal: of each projection, not of the three side by side.
    """

    def split(tree: Any) -> Any:
        def parts(path: tuple[Any, ...], leaf: Array) -> Array | tuple[Array, ...]:
            fused = any(getattr(key, "key", None) == "query_key_value" for key in path)
            return tuple(leaf[..., part] for part in columns) if fused else leaf

        return jax.tree.map_with_path(parts, tree)

    def join(tree: Any) -> Any:
        def whole(leaf: Array | tuple[Array, ...]) -> Array:
            return jnp.concatenate(leaf, axis=-1) if isinstance(leaf, tuple) else leaf

        return jax.tree.map(whole, tree, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def init(params: optax.Params) -> optax.OptState:
        return optimizer.init(split(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = optimizer.update(split(updates), state, split(params))
        return join(updates), state

    return optax.GradientTransformation(init, update)


@functools.partial(jax.jit, static_argnames=("graph", "optimizer"), donate_argnames=("state",))
def update(
    graph: nnx.GraphDef[Llama], optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Float[Array, ""]]:
    """One training step: the new state, and the loss before it. The state passed in is consumed."""
    loss, gradient = jax.value_and_grad(weighted_loss)(state.parameters, graph, batch)
    change, moments = optimizer.update(gradient, state.optimizer, state.parameters)
    return TrainState(optax.apply_updates(state.parameters, change), moments, state.began), loss


def weighted_loss(parameters: optax.Params, graph: nnx.GraphDef[Llama], batch: Batch) -> Float[Array, ""]:
    """Mean cross-entropy of the next token, in nats, by the batch's weights."""
    logits = nnx.merge(graph, parameters)(jnp.asarray(batch.tokens))[:, :-1]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    return (entropy * batch.weights[:, 1:]).sum() / batch.weights[:, 1:].sum()


def held_out(
    graph: nnx.GraphDef[Llama], parameters: optax.Params, encoder: Tokenizer, tokens: int, *, rows: int = 4
) -> dict[str, float]:
    """The fraction of answer tokens predicted right, by task, on `rows` held-out problems each."""
    scores = {}
    for name, sized in batches.TASKS.items():
        batch = batches.encode(encoder, (sized(seed, tokens) for seed in range(rows)), tokens)
        hits = np.asarray(_next_tokens(graph, parameters, batch.tokens))[:, :-1] == batch.tokens[:, 1:]
        scores[name] = round(float(hits[batch.weights[:, 1:] > 0].mean()), 4)
    return scores


@functools.partial(jax.jit, static_argnames=("graph",))
def _next_tokens(
    graph: nnx.GraphDef[Llama], parameters: optax.Params, tokens: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    return nnx.merge(graph, parameters)(tokens).argmax(-1)


def _placements() -> tuple[NamedSharding, NamedSharding]:
    """Rows of a batch split over all devices, and a whole copy on each."""
    mesh = jax.make_mesh((jax.device_count(),), ("rows",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())


def _save(manager: ocp.CheckpointManager, step: int, state: TrainState) -> None:
    manager.save(step, args=ocp.args.StandardSave(jax.tree.leaves(state)))


def _restore(manager: ocp.CheckpointManager, state: TrainState, *, otherwise: int) -> tuple[int, TrainState]:
    """The steps done and the latest state saved; `otherwise` and `state` itself if there is none."""
    step = manager.latest_step()
    if step is None:
        return otherwise, state
    leaves, structure = jax.tree.flatten(state)
    restored = manager.restore(step, args=ocp.args.StandardRestore(leaves))
    return step, jax.tree.unflatten(structure, restored)


def _read_curve(directory: Path, steps: int) -> list[Measure]:
    file = directory / "curve.json"
    curve = json.loads(file.read_text()) if file.exists() else []
    return [measure for measure in curve if measure["step"] <= steps]


def _write_curve(directory: Path, curve: list[Measure]) -> None:
    lines = ",\n".join(json.dumps(measure) for measure in curve)
    (directory / "curve.json").write_text(f"[\n{lines}\n]\n")


def _plot(curve: list[Measure], file: Path) -> None:
    figure = new_figure(8, 4)
    axes = figure.subplots()
    for name in batches.TASKS:
        measured = [m for m in curve if name in m]  # a curve goes on where a task was added
        axes.plot([m["step"] for m in measured], [m[name] for m in measured], label=name)
    axes.set(xlabel="training step", ylabel="held-out answer tokens right", ylim=(0, 1.02))
    for before, after in itertools.pairwise(curve):
        if before["tokens"] != after["tokens"]:
            axes.axvline(before["step"], color="lightgray")
            axes.text(before["step"], 0.02, f"{after['tokens']:.0f} tokens", rotation=90, fontsize="small")
    axes.legend(loc="center right")
    save_figure(figure, file)


def _progress() -> Progress:
    rows = TextColumn("rows of {task.fields[tokens]} tokens")
    return Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), rows)


def main(
    out: Annotated[Path, typer.Option(help="Where checkpoints, curve and model go; resumes what is there.")],
    seed: Annotated[int, typer.Option(help="Of initialization.")] = 0,
    start: Annotated[str, typer.Option(help="A model to go on from, such as demo; needs --cycle.")] = "",
    cycle: Annotated[int, typer.Option(min=0, help="Begin with this cycle of the recipe.")] = 0,
) -> None:
    """Train the demo model by the shipped recipe."""
    recipe = Recipe(seed=seed)
    if bool(start) != bool(cycle) or cycle >= len(recipe.cycles):
        raise typer.BadParameter(
            f"--start and --cycle (1 to {len(recipe.cycles) - 1}) go together: the model of the cycle before"
        )
    begin = load(start, dtype="float32")[0] if start else None
    model, curve = train(recipe, out, start=begin, cycle=cycle)
    export(model, out / "model")
    _plot(curve, out / "model" / "curve.png")


if __name__ == "__main__":
    typer.run(main)
