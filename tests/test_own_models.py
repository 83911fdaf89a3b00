"""The trainer's own suite, for models that growjax did not write: what holds for a GPT holds for them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import train as trainer
from growjax.data import ByteTokenizer, Causal, PrefixLM
from growjax.errors import AxisError, DataError, EvalError, PlanError
from growjax.evals import LanguageModel, Settings, evaluate, generate
from growjax.forecast.dryrun import dry_run
from growjax.models import Model
from growjax.report.runs import write_report
from growjax.runs.checkpoint import read_lineage
from growjax.runs.lineage import load_model
from growjax.train import Growth, Options, Step, read_journal
from tests import own
from tests.conftest import SEVERAL_DEVICES
from tests.runs import feed, losses, plan, same, steps


train: Any = trainer.train
ROOT = Path(gj.__file__).parents[1]


PLANS = {"declared": own.mixed, "annotated": own.annotated, "a dict": own.mapping}


def asked(of, **fields) -> Options:
    """Two hooks: one finds the held-out loss once more, the other says how wide the model is."""
    rows = feed(of).held_out(of.objective, 6)

    def again(model, step):
        found, counts = jax.vmap(lambda row: of.loss(model, row))(rows)
        return {"loss": float((found * counts).sum() / counts.sum())}

    hooks = again, lambda model, step: {"hidden": gj.sizes(model)["hidden"]}
    return Options(evaluate_every=of.flops / 6, held_out=6, hooks=hooks, **fields)


@pytest.fixture(scope="module", params=PLANS)
def done(request, tmp_path_factory):
    """A plan, its records, its folder, and the programs that it compiled."""
    of, programs = PLANS[request.param](), {}
    folder = tmp_path_factory.mktemp("own") / request.param.replace(" ", "-")
    options = asked(of, save_every=2, keep_last=99)
    running = train(of, feed(of), run=folder, options=options, cache=programs)
    records = list(trainer.watch(running, of, run=folder))
    return of, records, folder, programs


def scores(records):
    return {r.step: r.scores for r in records if isinstance(r, Step) and r.scores}


def test_it_trains_and_its_growth_is_certified(done):
    of, records, _, _ = done
    steps_done = [r for r in records if isinstance(r, Step)]
    assert len(steps_done) == of.steps and steps_done[-1].flops == of.flops
    assert steps_done[-1].loss < steps_done[0].loss
    first = next(r for r in records if isinstance(r, Growth))
    assert first.grew == {"hidden": (16, 24)} and first.crossing.limit is not None
    assert first.crossing.change < 1e-5 < steps_done[0].loss


def test_hooks_see_it_as_it_is_judged(done):
    of, records, folder, _ = done
    marks = [r for r in records if isinstance(r, Step) and r.held_out is not None]
    assert len(marks) > 2
    for record in marks:
        assert record.scores is not None
        assert record.scores["loss"] == pytest.approx(record.held_out, rel=1e-5)
        assert record.scores["hidden"] == (16 if record.stage == 0 else 24)
    assert {r.stage for r in marks} == set(range(len(of.stages)))
    rows = [row for row in read_journal(folder) if row["kind"] == "step" and row["scores"]]
    assert [row["scores"] for row in rows] == [r.scores for r in marks]


def test_it_resumes_bitwise(done, tmp_path):
    of, records, folder, programs = done
    for name in ("00000002-00", "00000002-01", "00000004-01"):
        again = tmp_path / name
        shutil.copytree(folder, again)
        for path in (again / "checkpoints").iterdir():
            if path.name > name:
                shutil.rmtree(path)
        rest = list(train(of, feed(of), run=again, options=asked(of), cache=programs))
        assert same(rest, records) and scores(rest).items() <= scores(records).items()
        whole = losses(records)
        assert losses(rest) == {n: whole[n] for n in losses(rest)} and len(losses(rest)) < of.steps


def is_shape(x):
    return hasattr(x, "shape")


def test_its_dry_run_agrees_with_xla_and_counts_its_bytes(done):
    """The refusal of `check` is at 2%."""
    of, *_ = done
    forecast = dry_run(of)
    forecast.check()
    for stage in forecast.stages:
        assert stage.xla_ratio == pytest.approx(1, rel=0.02)
        arrays = jax.tree.leaves(eqx.filter(of.spans[stage.index].model, is_shape))
        assert stage.parameter_bytes == sum(x.size * x.dtype.itemsize for x in arrays)
        assert stage.parameter_bytes and stage.optimizer_bytes
        assert stage.optimizer_bytes > 2 * stage.parameter_bytes


def test_its_checkpoint_is_the_model(done):
    of, records, folder, _ = done
    last = max((folder / "checkpoints").iterdir())
    model, lineage = load_model(last)
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(records[-1].model), strict=True):
        np.testing.assert_array_equal(x, y)
    assert lineage["model"]["factory"]["name"].startswith("tests.own:")
    assert json.loads((folder / "plan.json").read_text())["model"]["is"] == "growjax:Model"


def test_it_is_reported(done, tmp_path):
    *_, folder, _ = done
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert folder.name in page and "wide" in page


def test_it_is_evaluated_as_far_as_it_can_be(done):
    of, records, *_ = done
    model = records[-1].model
    if of.loss is own.apply_loss:
        language = LanguageModel(model, ByteTokenizer())
        with pytest.raises(PlanError, match="a dict cannot be called"):
            language.loglikelihoods([("1 and ", "2")])
        return
    language = LanguageModel(model, ByteTokenizer(), longest=16)
    scored = language.loglikelihoods([("7 and 49 is", " 5"), ("7 and 49 is", "zz")])
    row = jnp.asarray(language.encode("7 and 49 is 5"))
    logs = jax.nn.log_softmax(model(row))
    by_hand = logs[-3, row[-2]] + logs[-2, row[-1]]
    assert scored[0].logprob == pytest.approx(float(by_hand), rel=1e-4)
    with pytest.raises(EvalError, match="no `extend`"):
        generate(language, ["7 and "], new=2)


def test_tasks_that_it_cannot_do_are_refused_before_any_is_run(done, tmp_path):
    """In one error; those that it can do are run."""
    of, records, *_ = done
    model, held_out = records[-1].model, tmp_path / "held-out.txt"
    name = type(getattr(model, "model", model)).__name__
    held_out.write_text("7 and 49 is 56. " * 3)
    settings = Settings(texts=(held_out,), longest=16, limit=2)
    with pytest.raises(EvalError, match="these tasks cannot be run:") as caught:
        evaluate(model, ["bpb", "qa/trivia", "glue/rte"], ByteTokenizer(), settings)
    assert f"qa/trivia: the model writes, and a {name} has no `extend`" in str(caught.value)
    assert "glue/rte: is for an encoder, and the model is a decoder" in str(caught.value)
    if of.loss is own.apply_loss:
        assert "bpb: reads logits, and a dict cannot be called" in str(caught.value)
        return
    scores = evaluate(model, ["bpb", "primitives/copy"], ByteTokenizer(), settings)
    assert 0 < scores["bpb"]["bits_per_byte"] < 20 and "choice" in scores["primitives/copy"]


# What a model does not read is never ignored -------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": Causal(8)}, "Mixer does not read positions, documents, which the objective's"),
        ({"objective": PrefixLM(8)}, "Mixer does not read positions, prefix, documents"),
        ({"objective": PrefixLM(8, "seq2seq")}, "an encoder and a decoder, which Mixer does not"),
        ({"model": Model("tests.own:mixer", {"layers": 2})}, "TypeError: .*missing 1 required .*width"),
        ({"model": Model("tests.own:apply", {"tree": 1, "tokens": 2})}, "cannot be built: TypeError"),
        ({"model": Model("tests.own:bare", {})}, "model: .*no axes.*words"),
        ({"model": Model("tests.own:mixer", {"layers": 2, "width": 16}), "loss": own.apply_loss},
         "stage 0 'small': AttributeError: .* no attribute 'model' .in apply_loss, own.py:"),
        ({"optimizer": trainer.Optimizer("sophia"), "loss": own.apply_loss}, "sophia draws labels"),
        ({"model": Model("tests.own:whole", {"layers": 2, "width": 16})},
         "Whole: expected logits of a floating-point type, got int32"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_refused_with_the_plan(changes, message):
    with pytest.raises(PlanError, match=f"(?s){message}"):
        own.mixed(**changes)


def test_logits_of_fewer_words_than_the_tokenizer_has_are_refused_before_a_step():
    narrow = own.mixed(model=Model("tests.own:narrow", {"layers": 2, "width": 16}))
    with pytest.raises(DataError, match="has 384 words, and the model gives logits of 7"):
        feed(narrow)


def test_a_table_of_fewer_rows_than_the_tokenizer_has_words_is_refused_whatever_its_axis():
    """JAX would read its last row for every word beyond it."""
    of = lambda **arguments: plan(  # noqa: E731
        steps(1), model=Model("tests.own:short", arguments), objective=Causal(8, packing="concat")
    )
    with pytest.raises(
        DataError, match="384 words, and the model reads row 383 of an array of 383"
    ):
        feed(of(pieces=383))
    feed(of(pieces=384))
    feed(of(pieces=100, hashed=True))
    key = jax.random.key(0)
    with pytest.raises(EvalError, match="its largest token reads row 383 of an array of 100"):
        LanguageModel(own.short(100, key=key), ByteTokenizer())
    LanguageModel(own.short(100, True, key=key), ByteTokenizer())


def test_a_model_is_shown_as_it_would_be_written():
    assert repr(Model(own.mixer, {"width": 8})) == "Model('tests.own:mixer', {'width': 8})"
    assert repr(Model(lambda key: key)).startswith("Model(test_a_model_is_shown")
    assert (
        repr(Model(own.mixer, dtype="bfloat16")) == "Model('tests.own:mixer', {}, dtype='bfloat16')"
    )


@pytest.mark.parametrize(
    "factory, message",
    [
        ("tests.own:gone", "cannot be imported: AttributeError"),
        ("nowhere_pkg:build", "cannot be imported: ModuleNotFoundError"),
        ("build", "expected an import path such as my_pkg.models:build"),
        ("tests.own:LINEARS", "expected a function, and it is"),
        (3, "factory: expected a function, by its import path, got 3"),
    ],
)
def test_a_factory_that_is_none_is_refused(factory, message):
    with pytest.raises(PlanError, match=message):
        Model(factory)


# A dict of arrays, without a plan ------------------------------------------------------------------


def test_a_dict_of_arrays_is_grown_certified_and_carried():
    import optax

    tree = own.parameters(8, 16, key=jax.random.key(0))
    tokens = jnp.arange(6).reshape(2, 3)

    def forward(model, batch):
        return jax.vmap(lambda row: own.apply(model.model, row))(batch)

    op = gj.copy(hidden=24, shares="random")
    big = gj.grow(op, tree)
    assert big.model["mlp"]["up"].shape == (8, 24) and type(big.model) is dict
    np.testing.assert_allclose(forward(big, tokens), forward(tree, tokens), atol=1e-5)
    assert gj.certify(op, tree, tokens, forward=forward).passed
    trained = gj.partition(tree)[0]
    tx = optax.adam(1e-3)
    state = gj.carry(op, tx.init(trained), tree, optimizer=tx)
    assert state[0].mu.model["mlp"]["down"].shape == (24, 384)


def test_a_dict_of_layers_by_number_keeps_its_state_and_a_certificate_sees_through_it():
    """NNX keys the layers of a list by number; `embed` is what the dict is applied to."""
    import optax

    rng = np.random.default_rng(0)
    specs = {"blocks.*.up": "embed -> mlp", "blocks.*.down": "mlp -> embed"}
    up, down = (jnp.asarray(rng.normal(size=(2, *s)), "float32") for s in [(4, 6), (6, 4)])
    tree = gj.annotate({"blocks": {i: {"up": up[i], "down": down[i]} for i in range(2)}}, specs)

    def forward(model, x):
        for block in model.model["blocks"].values():
            x = x + jnp.tanh(x @ block["up"]) @ block["down"]
        return x

    x = jnp.asarray(rng.normal(size=(3, 4)), "float32")
    certificate = gj.certify(gj.copy(mlp=9), tree, x, forward=forward)
    assert (
        certificate.passed
        and certificate.forward[-1].floor < 1e-12
        and certificate.forward[0].floor < 1e-5
    )
    assert not gj.certify(Forgetful(), tree, x, forward=forward).passed
    with pytest.raises(AxisError, match="a dict cannot be called; say how it is applied"):
        gj.certify(gj.copy(mlp=9), tree, x)
    trained = gj.partition(tree)[0]
    tx = optax.masked(optax.adam(1e-3), _in_up)
    state = gj.carry(gj.copy(mlp=9), tx.init(trained), tree, optimizer=tx)
    assert state.inner_state[0].mu.model["blocks"][1]["up"].shape == (4, 9)


def _in_up(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: "up" in str(path), tree)


class Forgetful(gj.Operator):
    """Copies hidden units, and halves nothing."""

    exactness = "exact-given-init"

    def maps(self, axes):
        return [gj.AxisMap("mlp", np.repeat(np.arange(axes.size("mlp")), 2))]


class Frozen(Mapping):
    """A tree that is no dict, as Flax's FrozenDict is."""

    def __init__(self, inner):
        self.inner = inner

    def __getitem__(self, key):
        return self.inner[key]

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)


def test_trees_that_no_path_reads_are_refused():
    jax.tree_util.register_pytree_with_keys(
        Frozen,
        lambda tree: ([(jax.tree_util.DictKey("inner"), tree.inner)], None),
        lambda _, children: Frozen(*children),
    )
    with pytest.raises(
        AxisError, match="w.inner: it is held by a Frozen, .*give plain dicts"
    ) as caught:
        gj.annotate({"w": Frozen(jnp.ones(3))}, {"w.inner": "-> embed"})
    assert "flax.core.unfreeze" in str(caught.value)


# On many devices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_every_layout_gives_the_same_losses(layouts, name):
    one = layouts[name].pop("one")
    for layout, found in layouts[name].items():
        np.testing.assert_allclose(found, one, rtol=2e-5, err_msg=layout)
    assert len(layouts[name]) == {"declared": 3, "annotated": 2, "a dict": 1}[name]


@pytest.fixture(scope="module")
def layouts():
    """The losses of every plan under its layouts, in a process that has eight devices."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.hosts", "own"],
        env={**os.environ, **SEVERAL_DEVICES, "JAX_NUM_CPU_DEVICES": "8"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout.splitlines()[-1])


# Own values, from a file, by the command line ------------------------------------------------------


def growjax(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "growjax", *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_plan_of_own_values_is_killed_resumed_bitwise_and_reported(tmp_path):
    of = own.everything()
    trainer.save_plan(of, tmp_path / "plan.json")
    assert "tests.own:" in (tmp_path / "plan.json").read_text()
    refused = growjax("plan", tmp_path / "plan.json")
    said, _ = refused.communicate(timeout=300)
    assert refused.returncode == 1 and "give --allow tests" in said and "Traceback" not in said

    command = ["train", tmp_path / "plan.json", "--run", tmp_path / "killed", "--allow", "tests"]
    doomed = growjax(*command, "--save-every", 2)
    written = tmp_path / "killed" / "checkpoints" / "00000002-00"
    while not written.exists() and doomed.poll() is None:
        time.sleep(0.02)
    doomed.kill()
    said, _ = doomed.communicate(timeout=300)
    assert doomed.returncode == -signal.SIGKILL, said
    resumed = growjax(*command, "--save-every", 2)
    said, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, said

    list(
        train(
            of, run=tmp_path / "whole", options=Options(save_every=2, evaluate_every=of.cost / 20)
        )
    )
    ends = [max((tmp_path / name / "checkpoints").iterdir()) for name in ("killed", "whole")]
    killed, whole = map(read_lineage, ends)
    assert ends[0].name == ends[1].name and killed["checksums"] == whole["checksums"]
    assert [op["is"] for op in killed["operators"]] == ["tests.own:Stack", "growjax:MSG"]
    page = write_report([tmp_path / "killed"], tmp_path / "report.html").read_text()
    assert "killed" in page and "reversed" in page and "half" in page
