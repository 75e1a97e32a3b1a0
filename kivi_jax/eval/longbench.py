"""LongBench (arXiv 2308.14508): KIVI's 15 tasks, and three more that are scored without word segmentation.

Prompts are the benchmark's own and are read from the files that it publishes beside its data,
`dataset2prompt.json` and `dataset2maxlen.json`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kivi_jax.eval import scoring
from kivi_jax.eval.samples import Sample, as_texts, files_by_task, read_rows

METRICS: dict[str, Callable[[str, str], float] | None] = {  # None: classification, which needs classes
    "narrativeqa": scoring.answer_f1,
    "qasper": scoring.answer_f1,
    "multifieldqa_en": scoring.answer_f1,
    "hotpotqa": scoring.answer_f1,
    "2wikimqa": scoring.answer_f1,
    "musique": scoring.answer_f1,
    "gov_report": scoring.rouge_l,
    "qmsum": scoring.rouge_l,
    "multi_news": scoring.rouge_l,
    "trec": None,
    "triviaqa": scoring.answer_f1,
    "samsum": scoring.rouge_l,
    "lsht": None,
    "passage_count": scoring.count,
    "passage_retrieval_en": scoring.retrieval,
    "passage_retrieval_zh": scoring.retrieval,
    "lcc": scoring.code_similarity,
    "repobench-p": scoring.code_similarity,
}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # few-shot tasks: what follows continues the pattern
LONGEST_ANSWER = 512  # tokens, of any task
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")
MORE_THAN_KIVI = ("lsht", "passage_count", "passage_retrieval_zh")
KIVI_TASKS = tuple(task for task in METRICS if task not in MORE_THAN_KIVI)  # the 15 whose mean KIVI prints


def prompt_files(data: str | Path, prompts: str | Path | None) -> dict[str, Path]:
    """LongBench's config files of prompts and lengths: in the folder `prompts`, or else beside the data."""
    path = Path(data)
    folder = Path(prompts) if prompts is not None else path if path.is_dir() else path.parent
    return {name: folder / f"dataset2{name}.json" for name in ("prompt", "maxlen")}


def read_samples(
    data: str | Path, prompts: str | Path | None, *, limit: int | None, tasks: Sequence[str] = ()
) -> list[Sample]:
    """Up to `limit` samples of every task in `data`: NAME.jsonl files, NAME being a task's.

    Args:
        data: a folder, a file, or a data set on the hub with a configuration per task.
        prompts: the folder of `dataset2prompt.json` and `dataset2maxlen.json`; by default that of `data`.
        limit: samples per task; None for all.
        tasks: of which tasks; by default all that a folder has, and of a data set on the hub KIVI's 15.

    Raises:
        ValueError: a task is unknown or has no file, or the prompts are missing.
    """
    if unknown := [task for task in tasks if task not in METRICS]:
        raise ValueError(f"unknown task {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    path = Path(data)
    templates, most = (_read_json(file) for file in prompt_files(data, prompts).values())
    sources: Mapping[str, Any] = (
        files_by_task(path, METRICS)
        if path.exists()
        else {task: f"{data}:{task}" for task in tasks or KIVI_TASKS}
    )
    if missing := [task for task in tasks if task not in sources]:
        raise ValueError(f"{path} has no file of the task {', '.join(missing)}, but {', '.join(sources)}")
    samples: list[Sample] = []
    for task in tasks or sources:
        if task not in templates or task not in most:
            folder = prompt_files(data, prompts)["prompt"].parent
            raise ValueError(f"{folder} has no prompt or no answer length of {task} in dataset2*.json")
        classes = ("all_classes",) if METRICS[task] is None else ()
        rows = read_rows(sources[task], "context", "input", "answers", *classes)
        for index, row in enumerate(rows[:limit]):
            samples.append(
                Sample(
                    id=f"{task}-{row.get('_id', index)}",
                    task=task,
                    prompt=_fill(templates[task], row, task),
                    answers=as_texts(row["answers"]),
                    max_new_tokens=most[task],
                    truncate=True,
                    chat=task not in NO_CHAT,
                    info={"classes": as_texts(row["all_classes"])} if classes else {},
                )
            )
    return samples


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not isinstance(found := json.loads(path.read_text("utf-8")), dict):
            raise TypeError("it is no JSON object")
        return found
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"LongBench's {path.name} cannot be read ({error}): copy the benchmark's config files beside its "
            "data, or pass their folder as --prompts"
        ) from None


def _fill(template: Any, row: Mapping[str, Any], task: str) -> str:
    try:
        return str.format(template, **row)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"LongBench's prompt of {task} in dataset2prompt.json cannot be filled ({error!r}): copy it again"
        ) from error


def score(record: Mapping[str, Any]) -> float:
    """The task's metric, the best over the reference answers."""
    task, prediction = record["task"], record["prediction"]
    if task in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max(
        _score_one(task, prediction, answer, record.get("classes", ())) for answer in record["answers"]
    )


def _score_one(task: str, prediction: str, answer: str, classes: Sequence[str]) -> float:
    metric = METRICS[task]
    return (
        scoring.classification(prediction, answer, classes) if metric is None else metric(prediction, answer)
    )
