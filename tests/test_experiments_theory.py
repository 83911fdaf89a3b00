"""The smallest size of the theory experiments, and their parts by hand."""

import itertools
from typing import Any

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import growjax as gj
from experiments import study
from experiments.theory import blocks, fit, polynomials, run, stability, trained
from experiments.theory.bytes import Bytes, texts
from experiments.theory.experiment import table
from growjax.data import Text
from growjax.growth import sources
from growjax.train import cross_entropy


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("theory")


def ran(out, *names):
    """Run some experiments at their smallest size; returns their rows and their lines."""
    results = out / "smoke.jsonl"
    shared = run.Shared(study.Inputs("smoke", out))
    for name in names:
        for seed in range(run.STUDY.seeds["smoke"]):
            study.run(list(run.cells("smoke", name, seed)), shared, results)
    rows = [row for row in run.STUDY.report(results) if row.workload in names]
    return rows, [line for line in study.read(results) if line["workload"] in names]


@pytest.fixture(scope="module")
def stable(out):
    return ran(out, "stability")


@pytest.fixture
def rows(stable):
    return stable[0]


@pytest.fixture
def lines(stable):
    return stable[1]


# Four seeds of 128 coordinates: the standard error of a slope is at most 0.04 here.
def test_slopes_are_those_of_the_closed_forms(rows):
    slopes = [row for row in rows if "closed form" in row.question]
    assert len(slopes) == 4
    assert {row.verdict for row in slopes} == {"yes"}, slopes


def test_means_are_the_closed_forms(lines):
    for variant in stability.VARIANTS:
        for depth in stability.SIZES["smoke"].depths:
            means = [
                line["mean"]
                for line in lines
                if (line["arm"], line["budget"]) == (variant, f"{depth} layers")
            ]
            assert np.mean(means) == pytest.approx(stability.closed_form(variant, depth), rel=0.2)


def test_early_layers_matter_most_under_residual_and_norm(lines):
    variant = [line for line in lines if line["arm"] == "residual + norm"]
    deepest = [line["ratios"] for line in variant if line["budget"] == "32 layers"]
    ratios, layers = np.mean(deepest, axis=0), np.arange(1, 33)
    slope = np.polyfit(np.log(layers + 1), np.log(ratios), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_closed_forms_reach_their_limits():
    depths = np.array([2**16, 2**18])
    for variant, limit in stability.VARIANTS.items():
        logs = np.log([stability.closed_form(variant, int(d)) for d in depths])
        assert np.diff(logs)[0] / np.log(4) == pytest.approx(limit, abs=0.01)


def test_the_loss_at_the_boundary_stays_within_its_bound_sample_by_sample(lines):
    assert len(lines) == 48
    assert all(0 < line["worst_gap_over_bound"] <= 1 for line in lines)


def test_the_bound_and_the_gap_by_hand():
    whole, parts = jnp.array([[2.0, 0.0]]), jnp.array([[[0.0, 2.0]], [[2.0, 0.0]]])
    gap, bound = stability.boundary(whole, parts, jnp.array([[1.0, 0.0]]))
    assert gap[0] == pytest.approx(2**0.5 / 2)  # losses sqrt(2) and 0, against 0
    assert bound[0] == pytest.approx(2**0.5)  # 2 * mean(sqrt(8) / 2, 0)


def test_few_removed_layers_add_up_as_orthogonal_errors(out):
    answers, _ = ran(out, "removed")
    assert [row.verdict for row in answers[:3]] == ["yes"] * 3, answers
    # first order no longer: errors saturate once half of the layers are gone
    assert (answers[-1].estimate or 9) < 0.9


def test_a_removed_layer_is_the_identity():
    net = stability.network("residual + norm", 3, 8, gj.step_key(0, 0))
    x = jnp.arange(16.0).reshape(2, 8)
    flags = jnp.array([[True, False, True], [False, False, False]])
    got = stability.outputs(net, x, flags)
    expected = x
    for layer in (0, 2):
        centred = expected - expected.mean(-1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        expected = expected + normed @ net.block.weight[layer]
    scale = jnp.max(jnp.abs(jnp.stack([expected, x])))
    np.testing.assert_allclose(got, jnp.stack([expected, x]) / scale, atol=1e-5)


@given(st.integers(0, 2**20), st.integers(1, 5), st.floats(-3, 3))
def test_no_change_of_the_loss_at_a_boundary_is_above_its_bound(seed, layers, scale):
    rng = np.random.default_rng(seed)
    whole, target = rng.normal(size=(2, 7, 4))
    parts = whole + 10**scale * rng.normal(size=(layers, 7, 4))
    gap, bound = stability.boundary(jnp.asarray(whole), jnp.asarray(parts), jnp.asarray(target))
    assert (gap <= bound + 1e-5).all()


def test_a_table_has_seeds_and_budgets_wherever_their_lines_are():
    lines = [
        {"budget": budget, "seed": seed, "end": {"x": 10 * seed + n if seed else None}}
        for seed in (1, 0)
        for n, budget in enumerate(("4", "8"))
    ]
    np.testing.assert_array_equal(table(lines, "end", "x"), [[np.nan] * 2, [10, 11]])


def test_the_study_reports_on_experiments_that_have_run_whole(out, stable):
    assert run.STUDY.workloads == ("stability", "removed", "trained", "polynomials", "blocks")
    assert [line["workload"] for line in study.read(out / "smoke.jsonl")][:1] == ["stability"]
    lines = stable[1]
    assert run.summarise(out / "smoke.jsonl", lines) and not run.summarise(
        out / "smoke.jsonl", lines[1:]
    )
    page = run.page(out / "smoke.jsonl", lines, stable[0])
    assert list(page.pictures) == ["stability"] and "stability, 9 questions: " in page.answer[0]


# Training in phases ------------------------------------------------------------------------------


def toy(layers=8):
    sets = np.eye(2, 4, dtype=bool)
    task = polynomials.Polynomial(jnp.asarray(sets), jnp.ones(2), 8)
    return task, polynomials.Network(4, 6, 5, layers, key=jax.random.key(0))


def fitted(phases, every, seed=0, layers=8):
    task, net = toy(layers)
    return list(fit.fit(net, phases, task, rate=1e-2, every=every, seed=seed))


def test_phases_follow_each_other_however_often_one_looks():
    phases = [fit.Phase(4, gj.random_path(3)), fit.Phase(2)]
    often, once = fitted(phases, 2), fitted(phases, 4)
    assert [step for step, _ in often] == [2, 4, 6]
    assert [step for step, _ in once] == [4, 6]
    for a, b in zip(jax.tree.leaves(often[-1][1]), jax.tree.leaves(once[-1][1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    other = fitted(phases, 4, seed=1)[-1][1]
    assert not np.allclose(other.out, once[-1][1].out)


def test_what_no_path_came_through_is_as_it_was_born():
    _, born = toy()
    (_, after), *_ = fitted([fit.Phase(4, gj.random_path(2))], 4)
    same = np.asarray(after.blocks.block.mlp.up == born.blocks.block.mlp.up).all(axis=(1, 2))
    assert same.tolist() == [False, *[True] * 6, False]


def test_growth_in_a_phase_copies_layers_and_their_moments(monkeypatch):
    carried = []
    carry = gj.carry
    monkeypatch.setattr(gj, "carry", lambda *a, **k: carried.append(carry(*a, **k)) or carried[-1])
    phases = [fit.Phase(3), fit.Phase(1, grow=gj.stack(layers=4, order="top"))]
    (_, small), (_, big) = fitted(phases, 3, layers=2)
    assert [gj.sizes(m)["layers"] for m in (small, big)] == [2, 4]
    moments = [x for x in jax.tree.leaves(carried[0]) if x.shape == (4, 6, 5)]
    assert moments
    for moment in moments:
        assert np.abs(moment[:2]).min() > 0
        np.testing.assert_array_equal(moment[2:], moment[:2])


def test_the_whole_network_is_no_path():
    stages = fit.staged(gj.path_schedule((2, 4), layers=4, steps=10))
    assert stages == [fit.Phase(5, gj.random_path(2)), fit.Phase(5)]


# Polynomials -------------------------------------------------------------------------------------


def cube(bits):
    return 1.0 - 2 * ((np.arange(2**bits)[:, None] >> np.arange(bits)) & 1)


@given(st.integers(6, 32), st.integers(0, 2**20))
def test_half_of_each_degree_extends_a_term_of_the_one_below(bits, seed):
    sets = polynomials.staircase(bits, seed)
    terms = polynomials.TERMS
    assert len(np.unique(sets, axis=0)) == len(sets) == 5 * terms
    assert sets.sum(axis=1).tolist() == np.repeat(range(1, 6), terms).tolist()
    for degree in range(1, 5):
        below, here = sets[(degree - 1) * terms :][:terms], sets[degree * terms :][:terms]
        nested = [any((small <= big).all() for small in below) for big in here]
        assert sum(nested) >= terms // 2


def test_a_monomial_is_the_product_of_its_bits():
    sets = polynomials.staircase(6, 0)
    x = cube(6)
    expected = np.stack([x[:, row].prod(axis=1) for row in sets], axis=1)
    got = np.asarray(polynomials.monomials(jnp.asarray(x), jnp.asarray(sets)))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(got.T @ got / len(x), np.eye(len(sets)))


def test_points_are_uniform_on_the_cube():
    x = np.asarray(polynomials.points(jax.random.key(0), 4096, 20))
    assert x.shape == (4096, 20)
    assert set(np.unique(x)) == {-1.0, 1.0}
    assert np.abs(x.mean(axis=0)).max() < 5 / 64
    assert np.abs(x.T @ x / 4096 - np.eye(20)).max() < 5 / 64


def test_coefficients_are_exact_on_any_sample():
    task, _ = toy()
    x = polynomials.points(jax.random.key(1), 50, 4)
    model = lambda x: 0.25 * x[:, 0] - 3 * x[:, 1]  # noqa: E731
    coefficients, loss = polynomials.measure(model, task, x)
    np.testing.assert_allclose(coefficients, [0.25, -3], atol=1e-5)
    expected = np.mean(np.asarray(x[:, 0] * 0.75 + x[:, 1] * 4) ** 2)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_the_network_is_its_blocks_on_a_stream():
    _, net = toy(layers=2)
    x = jnp.asarray(cube(4))
    stream = np.asarray(x @ net.into)
    for layer in range(2):
        mlp = jax.tree.map(lambda a, layer=layer: np.asarray(a[layer]), net.blocks.block.mlp)
        centred = stream - stream.mean(-1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        stream = stream + np.maximum(normed @ mlp.up + mlp.up_bias, 0) @ mlp.down + mlp.down_bias
    np.testing.assert_allclose(net(x), stream @ net.out + net.bias, atol=1e-5)


def test_arms_train_for_as_long_and_constant_p_at_the_cost_of_raptr():
    arms: Any = polynomials.arms(8, 400)
    assert {sum(p.steps for p in phases) for _, phases in arms.values()} == {400}
    lengths = {
        name: [8 if p.subnet is None else p.subnet.length for p in arms[name][1]]
        for name in ("full", "RaPTr", "constant p")
    }
    assert lengths == {"full": [8], "RaPTr": [2, 4, 6, 8], "constant p": [5]}
    assert [p.grow and dict(p.grow.sizes)["layers"] for p in arms["stacking"][1]] == [None, 4, 6, 8]
    assert arms["stacking"][0] == 2
    for floor in (0.5, 0.25):
        (drop,) = [p.subnet for p in arms[f"PLD {floor}"][1]]
        assert drop.theta(400) == pytest.approx(floor, abs=1e-6)


def test_times_and_their_order():
    steps, curves = [1, 2, 3], np.array([[0.9, 0, 0.8], [0, 0.85, 0], [1, 1, 0.2]])
    times = polynomials.reached(steps, curves[:, [0, 1, 2]])
    assert times.tolist() == [1, 2, 1]
    assert polynomials.ordered(times) == 0.5
    never = polynomials.reached(steps, 0 * curves)
    assert np.isinf(never).all()


def test_terms_that_extend_a_lower_one_are_told_from_the_others():
    terms = [9.0] * 12 + [1.0, 0.5, 0.25, 0.25] + [1.0, 1.0, 0.5, 0.0]
    assert polynomials.extended({"terms": terms}) == 0.875 - 0.25


@pytest.fixture(scope="module")
def learned(out):
    return ran(out, "polynomials")


# What is asked is a mean of two seeds, far above 0.1 here.
def test_growing_paths_capture_high_degrees_that_falling_ones_do_not(learned):
    rows, _ = learned
    estimates = {row.question: row.estimate for row in rows}
    assert estimates["degrees 4 and 5: does RaPTr capture over 0.1 more than PLD 0.25?"] > 0.2
    assert (
        estimates["full: does the whole network leave less than 5% of the variance at the end?"]
        < 0.05
    )


def test_low_degrees_come_first(learned):
    rows, lines = learned
    orders = [row for row in rows if "degree by degree" in row.question]
    assert len(orders) == 6
    assert {row.verdict for row in orders} == {"yes"}
    assert all(len(line["captured"]) == len(line["steps"]) == 4 for line in lines)
    for line in lines:  # what is reported of the degrees is what is reported of their terms
        shares = np.reshape(line["terms"], (5, -1)).mean(axis=1)
        np.testing.assert_allclose(line["captured"][-1], shares, atol=1e-3)


# Two blocks --------------------------------------------------------------------------------------


def test_one_block_alone_is_the_mean_over_both():
    task, net = toy(layers=2)
    x = polynomials.points(jax.random.key(1), 64, 4)
    single = []
    for layer in (0, 1):
        part = gj.AxisMap("layers", np.array([layer]))
        single.append(polynomials.measure(gj.maps.apply(part, net, None), task, x)[0])
    np.testing.assert_allclose(blocks.alone(net, task, x), np.mean(single, axis=0), atol=1e-5)


def test_the_product_is_read_when_its_factor_is_fitted():
    run = {"alone": [[0.5, 0.1], [1.2, 0.2], [0.96, 0.3], [1.0, 0.4]]}
    assert blocks.fitted(run) == 0.3
    assert (
        blocks.fitted({"alone": [[0.5, 0.1], [0.6, 0.2]]}) == 0.2
    )  # never: what it had at the end


def test_one_block_learns_the_product_and_both_mend_the_double_count(out):
    estimates = np.array([row.estimate for row in ran(out, "blocks")[0]], float)
    first, product, lost, growing, shrinking = estimates
    assert first > 0.3
    assert product > 1.1
    assert lost < 0
    assert growing < 0.01 < shrinking


# Trained networks --------------------------------------------------------------------------------

TINY = trained.Size((4,), 16, 2, 12, 4, 12, 6, 2)


def gpt(norm="LayerNorm"):
    windows = jax.random.randint(jax.random.key(1), (6, 13), 0, 256)
    return trained.network(TINY, 4, norm, jax.random.key(0)), windows


@pytest.mark.parametrize("norm", trained.NORMS)
def test_losses_without_a_layer_are_those_of_the_model_that_lacks_it(norm):
    model, windows = gpt(norm)
    ratios, losses = trained.removals(model, windows, 4)
    assert ratios.shape == (4, 6, 12)
    assert losses.shape == (5, 6, 12)
    lacking = gj.AxisMap("layers", np.array([0, 1, 3]))
    examples = {"tokens": windows[:, :-1], "targets": windows[:, 1:], "weights": jnp.ones((6, 12))}
    expected = eqx.filter_jit(jax.vmap(cross_entropy, in_axes=(None, 0)))
    for got, part in ((losses[0], model), (losses[3], gj.maps.apply(lacking, model, None))):
        np.testing.assert_allclose(got, expected(part, examples)[0], atol=1e-4)


def test_distances_are_those_of_the_stream_that_the_head_reads():
    model, windows = gpt()
    ratios, _ = trained.removals(model, windows, 4)
    eye = jnp.eye(4, dtype=bool)
    whole, part = (
        eqx.filter_jit(trained.hidden)(model, windows[2, :-1], on) for on in (eye.any(0), ~eye[1])
    )
    expected = jnp.linalg.norm(whole - part, axis=-1) / jnp.linalg.norm(whole, axis=-1)
    np.testing.assert_allclose(ratios[1, 2], expected, rtol=1e-4)
    head: Any = model.head
    scores = model.norm(whole) @ head
    np.testing.assert_allclose(scores, eqx.filter_jit(model)(windows[2, :-1]), atol=1e-4)


def test_without_norms_a_block_reads_the_stream_as_it_is():
    normed, bare = (gpt(norm)[0] for norm in trained.NORMS)
    x = jax.random.normal(jax.random.key(2), (1, 16))  # one position attends to itself alone

    def added(model, x):
        layer = jax.tree.map(lambda a: a[0], eqx.filter(model.blocks.block, eqx.is_array))
        block = eqx.combine(layer, model.blocks.block)
        attended = x + block.attention(block.attention_norm(x))
        return attended - x

    np.testing.assert_allclose(added(bare, 2 * x), 2 * added(bare, x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(added(normed, 2 * x), added(normed, x), rtol=1e-3, atol=1e-5)


def test_the_bound_is_for_text_that_its_constant_has_not_seen():
    model, windows = gpt()
    ratios, losses = trained.removals(model, windows, 4)
    probed = trained.probe(model, windows, 4)
    quotients = np.abs(losses[1:] - losses[0])[:, :3] / ratios[:, :3]
    assert probed["mu"] == pytest.approx(float(quotients.max()), rel=1e-4)
    assert probed["mean"] == pytest.approx(float(ratios[:, 3:].mean()), rel=1e-4)
    assert probed["bound"] == pytest.approx(probed["mu"] * probed["mean"])
    assert probed["loss"] == pytest.approx(float(losses[0, 3:].mean()), rel=1e-4)
    gap = float(losses[1:, 3:].mean() - losses[0, 3:].mean())
    assert probed["gap"] == pytest.approx(gap, abs=1e-4)
    np.testing.assert_allclose(probed["ratios"], ratios[:, 3:].mean(axis=(1, 2)), atol=1e-4)


def test_one_document_in_ten_is_held_out(tmp_path):
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text(str(n) * 50)
    train, held_out = texts(Text(str(tmp_path)))
    assert set(bytes(np.asarray(held_out))) == {ord("9")}
    assert len(train) == 450
    (tmp_path / "whole.txt").write_text("".join(chr(97 + n) * 30 for n in range(10)))
    train, held_out = texts(Text(str(tmp_path / "whole.txt")))
    assert bytes(np.asarray(held_out)) == b"j" * 30
    assert len(train) == 270
    windows = Bytes(train, 5, 20).draw(jax.random.key(0))
    assert windows.shape == (5, 21)
    assert all(bytes(np.asarray(w, np.uint8)) in bytes(np.asarray(train)) for w in windows)


def test_a_network_is_seen_at_birth_before_the_last_stage_and_at_the_end():
    text = jnp.asarray(np.tile(np.arange(97, 105, dtype=np.uint8), 40))
    line = trained.trained_line(TINY, "LayerNorm", "full", 4, 0, (text, text))
    assert list(line) == ["birth", "boundary", "end"]
    losses = [line[time]["loss"] for time in line]
    assert losses[0] > losses[1] > losses[2]
    assert [phase.subnet and phase.subnet.length for phase in phases_of("RaPTr")] == [2, 3, None]
    assert [phase.subnet for phase in phases_of("full")] == [None] * 3


def phases_of(arm) -> Any:
    return trained.phases(arm, 4, 12)


def test_rows_of_trained_networks_say_what_their_lines_do():
    size = trained.SIZES["smoke"]
    power = {"LayerNorm": -0.5, "no norm": 0.0}
    lines = []
    for norm, arm in trained.NETS:
        for depth, seed in itertools.product(size.depths, range(size.seeds)):
            mean = depth ** power[norm] * (1 + 0.01 * seed) * (0.5 if arm == "RaPTr" else 1)
            seen = {"ratios": [mean] * depth, "mean": mean, "gap": -mean / 4, "bound": mean}
            key = {"budget": f"{depth} layers", "arm": trained.name_of(norm, arm), "seed": seed}
            lines.append(key | dict.fromkeys(trained.TIMES, seen))
    rows = {row.question: row for row in trained.answers(size, lines)}
    slope = rows["full, LayerNorm: does the mean ratio fall with depth (slope)?"]
    assert (slope.estimate, slope.verdict) == (-0.5, "yes")
    assert rows["RaPTr, no norm: does the mean ratio fall with depth (slope)?"].estimate == 0
    assert rows["full, LayerNorm: is the gap L1 - L2 at the boundary above 0?"].verdict == "no"
    assert rows["full, LayerNorm: does the bound hold (worst gap over bound)?"].estimate == 0.25
    below = rows["LayerNorm: is RaPTr's mean ratio below that of full (log)?"]
    assert below.estimate == pytest.approx(np.log(0.5), abs=1e-3)
    steeper = rows["full: is the slope below 0 by more with LayerNorm than without?"]
    assert (steeper.estimate, steeper.verdict) == (-0.5, "yes")
    left, middle, right = trained.draw(size, lines).axes
    assert len(left.lines) == 4 and left.get_title() == "8 layers, trained"


def test_trained_networks_are_lines_of_the_text_they_learned(tmp_path):
    about = run.EXPERIMENTS["trained"]
    made = study.Inputs("smoke", tmp_path, text=tmp_path / "tale.txt")
    (cell, *_) = run.cells("smoke", "trained", 0)
    assert cell.settings(run.Shared(made)) == {"text": "tale"} and about.reads
    assert run.flags([{"settings": {"text": "tale"}}, {}]) == " --text tale"


# Orders of stacking ------------------------------------------------------------------------------


@given(st.integers(2, 12), st.integers(2, 6))
def test_the_share_of_neighbours_that_stacking_keeps(layers, factor):
    def share(order):
        steps = np.diff(sources(order, layers, factor * layers))
        return np.mean(steps == 1)

    assert share("repeat") == pytest.approx(factor * (layers - 1) / (factor * layers - 1))
    assert share("interleave") == pytest.approx((layers - 1) / (factor * layers - 1))


@given(st.integers(1, 4), st.integers(2, 8))
def test_growing_in_the_middle_keeps_both_ends(block, count):
    layers = np.arange(block)
    for n in range(1, count):
        grown = layers[sources("middle", n * block, (n + 1) * block)]
        assert (grown[:block] == layers[:block]).all()
        assert (grown[-block:] == layers[-block:]).all()
        layers = grown
    assert len(layers) == count * block
