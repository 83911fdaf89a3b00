"""Plant realistic bugs, one at a time, and see that the tests notice: `python -m tests.mutations`.

    python -m tests.mutations                  all of them, after the tests have passed without any
    python -m tests.mutations --only 7 12      these
    python -m tests.mutations --changed main   those in files that differ from what main has
    python -m tests.mutations --list

The package, its tests and pages are copied to a temporary folder first; the working tree is never
touched. A bug that survives, or whose text is no longer there exactly once, makes the exit status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests import (
    planted,
    planted_algebra,
    planted_budgets,
    planted_data,
    planted_kernels,
    planted_models,
    planted_runs,
    planted_specs,
    planted_text,
)


ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """One bug: `old` in `file` becomes `new`, and `-k keyword` of `tests` should fail."""

    name: str
    file: str
    tests: str
    keyword: str
    old: str
    new: str


def mutations() -> list[Mutation]:
    """The rows of all tables, read."""
    entries = []
    tables = (
        planted,
        planted_models,
        planted_runs,
        planted_budgets,
        planted_specs,
        planted_algebra,
        planted_kernels,
        planted_data,
        planted_text,
    )
    table = "".join(module.TABLE for module in tables)
    for entry in table.strip().removeprefix("@ ").split("\n@ "):
        head, *lines = entry.split("\n")
        old, new = ("\n".join(x[2:] for x in lines if x.startswith(sign)) for sign in "-+")
        name, file, tests, keyword = map(str.strip, head.split("|"))
        entries.append(Mutation(name, file, tests, keyword, old, new))
    return entries


def run(folder: Path, tests: str, keyword: str) -> int:
    """The exit status of pytest in a copy: 0 passed, 1 failed, anything else is no verdict."""
    command = [sys.executable, "-m", "pytest", f"tests/test_{tests}.py", "-k", keyword]
    # As in `make test`: what only the deep profile notices is noticed too late
    command += ["-m", "not slow", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    # Without bytecode: a bug of the same length, planted within a second, would not be compiled.
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode


def plant(folder: Path, bug: Mutation) -> str:
    """Plant one bug, run its tests, take it out again; the verdict."""
    path = folder / "growjax" / bug.file
    source = path.read_text()
    if source.count(bug.old) != 1:
        return f"DOES NOT APPLY ({source.count(bug.old)} places)"
    path.write_text(source.replace(bug.old, bug.new))
    try:
        status = run(folder, bug.tests, bug.keyword)
    finally:
        path.write_text(source)
    return {0: "SURVIVED", 1: "caught"}.get(status, f"NO VERDICT (pytest exit status {status})")


def changed(base: str) -> set[str]:
    """Files that differ from where this branch left `base`; on `base` itself, those of its last commit.

    What is not committed yet counts.
    """

    def git(*arguments: str) -> list[str]:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()

    (start,) = git("merge-base", base, "HEAD")
    if [start] == git("rev-parse", "HEAD") and not git("status", "--porcelain"):
        start = "HEAD~"
    return {*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")}


def touches(bug: Mutation, files: set[str]) -> bool:
    """Whether a change of these files can change what becomes of a bug."""
    return f"growjax/{bug.file}" in files or f"tests/test_{bug.tests}.py" in files


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers from --list")
    parser.add_argument("--changed", metavar="BRANCH", help="of the files that differ from it")
    parser.add_argument("--list", action="store_true", help="print the bugs and stop")
    args = parser.parse_args()
    chosen = {i: bug for i, bug in enumerate(mutations(), 1) if i in (args.only or [i])}
    if args.changed:
        files = changed(args.changed)
        chosen = {i: bug for i, bug in chosen.items() if touches(bug, files)}
    if args.list:
        for i, bug in chosen.items():
            print(f"{i:3} {bug.name}  [growjax/{bug.file}; test_{bug.tests}.py -k '{bug.keyword}']")
        return 0
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("growjax", "tests", "docs"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        for tests in sorted({bug.tests for bug in chosen.values()}):
            keywords = {f"({bug.keyword})" for bug in chosen.values() if bug.tests == tests}
            if run(folder, tests, " or ".join(sorted(keywords))):
                print(f"test_{tests}.py fails, or selects nothing, without any bug planted")
                faults += 1
        for i, bug in chosen.items():
            start = time.monotonic()
            verdict = plant(folder, bug)
            faults += verdict != "caught"
            seconds = time.monotonic() - start
            print(f"{i:3} {bug.name:55} {verdict:10} {seconds:5.1f} s", flush=True)
    print(f"{len(chosen)} bugs planted, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
