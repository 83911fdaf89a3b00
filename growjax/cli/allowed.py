"""The option `--allow` of commands that read files, and the first acts of those that train."""

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


def prepare_process(
    allow: tuple[str, ...], folder: Path, programs: str, hosts: bool = False
) -> None:
    """Prepare this process for training: packages, other hosts, compiled programs and memory.

    `programs` is the option of the commands; by default the folder is in the cache of `folder`.
    """
    allow_packages(allow)
    from growjax.parallel import connect
    from growjax.programs.cache import keep_memory, keep_programs

    keep_memory()
    if hosts:
        connect()
    keep_programs(folder / "cache" / "programs", programs)
