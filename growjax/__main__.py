"""The command line: `growjax COMMAND`, or `python -m growjax COMMAND`."""

# ruff: noqa: E402 - `require` must run before the imports below, to name a package that is missing

import os
import sys
from pathlib import Path
from typing import Annotated

from growjax import __version__
from growjax.errors import ExtraError, GrowjaxError
from growjax.extras import require


try:
    require("the command line", "tyro", "rich")
except ExtraError as error:
    sys.exit(f"growjax: {error}")

import tyro


app = tyro.extras.SubcommandApp()
_ALLOW = "Packages of your own that files may import, such as my_pkg; runs their code."
Allow = Annotated[tuple[str, ...], tyro.conf.arg(help=_ALLOW)]


# Each command imports its modules inside its body, so that `--help` is fast.


@app.command
def demo(
    data: Path | None = None,
    seed: int = 0,
    out: Path = Path("runs/demo"),
    steps: int = 320,
) -> None:
    """Train a small model in five ways at counted cost, and write a report. A few minutes on a CPU.

    Args:
        data: A folder of text files to train on; by default, this Python's standard library.
        seed: The seed of the models, the batches and the paths.
        out: The folder for report.html, summary.json and the folders of the runs.
        steps: Steps of the run from scratch; the lengths of the other runs follow from its cost.
    """
    from growjax.demo import Size, run

    run(data, seed, out, Size(steps=steps))


@app.command
def train(
    plans: tyro.conf.Positional[tuple[Path, ...]],
    run: Path,
    change: tuple[str, ...] = (),
    fork: str | None = None,
    evaluations: int = 20,
    held_out: int = 256,
    held_out_end: int = 4096,
    save_every: int | None = None,
    save_minutes: float | None = 10.0,
    save_at: tuple[int, ...] = (),
    keep_last: int = 2,
    keep_every: int | None = None,
    fall_back: bool = False,
    tracker: tuple[str, ...] = (),
    profile: tuple[int, int] | None = None,
    reference: Path | None = None,
    hosts: bool = False,
    allow: Allow = (),
    programs: str = "",
) -> None:
    """Run a plan, or resume it: the same command goes on from the last checkpoint.

    On Ctrl-C or SIGTERM the run finishes its step, saves and ends; on a second one it ends at once. Exit
    statuses: 0 the plan ended, 75 SIGTERM stopped it (the same command goes on), 130 Ctrl-C, 1 an error.

    Args:
        plans: A JSON file, or a Python file that defines `plan`. Several are trained as a tree, one after
            the other: the first steps that they have in common are trained once.
        run: The folder of the run: its plan, journal and checkpoints. Of several plans, the folder of
            their runs, each named after its plan.
        change: Fields of the plan to change, such as batch=16 or model.dtype=bfloat16.
        fork: A run to go on from, with its whole state, as RUN or RUN@STEP. The plan must train the same
            steps before; they are not trained again.
        evaluations: The number of evaluations on held-out text, at equal distances in cost.
        held_out: The number of held-out windows in each evaluation; always the same ones.
        held_out_end: The number of windows that the finished model is evaluated on; 0 for none.
        save_every: Steps between checkpoints, besides those before and after every growth.
        save_minutes: Minutes between checkpoints; None for none by time.
        save_at: Steps before which to write a checkpoint that stays, for runs that fork from it.
        keep_last: The number of latest checkpoints that stay.
        keep_every: Checkpoints at multiples of this many steps stay as well.
        fall_back: Set a damaged checkpoint aside and go on from the one before it.
        tracker: Trackers that get the numbers besides the journal: tensorboard, wandb.
        profile: The first and the last step of a profile to write.
        reference: The second model that RHO compares with: a run, a checkpoint or a Hugging Face folder.
        hosts: Join the other hosts of a pod first.
        programs: The folder for compiled programs, which a resumed run loads; by default
            JAX_COMPILATION_CACHE_DIR, or else cache/programs next to the run. "none" for no such folder.
    """
    _allow(allow)
    from growjax import parallel

    if hosts:
        parallel.connect()
    parallel.keep_programs(run.parent / "cache" / "programs", programs)

    from rich.console import Console

    from growjax.evals.commands import open_model
    from growjax.train import Options
    from growjax.train.commands import train_plans
    from growjax.train.planfile import read_plan

    console = Console()
    with console.status("reading the plan"):
        read = [read_plan(plan, change) for plan in plans]
        second = None if reference is None else open_model(reference)[0]
    options = Options(
        held_out=held_out,
        held_out_end=held_out_end,
        save_every=save_every,
        save_minutes=save_minutes,
        save_at=save_at,
        keep_last=keep_last,
        keep_every=keep_every,
        fall_back=fall_back,
        profile=profile,
    )
    status = train_plans(
        read,
        run,
        options,
        fork=fork,
        evaluations=evaluations,
        reference=second,
        trackers=tracker,
        console=console,
    )
    if status:
        _leave(status)


@app.command
def plan(
    plan: tyro.conf.Positional[Path],
    change: tuple[str, ...] = (),
    target: str | None = None,
    devices: int | None = None,
    allow: Allow = (),
) -> None:
    """Print the stages of a plan, their cost and memory, and all faults; nothing is computed.

    Args:
        plan: A JSON file, or a Python file that defines `plan`.
        change: Fields of the plan to change, such as batch=16 or layout.fsdp=8.
        target: A TPU slice such as v5e:4x4 to compile every program for, with the real TPU compiler.
        devices: The number of devices to lay the plan out on, without a target.
    """
    _allow(allow)
    if target is not None:
        from growjax.forecast.pod import prepare

        # Before any other use of JAX, which would look for a TPU
        prepare(target)

    from rich.console import Console

    from growjax.train.commands import show_plan
    from growjax.train.planfile import read_plan

    show_plan(read_plan(plan, change), target=target, devices=devices, console=Console())


@app.command
def calibrate(
    plans: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    name: str | None = None,
    warmup: int = 50,
    steps: int = 1000,
    blocks: int = 20,
    cache: Path = Path("runs/cache"),
    allow: Allow = (),
) -> None:
    """Measure the time of every operation of some plans on this machine, and write the clock as JSON.

    Plans that name data are measured on them as well; waiting for data is reported, but not charged.

    Args:
        plans: JSON files, or Python files that define `plan`.
        out: The file to write; it must not exist.
        name: The name of the clock; by default that of the file.
        warmup: Steps of each operation before the measurement.
        steps: Steps of each operation that are measured.
        blocks: The number of blocks of steps; the device is waited for at the end of each.
        cache: The folder for tokenised data.
    """
    _allow(allow)
    from rich.console import Console

    from growjax.train.commands import calibrate_plans

    sizes = {"warmup": warmup, "steps": steps, "blocks": blocks}
    calibrate_plans(plans, out, name=name, console=Console(), cache=cache, **sizes)


@app.command
def grow(
    out: Path,
    to: dict[str, int] = {},  # noqa: B006 (never changed; tyro shows it)
    checkpoint: tyro.conf.Positional[Path | None] = None,
    from_hf: Path | None = None,
    by: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    allow: Allow = (),
) -> None:
    """Grow a checkpoint, with its optimizer state, into a new one, and print its certificate.

    Args:
        to: Axes and the sizes to reach, such as: --to mlp 2048 embed 384.
        out: The folder to write; it must not exist.
        checkpoint: The folder of a run (its last checkpoint) or of one checkpoint.
        from_hf: A Hugging Face folder to grow instead, into another one.
        by: Operators joined by +: msg, copy, zeros for widths, stack or expand for layers. By default
            msg, and copy for a Hugging Face folder, which cannot hold gates. Or, without --to, one
            operator with all its options: "copy(mlp=2048, shares=equal)", or several:
            "chain(copy(mlp=9), stack(layers=(0, 1, 1), branch=zero))".
        dtype: The dtype to write to a Hugging Face folder. By default that of the source, and float32 if
            that has 16 bits.
        seed: The seed of the random draws.
    """
    _allow(allow)
    if dtype is not None and from_hf is None:
        raise GrowjaxError("dtype: only with --from-hf; a checkpoint of ours keeps its own")
    if (checkpoint is None) == (from_hf is None):
        raise GrowjaxError("grow: expected one of CHECKPOINT and --from-hf")
    if from_hf is not None:
        from growjax.train.commands import grow_pretrained

        print(grow_pretrained(by or "copy", to, from_hf, out, seed=seed, dtype=dtype))
        return
    assert checkpoint is not None
    from growjax.runs.checkpoint import read_lineage
    from growjax.runs.lineage import model_of
    from growjax.runs.run import checkpoint_in
    from growjax.train.commands import grow_checkpoint, operator_of

    checkpoint = checkpoint_in(checkpoint)
    op = operator_of(by or "msg", to, model_of(read_lineage(checkpoint)))
    print(grow_checkpoint(op, checkpoint, out, seed=seed))


@app.command
def certify(
    checkpoint: tyro.conf.Positional[Path],
    to: dict[str, int] = {},  # noqa: B006 (never changed; tyro shows it)
    by: str = "msg",
    seed: int = 0,
    allow: Allow = (),
) -> None:
    """Print the certificate of growing a checkpoint, without writing anything.

    Args:
        checkpoint: The folder of a run (its last checkpoint) or of one checkpoint.
        to: Axes and the sizes to reach, such as: --to mlp 2048 embed 384.
        by: Operators joined by +: msg, copy, zeros for widths, stack for layers; or, without --to, one
            operator with all its options, as for grow.
        seed: The seed of the random draws.
    """
    _allow(allow)
    from growjax.gates import ungated
    from growjax.runs.lineage import load_model
    from growjax.train.commands import certify_model, operator_of

    model = ungated(load_model(checkpoint)[0])
    certificate = certify_model(operator_of(by, to, model), model, seed=seed)
    print(certificate)
    if not certificate.passed:
        sys.exit(1)


@app.command
def inspect(path: tyro.conf.Positional[Path], allow: Allow = ()) -> None:
    """Print the lineage of a checkpoint (of a run, its last one) and its arrays.

    Args:
        path: The folder of a checkpoint or of a run.
    """
    _allow(allow)
    from rich.console import Console

    from growjax.train.commands import describe

    describe(path, Console())


@app.command(name="eval")
def evaluate(
    checkpoint: tyro.conf.Positional[Path | None] = None,
    tasks: tuple[str, ...] = (),
    data: Path | None = None,
    text: tuple[Path, ...] = (),
    tokenizer: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    longest: int | None = None,
    seed: int = 0,
    seeds: int = 5,
    rate: float = 5e-5,
    batch: int = 32,
    epochs: int | None = None,
    length: int = 128,
    include: Path | None = None,
    out: Path = Path("eval.json"),
    allow: Allow = (),
) -> None:
    """Score a checkpoint on some tasks, print a table and write the numbers as JSON.

    Args:
        checkpoint: The folder of a run, of one checkpoint, or of a Hugging Face model.
        tasks: Names of tasks; `growjax eval --tasks` lists them. Any other name is one of lm-eval. \
            A number of examples to show may follow it, as in qa/nq_open@5.
        data: The folder with glue, superglue, squad, blimp and qa in it.
        text: Files of text for bpb.
        tokenizer: "bytes" or a file; by default the one that the model was trained with.
        shots: The number of solved examples to show before a question.
        limit: The most pairs, problems or questions of a task to use.
        longest: The most tokens to read at once, for models without a limit of their own.
        seed: The seed of problems, masks and examples.
        seeds: The number of times to fine-tune, with seeds 0, 1, ...
        rate: The highest learning rate of fine-tuning.
        batch: Examples a step of fine-tuning.
        epochs: Epochs of fine-tuning; by default 3, or 5 below 10,000 examples.
        length: The longest input of fine-tuning, in tokens.
        include: A folder of task definitions for lm-eval.
        out: The file to write; it must not exist.
    """
    _allow(allow)
    from rich.console import Console

    from growjax.evals import Recipe, Settings
    from growjax.evals.commands import eval_checkpoint, list_tasks

    if not tasks:
        list_tasks(Console())
        return
    if checkpoint is None:
        raise GrowjaxError(
            "eval: expected CHECKPOINT, a run, one checkpoint or a Hugging Face folder"
        )
    settings = Settings(
        data=data,
        texts=text,
        shots=shots,
        limit=limit,
        seed=seed,
        recipe=Recipe(batch=batch, rate=rate, epochs=epochs, length=length),
        seeds=tuple(range(seeds)),
        longest=longest,
        include=include,
    )
    eval_checkpoint(checkpoint, tasks, settings, tokenizer=tokenizer, out=out, console=Console())


@app.command
def sweep(
    plan: tyro.conf.Positional[Path],
    over: tuple[str, ...],
    run: Path,
    out: Path | None = None,
    margin: float | None = None,
    evaluations: int = 20,
    held_out: int = 256,
    held_out_end: int = 4096,
    allow: Allow = (),
    programs: str = "",
) -> None:
    """Train a plan with every combination of some values of its fields, and compare their losses.

    If it is stopped, the same command goes on. Exit statuses are those of `train`.

    Args:
        plan: A JSON file, or a Python file that defines `plan`.
        over: Fields and their values, such as rate.peak=1e-3,2e-3 seed=0,1,2,3,4,5.
        run: The folder of the runs, each of which is named after its values.
        out: The page to write; by default sweep.html in that folder.
        margin: A difference that counts as none, in nats, chosen before the runs.
        evaluations: The number of evaluations of each run on held-out text, at equal distances in cost.
        held_out: The number of held-out windows in each evaluation; always the same ones.
        held_out_end: The number of windows that the finished models are evaluated on; 0 for none.
        programs: The folder for compiled programs; see `train`.
    """
    _allow(allow)
    from growjax import parallel

    parallel.keep_programs(run / "cache" / "programs", programs)
    from rich.console import Console

    from growjax.report import sweep as swept
    from growjax.train import Options

    status, _ = swept.sweep(
        plan,
        over,
        run,
        Options(held_out=held_out, held_out_end=held_out_end),
        evaluations=evaluations,
        out=out,
        margin=margin,
        console=Console(),
    )
    if status:
        _leave(status)


@app.command
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
    _allow(allow)
    from rich.console import Console

    from growjax.report.compared import compare_runs

    compare_runs(runs, out=out, baseline=baseline, margin=margin, console=Console())


@app.command
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
    _allow(allow)
    from growjax.report.runs import write_report

    print(write_report(runs, out))


def _allow(packages: tuple[str, ...]) -> None:
    """Let files import these packages, installed or in the current folder."""
    from growjax import values

    if packages:
        sys.path.append(str(Path.cwd()))
        values.allow(*packages)


def main() -> None:
    """Run one command; an error of growjax is printed as a message, without a traceback."""
    if sys.argv[1:] == ["--version"]:
        print(f"growjax {__version__}")
        return
    try:
        app.cli(
            prog="growjax",
            description="Grow Transformers while they train. `growjax --version` prints the version.",
        )
    except GrowjaxError as error:
        sys.exit(f"growjax: {error}")
    except KeyboardInterrupt:
        print("growjax: interrupted; all that was saved remains", file=sys.stderr)
        _leave(130)


def _leave(status: int) -> None:
    """Exit at once, without waiting for threads, one of which may still compile a program."""
    # `os._exit` does not flush
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
