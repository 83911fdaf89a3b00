"""GLUE and SuperGLUE: their tasks as data, and readers of the files as they are published.

A label is stored as its name, since distributions number the labels differently. Wang et al., "GLUE",
ICLR 2019; "SuperGLUE", NeurIPS 2019.
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
    """One example: a text or a pair of texts to label, or several to choose from.

    **Fields**

    - `choices`: the texts, or pairs of texts, to choose from; a single one if labels are predicted.
    - `label`: the name of the right label, the number of the right choice (`"0"`, `"1"`), or the value
      of a regression; None in test sets.
    - `group`: the question that it belongs to, for tasks with several examples per question (MultiRC,
      ReCoRD).
    - `candidate`, `answers`: for ReCoRD, the entity filled into the query, and the right ones.
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
    """One task: its files, its labels and its metric.

    **Fields**

    - `name`: such as `"glue/rte"`.
    - `folder`: the folder of its files within that of the benchmark.
    - `labels`: the names of the labels; empty for a regression.
    - `metric`: a function of examples, predictions and scores.
    - `dev`: the names of its development sets.
    - `columns`: for GLUE, the possible names of each text's column, and last of the label's.
    - `examples`: for SuperGLUE, a function from one record of its files to examples.
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
        """The number of texts (or pairs) of one example; 1 if labels are predicted."""
        return 2 if self.name.endswith("copa") else 1

    @property
    def outputs(self) -> int:
        """The number of outputs of the model for each text: one per label, or 1 to rank or regress."""
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
    - `split`: the name of a file without its suffix, such as `"train"`, or a split of the dataset.

    Raises `EvalError` that lists the first bad lines.

    **Example**

        examples = read_task(GLUE["glue/rte"], "data/glue", "train")
    """
    examples: list[Example] = []
    if isinstance(source, Mapping):
        if split not in source:
            raise EvalError(f"{task.name}: no split {split!r}, only {', '.join(source)}")
        features = getattr(source[split], "features", {})
        for row in source[split]:
            named = _with_label_names(row, features)
            examples += task.examples(named) if task.examples else [_from_row(task, named)]
        return examples
    folder = Path(source) / task.folder
    if task.examples is None:
        return _read_table(task, find(folder, f"{split}.tsv"))
    path = find(folder, f"{split}.jsonl")
    for number, record in enumerate(read_records(path), 1):
        try:
            examples += task.examples(record)
        except (KeyError, TypeError) as error:
            raise EvalError(
                f"{path}: record {number} has no {error}; it has {[*record]}"
            ) from error
    return examples


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
    # "constant" marks a correlation that does not exist, and SQuAD 2.0's scores of answerable and
    # unanswerable questions are parts of its other two
    values = [x for name, x in scores.items() if name != "constant" and "answerable" not in name]
    return float(np.mean(values))


# GLUE --------------------------------------------------------------------------------------------


def _read_table(task: GlueTask, path: Path) -> list[Example]:
    """The examples of a published table: columns separated by tabs; quotes are ordinary characters."""
    lines = read_lines(path)
    rows = [line.split("\t") for line in lines]
    header = rows.pop(0) if rows else []
    if task.name == "glue/cola" and "sentence" not in header:
        # CoLA's training and development files have no header; its test file has one
        rows, header = [header, *rows], ["source", "label", "author's", "sentence"]
    *text_names, _ = task.columns
    if any(not any(name in header for name in names) for names in text_names):
        raise EvalError(f"{path}: expected columns {task.columns[:-1]}, got {header}")
    examples, faults = [], []
    for number, row in enumerate(rows, 2):
        if len(row) < len(header):
            # QQP's training set has short rows, which are skipped by convention
            if task.name != "glue/qqp":
                faults.append(f"line {number}: {len(row)} columns of {len(header)}")
            continue
        try:
            examples.append(_from_row(task, dict(zip(header, row, strict=False))))
        except EvalError as error:
            faults.append(f"line {number}: {error}")
    raise_all(EvalError, f"{path}: these are not rows of {task.name}:", faults[:5])
    return examples


def _from_row(task: GlueTask, row: Mapping[str, Any]) -> Example:
    """The example in a row of named columns, each under the first of its possible names."""
    *text_names, label_names = task.columns
    text = tuple(str(next(row[name] for name in names if name in row)) for names in text_names)
    value = next((row[name] for name in label_names if name in row), None)
    if value is None or value in ("-1", -1):  # -1 is the label of test sets
        return Example((text,), None)
    if not task.labels:
        return Example((text,), float(value))
    if str(value) not in task.labels:
        raise EvalError(f"label {value!r}, expected one of {', '.join(task.labels)}")
    return Example((text,), str(value))


def _with_label_names(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a dataset, its label as a name if the files of the benchmark use that name.

    Other names ("acceptable", "equivalent") are the library's own, where the files have numbers.
    """
    values = dict(row)
    names = getattr(features.get("label"), "names", None)
    if names and isinstance(row["label"], int) and row["label"] >= 0:
        name = names[row["label"]]
        published = {"contradiction", "entailment", "neutral", "not_entailment"}
        values["label"] = name if name in published else row["label"]
    return values


def _labels(metric: Callable[[Sequence, Sequence], Scores]) -> Metric:
    """A metric of true and predicted labels, as a metric of a task."""
    return lambda examples, predicted, scores: metric([e.label for e in examples], predicted)


# Labels and columns that several tasks share. MRPC's tables call their texts "#1 String" and "#2 String"
_NUMBERS, _NLI = ("0", "1"), ("contradiction", "entailment", "neutral")
_RTE = ("entailment", "not_entailment")
_PAIR = (("sentence1", "premise", "#1 String"), ("sentence2", "hypothesis", "#2 String"))
_QUESTIONS = (("question1",), ("question2",))

# Name, folder, labels, metric, and the possible names of its columns
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
    """The label of a record: a name, `"0"` for false or `"1"` for true, or None in a test set."""
    label = record.get("label")
    if label is None or label == -1:
        return None
    return label if isinstance(label, str) else str(int(label))


def _boolq(r: Mapping[str, Any]) -> Iterator[Example]:
    yield Example(((r["question"], r["passage"]),), _truth(r))


def _entailment(r: Mapping[str, Any]) -> Iterator[Example]:
    yield Example(((r["premise"], r["hypothesis"]),), _truth(r))


def _copa(r: Mapping[str, Any]) -> Iterator[Example]:
    # Each alternative is paired with the premise and the question in words
    question = "What was the cause?" if r["question"] == "cause" else "What happened as a result?"
    premise = f"{r['premise']} {question}"
    yield Example(((premise, r["choice1"]), (premise, r["choice2"])), _truth(r))


def _multirc(r: Mapping[str, Any]) -> Iterator[Example]:
    """One example for each answer of each question, to be judged right or wrong."""
    if "paragraph" in r:  # the library `datasets` has one row per answer
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
    """One example for each entity of the passage in each query, to be judged right or wrong."""
    if "qas" in r:  # the published files; the library `datasets` has one row per query
        passage = r["passage"]["text"]
        # The `end` of an entity is the index of its last character
        entities = [passage[e["start"] : e["end"] + 1] for e in r["passage"]["entities"]]
        queries = [
            (str(qa["idx"]), qa["query"], [a["text"] for a in qa.get("answers", ())])
            for qa in r["qas"]
        ]
    else:
        passage, entities = r["passage"], r["entities"]
        queries = [(f"{r['idx']['passage']}-{r['idx']['query']}", r["query"], r["answers"])]
    # The bullet points of a news article follow this mark
    passage = passage.replace("@highlight\n", "- ")
    for group, query, gold in queries:
        for entity in dict.fromkeys(entities):
            text = (passage, query.replace("@placeholder", entity))
            label = str(int(entity in gold)) if gold else None
            yield Example((text,), label, group, entity, tuple(gold))


def _wic(r: Mapping[str, Any]) -> Iterator[Example]:
    # Whether the word has the same meaning in both sentences
    yield Example(((f"{r['word']}: {r['sentence1']}", r["sentence2"]),), _truth(r))


def _wsc(r: Mapping[str, Any]) -> Iterator[Example]:
    # The pronoun (span 2) and the noun that it may refer to (span 1)
    spans = r.get("target", r)
    yield Example(((r["text"], f"{spans['span2_text']} is {spans['span1_text']}"),), _truth(r))


def _score_multirc(examples: Sequence[Example], predicted: Sequence[Any], scores: Any) -> Scores:
    """MultiRC's: F1 over all answers, and the share of questions with every answer judged right."""
    groups, truth = [e.group for e in examples], [e.label for e in examples]
    return metrics.grouped_f1(groups, truth, predicted)


def _score_record(examples: Sequence[Example], predicted: Sequence[Any], scores: Any) -> Scores:
    """ReCoRD's: the answer to a query is the entity whose label "1" outscores "0" by most."""
    best: dict[str, int] = {}
    margin = scores[:, 1] - scores[:, 0]
    for i, example in enumerate(examples):
        if example.group not in best or margin[i] > margin[best[example.group]]:
            best[example.group] = i
    answered = [examples[i] for i in best.values()]
    return metrics.answers([e.candidate for e in answered], [e.answers for e in answered])


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
