"""What a layout keeps for the gradient, and which named tensors of that in the host's memory."""

import dataclasses
import io
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import growjax as gj
from growjax.errors import LayoutError
from growjax.forecast.dryrun import dry_run
from growjax.forecast.memory import cheapest, usage
from growjax.forecast.residuals import residual_bytes
from growjax.models import GPT
from growjax.parallel import Layout, remembering
from growjax.plan.stages import Work
from growjax.programs.ahead import Need
from tests.runs import SMALL, plan, steps


NAMES = ("layer inputs", "attention inputs", "attention", "between branches")


def test_advice_is_of_a_layout_that_says_what_is_kept():
    """And not of the model, which has no say then; a batch that has no parts left is no error."""
    of = plan(steps(1), batch=1, layout=Layout(data=1, remat="dots"))
    need: Need = ("step", 0, Work())
    tried = []

    def measure(changed: Any) -> int | None:
        tried.append(changed.layout)
        return 2**16 if changed.layout.remat == "full" else None

    change = cheapest(of, need, 1, 2**20, 2**17, measure)
    assert change == "layout.remat=full makes it 64.0 KiB, as was compiled"
    assert tried == [Layout(data=1, remat="full")]
    spans, kept = of.spans[0], {}
    for remat in ("none", "dots", "full"):
        kept[remat] = residual_bytes(spans, None, of.loss, Layout(remat=remat))
    assert kept["full"] < kept["dots"] < kept["none"], kept


# Named tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["model", "none"])
def test_named_tensors_with_the_host_change_no_gradient(remat: Any):
    tokens = jnp.arange(8) % 11
    model = GPT(dataclasses.replace(SMALL, vocab=11, attention="blockwise"), key=jax.random.key(0))

    def gradient(offload: Any) -> Any:
        changed = remembering(model, Layout(remat=remat, offload=offload))
        return eqx.filter_grad(lambda model: model(tokens).sum()), changed

    function, plain = gradient(())
    expected = jax.tree.leaves(eqx.filter_jit(function)(plain))
    function, changed = gradient(NAMES)
    for ours, theirs in zip(
        jax.tree.leaves(eqx.filter_jit(function)(changed)), expected, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_each_name_sends_its_tensors_to_the_host():
    tokens = jnp.arange(8) % 11
    model = GPT(dataclasses.replace(SMALL, vocab=11, attention="blockwise"), key=jax.random.key(0))

    def sent(*offload: Any) -> int:
        changed = remembering(model, Layout(remat="full", offload=offload))
        trained, rest = gj.partition(changed)
        program = jax.make_jaxpr(jax.grad(lambda t: eqx.combine(t, rest)(tokens).sum()))(trained)
        # What the scans of the forward and of the backward pass write for all layers
        results = [x for e in program.eqns if e.primitive.name == "scan" for x in e.outvars]
        return sum(x.aval.memory_space == jax.memory.Space.Host for x in results)

    counts = {name: sent(name) for name in NAMES}
    # Of attention, queries, keys and values; and its output with the logarithms of its sums
    assert counts == dict(zip(NAMES, (1, 3, 2, 1), strict=True))
    assert (sent(), sent(*NAMES)) == (0, 7)


def test_what_the_host_keeps_is_not_on_the_device():
    """Per device: the inputs of layers, and then their queries, keys and values as well."""
    of = {}
    for offload in ((), ("layer inputs",), ("layer inputs", "attention inputs")):
        layout = Layout(data=2, remat="attention", offload=offload)  # type: ignore[arg-type]
        of[len(offload)] = plan(steps(1), layout=layout)
    uses = {n: usage(run, 0, None, 2, training=True) for n, run in of.items()}
    span = of[0].spans[0]
    layers, embed = span.sizes["layers"], span.sizes["embed"]
    tokens = span.batch // 2 * span.objective.length
    one = 4 * layers * tokens * embed
    heads = 4 * layers * tokens * SMALL.heads * SMALL.head_dim
    assert [use.host for use in uses.values()] == [0, one, one + 3 * heads]
    assert {use.residuals + use.host for use in uses.values()} == {uses[0].residuals}
    (facts,) = dry_run(of[2], devices=2).stages
    assert (facts.kept_bytes, facts.host_bytes) == (uses[2].residuals, uses[2].host)
    assert dry_run(of[0], devices=2).stages[0].host_bytes is None
    console = Console(width=100, file=io.StringIO())
    console.print(dry_run(of[2], devices=2))
    assert "in the host's memory" in console.file.getvalue()  # type: ignore[attr-defined]


def test_names_that_are_none_are_refused():
    with pytest.raises(LayoutError, match="offload"):
        Layout(offload=("scores",))  # type: ignore[arg-type]
