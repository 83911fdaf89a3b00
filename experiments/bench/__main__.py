"""`python -m experiments.bench NAME [--record]`: run one benchmark; its last line is one JSON object.

`--record` adds that line to the history in `experiments/bench/README.md`, with the day, the commit and
the machine.
"""

import argparse
import datetime
import importlib
import json
import pkgutil
from pathlib import Path

import experiments.bench
from experiments.bench._race import machine
from experiments.bench._record import recorded


HISTORY = Path(__file__).with_name("README.md")


def main() -> None:
    """Run the benchmark that the command line names."""
    names = [m.name for m in pkgutil.iter_modules(experiments.bench.__path__) if m.name[0] != "_"]
    parser = argparse.ArgumentParser(prog="python -m experiments.bench")
    parser.add_argument("name", choices=names)
    parser.add_argument(
        "--record", action="store_true", help="add the result to the README's history"
    )
    options = parser.parse_args()
    result = importlib.import_module(f"experiments.bench.{options.name}").run()
    print(json.dumps({"name": options.name, **result}))
    if options.record:
        today = datetime.date.today()
        page = recorded(HISTORY.read_text(), options.name, result, today, machine())
        HISTORY.write_text(page)


if __name__ == "__main__":
    main()
