"""Metrics worked out by hand and against scikit-learn, and readers of files laid out as published."""

import gzip
import json
import lzma
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from growjax.errors import EvalError
from growjax.evals import GLUE, glue, metrics, read_questions, read_squad, read_task
from growjax.evals.files import read_archive
from growjax.evals.glue import Example


# Metrics -----------------------------------------------------------------------------------------


def test_metrics_by_hand():
    truth, guess = ["1", "1", "1", "0", "0"], ["1", "1", "0", "1", "0"]
    # 2 true positives, 1 false negative, 1 false positive, 1 true negative
    assert metrics.accuracy(truth, guess) == {"accuracy": 0.6}
    assert metrics.f1(truth, guess)["f1"] == pytest.approx(2 / 3)
    assert metrics.f1(truth, guess, "0")["f1"] == pytest.approx(1 / 2)
    assert metrics.macro_f1(truth, guess)["f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics.matthews(truth, guess)["matthews"] == pytest.approx(
        (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)
    )
    scores = metrics.correlations([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 9.0])
    # Covariances 11.5 / sqrt(5 * 38.75); ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert scores["pearson"] == pytest.approx(11.5 / math.sqrt(5 * 38.75))
    assert scores["spearman"] == pytest.approx(0.8)


def test_metrics_of_a_model_that_says_one_thing():
    truth = ["1", "0", "1"]
    assert metrics.matthews(truth, ["1"] * 3) == {"matthews": 0.0}
    assert metrics.f1(truth, ["0"] * 3) == {"f1": 0.0, "accuracy": pytest.approx(1 / 3)}
    assert metrics.matthews(["1"] * 3, ["1"] * 3) == {"matthews": 0.0}
    constant = metrics.correlations([1.0, 2.0], [3.0, 3.0])
    assert constant == {"pearson": 0.0, "spearman": 0.0, "constant": 1.0}
    assert glue.headline(constant) == 0.0


def test_multirc_by_hand():
    groups = ["a", "a", "b", "b", "c"]
    truth, guess = ["1", "0", "1", "1", "0"], ["1", "0", "1", "0", "0"]
    scores = metrics.grouped_f1(groups, truth, guess)
    assert scores == {"f1": pytest.approx(2 * 2 / (2 * 2 + 1)), "exact_match": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    "text, squad, triviaqa",
    [
        ("The  Eiffel-Tower!", "eiffeltower", "eiffel tower"),
        ("An apple a day", "apple day", "apple day"),
        ("theatre", "theatre", "theatre"),
        ("Jack\u2019s \u2018hat\u2019", "jack\u2019s \u2018hat\u2019", "jack s hat"),
        ("U.S.", "us", "u s"),
        ("under_score", "underscore", "under score"),
    ],
)
def test_normalisers(text, squad, triviaqa):
    assert metrics.normalise_squad(text) == squad
    assert metrics.normalise_triviaqa(text) == triviaqa


def test_answers_by_hand():
    gold = [["Eiffel Tower", "the tower"], ["4", "four"], ["a b b"]]
    scores = metrics.answers(["the tower of Eiffel", "Four.", "b b c"], gold)
    # 2 of the words "tower of eiffel" are right: P 2/3, R 1. "a" is an article: b b against b b c
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx((4 / 5 + 1 + 4 / 5) / 3)


def test_questions_without_an_answer():
    gold = [["Paris"], [], [], ["a"]]
    scores = metrics.answers(["Paris", "", "Rome", ""], gold)
    assert scores["exact_match"] == scores["f1"] == 0.75
    assert (scores["answerable_f1"], scores["unanswerable_exact_match"]) == (1.0, 0.5)
    assert "answerable_f1" not in metrics.answers(["Paris"], [["Paris"]])


@given(seed=st.integers(0, 10**6), n=st.sampled_from([2, 9, 40]))
def test_metrics_do_not_depend_on_the_order_and_agree_with_sklearn(seed, n):
    from sklearn import metrics as sklearn

    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(0, 2, (2, n)).astype(str).tolist()
    groups, order = rng.integers(0, 3, n).tolist(), rng.permutation(n)

    def everything(order):
        t, p, g = ([x[i] for i in order] for x in (truth, guess, groups))
        all_scores = [metrics.f1(t, p), metrics.macro_f1(t, p), metrics.grouped_f1(g, t, p)]
        if len({*t, *p}) == 2:
            all_scores += [
                metrics.matthews(t, p),
                metrics.correlations([*map(float, t)], [*map(float, p)]),
            ]
        return [value for scores in all_scores for value in scores.values()]

    ours = everything(range(n))
    np.testing.assert_allclose(everything(order), ours, atol=1e-12)
    options: dict = dict(zero_division=0)
    assert ours[0] == sklearn.f1_score(truth, guess, labels=["1"], average="macro", **options)
    assert ours[1] == np.mean(np.array(truth) == guess)
    assert ours[2] == sklearn.f1_score(truth, guess, average="macro", **options)
    if len({*truth, *guess}) == 2:
        # On two labels Pearson's, Spearman's and Matthews' correlations are one
        same = ours[6:] if len({*truth}) == len({*guess}) == 2 else ours[6:7]
        np.testing.assert_allclose(same, sklearn.matthews_corrcoef(truth, guess), atol=1e-12)


def test_lists_of_different_lengths_are_refused():
    for wrong in (lambda: metrics.accuracy(["1"], ["1", "0"]), lambda: metrics.answers([], [])):
        with pytest.raises(EvalError, match="same length, not empty"):
            wrong()


# GLUE --------------------------------------------------------------------------------------------


def write(path, text, open=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)


def test_tables_are_read_without_quoting(tmp_path):
    write(
        tmp_path / "MRPC" / "train.tsv.xz",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
        '1\t1\t2\t"He said so .\tHe " said " so .\r\n'
        "0\t3\t4\tA line\u2028of its own\x85 .\tB .\r\n",
        lzma.open,
    )
    first, second = read_task(GLUE["glue/mrpc"], tmp_path, "train")
    assert first == Example((('"He said so .', 'He " said " so .'),), "1")
    assert second == Example((("A line\u2028of its own\x85 .", "B ."),), "0")


def test_cola_has_no_header_but_in_its_test_set(tmp_path):
    write(tmp_path / "CoLA" / "dev.tsv", "gj04\t1\t\tHe slept.\ngj04\t0\t*\tHim slept.\n")
    write(tmp_path / "CoLA" / "test.tsv.gz", "index\tsentence\n0\tShe slept.\n", gzip.open)
    task = GLUE["glue/cola"]
    assert read_task(task, tmp_path, "dev") == [
        Example((("He slept.",),), "1"),
        Example((("Him slept.",),), "0"),
    ]
    assert read_task(task, tmp_path, "test") == [Example((("She slept.",),), None)]


ROWS = {
    "glue/sst-2": ("sentence\tlabel", "fine\t1", (("fine",), "1")),
    "glue/sts-b": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\ty\t1\ts\tt\ta\tb\t3.8",
        (("a", "b"), 3.8),
    ),
    "glue/qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "0\t1\t2\ta?\tb?\t0",
        (("a?", "b?"), "0"),
    ),
    "glue/mnli": (
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\ta\tb\tneutral\tentailment",
        (("a", "b"), "entailment"),
    ),
    "glue/qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\ta?\tb\tnot_entailment",
        (("a?", "b"), "not_entailment"),
    ),
    "glue/rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\ta\tb\tentailment",
        (("a", "b"), "entailment"),
    ),
    "glue/wnli": ("index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1", (("a", "b"), "1")),
}


@pytest.mark.parametrize("name", ROWS)
def test_tables(name, tmp_path):
    header, row, (text, label) = ROWS[name]
    task = GLUE[name]
    write(tmp_path / task.folder / f"{task.dev[0]}.tsv", f"{header}\n{row}\n")
    assert read_task(task, tmp_path, task.dev[0]) == [Example((text,), label)]


def test_bad_tables_are_refused(tmp_path):
    good = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
    write(tmp_path / "RTE" / "train.tsv", f"{good}1\ta\tb\n2\ta\tb\tneutral\n")
    with pytest.raises(EvalError, match=r"(?s)line 3: 3 columns of 4.*line 4: label 'neutral'"):
        read_task(GLUE["glue/rte"], tmp_path, "train")
    write(tmp_path / "QQP" / "train.tsv", ROWS["glue/qqp"][0] + "\nshort\n0\t1\t2\ta\tb\t1\n")
    assert len(read_task(GLUE["glue/qqp"], tmp_path, "train")) == 1
    with pytest.raises(EvalError, match=r"expected dev.tsv .*got train.tsv"):
        read_task(GLUE["glue/rte"], tmp_path, "dev")
    write(tmp_path / "WNLI" / "dev.tsv", "a\tb\n1\t2\n")
    with pytest.raises(EvalError, match=r"expected columns .*sentence1.*got \['a', 'b'\]"):
        read_task(GLUE["glue/wnli"], tmp_path, "dev")


class Rows(list):
    """Rows with features, as those of the library `datasets`."""

    def __init__(self, rows, names):
        super().__init__(rows)
        self.features = {"label": type("ClassLabel", (), {"names": names})()}


def test_datasets_of_the_library():
    """Their MNLI counts its labels in another order than the files name them."""
    names = ["entailment", "neutral", "contradiction"]
    rows = Rows(
        [{"premise": "a", "hypothesis": "b", "label": i, "idx": 0} for i in (0, 1, 2, -1)], names
    )
    examples = read_task(GLUE["glue/mnli"], {"train": rows}, "train")
    assert [example.label for example in examples] == [*names, None]
    rows = Rows([{"sentence": "a", "label": 1, "idx": 0}], ["unacceptable", "acceptable"])
    assert read_task(GLUE["glue/cola"], {"train": rows}, "train") == [Example((("a",),), "1")]
    rows = Rows(
        [{"premise": "a", "hypothesis": "b", "label": 1}],
        ["entailment", "contradiction", "neutral"],
    )
    assert read_task(GLUE["superglue/cb"], {"train": rows}, "train")[0].label == "contradiction"
    with pytest.raises(EvalError, match="no split 'dev', only train"):
        read_task(GLUE["glue/cola"], {"train": rows}, "dev")


# SuperGLUE ---------------------------------------------------------------------------------------


MULTIRC = {
    "idx": 3,
    "passage": {
        "text": "P.",
        "questions": [
            {
                "question": "Q?",
                "idx": 0,
                "answers": [
                    {"text": "x", "idx": 0, "label": 1},
                    {"text": "y", "idx": 1, "label": 0},
                ],
            },
            {"question": "R?", "idx": 1, "answers": [{"text": "z", "idx": 2, "label": 1}]},
        ],
    },
}
RECORD = {
    "passage": {
        "text": "Ann met Bob.\n@highlight\nIt rained.",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}],
    },
    "qas": [
        {
            "idx": 7,
            "query": "@placeholder was met.",
            "answers": [{"text": "Bob", "start": 8, "end": 10}],
        }
    ],
}
RECORDS = {
    "boolq": ({"question": "q", "passage": "p", "label": True}, Example((("q", "p"),), "1")),
    "cb": (
        {"premise": "p", "hypothesis": "h", "label": "neutral"},
        Example((("p", "h"),), "neutral"),
    ),
    "rte": ({"premise": "p", "hypothesis": "h"}, Example((("p", "h"),), None)),
    "copa": (
        {"premise": "It fell.", "choice1": "a", "choice2": "b", "question": "effect", "label": 1},
        Example(
            (
                ("It fell. What happened as a result?", "a"),
                ("It fell. What happened as a result?", "b"),
            ),
            "1",
        ),
    ),
    "wic": (
        {"word": "run", "sentence1": "s", "sentence2": "t", "label": False, "start1": 0},
        Example((("run: s", "t"),), "0"),
    ),
    "wsc": (
        {
            "text": "Tom hit it.",
            "target": {"span1_text": "Tom", "span2_text": "it"},
            "label": False,
        },
        Example((("Tom hit it.", "it is Tom"),), "0"),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records(name, tmp_path):
    record, expected = RECORDS[name]
    task = GLUE[f"superglue/{name}"]
    write(tmp_path / task.folder / "val.jsonl", json.dumps(record) + "\n\n")
    assert read_task(task, tmp_path, "val") == [expected]


def test_multirc_and_record_are_grouped_by_question(tmp_path):
    for folder, record in (("MultiRC", MULTIRC), ("ReCoRD", RECORD)):
        write(tmp_path / folder / "val.jsonl", json.dumps(record))
    task = GLUE["superglue/multirc"]
    examples = read_task(task, tmp_path, "val")
    assert [(e.group, e.choices[0][1], e.label) for e in examples] == [
        ("3-0", "Q? x", "1"),
        ("3-0", "Q? y", "0"),
        ("3-1", "R? z", "1"),
    ]
    # Right about the first question, wrong about the second
    assert glue.score(task, examples, np.array([[0, 1], [1, 0], [1, 0]])) == {
        "f1": pytest.approx(2 / 3),
        "exact_match": 0.5,
    }

    task = GLUE["superglue/record"]
    examples = read_task(task, tmp_path, "val")
    assert examples[1] == Example(
        (("Ann met Bob.\n- It rained.", "Bob was met."),), "1", "7", "Bob", ("Bob",)
    )
    # Neither entity looks right, and Bob less wrong than Ann
    assert glue.score(task, examples, np.array([[3.0, 1.0], [2.0, 1.0]]))["exact_match"] == 1
    assert glue.score(task, examples, np.array([[2.0, 1.0], [3.0, 1.0]]))["exact_match"] == 0


def test_the_rows_of_the_library_are_the_same_examples(tmp_path):
    row = {
        "paragraph": "P.",
        "question": "Q?",
        "answer": "x",
        "idx": {"paragraph": 3, "question": 0, "answer": 0},
        "label": 1,
    }
    write(tmp_path / "MultiRC" / "val.jsonl", json.dumps(MULTIRC))
    write(tmp_path / "ReCoRD" / "val.jsonl", json.dumps(RECORD))
    task = GLUE["superglue/multirc"]
    assert read_task(task, {"val": [row]}, "val") == read_task(task, tmp_path, "val")[:1]
    row = {
        "passage": RECORD["passage"]["text"],
        "query": "@placeholder was met.",
        "entities": ["Ann", "Bob"],
        "answers": ["Bob"],
        "idx": {"passage": 0, "query": 7},
    }
    task = GLUE["superglue/record"]
    ours = read_task(task, {"val": [row]}, "val")
    assert [e.choices for e in ours] == [e.choices for e in read_task(task, tmp_path, "val")]


def test_scores_of_choices_and_of_values():
    copa = GLUE["superglue/copa"]
    assert (copa.choices, copa.outputs, GLUE["glue/mnli"].outputs) == (2, 1, 3)
    examples = [RECORDS["copa"][1]] * 2
    assert glue.score(copa, examples, np.array([[0.0, 1.0], [1.0, 0.0]])) == {"accuracy": 0.5}
    pairs = [Example((("a", "b"),), x) for x in (1.0, 2.0, 4.0)]
    assert glue.score(GLUE["glue/sts-b"], pairs, np.array([[0.1], [0.2], [0.9]]))["spearman"] == 1
    with pytest.raises(EvalError, match="1 of 1 examples have no label"):
        glue.score(GLUE["glue/rte"], [RECORDS["rte"][1]], np.zeros((1, 2)))


def test_bad_records_are_refused(tmp_path):
    write(tmp_path / "BoolQ" / "val.jsonl", '{"question": "q", "label": true}\n')
    with pytest.raises(EvalError, match="record 1 has no 'passage'"):
        read_task(GLUE["superglue/boolq"], tmp_path, "val")
    write(tmp_path / "WiC" / "val.jsonl", "{}\nnothing\n[1]\n")
    with pytest.raises(EvalError, match=r"record 1 has no"):
        read_task(GLUE["superglue/wic"], tmp_path, "val")
    with pytest.raises(EvalError, match=r"(?s)line 2: Expecting value.*line 3: expected an object"):
        list(read_archive(tmp_path / "WiC", ".jsonl"))


# Questions ---------------------------------------------------------------------------------------


def test_squad(tmp_path):
    qas = [
        {"id": "1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 4}]},
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    whole = {
        "version": "v2.0",
        "data": [{"title": "t", "paragraphs": [{"context": "See Ann.", "qas": qas}]}],
    }
    write(tmp_path / "dev.json.xz", json.dumps(whole), lzma.open)
    first, second = read_squad(tmp_path / "dev.json.xz")
    assert (first.answers, first.starts, first.context) == (("Ann",), (4,), "See Ann.")
    assert second.answers == ()
    qas[0]["answers"][0]["answer_start"] = 3
    write(tmp_path / "off.json", json.dumps(whole))
    with pytest.raises(EvalError, match="question 1: 'Ann' is not at character 3"):
        read_squad(tmp_path / "off.json")
    write(tmp_path / "other.json", "{}")
    with pytest.raises(EvalError, match="not laid out as SQuAD"):
        read_squad(tmp_path / "other.json")


def test_closed_book_sets(tmp_path):
    write(
        tmp_path / "nq.dev.jsonl",
        '{"question": "q1", "answer": ["a", "b", "a"]}\n{"question": "q2", "answer": ["c"]}\n',
    )
    write(tmp_path / "web.json", '[\n {"qId": "w", "answers": ["x"], "qText": "q"}\n]')
    trivia = {"Data": [{"Question": "q", "Answer": {"Value": "V", "Aliases": ["A", "V"]}}]}
    write(tmp_path / "trivia.json", json.dumps(trivia, indent=1))
    assert [q.answers for q in read_questions(tmp_path / "nq.dev.jsonl")] == [("a", "b"), ("c",)]
    assert read_questions(tmp_path / "web.json")[0].answers == ("x",)
    assert read_questions(tmp_path / "trivia.json")[0].answers == ("A", "V")
    write(tmp_path / "bad.jsonl", '{"question": "q"}\n')
    with pytest.raises(EvalError, match="record 0 has no question and answers"):
        read_questions(tmp_path / "bad.jsonl")
