"""Cycles of a program's text, the pace of stages, and what is tried when a program does not fit."""

import dataclasses
import io
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from growjax.errors import CostError, LayoutError
from growjax.forecast.cycles import TILES, cycles
from growjax.forecast.memory import cheapest
from growjax.forecast.speed import DEVICES, device_of, pace_of, pace_table, roofline
from growjax.models import GPT
from growjax.nn import Stacked
from growjax.parallel import Layout, remembering
from growjax.plan.plan import Plan
from growjax.plan.stages import Work
from growjax.programs.ahead import Need
from growjax.train.commands import show_plan
from tests.runs import SMALL, plan, steps


def estimate(n: int) -> str:
    return f'backend_config={{"estimated_cycles":"{n}"}}'


def kernel(phase: str, keys: str, side: int, *, table: str = "s8[1,2,2]") -> str:
    """A call of a kernel of splash attention on 8 sequences of 16 heads, as the compiler writes it."""
    name = "" if phase == "fwd" else f"_{phase}"
    sizes = rf"\"block_q{name}\": {side}, \"block_kv{name}\": {side}, \"q_layout\": 1"
    operands = f"{table}{{2,1,0}}, bf16[8,16,1024,64]{{3,2,1,0}}, bf16[8,16,{keys}]{{3,2,1,0}}"
    return (
        f"  %splash_mha_{phase}_residuals.1 = (f32[8,16,1024,128]{{3,2,1,0}}) custom-call(%a, %b), "
        'custom_call_target="tpu_custom_call", '
        f"operand_layout_constraints={{{operands}}}, frontend_attributes={{kernel_metadata={{\n"
        f'"xprof_metadata":"{{{sizes}}}"\n}}}}'
    )


def program(*body: str, bound: str = "constant(24)", entry: tuple[str, ...] = ()) -> str:
    """The text of a program that runs a body 24 times."""
    lines = [
        "HloModule jit__step, is_scheduled=true",
        "%body.1 (p: (s32[])) -> (s32[]) {",
        *body,
        "}",
        "%cond.2 (p: (s32[])) -> pred[] {",
        f"  %c.1 = s32[] {bound}",
        "  ROOT %lt = pred[] compare(%i, %c.1), direction=LT",
        "}",
        "%cheap (p: f32[]) -> f32[] {",
        f"  %x = f32[] add(%p, %p), {estimate(5)}",
        "}",
        "%dear (p: f32[]) -> f32[] {",
        f"  %y = f32[] multiply(%p, %p), {estimate(70)}",
        "}",
        "ENTRY %main.3 (p: f32[]) -> f32[] {",
        f"  %f = f32[] fusion(%p), kind=kLoop, {estimate(1000)}",
        "  %w = (s32[]) while(%t), condition=%cond.2, body=%body.1, metadata={}",
        *entry,
        "}",
    ]
    return "\n".join(lines)


def test_a_loop_counts_each_of_its_iterations():
    text = program(f"  %g = f32[] fusion(%p), {estimate(10)}")
    assert cycles(text, 1) == (1000 + 24 * 10, 0)
    branches = (
        "  %b = f32[] conditional(%i, %p, %p), branch_computations={%cheap, %dear}, metadata={}"
    )
    call = "  %k = f32[] call(%p), to_apply=%cheap"
    assert cycles(program(entry=(branches, call)), 1).total == 1000 + 70 + 5


def test_a_kernel_counts_the_tiles_that_it_computes():
    """Of 2 x 2 tiles of a causal mask three, and one of one; on two cores, half of the cycles."""
    forward = TILES["fwd"].tile + TILES["fwd"].score * 512**2
    calls = 24 * 8 * 16
    text = program(kernel("fwd", "1024,64", 512))
    assert cycles(text, 1).kernels == pytest.approx(calls * 3 * forward, abs=1)
    assert cycles(text, 2).kernels == pytest.approx(calls * 3 * forward / 2, abs=1)
    whole = TILES["dq"].tile + TILES["dq"].score * 1024**2
    text = program(kernel("dq", "1024,64", 1024, table="s8[1,1,1]"))
    assert cycles(text, 1).kernels == pytest.approx(calls * whole, abs=1)


def test_what_has_no_cycles_is_an_error():
    with pytest.raises(CostError, match="a loop of unknown length"):
        cycles(program(bound="parameter(0)"), 1)
    with pytest.raises(CostError, match="%mine.1: no cycles are known for this kernel"):
        cycles(
            program('  %mine.1 = f32[8] custom-call(%p), custom_call_target="tpu_custom_call"'), 1
        )


def test_the_pace_of_a_stage_is_that_of_its_steps():
    (span,) = plan(steps(4)).spans
    seconds = dict.fromkeys(span.works, 0.5)
    pace = pace_of(span, seconds, DEVICES["v5e"], 4)
    assert pace.step == pytest.approx(0.5) and pace.hours == pytest.approx(span.steps * 0.5 / 3600)
    assert pace.tokens_per_second == pytest.approx(span.step_tokens / 0.5)
    assert pace.mfu == pytest.approx(span.flops[0] / (0.5 * 4 * 197e12))


def test_hours_of_some_stages_are_not_those_of_the_plan():
    """A stage whose kernels have no known cycles is in the table, and not in the hours."""
    of = plan(steps(4, "counted"), steps(6, "mixture"))
    pace = pace_of(of.spans[0], dict.fromkeys(of.spans[0].works, 360.0), DEVICES["v5e"], 4)
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(pace_table("paces", [pace], ["counted", "mixture"]))
    text = console.export_text()
    assert re.search(r"1 mixture +unknown +unknown +unknown +unknown", text)
    assert "0.4 hours of training, without stage 1" in text


def test_the_roofline_of_a_device_is_of_its_own_rows():
    """Rows are split over `experts` as well."""
    several = [
        roofline(plan(steps(4), batch=8, layout=layout), "v5e", 8)[0].step
        for layout in (Layout(fsdp=2), Layout(fsdp=2, experts=2))
    ]
    assert several[0] == several[1]


def test_the_roofline_is_a_bound():
    """No share of the peak is above 1; more devices and a faster kind take less time."""
    of = plan(steps(4), batch=8)
    (one,), (two,) = (roofline(of, "v5e", n) for n in (1, 2))
    assert 0 < one.mfu < 1 and two.step < one.step and two.mfu <= one.mfu
    (fast,) = roofline(of, "b200", 1)
    assert fast.step < one.step
    with pytest.raises(LayoutError, match="kind: expected one of v5e, .*, got 'tpu'"):
        device_of("tpu")
    console = Console(width=140, file=io.StringIO(), record=True)
    show_plan(of, kind="h100", devices=2, console=console)
    assert "at best, on 2 x h100 (by roofline)" in console.export_text()
    with pytest.raises(LayoutError, match="kind: expected one of v5e, .*, got 'nope'"):
        show_plan(of, kind="nope", console=console)
    assert not console.export_text(), "an unknown kind is refused before anything is printed"


@pytest.mark.parametrize("used", [2**20, 2**24], ids=["about right", "far too high"])
def test_the_cheapest_change_that_fits_is_looked_for(used):
    """The mildest value of the cheapest field, wherever the estimate starts; else the next field."""
    of, tried = plan(steps(1), batch=64), []

    def measure(changed: Plan) -> int | None:
        tried.append(changed)
        return 2**20 // changed.accumulate // (2 if changed.layout.fsdp > 1 else 1)

    need: Need = ("step", 0, Work())
    change = cheapest(of, need, 4, used, 2**17, measure)
    assert change == "accumulate=8 makes it 128.0 KiB, as was compiled"
    assert len(tried) == len(set(tried)) <= 4
    change = cheapest(of, need, 4, used, 2**19, lambda p: None if p.accumulate > 1 else measure(p))
    assert change == "fsdp=2 makes it 512.0 KiB, as was compiled"
    assert cheapest(of, need, 4, used, 2**9, lambda _: None) is None


# What is kept for the backward pass --------------------------------------------------------------------


def test_the_layout_says_what_is_kept():
    """By the names people know, in every stack; the gradients are the same to rounding."""
    tokens = jnp.arange(8) % 11
    model = GPT(dataclasses.replace(SMALL, vocab=11), key=jax.random.key(0))
    assert remembering(model, Layout()) is model
    gradient: Any = eqx.filter_jit(eqx.filter_grad(lambda model: model(tokens).sum()))
    leaves = jax.tree.leaves(gradient(model))
    names: Any = (("none", "everything"), ("full", "nothing"), ("attention", "attention"))
    for name, remat in names:
        changed = remembering(model, Layout(remat=name, unroll=2))
        assert isinstance(changed.blocks, Stacked)
        assert (changed.blocks.remat, changed.blocks.unroll) == (remat, 2)
        for ours, theirs in zip(jax.tree.leaves(gradient(changed)), leaves, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert remembering(model, Layout(unroll=2)).blocks.remat == model.blocks.remat
    with pytest.raises(LayoutError, match="unroll: expected"):
        Layout(unroll=0)
