"""The harness over our models, and next to its own over the same weights. Skipped without it."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest


os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="needs the harness: pip install 'growjax[eval]'")
# The harness and what it brings warn about each other
pytestmark = pytest.mark.filterwarnings("ignore")

import growjax as gj  # noqa: E402
from growjax.data import ByteTokenizer, load_tokenizer  # noqa: E402
from growjax.data.tokenizer_export import stock_files  # noqa: E402
from growjax.errors import EvalError  # noqa: E402
from growjax.evals import LanguageModel, generate, harness  # noqa: E402
from growjax.evals.harness import HarnessModel, run_harness  # noqa: E402
from growjax.models import GPT, T5, GPTConfig, Llama, LlamaConfig, T5Config  # noqa: E402


TOKENIZER = ByteTokenizer(sentinels=0, multiple=1)
SIZES: dict = dict(embed=16, heads=2, head_dim=8, mlp=32)
FACTS = [("sky", "blue", "red"), ("grass", "green", "pink"), ("snow", "white", "brown")]


def sharp(model):
    trained, rest = gj.partition(model)
    return eqx.combine(jax.tree.map(lambda x: 4 * x, trained), rest)


def language() -> LanguageModel:
    config = GPTConfig(layers=2, positions=96, vocab=TOKENIZER.vocabulary.size, **SIZES)
    return LanguageModel(sharp(GPT(config, key=jax.random.key(2))), TOKENIZER)


TASKS: dict[str, dict[str, Any]] = {
    "colours": {
        "output_type": "multiple_choice",
        "doc_to_text": "The colour of {{thing}} is",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "costs": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{thing}} {{thing}} is {{right}} and is not {{wrong}} at all, at all",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "says": {
        "output_type": "generate_until",
        "doc_to_text": "{{thing}} is",
        "doc_to_target": "{{right}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture
def include(tmp_path):
    """A folder of tasks over a local file, as anybody would write them."""
    rows = [dict(zip(("thing", "right", "wrong"), fact, strict=True)) for fact in FACTS]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data)}}}
    for name, task in TASKS.items():
        whole = {"task": name, "validation_split": "validation", **where, **task}
        # YAML reads JSON
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole))
    return tmp_path


def test_all_types_of_requests(include):
    """What the harness makes of a model is what we make of it by hand."""
    ours = language()
    results = run_harness(ours, [*TASKS], include=include, shots=0)
    contexts = [f"The colour of {thing} is" for thing, _, _ in FACTS]
    pairs = [(c, f" {x}") for c, fact in zip(contexts, FACTS, strict=True) for x in fact[1:]]
    scores = np.reshape([s.logprob for s in ours.loglikelihoods(pairs)], (3, 2))
    assert results["colours"]["acc"] == np.mean(scores[:, 0] > scores[:, 1])
    lengths = [[len(x) for x in fact[1:]] for fact in FACTS]
    normed = scores / np.array(lengths)
    assert results["colours"]["acc_norm"] == np.mean(normed[:, 0] > normed[:, 1])

    texts = [f"{t} {t} is {r} and is not {w} at all, at all" for t, r, w in FACTS]
    bits = -sum(ours.rolling(texts)) / sum(map(len, texts)) / np.log(2)
    assert results["costs"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert (
        results["says"] == {"exact_match": 0.0, "sample_len": 3}
        or results["says"]["exact_match"] == 0
    )


def requests(*args):
    return [type("Instance", (), {"args": a})() for a in args]


def test_answers_come_in_the_order_of_the_questions():
    ours = language()
    options = {"until": ["zz"], "max_gen_toks": 7}
    asked = [
        (p, options if i % 2 else {**options, "max_gen_toks": 3}) for i, p in enumerate("abcde")
    ]
    answers = HarnessModel(ours).generate_until(requests(*asked))
    long, short = (generate(ours, list("abcde"), new=n, until=["zz"]) for n in (7, 3))
    assert answers == [long[i] if i % 2 else short[i] for i in range(5)]
    pairs = [("the", " cat"), ("", "x"), ("a", " very long continuation"), ("b", "c")]
    scored = HarnessModel(ours).loglikelihood(requests(*pairs), disable_tqdm=True)
    np.testing.assert_allclose(
        [s for s, _ in scored], [s.logprob for s in ours.loglikelihoods(pairs)]
    )


def test_what_a_model_cannot_do_is_refused():
    model = HarnessModel(language())
    for odd in ({"do_sample": True, "min_p": 0.5}, {"num_beams": 4}):
        with pytest.raises(EvalError, match="min_p=0.5|num_beams=4"):
            model.generate_until(requests(("a", {"until": [], **odd})))
    asked = {"until": [], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    options = harness._options(asked, 96)
    assert {n: options[n] for n in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
    }
    assert harness._options({**asked, "do_sample": False}, 96)["top_k"] == 0


def test_the_harness_knows_growjax_by_name(include, tmp_path, monkeypatch):
    ours = language()
    gj.hf.save(ours.model, tmp_path / "model")
    for name, text in stock_files(TOKENIZER, kind="causal").items():
        (tmp_path / "model" / name).write_text(text)
    tasks = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=str(include), include_defaults=False
    )
    report = importlib.import_module("lm_eval").simple_evaluate(
        model="growjax",
        model_args=f"pretrained={tmp_path / 'model'},batch_size=2",
        tasks=["colours"],
        task_manager=tasks,
        bootstrap_iters=0,
    )
    expected = run_harness(ours, ["colours"], include=include)["colours"]
    assert harness._scores(report["results"]["colours"]) == pytest.approx(expected)
    called = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: called.append(1))
    harness.main()
    assert called == [1]
    others: list[dict[str, Any]] = [{"device": "cuda:0"}, {"peft": "x"}]
    for wrong in others:
        with pytest.raises(EvalError, match="model_args: expected pretrained, tokenizer"):
            harness.Checkpoint(pretrained=str(tmp_path / "model"), **wrong)


def test_a_harness_with_plugins_finds_growjax_by_its_entry_point():
    """As those after 0.4.13 do: the name stands for the entry point until a model is asked for."""
    from importlib.metadata import EntryPoint

    whole = tomllib.loads((Path(gj.__file__).parents[1] / "pyproject.toml").read_text())
    (name, value), *others = whole["project"]["entry-points"]["lm_eval.models"].items()
    assert name == "growjax" and not others
    code = (
        "from importlib.metadata import EntryPoint\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry as known\n"
        f"known.register({name!r}, target=EntryPoint({name!r}, {value!r}, 'lm_eval.models'))\n"
        "print(known.get('growjax').__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "Checkpoint\n", run.stderr
    assert EntryPoint(name, value, "lm_eval.models").load() is harness.Checkpoint


def test_the_harness_tasks_are_read_where_they_may_be_meant(include, monkeypatch):
    """Not for tasks of one's own folder: there are thousands, which are not read here either."""
    rooms, read = importlib.import_module("lm_eval.tasks"), []
    whole: Any = rooms.TaskManager

    def known(include_path: str | None = None, include_defaults: bool = True) -> Any:
        read.append((include_path is not None, include_defaults))
        return whole(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(rooms, "TaskManager", known)
    ours, theirs = (True, False), (True, True)
    (include / "all.yaml").write_text(json.dumps({"group": "all", "task": ["says"]}))
    assert harness._manager(["says", "costs"], include).all_groups == ["all"] and read == [ours]
    for tasks in (["all"], ["says", "missing"], [{"task": "says"}]):
        read.clear()
        harness._manager(tasks, include)
        assert read == [ours, theirs]
    read.clear()
    for folder in (None, include):
        with pytest.raises(EvalError, match="neither growjax nor the harness has missing"):
            run_harness(language(), ["missing"], include=folder)
    assert read == [(False, True), ours, theirs]


# Next to the harness's own -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE with some merges and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(
        [f"The colour of {' '.join(fact)} is not is" for fact in FACTS], trainer
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def cases(vocab: int):
    key = jax.random.key(3)
    gpt = GPTConfig(layers=2, positions=64, vocab=vocab, **SIZES)
    llama = LlamaConfig(layers=2, kv_heads=1, vocab=vocab, **SIZES)
    t5 = T5Config(encoder_layers=2, decoder_layers=2, vocab=vocab, **SIZES)
    return {"gpt": GPT(gpt, key=key), "llama": Llama(llama, key=key), "t5": T5(t5, key=key)}


def ended(tokenizer_file, folder):
    """The same tokenizer as T5 has it, which puts an end after a text."""
    from tokenizers import Tokenizer, processors

    made, end = Tokenizer.from_file(str(tokenizer_file)), "<|endoftext|>"
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {end}", special_tokens=[(end, made.token_to_id(end))]
    )
    made.save(str(folder / "ended.json"))
    return folder / "ended.json"


def their_tokenizer(file) -> Any:
    return importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<pad>"
    )


@pytest.fixture
def both(tokenizer_file, tmp_path):
    """The same exported weights as a model of ours for the harness, and as its own."""
    hf: Any = pytest.importorskip("growjax.hf")
    pytest.importorskip("accelerate", reason="needs torch and transformers: lm-eval[hf]")
    load: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    def make(name: str) -> tuple[HarnessModel, Any]:
        tokenizer = load_tokenizer(tokenizer_file)
        model = sharp(cases(tokenizer.vocabulary.size)[name])
        hf.save(model, tmp_path / "model")
        config = tmp_path / "model" / "config.json"
        pad, eos = (tokenizer.vocabulary.specials[n] for n in ("pad", "eos"))
        ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": eos}
        config.write_text(json.dumps({**json.loads(config.read_text()), **ids}))
        source = ended(tokenizer_file, tmp_path) if name == "t5" else tokenizer_file
        theirs = load(
            pretrained=str(tmp_path / "model"),
            tokenizer=their_tokenizer(source),
            max_length=64,
            device="cpu",
            batch_size=2,
            dtype="float32",
            backend="seq2seq" if name == "t5" else "causal",
        )
        return HarnessModel(LanguageModel(model, tokenizer, longest=64)), theirs

    return make


@pytest.mark.parametrize("name", ["gpt", "llama", "t5"])
def test_the_numbers_are_those_of_the_harness_own_model(name, both, tokenizer_file):
    ours, theirs = both(name)
    pairs = [("The sky is", " blue"), ("", "snow"), ("of  ", "grass is"), ("x" * 90, " green" * 3)]
    for a, b in zip(
        ours.loglikelihood(requests(*pairs), disable_tqdm=True),
        theirs.loglikelihood(requests(*pairs), disable_tqdm=True),
        strict=True,
    ):
        assert abs(a[0] - b[0]) < 1e-3 and a[1] == b[1]
    options = {"until": ["\n"], "max_gen_toks": 20, "do_sample": False}
    asked = requests(("The colour of snow is", options), ("grass", options))
    answers, expected = ours.generate_until(asked), theirs.generate_until(asked, disable_tqdm=True)
    if name == "t5":
        # Its T5 writes as many tokens more as the longest text has that is read
        expected = [b[: len(a)] for a, b in zip(answers, expected, strict=True)]
    assert answers == expected and all(answers)
    texts = ["The sky is blue and " * 9, "snow", "grass is not pink"]
    if name == "t5":
        # Its T5 counts the end of a text too, and in later windows reads a token of the one before
        theirs.tokenizer, texts = their_tokenizer(tokenizer_file), texts[1:]
    rolling = requests(*[(text,) for text in texts])
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(rolling),
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True),
        atol=1e-3,
        rtol=1e-6,
    )


def test_whole_tasks_score_the_same_as_with_the_harness_own_model(both, include):
    ours, theirs = both("gpt")
    results = run_harness(ours.language, [*TASKS], include=include, shots=1)
    whole = importlib.import_module("lm_eval").simple_evaluate(
        model=theirs,
        tasks=[*TASKS],
        num_fewshot=1,
        bootstrap_iters=0,
        task_manager=importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=str(include), include_defaults=False
        ),
        **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), 0),
        fewshot_random_seed=0,
    )
    assert {*results} == {*TASKS}
    for task, scores in results.items():
        expected = harness._scores(whole["results"][task])
        assert scores == pytest.approx(expected, rel=1e-3), task
