"""One plan on many devices and hosts: the same losses everywhere, and resume from one to another."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import growjax as gj
from tests.conftest import SEVERAL_DEVICES, UNCACHED
from tests.killed import free_port


ROOT = Path(gj.__file__).parents[1]
ENVIRONMENT = {**os.environ, **SEVERAL_DEVICES}


def start(*args: object, devices: int = 1) -> subprocess.Popen:
    several = UNCACHED if args[0] == "rank" else {}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.hosts", *map(str, args)],
        cwd=ROOT,
        env=ENVIRONMENT | several | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    process = start("layouts", tmp_path_factory.mktemp("layouts"), devices=8)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("way", ["replicas", "context", "both"])
def test_every_layout_gives_the_same_losses(layouts, way):
    one, losses = layouts["losses"]["one"], layouts["losses"][way]
    assert len(one) == 4 + 2 and losses == pytest.approx(one, abs=3e-5)


def test_a_run_goes_on_with_fewer_devices(layouts):
    """Saved on eight devices, split two ways; gone on from step 1 on two, which share the sequences."""
    one, resumed = layouts["losses"]["one"], layouts["losses"]["resumed"]
    assert resumed == pytest.approx(one[1:], abs=3e-5)


def test_what_eight_devices_saved_is_read_and_grown_alike_on_fewer(layouts):
    """Bitwise, weights and moments, new and old; reading holds a checkpoint against its own checksums."""
    whole, *fewer = layouts["grown"].values()
    assert list(layouts["grown"]) == [f"{n} devices" for n in (8, 4, 2, 1)]
    assert {name.partition(".")[0] for name in whole} == {"trained", "rest", "optimizer"}
    assert all(sums == whole for sums in fewer)


def test_programs_are_shared_by_runs_on_the_same_devices_only(layouts):
    assert len(set(layouts["born on"])) == 2


def test_a_fork_on_eight_devices_is_the_run_itself(layouts):
    """Forked before a growth, after it, and on the paths that follow."""
    assert layouts["forks"] == [True, True, True]


def test_replicas_may_draw_paths_of_their_own(layouts):
    one, own = layouts["losses"]["one"], layouts["losses"]["own paths"]
    assert own[:2] == pytest.approx(one[:2], abs=3e-5)  # before there are paths
    assert abs(own[2] - one[2]) > 1e-4


def test_parameters_are_split_where_they_can_be(layouts):
    assert layouts["devices"] == 8
    assert any("fsdp" in spec for spec in layouts["specs"])


def test_experts_are_split_grown_and_resumed_on_eight_devices(tmp_path):
    """A dense model becomes a mixture and gets more experts; the same bits after a resume."""
    process = start("experts", tmp_path, devices=8)
    out, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    report = json.loads(out.splitlines()[-1])
    one, split, resumed, dense, ragged = report["losses"].values()
    assert list(split.values()) == pytest.approx(list(one.values()), abs=3e-5) and len(one) == 5
    assert resumed == {step: split[step] for step in resumed} and len(resumed) == 3
    assert report["same end"]
    assert list(ragged.values()) == pytest.approx(list(dense.values()), abs=3e-5)
    by_name = {path.rpartition(".")[2]: spec for path, spec in report["specs"].items()}
    assert "'experts'" in by_name["up"] and "'experts'" in by_name["down"]
    assert "'experts'" not in by_name["router"]


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("hosts") / "run", free_port()
    ranks = [start("rank", folder, i, port, "start") for i in range(2)]
    done = [r.communicate(timeout=600) for r in ranks]
    for rank, output in zip(ranks, done, strict=True):
        assert rank.returncode == 0, "\n".join(output)
    return folder, [out for out, _ in done]


def shown(out: str) -> dict[int, float]:
    return dict(json.loads(line) for line in out.splitlines() if re.match(r"\[\d", line))


def test_two_hosts_give_the_losses_of_one(layouts, two_hosts):
    _, outs = two_hosts
    first, second = (shown(out) for out in outs)
    assert first == second and list(first) == list(range(4))
    assert list(first.values()) == pytest.approx(layouts["losses"]["one"][:4], abs=3e-5)
    assert all(f"process {i} of 2 on" in out and "1 of 2" in out for i, out in enumerate(outs))


@pytest.fixture(scope="module")
def one_host(two_hosts):
    alone = start("start", two_hosts[0])
    out, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    return out


def test_two_hosts_start_from_a_run_and_read_the_whole_model_in_hooks(two_hosts, one_host):
    folder, outs = two_hosts
    first, second = (json.loads(out.splitlines()[-1]) for out in outs)
    one = json.loads(one_host.splitlines()[-1])
    assert first == second and len(first["losses"]) == len(first["sizes"]) == 2
    for field in ("losses", "sizes"):
        assert first[field] == pytest.approx(one[field], rel=1e-5)
    # From the model that was trained, and not from one that was just born
    assert one["losses"][0] < shown(outs[0])[0] - 0.01


def test_two_hosts_choose_fit_and_end_a_stage_as_one_does(two_hosts, one_host):
    first, second = (json.loads(out.splitlines()[-2]) for out in two_hosts[1])
    one = json.loads(one_host.splitlines()[-2])
    assert first == second
    assert (first["chosen"], first["ended"]) == (one["chosen"], one["ended"]) and one["ended"]
    assert first["losses"] == pytest.approx(one["losses"], abs=3e-5)
    assert first["rest"] == pytest.approx(one["rest"], abs=3e-5)


def test_hosts_that_see_different_checkpoints_do_not_go_on(two_hosts, tmp_path):
    """As where a shared folder shows one of them an older state."""
    folder, _ = two_hosts
    for i in range(2):
        shutil.copytree(folder, tmp_path / str(i))
    shutil.rmtree(sorted((tmp_path / "1" / "checkpoints").iterdir())[-1])
    port = free_port()
    ranks = [start("rank", tmp_path, i, port, "apart") for i in range(2)]
    done = [r.communicate(timeout=300) for r in ranks]
    for rank, (_, errors) in zip(ranks, done, strict=True):
        assert rank.returncode == 1, errors
        assert "CheckpointError: the hosts cannot go on together" in errors, errors
        assert "process 1: " in errors and "00000004-01: expected a checkpoint" in errors, errors


def test_two_hosts_stop_before_the_same_step_and_go_on_even_if_one_dies(tmp_path):
    """They are told to stop, one of them fails two steps after that, and both go on to the end."""

    def session(*whats: str) -> list[tuple[int, str, str]]:
        port = free_port()
        ranks = [start("rank", tmp_path, i, port, role) for i, role in enumerate(whats)]
        # A host that hangs is killed, so that what all of them printed is part of the failure
        watch = threading.Timer(300, lambda: [r.kill() for r in ranks])
        watch.start()
        outputs = [r.communicate() for r in ranks]
        watch.cancel()
        return [(r.returncode, *output) for r, output in zip(ranks, outputs, strict=True)]

    def ends(*whats: str) -> list[dict[str, Any]]:
        both = session(*whats)
        for status, *output in both:
            assert status == 0, "\n".join(output)
        first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in both)
        assert first == second
        return first

    whole, stopped = ends("stop", "stop")
    assert whole["finished"] and len(whole["losses"]) == 12
    assert not stopped["finished"] and stopped["signal"] == "SIGTERM"
    assert 0 < len(stopped["losses"]) < 9
    assert stopped["losses"] == dict(list(whole["losses"].items())[: len(stopped["losses"])])

    began = time.monotonic()
    (alone, out, errors), (dead, _, reason) = session("go on", "die")
    assert dead == 1 and "SystemError: this host dies" in reason
    assert alone not in (0, None)
    assert time.monotonic() - began < 120
    assert "growjax.errors" in errors or "heartbeat" in errors, errors
    later = {str(n): loss for n, loss in shown(out).items()}
    assert list(map(int, later))[0] == len(stopped["losses"])
    assert later.items() <= whole["losses"].items()

    (rest,) = ends("go on", "go on")
    assert rest["finished"] and rest["losses"].items() <= whole["losses"].items()
    assert not stopped["losses"].keys() & rest["losses"].keys()
    assert (stopped["losses"] | later | rest["losses"]) == whole["losses"]
