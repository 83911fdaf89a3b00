"""A run that is killed again and again, each time in a process of its own: `python -m tests.killed`.

    python -m tests.killed FOLDER DOOM ...
    python -m tests.killed FOLDER --tree DOOM ...       a tree of plans instead
    python -m tests.killed FOLDER --hosts DOOM ...      every session is two processes, a device each

One session in FOLDER/whole from beginning to end, one a doom in FOLDER/killed, and one there to its
end; if that run is over before, the next doom begins another one, in FOLDER/killed 2. Each step and
each end is a line of JSON. Processes are forked before JAX has looked for its devices: they share what
was imported, and nothing else. A doom is a place and how often to come past it, and kills there:
`saving:2`. With a signal before it, that is sent instead, once or twice: `INT saving:2`, `TERM twice
step:1`. The place `after:0.3` comes after so much of the time that a whole session takes, from the
first record, and `within:0.3` from the beginning. Of two processes, both come to their doom, or one
does: `1 INT saving:2`.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

import growjax as gj
from growjax import parallel
from growjax.data import Blended, ByteTokenizer, Corpus
from growjax.runs import checkpoint, saves
from growjax.train import (
    Begin,
    Branch,
    CorpusFeed,
    End,
    Growth,
    Layout,
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


HOSTS = 2


def split() -> Plan:
    """Growth behind gates that open over two steps, on two devices: 3 + 12 steps."""
    return plan(
        steps(3, "small"),
        steps(12, "ramp", grow=gj.msg(mlp=24, heads=4), ramp=2),
        layout=Layout(fsdp=HOSTS),
    )


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
        self.count = float(count or 1)
        self.inside: list[str] = []  # the functions of `around` that are running
        self.over = False  # nobody asks a run to stop that has come to its end
        self.lock = threading.Lock()  # so that none comes to its end while it is asked

    def at(self, place: str) -> None:
        """Die, if this is the place and the time."""
        if place != self.place:
            return
        self.count -= 1
        if self.count == 0:
            self.strike()

    def strike(self) -> None:
        """Send the signal, now."""
        with self.lock:
            if self.over and self.signal != signal.SIGKILL:
                return
            say(f"in {' '.join(self.inside)}")
            for _ in range(self.times):
                os.kill(os.getpid(), self.signal)

    def begin(self, place: str) -> None:
        """Set the time of a doom that comes some seconds after this place."""
        if self.place == place:
            timer = threading.Timer(self.count, self.strike)
            timer.daemon = True
            timer.start()

    def around(self, module: Any, name: str, before: str, after: str) -> None:
        """Be asked before and after each call of a function."""
        real = getattr(module, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            self.at(before)
            self.inside.append(name)
            result = real(*args, **kwargs)
            self.inside.pop()
            self.at(after)
            return result

        setattr(module, name, asked)


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to whoever asks for any.

    The coordinator binds it seconds later, once it has imported JAX. One that the system chose would by
    then be free for all connections of the machine.
    """
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


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
    doom.begin("within")
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
            doom.over = False
            doom.begin("after")
        if isinstance(record, End):
            with doom.lock:
                doom.over = True
            asked = INTERRUPTED if record.signal == "SIGINT" else STOPPED
            status = 0 if record.finished else asked
        if isinstance(record, Growth):
            doom.at("growth")
        if isinstance(record, Step):
            say([record.step, record.loss])
            doom.at("step")
            if jax.process_count() > 1:
                time.sleep(0.2)  # JAX's service looks for a signal once a second
    return status


def child(folder: Path, said: str, way: str, host: int = 0, port: int = 0) -> int:
    """One process of a session in a folder: its process number. It exits as the command line would."""
    number = os.fork()
    if number:
        return number
    signal.alarm(300)  # who hangs ends by SIGALRM, which no test takes for a status
    try:
        if way == "--hosts":
            parallel.connect(
                coordinator_address=f"127.0.0.1:{port}",
                num_processes=HOSTS,
                process_id=host,
                heartbeat=10,
                quiet=True,
            )
        runs = tree(folder) if way == "--tree" else [Branch(PLANS[way](), Path(), ())]
        status = session(folder, said, runs)
        if way == "--hosts":
            # As JAX does at the end of Python, and the command line where all were asked to stop
            jax.distributed.shutdown()
    except BaseException as error:
        say(repr(error))
        os._exit(1)
    os._exit(status)


PLANS = {"": short, "--hosts": split}


def main() -> None:
    folder, dooms, way = Path(sys.argv[1]), sys.argv[2:], ""
    if dooms[:1] in (["--tree"], ["--hosts"]):
        way = dooms.pop(0)
    # What orbax's first import brings is shared, too
    assert saves.Saves
    _, seconds = live(folder / "whole", "never", way)
    if any(":0." in doom for doom in dooms) and way != "--hosts":
        # Now that its programs are in the cache, which several processes do not use
        _, seconds = live(folder / "warm", "never", way)
    run, count, over = folder / "killed", 1, False
    for doom in dooms:
        if over:
            count += 1
            run = folder / f"killed {count}"
        if ":0." in doom:
            place, _, share = doom.partition(":")
            doom = f"{place}:{float(share) * seconds:.3f}"
        over, _ = live(run, doom, way)
    if not over:
        live(run, "never", way)


def live(run: Path, doom: str, way: str) -> tuple[bool, float]:
    """One session of a run, in one process or in two: whether it reached its end, and its seconds."""
    began, port = time.monotonic(), free_port()
    children = []
    for host in range(HOSTS if way == "--hosts" else 1):
        only, _, alone = doom.partition(" ")
        said = doom if only not in ("0", "1") else alone if only == str(host) else "never"
        children.append(child(run, said, way, host, port))
    ends = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]
    seconds = time.monotonic() - began
    end = {"doom": doom, "run": run.name, "status": ends if way == "--hosts" else ends[0]}
    # A checkpoint of which a part is there, as a kill leaves it
    torn = [path.name for path in run.glob("checkpoints/*orbax-checkpoint-tmp*")]
    say(end | {"seconds": round(seconds, 1), "torn": torn})
    return not any(ends), seconds


if __name__ == "__main__":
    main()
