"""The option `--allow`, which every command that reads files has."""

import sys
from pathlib import Path
from typing import Annotated

import tyro


_HELP = "Packages of your own that files may import, such as my_pkg; runs their code."
Allow = Annotated[tuple[str, ...], tyro.conf.arg(help=_HELP)]


def allow_packages(packages: tuple[str, ...]) -> None:
    """Let files import these packages, installed or in the current folder."""
    from growjax import values

    if packages:
        sys.path.append(str(Path.cwd()))
        values.allow(*packages)
