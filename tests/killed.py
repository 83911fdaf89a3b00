"""A run that is killed again and again, each time in a process of its own: `python -m tests.killed`.

    python -m tests.killed FOLDER DOOM ...

One session in FOLDER/whole from beginning to end, one a doom in FOLDER/killed, and one there to its end;
each step and each end is a line of JSON. Processes are forked before JAX has looked for its devices: they
share what was imported, and nothing else. A doom is a place and how often to come past it: `saving:2`.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import growjax as gj
from growjax.runs import checkpoint, saves
from growjax.train import Growth, Options, Plan, Step, train
from growjax.train import session as loop
from tests.runs import feed, plan, steps


def short() -> Plan:
    """Growth behind gates that open over four steps, then layers on top: 3 + 6 + 3 steps."""
    return plan(
        steps(3, "small"),
        steps(6, "ramp", grow=gj.msg(mlp=24, heads=4), ramp=4),
        steps(3, "deep", grow=gj.stack(layers=4, order="top")),
    )


class Doom:
    """Ends this process at one place, when it comes past it for the nth time."""

    def __init__(self, said: str):
        self.place, _, count = said.partition(":")
        self.count = int(count or 1)

    def at(self, place: str) -> None:
        """Die, if this is the place and the time."""
        self.count -= place == self.place
        if self.count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, module: Any, name: str, before: str, after: str) -> None:
        """Be asked before and after each call of a function."""
        real = getattr(module, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            self.at(before)
            result = real(*args, **kwargs)
            self.at(after)
            return result

        setattr(module, name, asked)


def say(what: Any) -> None:
    """A line of JSON in one piece: a thread that ends the process cannot cut it off."""
    os.write(sys.stdout.fileno(), (json.dumps(what) + "\n").encode())


def session(folder: Path, said: str) -> None:
    """One session of the run, until its doom or the end."""
    doom, of = Doom(said), short()
    doom.around(loop, "cross", "before growth", "after growth")
    # Orbax goes on writing in threads of its own once the call has returned
    doom.around(checkpoint.ocp, "save_async", "before saving", "saving")
    doom.around(checkpoint.shutil, "rmtree", "before dropping", "dropping")
    options = Options(held_out=4, save_every=2)
    for record in train(of, feed(of), run=folder, options=options):
        if isinstance(record, Growth):
            doom.at("growth")
        if isinstance(record, Step):
            say([record.step, record.loss])
            doom.at("step")
            if said == "terminated twice":
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    folder = Path(sys.argv[1])
    # What orbax's first import brings is shared, too
    assert saves.Saves
    for said in ["whole", *sys.argv[2:], "never"]:
        child = os.fork()
        if child == 0:
            try:
                session(folder / ("whole" if said == "whole" else "killed"), said)
            except BaseException as error:
                say(repr(error))
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say({"doom": said, "status": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
