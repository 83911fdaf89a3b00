"""The table of planted bugs fits the code: each text stands once, and each row names tests that exist."""

import re
import subprocess

import pytest

from tests.mutations import ROOT, Mutation, changed, mutations, touches


TABLE = mutations()


def test_every_planted_bug_applies():
    faults = []
    for number, bug in enumerate(TABLE, 1):
        path = ROOT / "growjax" / bug.file
        places = path.read_text().count(bug.old) if path.exists() else 0
        if places != 1:
            faults.append(f"{number} {bug.name}: its text is in {places} places of {bug.file}")
        if bug.old == bug.new:
            faults.append(f"{number} {bug.name}: nothing is changed")
    assert not faults, "tests/planted.py:\n" + "\n".join(faults)
    assert len(TABLE) >= 150 and len({bug.name for bug in TABLE}) == len(TABLE)


def test_every_planted_bug_names_tests_that_exist():
    faults = []
    for number, bug in enumerate(TABLE, 1):
        path = ROOT / "tests" / f"test_{bug.tests}.py"
        text = f"{path.name} {path.read_text().lower()}" if path.exists() else ""
        words = set(re.findall(r"\w+", bug.keyword.lower())) - {"or", "and", "not"}
        faults += [
            f"{number} {bug.name}: {word} is not in {path.name}"
            for word in words - {word for word in words if word in text}
        ]
    assert not faults, "tests/planted.py:\n" + "\n".join(faults)


def test_a_change_touches_the_bugs_of_its_files():
    bug = Mutation("", "maps.py", "growth", "", "a", "b")
    assert touches(bug, {"growjax/maps.py"}) and touches(bug, {"tests/test_growth.py"})
    assert not touches(bug, {"growjax/nn/maps.py", "tests/test_maps.py", "maps.py"})


def test_changes_are_those_since_the_branch_and_of_the_working_tree(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
        subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)

    monkeypatch.setattr("tests.mutations.ROOT", tmp_path)
    git("init")
    for name in ("one", "two", "three"):
        write(name, "a")
    git("add", ".")
    git("commit", "-m", "first")
    write("one", "b")
    git("commit", "-am", "second")
    assert changed("main") == {"one"}  # on the branch itself: what the last commit changed
    git("checkout", "-b", "branch")
    write("two", "b")
    git("commit", "-am", "third")
    write("three", "b")
    write("four", "a")
    assert changed("main") == {"two", "three", "four"}
    with pytest.raises(subprocess.CalledProcessError):
        changed("nowhere")
