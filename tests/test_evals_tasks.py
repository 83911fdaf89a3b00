"""Problems, questions and tasks by name, on models that are known to solve them or not to."""

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax.data import ByteTokenizer
from growjax.errors import DataError, EvalError, ExtraError
from growjax.evals import (
    GLUE,
    TASKS,
    LanguageModel,
    Recipe,
    Settings,
    SpanRecipe,
    Task,
    bits_per_byte,
    blimp,
    closed_book,
    evaluate,
    primitives,
)
from growjax.evals.commands import eval_checkpoint, list_tasks, open_model, table_of
from growjax.evals.questions import Question
from growjax.evals.reasoning import PRIMITIVES, problems
from growjax.models import BERT, GPT, T5, BERTConfig, GPTConfig, T5Config
from growjax.runs.lineage import load_model


TOKENIZER = ByteTokenizer(sentinels=0, multiple=1)
V = TOKENIZER.vocabulary.size
SIZES: dict = dict(embed=16, heads=2, head_dim=8, mlp=24, vocab=V)
GPT_512 = GPT(GPTConfig(layers=1, positions=512, **SIZES), key=jax.random.key(3))
BERT_64 = BERT(BERTConfig(layers=1, positions=64, **SIZES), key=jax.random.key(3))


# Primitives --------------------------------------------------------------------------------------


def solved(name: str, line: str) -> str:
    """The answer to a problem, found by reading it as a person would."""
    if name == "copy":
        words = line.split()
        return " " + words[words.index(words[-1]) + 1]
    *given, asked = line.split(",")
    values = dict(part.split("=") for part in given)
    value = values.get(asked[:-1], "")
    while value and not value.isdigit():
        if value in values:
            value = values[value]
        else:
            one, sign, other = re.fullmatch(r"(\w)([+-])(\w)", value).groups()  # type: ignore[union-attr]
            value = str(int(values[one]) + int(sign + values[other]))
    return value


@pytest.mark.parametrize("name", PRIMITIVES)
def test_problems_have_the_answers_that_they_say(name):
    drawn = problems(name, 60, shots=2, seed=4)
    for problem in drawn:
        *shown, asked = problem.prompt.split("\n")
        assert solved(name, asked) == problem.answer
        assert len(shown) == 2
        for line in shown:
            cut = line.rindex(" " if name == "copy" else "=") + (name != "copy")
            assert solved(name, line[:cut]) == line[cut:]
        assert problem.options.count(problem.answer) == 1
    assert len({p.prompt for p in drawn}) == 60
    assert len({p.answer for p in drawn}) >= 5
    assert problems(name, 3, shots=2, seed=4) == drawn[:3]
    assert problems(name, 60, shots=2, seed=5) != drawn


def test_depth_is_how_often_one_must_look_further():
    for depth in range(3):
        for problem in problems(f"variables-{depth}", 20, shots=0):
            values = dict(part.split("=") for part in problem.prompt.split(",")[:-1])
            at, looked = values[problem.prompt.split(",")[-1][:-1]], 0
            while not at.isdigit():
                at, looked = values[at], looked + 1
            assert looked == depth


def test_what_a_model_knows_is_counted(monkeypatch):
    """Likelihoods by an oracle that is right about four problems of five, and unsure of one of those."""
    asked = problems("arithmetic", 5, shots=1, seed=2)
    knows = {p.prompt: p.answer for p in asked[:4]}

    def oracle(self, pairs):
        from growjax.evals import Scored

        answers = []
        for context, continuation in pairs:
            assert continuation.endswith("\n")
            right = knows.get(context) == continuation[:-1]
            answers.append(
                Scored(
                    -1.0 if right else -2.0 - ord(continuation[0]) / 100,
                    right and context != asked[0].prompt,
                )
            )
        return answers

    monkeypatch.setattr(LanguageModel, "loglikelihoods", oracle)
    results = primitives(LanguageModel(GPT_512, TOKENIZER), "arithmetic", count=5, shots=1, seed=2)
    lucky = asked[4].answer == "0"
    assert results == {
        "exact_match": 3 / 5,
        "choice": (4 + lucky) / 5,
        "chance": pytest.approx(0.1),
    }


def test_unknown_problems_are_refused():
    with pytest.raises(EvalError, match="expected one of 'copy'"):
        problems("riddles", 3)
    with pytest.raises(EvalError, match="1 problem or more, got 0"):
        primitives(LanguageModel(GPT_512, TOKENIZER), "copy", count=0)


# Closed-book questions ---------------------------------------------------------------------------


QUESTIONS = [Question(str(i), f"what is {i}", (f"the {i}", f"No. {i}")) for i in range(6)]


def test_questions_are_asked_after_answered_ones(monkeypatch):
    """EM over what is written; the asked question is never among those shown."""
    prompts = []

    def writes(language, given, *, new, until):
        prompts.extend(given)
        assert (new, list(until)) == (9, ["\n"])
        return [" No 0!", " nothing", " no-2"]

    monkeypatch.setitem(closed_book.__globals__, "generate", writes)
    language = LanguageModel(GPT_512, TOKENIZER)
    results = closed_book(language, QUESTIONS, shots=2, new=9, limit=3, seed=1)
    assert results["exact_match"] == pytest.approx(2 / 3)
    shape = r"(Question: what is (\d)\nAnswer: the \2\n\n){2}Question: what is (\d)\nAnswer:"
    for i, prompt in enumerate(prompts):
        assert re.fullmatch(shape, prompt)
        assert prompt.count(f"what is {i}\n") == 1 and prompt.endswith(f"what is {i}\nAnswer:")
    once = list(prompts)
    prompts.clear()
    closed_book(language, QUESTIONS, shots=2, new=9, limit=3, seed=1)
    assert prompts == once
    prompts.clear()
    closed_book(language, QUESTIONS[:3], examples=QUESTIONS[5:], shots=1, new=9)
    assert all(prompt.startswith("Question: what is 5\nAnswer: the 5\n\n") for prompt in prompts)


def test_too_few_questions_are_refused():
    language = LanguageModel(GPT_512, TOKENIZER)
    for asked, shots in (([], 0), (QUESTIONS[:2], 2)):
        with pytest.raises(EvalError, match="closed-book questions: expected 1 or more"):
            closed_book(language, asked, shots=shots)


# Tasks by name -----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A folder of data, as `Settings` wants it."""
    files = {
        "blimp/data/one.jsonl": {"sentence_good": "a b", "sentence_bad": "b a"},
        "qa/trivia/dev.jsonl": {"question": "q", "answer": ["a"]},
        "qa/trivia/train.jsonl": {"question": "r", "answer": ["b"]},
    }
    for name, record in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        rows = "0\ta\tb\tentailment\n1\ta\tc\tnot_entailment\n"
        (tmp_path / "glue" / "RTE" / f"{split}.tsv").write_text(
            f"index\tsentence1\tsentence2\tlabel\n{rows}"
        )
    qas = [{"id": "1", "question": "q", "answers": [{"text": "b", "answer_start": 2}]}]
    squad = {"data": [{"paragraphs": [{"context": "a b c", "qas": qas}]}]}
    (tmp_path / "squad").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "squad" / f"{split}-v1.1.json").write_text(json.dumps(squad))
    (tmp_path / "text.txt").write_text("Some text, not in any corpus.\n")
    return tmp_path


def test_tasks_of_a_decoder(data):
    settings = Settings(data=data, texts=(data / "text.txt",), limit=2, shots=0)
    told = []
    names = ["bpb", "blimp", "primitives", "qa/trivia@1"]
    results = evaluate(GPT_512, names, TOKENIZER, settings, done=lambda *args: told.append(args))
    assert told == list(results.items())
    assert [*results] == ["bpb", "blimp", *(f"primitives/{n}" for n in PRIMITIVES), *names[3:]]
    language = LanguageModel(GPT_512, TOKENIZER)
    assert results["bpb"] == bits_per_byte(language, ["Some text, not in any corpus.\n"])
    assert results["blimp"] == blimp(language, data / "blimp")
    assert results["primitives/copy"] == primitives(language, "copy", count=2, shots=0)
    assert set(results["qa/trivia@1"]) == {"exact_match", "f1"}


def test_the_number_of_shots_of_a_name_comes_first(monkeypatch):
    asked = []
    fake = lambda language, name, **more: asked.append((name, more)) or {}  # noqa: E731
    monkeypatch.setitem(evaluate.__globals__, "primitives", fake)
    for settings in (Settings(shots=7, seed=3), Settings()):
        evaluate(GPT_512, ["primitives/copy@2", "primitives/copy"], TOKENIZER, settings)
    shots = [more.get("shots") for _, more in asked]
    assert shots == [2, 7, 2, None] and asked[0][1]["seed"] == 3


def test_tasks_of_an_encoder(data):
    recipe = Recipe(batch=2, epochs=1, length=16)
    points = SpanRecipe(Recipe(epochs=1, length=32, batch=2), stride=8, query=4)
    settings = Settings(
        data=data, texts=(data / "text.txt",), recipe=recipe, spans=points, seeds=(0, 1)
    )
    names = ["bpb", "blimp", "glue/rte", "squad/v1.1"]
    results = evaluate(BERT_64, names, TOKENIZER, settings)
    # The text is "a b c": some of it is always the answer, rightly or wrongly
    assert results["squad/v1.1"]["seeds"] == 2 and "f1" in results["squad/v1.1"]
    assert results["bpb"]["masked_bits"] > 0
    assert results["glue/rte"]["seeds"] == 2 and 0 <= results["glue/rte"]["accuracy"] <= 1


def test_tasks_of_a_pair_that_is_growing(data):
    """Gates that stand open, in the middle of a stage, are as good as dropped ones."""
    config = T5Config(encoder_layers=1, decoder_layers=1, **SIZES)
    model = gj.grow(gj.msg(mlp=32), T5(config, key=jax.random.key(3)), key=jax.random.key(4))
    settings = Settings(data=data, texts=(data / "text.txt",), limit=2, shots=1)
    names = ["bpb", "blimp", "primitives/variables-0"]
    opened = gj.ramp(model, 1.0)
    results, settled = (
        evaluate(m, names, TOKENIZER, settings) for m in (opened, gj.settle(opened))
    )
    assert [*results] == names
    for task, scores in results.items():
        assert scores == pytest.approx(settled[task], rel=1e-5)
        assert all(type(x) is float and np.isfinite(x) for x in scores.values())


def test_everything_that_is_lacking_is_said_at_once(data):
    settings = Settings(data=data, texts=(data / "lost.txt",))
    wrong = ["glue/cola", "glue/xyz", "primitives/x", "qa/none", "blimp@many", "squad/v2.0"]
    names = ["bpb", "glue/rte", *wrong]
    with pytest.raises(EvalError) as caught:
        evaluate(BERT_64, names, TOKENIZER, settings)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip(" -").split(":")[0] for line in lines] == ["bpb", *wrong]
    assert "lost.txt" in lines[0]
    with pytest.raises(EvalError, match="expected the folder of data, with blimp in it"):
        evaluate(GPT_512, ["blimp"], TOKENIZER)
    (data / "qa" / "trivia" / "other.dev.jsonl").write_text("{}")
    with pytest.raises(
        EvalError, match=r"name one of qa/trivia/dev.jsonl, qa/trivia/other.dev.jsonl"
    ):
        evaluate(GPT_512, ["qa/trivia"], TOKENIZER, settings)


@pytest.mark.parametrize(
    "model, task, wanted, got",
    [
        (GPT_512, "glue/rte", "an encoder", "a decoder"),
        (GPT_512, "squad/v1.1", "an encoder", "a decoder"),
        (BERT_64, "qa/trivia", "a decoder or an encoder-decoder", "an encoder"),
    ],
)
def test_a_task_for_other_models_is_refused_before_anything_is_read(model, task, wanted, got):
    with pytest.raises(EvalError, match=f"{task}: is for {wanted}, and the model is {got}"):
        evaluate(model, [task], TOKENIZER)


def test_every_task_is_one_value_of_the_table():
    assert len(TASKS) >= 27 and all(name == task.name for name, task in TASKS.items())
    assert {*GLUE} < {*TASKS} and {f"primitives/{name}" for name in PRIMITIVES} < {*TASKS}
    for task in TASKS.values():
        assert task.about and task.metric and set(task.models) <= {"causal", "seq2seq", "encoder"}
        with pytest.raises(dataclasses.FrozenInstanceError):
            task.name = "another"  # type: ignore[misc]


def test_the_first_score_of_a_task_is_among_its_scores(data):
    settings = Settings(data=data, texts=(data / "text.txt",), limit=2, shots=0)
    names = ["bpb", "blimp", "primitives/copy", "qa/trivia@1"]
    scores = evaluate(GPT_512, names, TOKENIZER, settings)
    for name, table in zip(names, ["bpb", "blimp", "primitives/copy", "qa/NAME"], strict=True):
        assert TASKS[table].metric in scores[name]


def test_a_task_of_ones_own_is_one_line():
    asked = []

    def run(candidate, data, settings):
        asked.append((candidate.model, data, settings.shots))
        return {"tokens": float(len(candidate.language.encode("abc")))}

    own = Task("letters", "tokens of three letters", "tokens", run, lambda s, name: s.limit)
    results = evaluate(GPT_512, [own], TOKENIZER, Settings(limit=7, shots=3))
    assert results == {"letters": {"tokens": 3.0}} and asked == [(GPT_512, 7, 3)]
    refused = dataclasses.replace(own, models=("encoder",))
    with pytest.raises(EvalError, match="letters: is for an encoder"):
        evaluate(GPT_512, [refused], TOKENIZER)


def test_the_harness_keeps_the_names_that_were_asked_for(monkeypatch):
    """A single task is called as it was asked for, shots and all; tasks of a group by their own names."""
    asked = []

    def run_harness(language, names, **more):
        asked.append((names, more["shots"]))
        return (
            {"group": {"acc": 0.5}, "group_a": {"acc": 0.25}}
            if names == ["group"]
            else {names[0]: {"acc": 1.0}}
        )

    monkeypatch.setitem(
        sys.modules, "growjax.evals.harness", types.SimpleNamespace(run_harness=run_harness)
    )
    results = evaluate(GPT_512, ["piqa@5", "group"], TOKENIZER)
    assert results == {"piqa@5": {"acc": 1.0}, "group": {"acc": 0.5}, "group_a": {"acc": 0.25}}
    assert asked == [(["piqa"], 5), (["group"], None)]


def test_a_task_of_the_harness_needs_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "growjax.evals.harness", raising=False)
    with pytest.raises(ExtraError, match=r"needs lm_eval: pip install 'growjax\[eval\]'"):
        evaluate(GPT_512, ["hellaswag"], TOKENIZER)


# The command -------------------------------------------------------------------------------------


def test_a_checkpoint_is_scored_on_the_command_line(run, data, tmp_path):
    """The last checkpoint of a run, with the tokenizer it was trained with."""
    _, _, folder = run
    out = tmp_path / "scores" / "eval.json"
    arguments = [
        "eval",
        folder,
        "--tasks",
        "bpb",
        "blimp",
        "--data",
        data,
        "--text",
        data / "text.txt",
        "--limit",
        "5",
        "--out",
        out,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "growjax", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(gj.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert "bits_per_byte" in done.stdout and "paradigm" not in done.stdout
    model, tokenizer, framed = open_model(folder)
    last = max((folder / "checkpoints").iterdir())
    assert eqx.tree_equal(model, open_model(last)[0], load_model(last)[0])
    assert not framed and record["tokenizer"] == tokenizer.vocabulary.digest
    text = (data / "text.txt").read_text()
    ours = bits_per_byte(LanguageModel(model, tokenizer), [text])
    assert record["results"]["bpb"] == pytest.approx(ours, rel=1e-4)
    assert record["settings"]["limit"] == 5
    with pytest.raises(EvalError, match="exists already"):
        eval_checkpoint(folder, ["bpb"], Settings(), out=out, console=Console())


def test_a_score_that_is_not_a_number_stands_in_the_table():
    shown = io.StringIO()
    Console(file=shown, width=120).print(
        table_of({"bpb": {"x": math.nan, "y": math.inf, "n": 7.0}})
    )
    assert all(f" {number} " in shown.getvalue() for number in ("nan", "inf", "7"))


def test_the_tasks_are_listed():
    shown = io.StringIO()
    list_tasks(Console(file=shown, width=120))
    for name in (*TASKS, "any other"):
        assert f"│ {name} " in shown.getvalue(), name
    assert "causal, seq2seq" in shown.getvalue()


def test_the_command_line_lists_tasks_and_asks_for_a_checkpoint(monkeypatch, capsys):
    from growjax.cli import main

    monkeypatch.setattr(sys, "argv", ["growjax", "eval", "--tasks"])
    main()
    assert "primitives/copy" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["growjax", "eval", "--tasks", "bpb"])
    with pytest.raises(SystemExit, match="growjax: eval: expected CHECKPOINT"):
        main()
    # Python's own exit would wait for the other hosts of a pod
    statuses = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", statuses.append)
    main()
    assert statuses == [1] and "growjax: eval: expected CHECKPOINT" in capsys.readouterr().err


def test_a_folder_of_hugging_face(tmp_path):
    """Its weights, the tokenizer beside them and, for a BERT, whether it is an uncased one."""
    pytest.importorskip("safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "A"]
    sizes: dict = {**SIZES, "vocab": 8}
    model = BERT(BERTConfig(layers=1, positions=16, **sizes), key=jax.random.key(1))
    gj.hf.save(model, tmp_path / "bert")
    with pytest.raises(DataError, match=r"expected tokenizer.json, vocab.txt, spiece.model"):
        open_model(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "bert" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    loaded, tokenizer, framed = open_model(tmp_path / "bert")
    assert tokenizer.encode("a A b").tolist() == [5, 7, 6] and framed
    tokens = jnp.array([2, 5, 7, 3])
    np.testing.assert_array_equal(loaded(tokens).hidden, model(tokens).hidden)
    with pytest.raises(EvalError, match="it is none"):
        open_model(tmp_path / "nowhere")
