"""The smallest size of the theory experiments: closed forms, slopes, and the bound at a boundary."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.theory import run


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("theory")


@pytest.fixture(scope="module")
def rows(out):
    return run.stability("smoke", out)


def read(out):
    return [json.loads(line) for line in (out / "stability-smoke.jsonl").read_text().splitlines()]


# Four seeds of 128 coordinates: the standard error of a slope is at most 0.04 here.
def test_slopes_are_those_of_the_closed_forms(rows):
    found = [row for row in rows if "closed form" in row["question"]]
    assert len(found) == 4
    assert {row["verdict"] for row in found} == {"yes"}, found


def test_means_are_the_closed_forms(rows, out):
    cells = read(out)
    for variant in run.VARIANTS:
        for depth in run.SIZES["smoke"].depths:
            means = [c["mean"] for c in cells if c["cell"][:2] == [variant, depth]]
            assert np.mean(means) == pytest.approx(run.closed_form(variant, depth), rel=0.2)


def test_early_layers_matter_most_under_residual_and_norm(rows, out):
    cells = read(out)
    deepest = [c["ratios"] for c in cells if c["cell"][:2] == ["residual + norm", 32]]
    ratios, layers = np.mean(deepest, axis=0), np.arange(1, 33)
    slope = np.polyfit(np.log(layers + 1), np.log(ratios), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_closed_forms_reach_their_limits():
    depths = np.array([2**16, 2**18])
    for variant, limit in run.VARIANTS.items():
        logs = np.log([run.closed_form(variant, int(d)) for d in depths])
        assert np.diff(logs)[0] / np.log(4) == pytest.approx(limit, abs=0.01)


def test_the_loss_at_the_boundary_stays_within_its_bound_sample_by_sample(rows, out):
    cells = read(out)
    assert len(cells) == 48
    assert all(0 < c["worst_gap_over_bound"] <= 1 for c in cells)


def test_the_bound_and_the_gap_by_hand():
    whole, parts = jnp.array([[2.0, 0.0]]), jnp.array([[[0.0, 2.0]], [[2.0, 0.0]]])
    gap, bound = run.boundary(whole, parts, jnp.array([[1.0, 0.0]]))
    assert gap[0] == pytest.approx(2**0.5 / 2)  # losses sqrt(2) and 0, against 0
    assert bound[0] == pytest.approx(2**0.5)  # 2 * mean(sqrt(8) / 2, 0)


def test_few_removed_layers_add_up_as_orthogonal_errors(out):
    found = run.removed("smoke", out)
    assert [row["verdict"] for row in found[:3]] == ["yes"] * 3, found
    # first order no longer: errors saturate once half of the layers are gone
    assert found[-1]["estimate"] < 0.9


def test_a_removed_layer_is_the_identity():
    net = run.network("residual + norm", 3, 8, run.gj.step_key(0, 0))
    x = jnp.arange(16.0).reshape(2, 8)
    flags = jnp.array([[True, False, True], [False, False, False]])
    got = run.outputs(net, x, flags)
    expected = x
    for layer in (0, 2):
        centred = expected - expected.mean(-1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        expected = expected + normed @ net.block.weight[layer]
    scale = jnp.max(jnp.abs(jnp.stack([expected, x])))
    np.testing.assert_allclose(got, jnp.stack([expected, x]) / scale, atol=1e-5)


def test_finished_cells_are_not_run_again(tmp_path):
    ran = []

    def cell(i):
        ran.append(i)
        return {"square": i * i}

    path = tmp_path / "cells.jsonl"
    run.cells(path, [(1,), (2,)], cell)
    done = run.cells(path, [(3,), (2,)], cell)
    assert ran == [1, 2, 3]
    assert [c["square"] for c in done] == [9, 4]


def test_intervals_are_those_of_student():
    mean, low, high = run.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.302653 / 3**0.5)
