"""Commands that compare and report runs, and advise from pilots: advise, compare, report."""

from pathlib import Path

import tyro

from growjax.cli.allowed import Allow, allow_packages, prepare_process


# Each command imports its modules inside its body, so that `--help` is fast.


def advise(
    plan: tyro.conf.Positional[Path],
    over: tuple[str, ...],
    budget: float,
    run: Path,
    budgets: tuple[float, ...] = (),
    times: tuple[float, ...] = (0.5,),
    seeds: int = 2,
    by: str = "copy+stack",
    margin: float = 0.01,
    out: Path | None = None,
    evaluations: int = 10,
    held_out: int = 256,
    held_out_end: int = 4096,
    allow: Allow = (),
    programs: str = "",
) -> int:
    """Train pilots of some sizes, and say which plan to train with a budget, and whether to grow.

    If it is stopped, the same command goes on. Exit statuses are those of `train`.

    Args:
        plan: A JSON file, or a Python file that defines `plan`: one stage that trains one whole model.
        over: Fields and their values, each combination a size, such as model.layers=2,4,8.
        budget: What the plan to train may cost, in the unit of the plan's clock.
        run: The folder of the pilots and the page, and of the plans control.json and grown.json.
        budgets: Those of the pilots; by default a sixteenth, an eighth and a quarter of the budget.
        times: The shares of the cost at which pilots grow, from each size to the next.
        seeds: How many seeds the pilots have, from the plan's own on.
        by: Operators joined by + that grow a size into another; see `growjax grow`.
        margin: The gain, in nats, below which growing is not worth it.
        out: The page to write; by default advice.html in the folder of the pilots.
        evaluations: The number of evaluations of each pilot on held-out text.
        held_out: The number of held-out windows in each evaluation; always the same ones.
        held_out_end: The number of windows that the finished models are evaluated on; 0 for none.
        programs: The folder for compiled programs; see `train`.
    """
    prepare_process(allow, run, programs)
    from rich.console import Console

    from growjax.report import advised
    from growjax.train import Options

    return advised.advise(
        plan,
        over,
        budget,
        run,
        Options(held_out=held_out, held_out_end=held_out_end),
        budgets=budgets,
        times=times,
        seeds=seeds,
        by=by,
        margin=margin,
        evaluations=evaluations,
        out=out,
        console=Console(),
    )[0]


def compare(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("compare.html"),
    baseline: str | None = None,
    margin: float | None = None,
    allow: Allow = (),
) -> None:
    """Test whether the runs that grow beat the fixed sizes at equal cost: a verdict, a table and a page.

    Runs of one plan that differ only in the seed are one arm. The arms that train one whole model from
    the first step to the last are the fixed sizes. A verdict needs six seeds.

    Args:
        runs: Folders of finished runs, on the same data and clock.
        out: The page to write.
        baseline: The name of an arm to compare the others with, instead of all fixed sizes.
        margin: A difference that counts as none, in nats, chosen before the runs.
    """
    allow_packages(allow)
    from rich.console import Console

    from growjax.report.compared import compare_runs

    compare_runs(runs, out=out, baseline=baseline, margin=margin, console=Console())


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path = Path("report.html"),
    allow: Allow = (),
) -> None:
    """Write one HTML page about some runs, with their losses against cost, tokens and seconds.

    Args:
        runs: Folders of runs.
        out: The page to write.
    """
    allow_packages(allow)
    from growjax.report.runs import write_report

    print(write_report(runs, out))
