"""One page about some runs, from the journals in their folders."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from growjax.errors import DataError
from growjax.report.figures import arms_figure, canvas, look, plain, scale, style
from growjax.report.page import Plot, Table, write_page
from growjax.train import Run


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page of some runs: losses against FLOPs, tokens and seconds, stages, growths, speed.

    Raises `DataError` for a folder without a journal, or one in which nothing was trained yet.

    **Example**

        write_report(["runs/scratch", "runs/grown"], "report.html")
    """
    arms = [read_run(run) for run in runs]
    if not arms:
        raise DataError("runs: expected at least one folder of a run")
    plots = [
        Plot(
            "Held-out loss against cost",
            arms_figure(arms),
            "The strip names the stages; a tick on a curve is where one begins.",
        ),
        *(
            Plot(f"Held-out loss against {name}", _against(arms, key, name), "The same losses.")
            for key, name in [("tokens", "training tokens"), ("seconds", "seconds of training")]
        ),
        Plot(
            "Training loss",
            _losses(arms),
            "Of the part that was trained, on its batch; a running mean over a fiftieth of the run.",
        ),
        Plot(
            "Speed",
            _against(arms, "speed", "training tokens", "tokens per second"),
            "Of each step, as a running mean. A step that waited for something shows as a dip.",
        ),
    ]
    return write_page(out, ", ".join(arm["name"] for arm in arms), plots, _tables(arms), _NOTES)


_NOTES = (
    "FLOPs are model FLOPs: the matrix products of a forward pass, counted off the traced program, times "
    "three. Norms, softmax, the optimizer and recomputation are not counted.",
    "Seconds are those spent training, over all sessions of a run, without compiling, growing, "
    "evaluating and saving.",
    "Held-out losses are of the whole model, in nats per token, also while a part of it is trained. Ends "
    "of runs compare if their learning rates are decayed; points before the end do not.",
    "The certificate of a growth is the loss on one held-out batch just before and just after.",
)


def read_run(run: str | Path) -> dict[str, Any]:
    """What the figures need to know of one run, by its plan and its journal."""
    plan, rows = Run(run).plan(), Run(run).rows()
    steps = [row for row in rows if row["kind"] == "step"]
    spent = steps[-1]["flops"] if steps else 0
    marks = [row for row in steps if row["held_out"] is not None]
    if not marks:
        raise DataError(f"{run}: nothing was evaluated in it yet")
    return {
        "name": Path(run).name,
        "held_out": [(row["flops"], row["held_out"]) for row in marks],
        "final": marks[-1]["held_out"],
        "finished": any(row["kind"] == "end" and row["finished"] for row in rows),
        "stages": [
            {"label": era.label, "start": era.flops[0], "stop": min(era.flops[1], spent)}
            for era in plan.timeline()
            if era.flops[0] < spent
        ],
        "tokens": [(row["tokens"], row["held_out"]) for row in marks],
        "seconds": [(row["seconds"], row["held_out"]) for row in marks],
        "loss": [(row["flops"], row["loss"]) for row in steps],
        "speed": [
            (row["tokens"], row["tokens_per_second"]) for row in steps if "tokens_per_second" in row
        ],
        "scores": marks[-1].get("scores") or {},
        "growths": [row for row in rows if row["kind"] == "growth"],
        "last": steps[-1],
        "waited": sum(row["waited"] for row in steps),
    }


def _mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a fiftieth of the points."""
    width = max(len(points) // 50, 1)
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    return [
        (points[i][0], (sums[i + 1] - sums[max(i + 1 - width, 0)]) / min(width, i + 1))
        for i in range(len(points))
    ]


def _figure(
    arms: Sequence[Mapping[str, Any]],
    points: Callable[[Mapping[str, Any]], Sequence[tuple[float, float]]],
    x: str,
    y: str,
) -> Figure:
    with style():
        figure, axes = canvas(3.2)
        for n, arm in enumerate(arms):
            given = points(arm)
            if given:
                axes.plot(*zip(*given, strict=True), label=plain(arm["name"]), **look(n))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_xlim(0, None)
        axes.legend(loc="best")
    return figure


def _against(
    arms: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    label: str = "held-out loss (nats per token)",
) -> Figure:
    smooth = _mean if key == "speed" else list
    return _figure(arms, lambda arm: smooth(arm[key]), name, label)


def _losses(arms: Sequence[Mapping[str, Any]]) -> Figure:
    unit, name = scale(max(arm["last"]["flops"] for arm in arms))
    return _figure(
        arms,
        lambda arm: [(x / unit, y) for x, y in _mean(arm["loss"])],
        f"training {name}",
        "training loss (nats per token)",
    )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def _tables(arms: Sequence[Mapping[str, Any]]) -> list[Table]:
    results = [
        [
            arm["name"],
            f"{arm['final']:.4f}",
            f"{arm['last']['flops']:.4g}",
            f"{arm['last']['tokens']:,}",
            f"{arm['last']['seconds']:.0f}",
            f"{arm['waited']:.1f}",
            "yes" if arm["finished"] else "no",
        ]
        for arm in arms
    ]
    growths = [
        [
            f"{arm['name']}: {', '.join(f'{a} {m} to {n}' for a, (m, n) in row['grew'].items())}",
            row["crossing"]["exactness"],
            f"{row['step']}",
            f"{row['crossing']['before']:.5f}",
            f"{row['crossing']['after']:.5f}",
            f"{row['crossing']['change']:.2g}",
            f"{row['stall']:.2f}",
        ]
        for arm in arms
        for row in arm["growths"]
    ]
    heads = ("run", "held-out loss", "FLOPs", "tokens", "seconds", "waited for data", "finished")
    tables = [Table("Results", heads, results, "Losses in nats per token; seconds of training.")]
    scores = dict.fromkeys(name for arm in arms for name in arm["scores"])
    if scores:
        rows = [
            [arm["name"], *(_number(arm["scores"].get(name)) for name in scores)] for arm in arms
        ]
        words = "What the runs' hooks said of their last models that were looked at."
        tables.append(Table("Scores", ("run", *scores), rows, words))
    if growths:
        heads = (
            "what grew",
            "promise",
            "before step",
            "loss before",
            "after",
            "change",
            "stall (s)",
        )
        words = (
            "Change is the mean absolute change of a token's loss; stall is how long training stood "
            "still."
        )
        tables.append(Table("Growth", heads, growths, words))
    return tables
