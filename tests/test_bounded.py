"""Models that are grown a layer at a time: the numbers, the certificate and the memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax import draws
from growjax.axes import axes_of, get, put
from growjax.certificate.part import cut
from growjax.certificate.streaming import certify_deferred
from growjax.cli import app
from growjax.deferred import Deferred
from growjax.errors import AxisError
from growjax.growth.leafwise import grow_deferred
from growjax.hf.convert import load_deferred
from growjax.train.commands import random_batch
from tests.folders import build
from tests.test_hf_grown import GROWN


KEY = draws.key(0)
DEEP = gj.chain(
    gj.copy(embed=16, mlp=9, heads=8), gj.stack(layers=4, order="interleave", branch="zero")
)
OPERATORS: dict[str, tuple[str, Any]] = {
    "several maps of layers": (
        "llama tied",
        gj.chain(
            gj.stack(layers=3, order="top", branch="split"),
            gj.copy(mlp=9, heads=8, shares="equal"),
            gj.stack(layers=5, branch="zero"),
        ),
    ),
    "draws, then layers": ("gpt2", gj.chain(gj.zeros(mlp=10), gj.stack(layers=4, branch="zero"))),
    **GROWN,
    "fresh layers": ("llama", gj.fresh(layers=3)),
    "aki": ("llama", gj.aki(mlp=9)),
    "words": ("llama", gj.vocabulary(19)),
    "words of a tied head": ("gpt2", gj.growth.transplant([*([i] for i in range(11)), [1, 2]])),
    "context": ("llama", gj.growth.context(2, how="ntk")),
    "a mixture": ("llama", gj.upcycle(experts=3)),
    "diagonal": ("gpt2", gj.copy(embed=16, mlp=12, heads=4, shares="diagonal")),
    "noise": ("llama", gj.copy(mlp=9, noise=0.1)),
    "between": ("llama", gj.growth.between(layers=3, fill="transport", branch="zero")),
    "within": ("llama", gj.growth.within(gj.zeros(mlp=9), layers=(1,))),
    "shared keys": ("llama", gj.growth.regroup(kv_heads=4)),
    "pooled keys": ("llama", gj.growth.pool(kv_heads=1)),
}
FAST = ("several maps of layers", "draws, then layers")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in OPERATORS],
)
def test_leaves_grown_one_by_one_are_bitwise_those_of_the_whole_model(name, tmp_path):
    family, op = OPERATORS[name]
    gj.hf.save(build(family), tmp_path / "small")
    gj.hf.save(gj.grow(op, gj.hf.load(tmp_path / "small"), key=KEY), tmp_path / "whole")
    model = load_deferred(tmp_path / "small")
    grown = grow_deferred(op, model, tmp_path / "scratch", key=KEY, small=0)
    gj.hf.save(grown, tmp_path / "leaves", shard=300)
    whole, leaves = gj.hf.load(tmp_path / "whole"), gj.hf.load(tmp_path / "leaves")
    assert gj.sizes(whole) == gj.sizes(leaves)
    for path, slot in axes_of(whole).items():
        for ours in slot.arrays():
            other = axes_of(leaves)[path].value
            assert ours.dtype == other.dtype and np.array_equal(ours, other), path


def test_a_layer_is_read_alone_and_a_table_in_blocks():
    reads = []

    def read(start: int, stop: int) -> np.ndarray:
        reads.append((start, stop))
        return np.arange(start, stop, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)

    leaf = Deferred((4, 3), np.dtype(np.float32), read)
    assert leaf[2, 1] == 2 and reads == [(2, 3)]
    changed = (1 + leaf * np.asarray([[1.0], [2.0], [3.0], [4.0]]) / 2 - 0.5).astype("bfloat16")
    assert changed.dtype == jnp.bfloat16 and np.array_equal(changed[3], [6.5, 6.5, 6.5])
    assert reads[-1] == (3, 4)
    assert [*leaf.blocks(most=24)] == [(0, 2), (2, 4)] and [*leaf.blocks(most=1)][0] == (0, 1)
    with pytest.raises(AxisError, match=r"shape \(2, 4, 3\) does not fit one of \(4, 3\)"):
        _ = leaf * np.ones((2, 4, 3))


# Certificates ------------------------------------------------------------------------------------


def _certified(model: Any, grown: Any, scratch: Path, most: int) -> Any:
    batch = lambda model: random_batch(model, 0)  # noqa: E731
    return certify_deferred(DEEP, model, grown, batch, scratch, key=KEY, least=0, most=most)


def test_a_certificate_of_a_part_has_the_outputs_of_all_layers(tmp_path):
    """And what is wrong in a layer outside of the part is seen."""
    gj.hf.save(build("llama"), tmp_path / "small")
    model = load_deferred(tmp_path / "small")
    grown = grow_deferred(DEEP, model, tmp_path / "scratch", key=KEY, small=0)
    part = _certified(model, grown, tmp_path / "scratch", 0)
    assert (
        part.passed and part.part == {"layers": (0,)} and "1 layers of the old model" in str(part)
    )
    assert part.axes == {"embed": (8, 16), "layers": (2, 4), "group": (2, 4), "mlp": (6, 9)}
    assert [d.dtype for d in part.forward] == ["float32", "float64"]
    assert 0 < part.forward[1].relative < 1e-12 and part.forward[1].floor > 0
    assert all(part.poison.values()) and part.gradient < 1e-10 and not any(part.locked.values())
    steps = ("blocks", "block", "mlp", "down")
    down = get(grown, steps)
    wrong = down.by_rows(lambda rows, start, stop: rows * (1.01 if start == 2 else 1))
    broken = _certified(model, put(grown, {steps: wrong}), tmp_path / "scratch", 0)
    assert not broken.passed and broken.gradient < 1e-10
    assert broken.forward[0].relative > 1e-4 > 1e-12 > broken.forward[1].relative


def test_a_part_keeps_the_shares_of_its_units():
    op, model, units = gj.copy(mlp=9, shares="random", seed=1), build("llama"), (1, 4)
    whole = op.maps(axes_of(model))[0]
    part, small = cut(op, model, {"mlp": units})
    move = part.maps(axes_of(small))[0]
    rows = [n for n, i in enumerate(whole.source.tolist()) if i in units]
    assert [units[i] for i in move.source] == whole.source[rows].tolist()
    np.testing.assert_array_equal(move.share, np.asarray(whole.share)[rows])


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_stays_below_that_of_the_new_model(tmp_path):
    """Of 80 MB, in a process of its own that has grown a small one before."""
    command = [sys.executable, "-m", "tests.bounded", "--measure", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["new"] > 80e6
    assert measured["peak"] < 0.6 * measured["new"]


def test_progress_is_told_in_lines_without_a_terminal(tmp_path, capsys):
    gj.hf.save(build("llama"), tmp_path / "small")
    args = ["grow", "--from-hf", str(tmp_path / "small"), "--to", "mlp", "9", "--shard", "1e-6"]
    app.cli(prog="growjax", args=[*args, "--out", str(tmp_path / "big")])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["reading", "certifying", "writing"]
    assert len([*(tmp_path / "big").glob("model-*.safetensors")]) > 5
    assert gj.sizes(gj.hf.load(tmp_path / "big"))["mlp"] == 9
    assert not [*tmp_path.glob(".big*")]
    record = json.loads((tmp_path / "big" / "certificate.json").read_text())
    assert record["certificate"]["part"] is None
