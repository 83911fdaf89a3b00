"""`python -m experiments.bench NAME`: run one benchmark; its last line is one JSON object."""

import importlib
import json
import pkgutil
import sys

import experiments.bench


def main() -> None:
    """Run the benchmark that the command line names."""
    names = [m.name for m in pkgutil.iter_modules(experiments.bench.__path__) if m.name[0] != "_"]
    if len(sys.argv) != 2 or sys.argv[1] not in names:
        sys.exit(f"python -m experiments.bench NAME, where NAME is one of: {', '.join(names)}")
    result = importlib.import_module(f"experiments.bench.{sys.argv[1]}").run()
    print(json.dumps({"name": sys.argv[1], **result}))


if __name__ == "__main__":
    main()
