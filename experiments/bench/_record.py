"""The history of results, a table in a page that `python -m experiments.bench NAME --record` adds to."""

import datetime
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


HEADING = "## History"
_NAMES = ("day", "commit", "benchmark", "ratio", "goal", "machine", "the rest")
_COLUMNS = f"| {' | '.join(_NAMES)} |\n{'|---' * len(_NAMES)}|\n"


def recorded(
    page: str, name: str, result: Mapping[str, Any], day: datetime.date, machine: str
) -> str:
    """The page with one more row at the end of its history, which is its last part.

    Raises `ValueError` for a page without a history.
    """
    text, heading, history = page.partition(f"\n{HEADING}\n")
    if not heading:
        raise ValueError(f"the page has no line {HEADING!r} to add a result under")
    rest = {key: value for key, value in result.items() if key not in ("ratio", "goal")}
    cells = (
        day.isoformat(),
        commit(),
        name,
        result.get("ratio", "-"),
        result.get("goal", "-"),
        machine,
        f"`{json.dumps(rest)}`",
    )
    # A bar would end the cell
    row = "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |\n"
    if _COLUMNS not in history:
        history += f"\n{_COLUMNS}"
    return f"{text}{heading}{history}{row}"


def commit() -> str:
    """The commit that is measured, with a `+` where files differ from it; "-" without a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", "../../growjax"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "-"
    changed = [line for line in changes.stdout.splitlines() if "bench/README.md" not in line]
    return head.stdout.strip() + ("+" if changed else "")
