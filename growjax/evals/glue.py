"""GLUE and SuperGLUE: their tasks as data, and readers of the files as they are published.

Labels are carried as their names, since the numbers differ from one distribution to the next. Wang et
al., "GLUE", ICLR 2019; "SuperGLUE", NeurIPS 2019.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from growjax.errors import EvalError, raise_all
from growjax.evals import metrics
from growjax.evals.files import find, read_lines, read_records
from growjax.evals.metrics import Scores


@dataclasses.dataclass(frozen=True)
class Example:
    """One decision to take.

    **Fields**

    - `choices`: the texts, or pairs of texts, to decide between; a single one if labels are.
    - `label`: the name of the right label, the number of the right choice (`"0"`, `"1"`), or the value
      of a regression; None in test sets.
    - `group`: which question it belongs to, where one has several (MultiRC, ReCoRD).
    - `candidate`, `answers`: of ReCoRD, the entity that is put in and those that are right.
    """

    choices: tuple[tuple[str, ...], ...]
    label: str | float | None
    group: str = ""
    candidate: str = ""
    answers: tuple[str, ...] = ()


# Examples, predicted labels (or values), and the score of every label for every example
Metric = Callable[[Sequence[Example], Sequence[Any], Float[np.ndarray, "n labels"]], Scores]


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One task: where it is, how it is labelled and what it is scored by.

    **Fields**

    - `name`: as it is written, `"glue/rte"`.
    - `folder`: of its files under that of the benchmark.
    - `labels`: their names; empty for a regression.
    - `metric`: of examples, predictions and scores.
    - `dev`: the names of its development sets.
    - `columns`: of GLUE, for each text and then for the label, what a column may be called.
    - `examples`: of SuperGLUE, what one record of its files gives.
    """

    name: str
    folder: str
    labels: tuple[str, ...]
    metric: Metric
    dev: tuple[str, ...] = ("dev",)
    columns: tuple[tuple[str, ...], ...] = ()
    examples: Callable[[Mapping[str, Any]], Iterator[Example]] | None = None

    @property
    def choices(self) -> int:
        """How many texts one example has to choose from."""
        return 2 if self.name.endswith("copa") else 1

    @property
    def outputs(self) -> int:
        """How many numbers a model gives for each text."""
        return 1 if self.choices > 1 or not self.labels else len(self.labels)


def read_task(
    task: GlueTask, source: str | Path | Mapping[str, Iterable[Mapping[str, Any]]], split: str
) -> list[Example]:
    """The examples of one split of a task.

    **Arguments**

    - `task`: one of `GLUE`.
    - `source`: the folder of the benchmark, with the task's own folder in it, as they are published
      (`RTE/train.tsv`, `BoolQ/val.jsonl`; `.xz`, `.gz` and `.bz2` are unpacked while reading); or a
      dataset of the library `datasets`, `load_dataset("nyu-mll/glue", "rte")`.
    - `split`: the name of a file without its end, such as `"train"`, or a split of the dataset.

    Raises `EvalError` that lists the first bad lines.

    **Example**

        examples = read_task(GLUE["glue/rte"], "data/glue", "train")
    """
    if isinstance(source, Mapping):
        if split not in source:
            raise EvalError(f"{task.name}: no split {split!r}, only {', '.join(source)}")
        rows = source[split]
        names = getattr(rows, "features", {})
        rows = (_named(row, names) for row in rows)
        make = task.examples or (lambda row: iter([_from_row(task, row)]))
        return [example for row in rows for example in make(row)]
    folder = Path(source) / task.folder
    if task.examples is None:
        return _read_table(task, find(folder, f"{split}.tsv"))
    path = find(folder, f"{split}.jsonl")
    found: list[Example] = []
    for number, record in enumerate(read_records(path), 1):
        try:
            found += task.examples(record)
        except (KeyError, TypeError) as error:
            raise EvalError(
                f"{path}: record {number} has no {error}; it has {[*record]}"
            ) from error
    return found


def score(
    task: GlueTask, examples: Sequence[Example], outputs: Float[np.ndarray, "n outputs"]
) -> Scores:
    """The metrics of a task, from a model's outputs `[examples, labels or choices]`.

    Raises `EvalError` for examples without a label.
    """
    unlabelled = sum(example.label is None for example in examples)
    if unlabelled:
        raise EvalError(f"{task.name}: {unlabelled} of {len(examples)} examples have no label")
    if not task.labels:
        return task.metric(examples, [float(x) for x in outputs[:, 0]], outputs)
    return task.metric(examples, [task.labels[i] for i in outputs.argmax(1)], outputs)


def headline(scores: Scores) -> float:
    """One number for a task: the mean of its metrics, as in the GLUE average."""
    parts = [x for name, x in scores.items() if name != "constant" and "answerable" not in name]
    return float(np.mean(parts))


# GLUE --------------------------------------------------------------------------------------------


def _read_table(task: GlueTask, path: Path) -> list[Example]:
    """A table as published: columns between tabs, with quotes that mean nothing."""
    lines = read_lines(path)
    rows = [line.split("\t") for line in lines]
    header = rows.pop(0) if rows else []
    if task.name == "glue/cola" and "sentence" not in header:
        # The only one whose files have no header, but for its test set
        rows, header = [header, *rows], ["source", "label", "author's", "sentence"]
    *texts, label = task.columns
    wanted = [next((header.index(n) for n in names if n in header), None) for names in texts]
    if None in wanted:
        raise EvalError(f"{path}: expected columns {task.columns[:-1]}, got {header}")
    labelled = next((header.index(name) for name in label if name in header), None)
    found, faults = [], []
    for number, row in enumerate(rows, 2):
        if len(row) < len(header):
            # QQP's training set has some of these, and everybody passes them over
            if task.name != "glue/qqp":
                faults.append(f"line {number}: {len(row)} columns of {len(header)}")
            continue
        values = {
            task.columns[i][0]: row[column] for i, column in enumerate(wanted) if column is not None
        }
        if labelled is not None:
            values[label[0]] = row[labelled]
        try:
            found.append(_from_row(task, values))
        except EvalError as error:
            faults.append(f"line {number}: {error}")
    raise_all(EvalError, f"{path}: these are not rows of {task.name}:", faults[:5])
    return found


def _from_row(task: GlueTask, row: Mapping[str, Any]) -> Example:
    *texts, label = task.columns
    text = tuple(str(next(row[n] for n in names if n in row)) for names in texts)
    value = next((row[n] for n in label if n in row), None)
    if value is None or value in ("-1", -1):
        return Example((text,), None)
    if not task.labels:
        return Example((text,), float(value))
    if str(value) not in task.labels:
        raise EvalError(f"label {value!r}, expected one of {', '.join(task.labels)}")
    return Example((text,), str(value))


def _named(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a dataset with the names of its labels, where these are the benchmark's own."""
    values = dict(row)
    names = getattr(features.get("label"), "names", None)
    if names and isinstance(row["label"], int) and row["label"] >= 0:
        name = names[row["label"]]
        own = {"contradiction", "entailment", "neutral", "not_entailment"}
        values["label"] = name if name in own else row["label"]
    return values


def _labels(metric: Callable[[Sequence, Sequence], Scores]) -> Metric:
    return lambda examples, predicted, scores: metric([e.label for e in examples], predicted)


_NUMBERS, _NLI = ("0", "1"), ("contradiction", "entailment", "neutral")
_RTE = ("entailment", "not_entailment")
_PAIR = (("sentence1", "premise", "#1 String"), ("sentence2", "hypothesis", "#2 String"))
_QUESTIONS = (("question1",), ("question2",))

# Name, folder, labels, metric, and what the columns of its tables may be called
_GLUE = [
    ("cola", "CoLA", _NUMBERS, _labels(metrics.matthews), (("sentence",), ("label",))),
    ("sst-2", "SST-2", _NUMBERS, _labels(metrics.accuracy), (("sentence",), ("label",))),
    ("mrpc", "MRPC", _NUMBERS, _labels(metrics.f1), (*_PAIR, ("Quality", "label"))),
    ("sts-b", "STS-B", (), _labels(metrics.correlations), (*_PAIR, ("score", "label"))),
    ("qqp", "QQP", _NUMBERS, _labels(metrics.f1), (*_QUESTIONS, ("is_duplicate", "label"))),
    ("mnli", "MNLI", _NLI, _labels(metrics.accuracy), (*_PAIR, ("gold_label", "label"))),
    ("qnli", "QNLI", _RTE, _labels(metrics.accuracy), (("question",), ("sentence",), ("label",))),
    ("rte", "RTE", _RTE, _labels(metrics.accuracy), (*_PAIR, ("label",))),
    ("wnli", "WNLI", _NUMBERS, _labels(metrics.accuracy), (*_PAIR, ("label",))),
]
_DEV = {"mnli": ("dev_matched", "dev_mismatched")}


# SuperGLUE ---------------------------------------------------------------------------------------


def _truth(record: Mapping[str, Any]) -> str | None:
    """The label of a record: a name, or `"0"` and `"1"` for false and true; None in a test set."""
    label = record.get("label")
    if label is None or label == -1:
        return None
    return label if isinstance(label, str) else str(int(label))


def _boolq(r: Mapping[str, Any]) -> Iterator[Example]:
    yield Example(((r["question"], r["passage"]),), _truth(r))


def _entailment(r: Mapping[str, Any]) -> Iterator[Example]:
    yield Example(((r["premise"], r["hypothesis"]),), _truth(r))


def _copa(r: Mapping[str, Any]) -> Iterator[Example]:
    ask = "What was the cause?" if r["question"] == "cause" else "What happened as a result?"
    premise = f"{r['premise']} {ask}"
    yield Example(((premise, r["choice1"]), (premise, r["choice2"])), _truth(r))


def _multirc(r: Mapping[str, Any]) -> Iterator[Example]:
    if "paragraph" in r:  # the library `datasets` has one row an answer
        group = f"{r['idx']['paragraph']}-{r['idx']['question']}"
        yield Example(((r["paragraph"], f"{r['question']} {r['answer']}"),), _truth(r), group)
        return
    passage = r["passage"]["text"]
    for question in r["passage"]["questions"]:
        group = f"{r['idx']}-{question['idx']}"
        for answer in question["answers"]:
            text = (passage, f"{question['question']} {answer['text']}")
            yield Example((text,), _truth(answer), group)


def _record(r: Mapping[str, Any]) -> Iterator[Example]:
    if "qas" in r:
        passage = r["passage"]["text"]
        # The end of an entity is its last character
        spans = [passage[e["start"] : e["end"] + 1] for e in r["passage"]["entities"]]
        asked = [
            (str(qa["idx"]), qa["query"], [a["text"] for a in qa.get("answers", ())])
            for qa in r["qas"]
        ]
    else:
        passage, spans = r["passage"], r["entities"]
        asked = [(f"{r['idx']['passage']}-{r['idx']['query']}", r["query"], r["answers"])]
    passage = passage.replace("@highlight\n", "- ")
    for group, query, gold in asked:
        for entity in dict.fromkeys(spans):
            text = (passage, query.replace("@placeholder", entity))
            label = str(int(entity in gold)) if gold else None
            yield Example((text,), label, group, entity, tuple(gold))


def _wic(r: Mapping[str, Any]) -> Iterator[Example]:
    yield Example(((f"{r['word']}: {r['sentence1']}", r["sentence2"]),), _truth(r))


def _wsc(r: Mapping[str, Any]) -> Iterator[Example]:
    spans = r.get("target", r)
    yield Example(((r["text"], f"{spans['span2_text']} is {spans['span1_text']}"),), _truth(r))


def _score_multirc(examples: Sequence[Example], predicted: Sequence[Any], scores: Any) -> Scores:
    groups, truth = [e.group for e in examples], [e.label for e in examples]
    return metrics.grouped_f1(groups, truth, predicted)


def _score_record(examples: Sequence[Example], predicted: Sequence[Any], scores: Any) -> Scores:
    """Of the entities of a query the one with the highest score of "1" is the answer."""
    best: dict[str, int] = {}
    margin = scores[:, 1] - scores[:, 0]
    for i, example in enumerate(examples):
        if example.group not in best or margin[i] > margin[best[example.group]]:
            best[example.group] = i
    chosen = [examples[i] for i in best.values()]
    return metrics.answers([e.candidate for e in chosen], [e.answers for e in chosen])


_SUPERGLUE = [
    ("boolq", "BoolQ", _NUMBERS, _labels(metrics.accuracy), _boolq),
    ("cb", "CB", _NLI, _labels(metrics.macro_f1), _entailment),
    ("copa", "COPA", _NUMBERS, _labels(metrics.accuracy), _copa),
    ("multirc", "MultiRC", _NUMBERS, _score_multirc, _multirc),
    ("record", "ReCoRD", _NUMBERS, _score_record, _record),
    ("rte", "RTE", _RTE, _labels(metrics.accuracy), _entailment),
    ("wic", "WiC", _NUMBERS, _labels(metrics.accuracy), _wic),
    ("wsc", "WSC", _NUMBERS, _labels(metrics.accuracy), _wsc),
]

_ALL = [
    GlueTask(f"glue/{name}", *row, dev=_DEV.get(name, ("dev",)), columns=columns)
    for name, *row, columns in _GLUE
] + [
    GlueTask(f"superglue/{name}", *row, dev=("val",), examples=examples)
    for name, *row, examples in _SUPERGLUE
]
GLUE: dict[str, GlueTask] = {task.name: task for task in _ALL}
