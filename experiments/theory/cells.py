"""Cells that are run once and kept, and the rows of `summary.json` that are made of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np


SizeName = Literal["smoke", "small", "paper"]


def cells(path: Path, wanted: list[tuple], run: Callable[..., dict]) -> list[dict]:
    """Every wanted cell, from the file where it is there already; new ones are added line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # killed in the middle of a line
        path.write_text(whole)
    done = {tuple(cell["cell"]): cell for cell in map(json.loads, whole.splitlines())}
    for cell in wanted:
        if cell not in done:
            done[cell] = {"cell": list(cell), **_finite(run(*cell))}
            with path.open("a") as file:
                file.write(json.dumps(done[cell]) + "\n")
    return [done[cell] for cell in wanted]


def _finite(value: Any) -> Any:
    """The same with None for what is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(values) -> tuple[float, float, float]:
    """The mean over seeds and its 95% t-interval."""
    from scipy.stats import t

    values = np.asarray(values)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def interval_half(values: np.ndarray) -> np.ndarray:
    """Half of the 95% t-interval of each column."""
    return np.array([(high - low) / 2 for _, low, high in map(interval, values.T)])


def within(values, low: float, high: float) -> str:
    """Whether the mean over seeds lies between two numbers, as far as its interval can tell."""
    _, least, most = interval(values)
    if low < least and most < high:
        return "yes"
    return "no" if most <= low or high <= least else "undecided"


def row(question: str, values, verdict: bool | str, command: str) -> dict:
    """One row of `summary.json`; where a network diverged there is no number, and the verdict says so."""
    if not np.all(np.isfinite(values)):
        found = {"question": question, "estimate": None, "interval": None, "seeds": len(values)}
        return found | {"verdict": "diverged", "command": command}
    estimate, low, high = (round(v, 4) for v in interval(values))
    if not isinstance(verdict, str):
        verdict = "yes" if verdict else "no"
    return {
        "question": question,
        "estimate": estimate,
        "interval": [low, high],
        "seeds": len(values),
        "verdict": verdict,
        "command": command,
    }


def summarise(out: Path, question: str, rows: list[dict]) -> list[dict]:
    """Replace the rows of one experiment in `summary.json`; the others stay."""
    path = out / "summary.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, question: rows}, indent=1) + "\n")
    return rows
