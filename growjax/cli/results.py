"""Commands that compare and report finished runs: compare, report."""

from pathlib import Path

import tyro

from growjax.cli.allowed import Allow, allow_packages


# Each command imports its modules inside its body, so that `--help` is fast.


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
