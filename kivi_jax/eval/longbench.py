"""LongBench (arXiv 2308.14508): the tasks of KIVI's tables that are scored without word segmentation.

Prompts are the benchmark's own and are read from the files that it publishes beside its data,
`dataset2prompt.json` and `dataset2maxlen.json`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kivi_jax.eval import scoring
from kivi_jax.eval.samples import Sample, files_by_task, read_rows

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
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")


def read_samples(data: str | Path, prompts: str | Path | None, *, limit: int | None) -> list[Sample]:
    """Up to `limit` samples of every task in `data`: NAME.jsonl files, NAME being a task's.

    Args:
        data: a folder, a file, or a data set on the hub with a configuration per task.
        prompts: the folder of `dataset2prompt.json` and `dataset2maxlen.json`; by default that of `data`.
        limit: samples per task; None for all.

    Raises:
        ValueError: there is no task's file, or the prompts are missing.
    """
    path = Path(data)
    folder = Path(prompts) if prompts is not None else path if path.is_dir() else path.parent
    templates, most = (_read_json(folder / f"dataset2{name}.json") for name in ("prompt", "maxlen"))
    sources: Mapping[str, Any] = (
        files_by_task(path, METRICS) if path.exists() else {task: f"{data}:{task}" for task in METRICS}
    )
    samples: list[Sample] = []
    for task, source in sources.items():
        for index, row in enumerate(read_rows(source)[:limit]):
            info = {"classes": row["all_classes"]} if METRICS[task] is None else {}
            samples.append(
                Sample(
                    id=f"{task}-{row.get('_id', index)}",
                    task=task,
                    prompt=templates[task].format(**row),
                    answers=list(row["answers"]),
                    max_new_tokens=most[task],
                    truncate=True,
                    chat=task not in NO_CHAT,
                    info=info,
                )
            )
    return samples


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"LongBench's {path.name} cannot be read ({error}): copy the benchmark's config files beside its "
            "data, or pass their folder as --prompts"
        ) from None


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
