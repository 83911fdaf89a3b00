"""The script that trains on a Cloud TPU, against a `gcloud` that is preempted once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "experiments" / "tpu" / "run.sh"

# Machines are there from the request on. Training fails once, by preemption or by its own fault.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >> "$FAKE/calls"
case "$*" in
  *"queued-resources describe"*) if [ -e "$FAKE/up" ]; then echo ACTIVE; else exit 1; fi ;;
  *"tpu-vm describe"*) if [ -e "$FAKE/lost" ]; then echo PREEMPTED; else echo READY; fi ;;
  *"queued-resources create"*) touch "$FAKE/up" ;;
  *"queued-resources delete"*) rm -f "$FAKE/up" "$FAKE/lost" ;;
  *"growjax train"*)
    if [ ! -e "$FAKE/tried" ]; then
      touch "$FAKE/tried"
      [ "$HOW" != saved ] || exit 75
      [ "$HOW" = fault ] || touch "$FAKE/lost"
      [ "$HOW" = asked ] || exit 1
    else
      touch "$FAKE/done"
    fi ;;
  *"storage cat"*) if [ -e "$FAKE/done" ]; then echo '{"kind": "end", "finished": true}'; fi ;;
esac
"""

# A `tar` that keeps a copy of what it wrote
TAR = """#!/usr/bin/env bash
{tar} "$@"
cp "$2" '{out}'
"""


def run(folder: Path, how: str, *names: str) -> tuple[int, list[str], str]:
    """The script's status, what it asked `gcloud` for, and what it said, for plans of some names."""
    fake = folder / "gcloud"
    fake.write_text(GCLOUD)
    fake.chmod(0o755)
    plans = [folder / (name if "." in name else f"{name}.json") for name in names or ("plan",)]
    for plan in plans:
        plan.write_text("{}")
    finished = subprocess.run(
        ["bash", SCRIPT, *plans],
        env={
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE": str(folder),
            "HOW": how,
            "BUCKET": "b",
            "POLL": "0",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = (folder / "calls").read_text().splitlines()
    words = ("create", "delete", "scp", "growjax train", "growjax compare")
    asked = [word for call in calls for word in words if f"{word} " in call]
    return finished.returncode, asked, finished.stderr


needs_tools = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("git")), reason="needs bash and git"
)


@needs_tools
def test_a_plan_in_python_is_refused_before_anything_is_rented(tmp_path):
    (tmp_path / "calls").touch()
    status, calls, output = run(tmp_path, "cut", "one", "two.py")
    assert (status, calls) == (2, []) and "growjax plan" in output and "--out plan.json" in output


@needs_tools
@pytest.mark.parametrize("how", ["cut", "asked"])
def test_a_preempted_run_starts_over_and_everything_is_removed(how, tmp_path):
    """Whether the connection is cut, or the run is asked to stop and ends well, it is not finished."""
    status, calls, output = run(tmp_path, how)
    once = ["create", "scp", "growjax train", "delete"]
    assert (status, calls) == (0, once + once), output
    assert "preempted" in output and "finished; its folder is gs://b/growjax" in output


@needs_tools
def test_a_run_that_stopped_and_saved_is_gone_on_with_where_it_is(tmp_path):
    """The machines are still well, and it is no fault."""
    status, calls, output = run(tmp_path, "saved")
    once = ["scp", "growjax train"]
    assert (status, calls) == (0, ["create", *once, *once, "delete"]), output
    assert "stopped, and saved" in output and "finished" in output


@needs_tools
def test_a_run_that_fails_on_its_own_is_not_tried_again(tmp_path):
    status, calls, output = run(tmp_path, "fault")
    assert (status, calls) == (1, ["create", "scp", "growjax train", "delete"]), output
    assert "it failed on machines that are well" in output


@needs_tools
def test_a_study_trains_one_plan_after_the_other_and_compares_their_runs(tmp_path):
    status, calls, output = run(tmp_path, "cut", "bert-1x-scratch", "bert-1x-msg")
    once = ["create", "scp", "growjax train"]
    rest = ["growjax train", "growjax compare", "delete"]
    assert (status, calls) == (0, [*once, "delete", *once, *rest]), output
    asked = (tmp_path / "calls").read_text()
    for name in ("bert-1x-scratch", "bert-1x-msg"):
        train = f"growjax train 'plans/growjax-{name}.json' --run 'runs/growjax/{name}' --hosts"
        assert train in asked
        assert f"storage cat gs://b/growjax/{name}/metrics.jsonl" in asked
    assert "compare 'runs/growjax/bert-1x-scratch' 'runs/growjax/bert-1x-msg' --out" in asked


@needs_tools
def test_the_plans_of_a_study_are_copied_whole(tmp_path):
    """What `scp` sends has every plan, under the name that it is trained by."""
    (tmp_path / "tar").write_text(TAR.format(out=tmp_path / "sent", tar=shutil.which("tar")))
    (tmp_path / "tar").chmod(0o755)
    status, _, output = run(tmp_path, "asked", "a", "b")
    assert status == 0, output
    sent = subprocess.run(["tar", "tzf", tmp_path / "sent"], capture_output=True, text=True).stdout
    assert {"plans/growjax-a.json", "plans/growjax-b.json"} <= set(sent.split())
