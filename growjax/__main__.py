"""The command line: `growjax COMMAND`, or `python -m growjax COMMAND`."""

import sys
from pathlib import Path

import tyro

from growjax.errors import GrowjaxError


app = tyro.extras.SubcommandApp()


# A command imports what it needs inside its body, so that `--help` does not load what it never uses.


@app.command
def demo(
    data: Path | None = None,
    seed: int = 0,
    out: Path = Path("runs/demo"),
    steps: int = 400,
) -> None:
    """Train a small model in four ways at counted cost, and write a report. A few minutes on a CPU.

    Args:
        data: A folder of text files to train on; by default, this Python's standard library.
        seed: Of the models, the batches and the paths.
        out: The folder for report.html and results.json.
        steps: How many steps the from-scratch run takes; the other arms follow from its cost.
    """
    from growjax.demo import Size, run

    run(data, seed, out, Size(steps=steps))


def main() -> None:
    """Run one command; a fault in what was asked for is a message and not a traceback."""
    try:
        app.cli(prog="growjax", description="Grow Transformers while they train.")
    except GrowjaxError as error:
        sys.exit(f"growjax: {error}")


if __name__ == "__main__":
    main()
