"""A run that is killed again and again, each time in a process of its own: `python -m tests.killed`.

    python -m tests.killed FOLDER DOOM ...
    python -m tests.killed FOLDER --tree DOOM ...       a tree of plans instead

One session in FOLDER/whole from beginning to end, one a doom in FOLDER/killed, and one there to its end;
each step and each end is a line of JSON. Processes are forked before JAX has looked for its devices: they
share what was imported, and nothing else. A doom is a place and how often to come past it, and kills
there: `saving:2`. With a signal before it, that is sent instead, once or twice: `INT saving:2`, `TERM
twice step:1`. The place `after:MS` comes so many milliseconds after the first record.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import growjax as gj
from growjax.data import Blended, ByteTokenizer, Corpus
from growjax.runs import checkpoint, saves
from growjax.train import (
    Begin,
    Branch,
    CorpusFeed,
    End,
    Growth,
    Options,
    Plan,
    Schedule,
    Stage,
    Step,
    Warmup,
    branches,
    train,
)
from growjax.train import session as loop
from growjax.train.commands import INTERRUPTED, STOPPED
from tests.runs import BATCH, TEXT, TOKENS, plan, steps


def short() -> Plan:
    """Growth behind gates that open over four steps, then layers on top: 3 + 6 + 3 steps.

    The batch of the last stage is half that of the others.
    """
    return plan(
        steps(3, "small"),
        steps(6, "ramp", grow=gj.msg(mlp=24, heads=4), ramp=4),
        Stage(
            "deep", tokens=3 * TOKENS // 2, batch=BATCH // 2, grow=gj.stack(layers=4, order="top")
        ),
    )


def blended(of: Plan) -> CorpusFeed:
    """The text of `feed` in three parts that are mixed by weight."""
    tokenizer, documents = ByteTokenizer(), TEXT.split(". ")
    parts = [Corpus.of(documents[n::3], tokenizer) for n in range(3)]
    mixed = Blended(tuple(parts), (0.5, 0.3, 0.2), ("a", "b", "c"))
    return CorpusFeed(of, mixed, mixed)


def tree(folder: Path) -> list[Branch]:
    """A plan that grows, the same for longer, and one that grows otherwise where both do."""
    rate = Schedule(1e-2, "constant", warmup=Warmup(steps=2))
    short = plan(steps(3), steps(3, grow=gj.msg(mlp=24), ramp=2), rate=rate)
    long = dataclasses.replace(short, name="long", stages=(*short.stages, steps(3)))
    other = dataclasses.replace(
        short, name="other", stages=(steps(3), steps(4, grow=gj.stack(layers=4)))
    )
    return branches([short, long, other], folder)


class Doom:
    """Ends this process at one place, when it comes past it for the nth time."""

    def __init__(self, said: str):
        words = said.partition(" ") if said.split()[0] in ("INT", "TERM") else ("KILL", "", said)
        self.signal, where = getattr(signal, f"SIG{words[0]}"), words[2]
        self.times = 2 if where.startswith("twice ") else 1
        self.place, _, count = where.removeprefix("twice ").partition(":")
        self.count = int(count or 1)

    def at(self, place: str) -> None:
        """Die, if this is the place and the time."""
        if place != self.place:
            return
        self.count -= 1
        if self.count == 0:
            self.strike()

    def strike(self) -> None:
        """Send the signal, now."""
        for _ in range(self.times):
            os.kill(os.getpid(), self.signal)

    def begin(self) -> None:
        """Set the time of a doom that comes after some milliseconds."""
        if self.place == "after":
            timer = threading.Timer(self.count / 1000, self.strike)
            timer.daemon = True
            timer.start()

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


def session(folder: Path, said: str, runs: list[Branch]) -> int:
    """One session of the runs, until its doom or the end: its exit status, as the command line's."""
    doom = Doom(said)
    doom.around(loop, "cross", "before growth", "after growth")
    # Orbax goes on writing in threads of its own once the call has returned
    doom.around(checkpoint.ocp, "save_async", "before saving", "saving")
    doom.around(checkpoint.shutil, "rmtree", "before dropping", "dropping")
    status = 1
    # A shell that runs the tests in the background lets them ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for of, run, save_at in runs:
        status = trained(of, folder / run, save_at, doom)
        if status:
            break
    return status


def trained(of: Plan, run: Path, save_at: tuple[int, ...], doom: Doom) -> int:
    """One session of one run."""
    status = 1
    options = Options(held_out=4, save_every=2, save_at=save_at)
    for record in train(of, blended(of), run=run, options=options):
        if isinstance(record, Begin):
            doom.begin()
        if isinstance(record, End):
            asked = INTERRUPTED if record.signal == "SIGINT" else STOPPED
            status = 0 if record.finished else asked
        if isinstance(record, Growth):
            doom.at("growth")
        if isinstance(record, Step):
            say([record.step, record.loss])
            doom.at("step")
    return status


def main() -> None:
    folder, dooms = Path(sys.argv[1]), sys.argv[2:]
    of_tree = dooms[:1] == ["--tree"]
    # What orbax's first import brings is shared, too
    assert saves.Saves
    for doom in ["whole", *dooms[of_tree:], "never"]:
        child = os.fork()
        if child == 0:
            try:
                run = folder / ("whole" if doom == "whole" else "killed")
                status = session(run, doom, tree(run) if of_tree else [Branch(short(), Path(), ())])
            except BaseException as error:
                say(repr(error))
                os._exit(1)
            os._exit(status)
        _, status = os.waitpid(child, 0)
        say({"doom": doom, "status": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
