"""Dry runs: FLOPs against XLA's count, bytes against arithmetic by hand, and what is refused."""

import dataclasses
import io
import json
from typing import Any

import equinox as eqx
import jax
import pytest
from rich.console import Console

import growjax as gj
from growjax.cost import parameters
from growjax.data import MLM, UL2, Causal
from growjax.errors import LayoutError, PlanError, StateError
from growjax.forecast import dryrun as module
from growjax.forecast import pod
from growjax.forecast.dryrun import amount, dry_run
from growjax.forecast.memory import remedies, usage
from growjax.forecast.pod import GENERATIONS, chips, compile_for
from growjax.forecast.residuals import residual_bytes
from growjax.forecast.xla import xla_training_flops
from growjax.models import BERTConfig, LlamaConfig, T5Config
from growjax.plan.steps import step_flops
from growjax.programs.ahead import Need
from growjax.programs.carried import carry_faults
from growjax.train import Layout, Optimizer, Plan, train
from growjax.train.commands import show_plan
from tests.runs import SMALL, every_kind, feed, plan, steps


BERT_SMALL = BERTConfig(layers=3, embed=16, heads=2, head_dim=8, mlp=32, vocab=384, positions=16)
T5_SMALL = T5Config(
    encoder_layers=2, decoder_layers=3, embed=16, heads=2, head_dim=8, mlp=32, vocab=384
)
LLAMA_SMALL = LlamaConfig(
    layers=2, embed=16, heads=4, kv_heads=2, head_dim=8, mlp=32, vocab=384, dtype="bfloat16"
)
PLANS = {
    "GPT, grown and on paths": every_kind,
    "BERT": lambda: plan(steps(2), model=BERT_SMALL, objective=MLM(16)),
    "T5": lambda: plan(steps(2), model=T5_SMALL, objective=UL2(32)),
    "Llama, recomputed": lambda: plan(
        steps(2, subnet=gj.random_part(mlp=16)),
        model=dataclasses.replace(LLAMA_SMALL, remat="nothing"),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_xla_counts_the_same_flops(name):
    """At any size, forward and backward: elementwise work is in neither count."""
    for stage in dry_run(PLANS[name]()).stages:
        # A CPU converts bfloat16 before a product, and XLA counts that
        converts = name.startswith("Llama")
        assert stage.xla_ratio == pytest.approx(1, abs=0.02 if converts else 0.002)


def test_every_layer_is_counted():
    counts = [
        xla_training_flops(of.spans[0].model, of.objective)
        for n in (1, 5)
        for of in [plan(steps(1), model=dataclasses.replace(SMALL, layers=n))]
    ]
    layer = 4 * 16 * 16 + 2 * 16 * 16 + 2 * 8 * 16  # projections, MLP, attention at length 8
    assert counts[1] - counts[0] == pytest.approx(4 * 3 * 8 * 2 * layer, rel=0.001)


@pytest.fixture
def ours(monkeypatch):
    """What XLA would say, without asking it."""
    count = step_flops
    monkeypatch.setattr(module, "xla_training_flops", lambda m, o, p, loss: count(m, o, 1, p))


def test_counts_that_disagree_are_refused(monkeypatch):
    monkeypatch.setattr(module, "xla_training_flops", lambda *_, **__: 10)
    with pytest.raises(PlanError, match=r"stage 0 '': 47616 FLOPs a token are counted, and XLA"):
        dry_run(plan(steps(1), model=dataclasses.replace(SMALL, layers=1))).check()


# Bytes -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
def test_bytes_of_a_device_are_those_of_hand_arithmetic():
    """Float32 on 4 devices: all that has a dimension that 4 divides is split, and the rest is whole."""
    fsdp = plan(steps(1), layout=Layout(fsdp=4), model=dataclasses.replace(SMALL, bias=True))
    (stage,) = dry_run(fsdp).stages
    # [384, 16] words, [16, 16] positions; q, k, v, out [2, 16, 2, 8] and their biases; MLP; norms
    tables, attention, mlp = 384 * 16 + 16 * 16, 4 * 2 * 16 * 16, 2 * 2 * 16 * 16
    biases = 2 * (3 * 16 + 16) + 2 * (16 + 16)
    norms = 2 * 2 * 2 * 16 + 2 * 16
    numbers = tables + attention + mlp + biases + norms
    assert numbers == stage.parameters == parameters(fsdp.spans[0].model)
    assert stage.parameter_bytes is not None and stage.optimizer_bytes is not None
    rest = 4 * (2 * 2 + 1)  # the epsilons of five norms
    assert stage.parameter_bytes == numbers + rest
    # Two moments like the parameters, and an age for every coordinate of every axis
    ages = 4 * sum(fsdp.spans[0].sizes.values())
    assert 2 * numbers <= stage.optimizer_bytes <= 2 * numbers + ages + 64
    (alone,) = dry_run(dataclasses.replace(fsdp, layout=Layout())).stages
    assert alone.parameter_bytes == 4 * numbers + rest
    assert stage.unsplit == alone.unsplit == ()


@pytest.mark.usefixtures("ours")
def test_a_growth_holds_two_states():
    stages = dry_run(every_kind(layout=Layout(fsdp=2))).stages
    states = [(s.parameter_bytes or 0) + (s.optimizer_bytes or 0) for s in stages]
    assert [s.growing_bytes for s in stages] == [None, states[0] + states[1], sum(states[1:])]


@pytest.mark.usefixtures("ours")
def test_what_could_not_be_split_is_named():
    (stage,) = dry_run(plan(steps(1), batch=35, layout=Layout(fsdp=7))).stages
    assert "embedding.table" in stage.unsplit and "blocks.block.mlp.up" in stage.unsplit


# What it says ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
def test_a_plan_is_worked_out_stage_by_stage():
    run = every_kind()
    forecast = dry_run(run)
    small, ramp, deep = forecast.stages
    assert (small.grows, small.exactness, small.parts) == (None, None, ())
    assert (ramp.grows, ramp.exactness) == ("msg(mlp=24, heads=4)", "exact")
    assert deep.exactness == "approximate" and deep.sizes["layers"] == 4
    assert deep.parts == ("RandomPath(length=3)", "RandomPath(length=4)")
    assert forecast.flops == run.flops and sum(s.tokens for s in forecast.stages) == run.tokens
    whole = run.spans[-1].flops[-1]
    assert small.saved == pytest.approx(1 - run.spans[0].flops[0] / whole)
    assert forecast.saved == pytest.approx(1 - run.flops / (run.steps * whole))
    assert deep.rate[1] == run.learning_rate(run.flops - run.spans[-1].flops[-1] / 2)
    json.dumps(forecast.to_dict())


REFUSED = {
    "batch: 4 sequences at a time cannot be split over data=2 x fsdp=4 = 8 devices; take 8": (
        {"layout": Layout(fsdp=4)},
        8,
    ),
    "split over data=4 x fsdp=1 = 4 devices in 2 parts; take 8 or 16": (
        {"batch": 12, "accumulate": 2, "layout": Layout()},
        4,
    ),
    "data=-1 x fsdp=3 x tensor=1 does not make 8 devices": ({"layout": Layout(fsdp=3)}, 8),
}


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_laid_out_is_refused(message):
    changes, devices = REFUSED[message]
    forecast = dry_run(plan(steps(1), **changes), devices=devices)
    assert [message in reason for reason in forecast.refusals] == [True]


@pytest.mark.usefixtures("ours")
def test_all_refusals_come_together_and_after_the_table():
    console = Console(width=120, file=io.StringIO(), record=True)
    with pytest.raises(PlanError) as error:
        show_plan(every_kind(layout=Layout(fsdp=4)), devices=8, console=console)
    assert str(error.value).count("\n  - stage") == 3
    text = console.export_text()
    assert "50.0%" in text and "RandomPath(length=3)" in text and "while growing" in text
    assert "8 devices: data=2 x fsdp=4 x tensor=1" in text and text.count("refused: stage") == 3


@pytest.mark.usefixtures("ours")
def test_no_array_is_made():
    before = len(jax.live_arrays())
    huge = dataclasses.replace(SMALL, layers=3, embed=8192, heads=64, head_dim=128, mlp=32768)
    (stage,) = dry_run(plan(steps(1), model=huge, layout=Layout(fsdp=4))).stages
    assert stage.parameters > 2**31 and len(jax.live_arrays()) <= before + 8


def test_amounts_are_for_people():
    texts = [amount(n) for n in (None, 0, 1023, 1536, 3 << 20, 5 << 30)]
    assert texts == ["-", "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.00 GiB"]


# Targets, as far as they go without a compiler ---------------------------------------------------


def test_slices_have_names():
    assert [chips(t) for t in ("v5e:16x16", "v5p:2x2x4", "v6e:4x4")] == [256, 16, 16]
    for wrong in ("v4:2x2x4", "v5e", "v5e:4x4x4", "v5e:0x4", "v5e:4xa", "16x16"):
        with pytest.raises(LayoutError, match="v5e:4x4 .16 GiB a chip., v5p:4x4x4 .95 GiB"):
            chips(wrong)
    assert set(GENERATIONS) == {"v5e", "v5p", "v6e"}
    assert [chips(t) for t in ("2xv5e:4x4", "12xv5p:2x2x4")] == [32, 192]
    for wrong in ("0xv5e:4x4", "v5e:4x4x2", "2x", "2xv5e", "-2xv5e:4x4", "2 x v5e:4x4"):
        with pytest.raises(LayoutError, match="or several slices, such as 2xv5e:4x4; got"):
            chips(wrong)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh reads of a device; a slice is one host."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "chip"

    @property
    def process_index(self) -> int:
        return self.slice_index


@pytest.mark.parametrize(
    ("layout", "slices", "of"),
    [
        # Replicas go across the slow network, what they share does not
        (Layout(fsdp=4), 2, [[0] * 4, [1] * 4]),
        (Layout(fsdp=2), 2, [[0] * 2, [0] * 2, [1] * 2, [1] * 2]),
        (Layout(fsdp=2, tensor=2), 2, [[0] * 4, [1] * 4]),
        # One replica is larger than a slice
        (Layout(fsdp=8), 2, [[0] * 4 + [1] * 4]),
        (Layout(fsdp=4), 4, [[0] * 2 + [1] * 2, [2] * 2 + [3] * 2]),
    ],
)
def test_replicas_are_spread_over_slices_first(layout, slices, of):
    devices = [Chip(n, n * slices // 8) for n in range(8)]
    mesh = layout.mesh(devices[::-1])  # in whatever order they come
    assert [d.id for d in mesh.devices.flat] == list(range(8))
    assert [[d.slice_index for d in row.flat] for row in mesh.devices] == of


def test_experts_and_heads_stay_within_a_slice():
    devices = [Chip(n, n // 4) for n in range(8)]
    with pytest.raises(
        LayoutError, match="data=1 x fsdp=1 cannot be split over 2 slices.*multiple"
    ):
        Layout(experts=8).mesh(devices)


@pytest.mark.parametrize(
    ("proven", "estimated", "advice"),
    [
        ("accumulate=4 fits", "not even accumulate=8 would be enough", "accumulate=4 fits"),
        ("accumulate=4 fits", "any of these would do: a", "accumulate=4 fits. By estimate, any"),
        (None, "not even accumulate=8", "no single change makes it fit. By estimate, not even"),
    ],
)
def test_what_was_compiled_is_not_denied_by_an_estimate(proven, estimated, advice, monkeypatch):
    monkeypatch.setattr(pod, "cheapest", lambda *_: proven)
    monkeypatch.setattr(pod, "remedies", lambda *_: estimated)
    full = pod.Compiled(0, "step", 99 << 30, fits=False)
    of, device = plan(steps(1)), pod.DEVICES["v5e"]
    (reason,) = pod._refusals(of, "v5e:4x4", device, [("step", 0, None)], [full], None)
    assert f"needs 99.00 GiB of 16.00 GiB a chip; {advice}" in reason
    assert ("By estimate" in reason) == ("By estimate" in advice)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LayoutError, match=r"install growjax\[tpu\]"):
        compile_for(plan(steps(1)), "v5e:4x4")


def large(**changes: Any) -> Plan:
    wide = dataclasses.replace(SMALL, layers=8, embed=128, heads=2, head_dim=64, mlp=512)
    fields = {"model": wide, "batch": 64, "optimizer": Optimizer("sgd")}
    return plan(steps(1), **fields | changes)


@pytest.mark.usefixtures("ours")
def test_what_a_step_holds_is_what_its_shapes_say():
    run = large()
    use = usage(run, 0, None, 16, training=True)
    (stage,) = dry_run(run, devices=16).stages
    assert use.state == (stage.parameter_bytes or 0) + (stage.optimizer_bytes or 0)
    assert use.residuals == 4 * residual_bytes(run.spans[0], None) and use.sums == 0
    halves = usage(large(accumulate=2), 0, None, 16, training=True)
    assert halves.residuals == use.residuals // 2 and halves.sums == 4 * stage.parameters
    config: Any = run.model
    lean = large(model=dataclasses.replace(config, remat="nothing"))
    # Of a layer at length 8, only its input is left
    assert residual_bytes(lean.spans[0], None) < residual_bytes(run.spans[0], None) / 3


def test_remedies_are_those_that_would_be_enough():
    need: Need = ("step", 0, None)
    run = large(batch=2**11)
    use = usage(run, 0, None, 16, training=True)
    used = use.total + 2**16
    # Half of what is kept for the backward pass must go, and two parts sum gradients on top
    sentence = remedies(run, need, 16, used, used - use.residuals // 2)
    assert sentence.startswith("any of these would do: ") and "batch=1024" in sentence
    assert (
        "accumulate=4" in sentence and "model.remat=nothing" in sentence and "fsdp" not in sentence
    )
    # More than half of the state must go (two devices each hold a little whole): only sharing helps
    few = usage(large(), 0, None, 16, training=True)
    sentence = remedies(large(), need, 16, few.total, few.residuals + few.state // 2)
    assert sentence.startswith("any of these would do: fsdp=4 (about ") and sentence.count("=") == 1
    sentence = remedies(run, need, 16, used, few.state // 8)
    assert sentence.startswith("no single change is enough; together fsdp=16 and accumulate=128")
    sentence = remedies(run, need, 16, used, 2**16)
    assert sentence.startswith("not even fsdp=16") and sentence.endswith(
        "or chips with more memory"
    )
    growth: Need = ("grow", 0, None)
    assert remedies(run, growth, 16, use.state, use.state // 2).count("=") == 1


def test_xla_counts_long_sequences_with_all_scores():
    """Attention over tiles is a loop of unknown length; both counts are of all scores."""
    config = gj.models.GPTConfig(
        layers=2, embed=16, heads=2, head_dim=8, mlp=16, vocab=30, positions=256
    )
    model = eqx.filter_eval_shape(lambda: gj.models.GPT(config, key=jax.random.key(0)))
    counted = step_flops(model, Causal(256), 1)
    assert counted == pytest.approx(xla_training_flops(model, Causal(256)), rel=1e-4)


def test_optimizer_state_that_cannot_follow_is_refused_before_the_run(tmp_path):
    """And not by a run that gets to the growth, after all steps of the stages before."""

    def grown(carry: Any) -> Plan:
        return plan(steps(1), steps(1, "wide", grow=gj.copy(mlp=32, noise=0.1), carry=carry))

    (refusal,) = dry_run(grown("dual")).refusals
    assert refusal.startswith("stage 1 'wide': carry='dual': ") and "carry='reset'" in refusal
    assert "copies are read with different noise" in refusal
    with pytest.raises(StateError, match=r"cannot be trained to its end:\n.*stage 1 'wide'"):
        next(iter(train(grown("dual"), feed(grown("dual")))))
    assert not dry_run(grown("reset")).refusals
    # Of copies from the layer above no state follows, but that of the rest does
    for op, follows in ((gj.aki(mlp=32), True), (gj.lemon(mlp=32), False)):
        (fault,) = carry_faults(plan(steps(1), steps(1, grow=op)))
        assert ("carry='zero' starts that of new copies alone anew" in fault) == follows


@pytest.mark.parametrize("devices", [0, -3])
def test_a_number_of_devices_is_positive(devices):
    with pytest.raises(LayoutError, match="devices: expected a positive number"):
        dry_run(plan(steps(1)), devices=devices)
