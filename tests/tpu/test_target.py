"""Plans compiled by the real TPU compiler, for slices of 16 and of 256 chips that are not here."""

import dataclasses
import io
import json
import re
from typing import Any

import jax
import pytest
from rich.console import Console

import growjax as gj
from growjax.data import MLM, UL2, Causal
from growjax.errors import LayoutError
from growjax.forecast.dryrun import dry_run
from growjax.forecast.pod import COLLECTIVES, Compiled, Target, compile_for
from growjax.models import (
    GPT,
    BERTConfig,
    GPTConfig,
    LlamaConfig,
    Model,
    ModernBERTConfig,
    T5Config,
)
from growjax.select import RhoLoss
from growjax.train import Layout, Plan, Schedule, Stage, cross_entropy
from growjax.train.commands import show_plan
from tests import own
from tests.conftest import DEEP


SMALL = GPTConfig(
    layers=2, embed=128, heads=2, head_dim=64, mlp=256, vocab=512, positions=128, dtype="bfloat16"
)
# What the oldest JAX runs in CI; the newest runs all
sample = pytest.mark.sample
# Of one block: q, k, v and out of its attention, up and down of its MLP
MATRICES = 6


def plan(*stages: Stage, batch: int = 16, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model": SMALL,
        "batch": batch,
        "objective": Causal(128, packing="concat"),
        "rate": Schedule(1e-3),
    }
    return Plan("pod", stages=stages, **fields | changes)


def steps(n: int, name: str, **fields: Any) -> Stage:
    return Stage(name, flops=n * plan(Stage(tokens=1)).flops, **fields)


def grown(**changes: Any) -> Plan:
    """Growth behind gates, then stacking, then paths of two lengths."""
    wider = gj.msg(embed=256, heads=4, mlp=512)
    return plan(
        steps(4, "small"),
        steps(99, "wide", grow=wider, ramp=2),
        Stage(
            "deep",
            grow=gj.stack(layers=4, order="top"),
            subnet=gj.path_schedule((3, 4), layers=4, steps=4),
        ),
        **changes,
    )


@pytest.fixture(scope="module", autouse=True)
def whole_compiler():
    """The other tests ask for little optimisation; what is looked at here is what users get."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def known(n: int | None) -> int:
    assert n is not None
    return n


def by_name(forecast: Target) -> dict[tuple[int, str], Compiled]:
    return {(p.stage, p.name): p for p in forecast.programs}


@pytest.fixture(scope="module")
def sixteen() -> Target:
    return compile_for(grown(layout=Layout(fsdp=4)), "v5e:4x4")


def test_every_program_of_a_plan_fits_sixteen_chips(sixteen):
    assert (sixteen.chips, sixteen.memory, sixteen.refusals) == (16, 16 << 30, ())
    assert list(by_name(sixteen)) == [
        (0, "evaluation"),
        (0, "step"),
        (1, "growth"),
        (1, "evaluation before it"),
        (1, "evaluation"),
        (1, "step"),
        (2, "growth"),
        (2, "evaluation before it"),
        (2, "evaluation"),
        (2, "step, RandomPath(length=3)"),
        (2, "step, RandomPath(length=4)"),
    ]
    assert all(p.fits and not p.to_host for p in sixteen.programs)
    sixteen.check()
    assert json.loads(json.dumps(sixteen.to_dict()))["programs"][0]["name"] == "evaluation"
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(sixteen)
    assert "16 chips of 16.00 GiB" in console.export_text()


def test_memory_is_that_of_the_arithmetic(sixteen):
    """Arrays are padded to tiles, so that the compiler needs no less than their shapes say."""
    states = [
        known(s.parameter_bytes) + known(s.optimizer_bytes)
        for s in dry_run(grown(layout=Layout(fsdp=4)), devices=16).stages
    ]
    for (stage, name), program in by_name(sixteen).items():
        if name.startswith("step"):
            assert states[stage] <= known(program.arguments) <= 1.5 * states[stage] + 2**16
            assert known(program.results) < 2**16, "a step that does not reuse its state's memory"
        if name == "growth":
            assert states[stage - 1] <= known(program.arguments)
            assert states[stage] <= known(program.results)


def test_gradients_are_scattered_and_parameters_gathered_by_layer(sixteen):
    """The compiler scatters what it can cut along its tiles, and sums tiny matrices whole."""
    collectives = {key: p.collectives for key, p in by_name(sixteen).items() if "step" in key[1]}
    assert collectives[0, "step"]["reduce-scatter"] == MATRICES + 1, (
        "those of a block, and the embedding"
    )
    assert all(counts["reduce-scatter"] >= MATRICES - 1 for counts in collectives.values())
    assert all(counts["all-gather"] >= MATRICES for counts in collectives.values())


@sample
def test_activations_are_not_sent_around():
    """The memory of a step is that of its sequences, and not of all that share a replica's state."""
    one, shared = (
        by_name(compile_for(plan(steps(4, "small"), layout=layout), "v5e:4x4"))[0, "step"]
        for layout in (Layout(), Layout(fsdp=4))
    )
    assert known(shared.temporaries) < 1.5 * known(one.temporaries) + 2**21
    assert shared.collectives["all-to-all"] == 0


@sample
def test_what_is_compiled_is_not_kept(tmp_path):
    """A program for chips that are not here cannot be loaded: JAX would warn, and compile it anew."""
    before = getattr(jax.config, "jax_compilation_cache_dir", None)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        for _ in range(2):
            assert compile_for(plan(steps(4, "small")), "v5e:4x4").refusals == ()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not list(tmp_path.iterdir()) and getattr(
        jax.config, "jax_enable_compilation_cache", None
    )


def test_replicas_add_up_and_do_nothing_else():
    forecast = compile_for(plan(steps(4, "small"), layout=Layout(step="shard_map")), "v5e:4x4")
    step = by_name(forecast)[0, "step"].collectives
    assert step["all-reduce"] >= 1 and {k for k in COLLECTIVES if step[k]} == {"all-reduce"}


@pytest.mark.skipif(not DEEP, reason="half a minute: the deep profile runs it")
def test_a_second_model_takes_the_memory_of_its_parameters():
    def needed(**more: Any) -> int:
        forecast = compile_for(plan(steps(4, "chosen", select=RhoLoss())), "v5e:4x4", **more)
        return known(by_name(forecast)[0, "step"].arguments)

    whole = plan(steps(4, "small")).spans[0].model
    smaller = GPT(dataclasses.replace(SMALL, layers=1), key=jax.random.key(0))
    counts = [sum(x.size for x in jax.tree.leaves(model)) for model in (whole, smaller)]
    saved = 4 * (counts[0] - counts[1])
    assert needed() - needed(reference=smaller) == pytest.approx(saved, rel=0.02) and saved > 0


def test_a_growth_fits_256_chips():
    forecast = compile_for(
        grown(layout=Layout(data=16, fsdp=16), batch=256), "v5e:16x16", stages=(1,)
    )
    assert forecast.chips == 256 and forecast.refusals == ()
    programs = by_name(forecast)
    assert programs[1, "step"].collectives["reduce-scatter"] >= 2, "those of the MLP"
    assert programs[1, "growth"].to_host == 0


# Sizes of 16 chips, in a torus of 4x4 or of 2x2x4
SIZES: dict[str, Any] = {
    "layers": 2,
    "embed": 128,
    "heads": 4,
    "head_dim": 64,
    "mlp": 256,
    "vocab": 512,
}
MODELS = {
    "GPT": ("v5e:4x4", GPTConfig(**SIZES, positions=64), Causal(64)),
    "Llama": ("v5e:4x4", LlamaConfig(**SIZES, kv_heads=2), Causal(64)),
    "T5": (
        "v5p:2x2x4",
        T5Config(
            encoder_layers=2, decoder_layers=2, embed=128, heads=2, head_dim=64, mlp=256, vocab=512
        ),
        UL2(64),
    ),
    "BERT": ("v6e:4x4", BERTConfig(**SIZES, positions=64), MLM(64)),
    "ModernBERT": ("v6e:4x4", dataclasses.replace(ModernBERTConfig(**SIZES), layers=3), MLM(64)),
    # Models that growjax did not write, and which read no documents
    "a declared module": (
        "v5e:4x4",
        Model(own.mixer, {"layers": 2, "width": 128}),
        Causal(64, packing="concat"),
    ),
    "a dict": (
        "v5e:4x4",
        Model(own.parameters, {"width": 128, "hidden": 256}),
        Causal(64, packing="concat"),
    ),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {"layout": Layout()},
    "shared": {"layout": Layout(fsdp=4)},
    "tensor": {"layout": Layout(tensor=2)},
    "shared tensor in parts": {"layout": Layout(fsdp=4, tensor=2), "accumulate": 2},
    "own paths": {"layout": Layout(step="shard_map", own_paths=True)},
}


# Without the deep profile, models of others, Llama (GPT to a layout) and T5 are compiled with the
# layouts that have all of it, ModernBERT (BERT to a layout) with none, and the oldest JAX compiles each
# other model and each layout once
BOTH = ("shared tensor in parts", "own paths")
QUICK = {"Llama": ("replicas", *BOTH), "T5": ("tensor", *BOTH), "ModernBERT": ()}
ONCE = [
    ("GPT", "own paths"),
    ("Llama", "replicas"),
    ("T5", "tensor"),
    ("BERT", "shared tensor in parts"),
    ("a declared module", "own paths"),
    ("a dict", "shared tensor in parts"),
]
PAIRS = [
    pytest.param(model, layout, marks=[sample] if (model, layout) in ONCE else [])
    for model, (_, config, _) in MODELS.items()
    for layout in LAYOUTS
    if DEEP or layout in (BOTH if isinstance(config, Model) else QUICK.get(model, LAYOUTS))
]


@pytest.mark.parametrize("model, layout", PAIRS)
def test_every_model_and_layout_compiles(model, layout):
    """On every generation that is known; what travels is parameters, gradients and sums."""
    target, config, objective = MODELS[model]
    drawn = LAYOUTS[layout]["layout"].own_paths
    axis = "encoder_layers" if model == "T5" else "layers"
    part = gj.random_path(1, keep=(), axis=axis) if drawn and model != "a dict" else None
    stage = Stage("only", tokens=1, subnet=part)
    loss = own.apply_loss if model == "a dict" else cross_entropy
    of = plan(stage, model=config, objective=objective, loss=loss, **LAYOUTS[layout])
    forecast = compile_for(of, target)
    assert forecast.refusals == () and len(forecast.programs) == 2
    for program in forecast.programs:
        sent = {k: program.collectives[k] for k in ("all-to-all", "collective-permute")}
        assert program.flops and not any(sent.values()), (program.name, sent)


def test_a_mixture_of_experts_compiles_and_sorts_on_its_own_chips():
    """Grown from a dense model; two chips that share its experts exchange tokens and not weights."""
    model = LlamaConfig(**SIZES, kv_heads=2, dtype="bfloat16")
    of = plan(
        Stage("dense", tokens=1),
        Stage("mixture", tokens=2, grow=gj.upcycle(experts=8)),
        model=model,
        objective=Causal(64, packing="concat"),
        layout=Layout(fsdp=2, experts=2),
    )
    forecast = compile_for(of, "v5e:4x4")
    assert forecast.refusals == ()
    step = by_name(forecast)[1, "step"]
    # What the sort of a device needs is on it; the exchange is a gather and a scatter of tokens
    assert step.flops and step.collectives["all-to-all"] == 0, step.collectives


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(fsdp=2, tensor=2), marks=sample),
        *([Layout(), Layout(fsdp=4), Layout(tensor=2)] if DEEP else []),
    ],
)
def test_all_logits_are_never_in_memory(layout):
    """Of 8 sequences a chip or more: a step takes less memory than they would, under every layout."""
    rows, length, vocab = 32, 512, 32_768
    of = plan(
        steps(4, "small"),
        model=dataclasses.replace(SMALL, positions=length, vocab=vocab),
        objective=Causal(length, packing="concat"),
        batch=rows,
        layout=layout,
    )
    programs = by_name(compile_for(of, "v5e:2x2"))
    logits = 4 * rows * length * vocab // 4
    parameters = 4 * 128 * vocab
    for name in ("step", "evaluation"):
        used = known(programs[0, name].temporaries)
        assert used < 0.6 * logits + 2 * parameters, (name, used / logits)
    assert programs[0, "step"].collectives["all-to-all"] == 0


@pytest.mark.parametrize("make", [own.mixed, own.annotated, own.mapping])
def test_plans_of_models_that_growjax_did_not_write_compile(make):
    """Every program of theirs: gates that open, layers on top, paths, and a dict of arrays."""
    of = make(layout=Layout(fsdp=4))
    forecast = compile_for(of, "v5e:2x2")
    assert forecast.refusals == () and all(p.fits and not p.to_host for p in forecast.programs)
    names = {(p.stage, p.name.partition(",")[0]) for p in forecast.programs}
    for stage in range(len(of.stages)):
        assert {(stage, "step"), (stage, "evaluation")} <= names
        assert ((stage, "growth") in names) == (stage > 0)


@pytest.fixture(scope="module")
def refused() -> tuple[Plan, str]:
    """A plan of far too large a batch, and what is said of its step."""
    large = plan(steps(4, "small"), batch=16 * 11264, model=dataclasses.replace(SMALL, dtype=None))
    forecast = compile_for(large, "v5e:4x4")
    with pytest.raises(LayoutError, match=r"does not fit v5e:4x4:\n  - stage 0 'small'"):
        forecast.check()
    (reason,) = [r for r in forecast.refusals if "step" in r]
    return large, reason


def test_what_does_not_fit_is_said_with_what_would_help(refused):
    _, reason = refused
    words = r"stage 0 'small': step: needs [\d.]+ GiB of 16.00 GiB a chip; accumulate=\d+ makes it "
    assert re.match(words + r"[\d.]+ [GM]iB, as was compiled. By estimate, any of these", reason)
    assert "batch=" in reason and "fsdp=" not in reason


@pytest.mark.skipif(not DEEP, reason="a minute: the deep profile runs it")
def test_what_is_said_to_help_does(refused):
    large, reason = refused
    parts = int(re.findall(r"accumulate=(\d+)", reason)[0])
    helped = compile_for(dataclasses.replace(large, accumulate=parts), "v5e:4x4")
    assert by_name(helped)[0, "step"].fits, "the remedy that was named does not help"


@sample
def test_slices_that_are_none_are_refused():
    small = plan(steps(1, "small"))
    with pytest.raises(LayoutError, match="cannot describe a slice v5e:3x5"):
        compile_for(small, "v5e:3x5")
    with pytest.raises(LayoutError, match="16 sequences in 1 parts on 256 devices"):
        compile_for(small, "v5e:16x16")


def test_slices_send_each_other_gradients_and_no_activations():
    """Of the evaluation, which has no gradients, the losses alone."""
    two = compile_for(plan(steps(4, "small"), layout=Layout(fsdp=4)), "2xv5e:2x2")
    assert (two.chips, two.refusals) == (8, ()) and all(p.fits for p in two.programs)
    of = by_name(two)
    # The losses of 16 sequences of 128 tokens, and their weights
    assert of[0, "evaluation"].between_slices == 2 and of[0, "step"].between_slices >= MATRICES
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(two)
    assert "2 between slices" in console.export_text()


@sample
def test_the_command_prints_both_tables():
    console = Console(width=140, file=io.StringIO(), record=True)
    show_plan(plan(steps(4, "small")), target="v5e:4x4", console=console)
    text = console.export_text()
    assert "16 devices: data=16 x fsdp=1" in text and "16 chips" in text
