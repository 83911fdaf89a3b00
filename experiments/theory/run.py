"""What happens to a network when layers are removed, and what paths of growing length can learn.

`python -m experiments.theory.run NAME --size smoke|small|paper --out DIR`, where NAME is `stability`,
`removed`, `trained`, `polynomials` or `blocks`.
"""

import json

import tyro

from experiments.theory.blocks import blocks
from experiments.theory.polynomials import polynomials
from experiments.theory.stability import removed, stability
from experiments.theory.trained import trained


COMMANDS = {
    "stability": stability,
    "removed": removed,
    "trained": trained,
    "polynomials": polynomials,
    "blocks": blocks,
}


def main() -> None:
    """Run the experiment that the command line names, and print its rows."""
    for line in tyro.extras.subcommand_cli_from_dict(COMMANDS):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
