"""Sequences that are split over devices (`Layout(context=...)`): everything as if they were whole."""

import json
import os
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import growjax as gj
from growjax.errors import AxisError, LayoutError, PlanError
from growjax.forecast.memory import usage
from growjax.nn import Readout, attend, cross_entropies, per_token
from growjax.nn.place import CONTEXT, Place, running_on
from growjax.nn.split import _moves, balances, firsts_of
from growjax.programs.step import _split_sequences
from growjax.train import Layout
from tests.conftest import DEEP, SEVERAL_DEVICES
from tests.runs import plan, steps


@pytest.fixture(scope="module")
def errors() -> dict[str, Any]:
    """The errors of every case, from a process with eight devices."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.context"],
        env={**os.environ, **SEVERAL_DEVICES, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_attention_of_a_split_sequence(errors):
    """In float64, every mask, the bias, and the kernel (float32): outputs and gradients."""
    assert len(errors["attention"]) == (47 if DEEP else 5), list(errors["attention"])
    assert all(error < 1e-12 for error in errors["attention"].values()), errors["attention"]


def test_models_learn_a_whole_sequence(errors):
    """In float64, with half-open gates; and no device has activations of all of it."""
    for name, (loss, gradient, whole) in errors["models"].items():
        assert loss < 1e-12 and gradient < 1e-10 and not whole, (name, loss, gradient, whole)
    assert len(errors["models"]) >= (20 if DEEP else 1), list(errors["models"])


@given(st.integers(2, 9), st.integers(1, 3))
def test_devices_see_equally_many_keys(devices, half):
    """The halves arrive where the mask counts them, each once, and the work is the same everywhere."""
    length = 2 * half * devices
    assert balances(True, None, length, devices)
    assert not balances(False, None, length, devices) and not balances(True, 3, length, devices)
    assert not balances(True, None, devices, devices) or devices % 2 == 0 or devices == 1
    firsts = firsts_of(length, devices, True)
    arrived = np.full((devices, 2), -1)
    for part, moves in enumerate(_moves(devices)):
        assert sorted(to for _, to in moves) == list(range(devices))
        for source, to in moves:
            arrived[to, part] = (2 * source + part) * half
    np.testing.assert_array_equal(np.sort(arrived, 1), np.sort(firsts, 1))
    assert len(set(firsts.sum(1))) == 1
    np.testing.assert_array_equal(
        firsts_of(length, devices, False)[:, 0], np.arange(devices) * 2 * half
    )


# Refused before a step ------------------------------------------------------------------------------


def test_what_cannot_be_split_is_refused_before_the_first_step():
    with pytest.raises(LayoutError, match="shard_map.*set fsdp, tensor, experts and context to 1"):
        Layout(step="shard_map", context=2)
    with pytest.raises(
        PlanError, match="context=3 devices cannot share .* tokens of 8, targets of 8"
    ):
        plan(steps(1), layout=Layout(context=3))
    layers = gj.stack(layers=4)
    with pytest.raises(PlanError, match="layers that read 5 tokens cannot be split over context=2"):
        plan(steps(1, "a", grow=layers, subnet=gj.random_tokens(5)), layout=Layout(context=2))
    plan(steps(1, "a", grow=layers, subnet=gj.random_tokens(6)), layout=Layout(context=2))
    plan(steps(1, "a", grow=layers, subnet=gj.random_tokens(9)), layout=Layout(context=2))


def test_hosts_read_whole_sequences():
    """Four devices of two hosts."""
    devices = [types.SimpleNamespace(process_index=n // 2) for n in range(4)]
    with pytest.raises(LayoutError, match="2 hosts cannot share 1 parts of a batch"):
        Layout(context=2, tensor=2).mesh(devices)


def test_a_mesh_has_the_axis_only_where_it_splits():
    split = Layout(fsdp=2, experts=2, context=4)
    assert split.axes == ("data", "fsdp", "tensor", "experts", "context")
    assert split.resolved(32) == (2, 2, 1, 2, 4) and split.shared == 16
    assert CONTEXT not in Layout(tensor=2).axes
    with pytest.raises(LayoutError, match="context=4 does not make 8 devices"):
        Layout(data=1, context=4).resolved(8)


def test_rows_stay_as_they_are_on_a_mesh_without_the_axis():
    rows = {"tokens": jnp.zeros((4, 8), int)}
    assert _split_sequences(rows, Layout().mesh(jax.devices()[:1])) is rows


class Eight(Place):
    """A place whose sequences are split over eight devices, which need not exist."""

    @property
    def context(self) -> int:
        return 8


def test_lengths_that_devices_cannot_share_are_an_error():
    x = jax.ShapeDtypeStruct((1, 1, 12, 4), "float32")
    weight, targets = jnp.zeros((4, 6)), jnp.zeros(12, int)
    with running_on(Eight("cpu")):
        with pytest.raises(AxisError, match="queries: 12 places cannot be split over context=8"):
            jax.eval_shape(lambda x: attend(x, x[0], x[0]), x)
        with pytest.raises(AxisError, match="tokens: 12 places cannot be split over context=8"):
            jax.eval_shape(
                lambda x: per_token(cross_entropies, Readout(x[0, 0], weight), targets), x
            )


def test_a_forecast_counts_a_part_of_the_activations():
    whole, half = (
        usage(plan(steps(1), layout=layout), 0, None, layout.shared, training=True)
        for layout in (Layout(), Layout(context=2))
    )
    assert half.residuals == whole.residuals // 2 > 0 and half.state == whole.state
