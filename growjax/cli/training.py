"""Commands that train: demo, prepare, train, choose, plan, calibrate, sweep."""

from pathlib import Path

import tyro

from growjax.cli.allowed import Allow, allow_packages, prepare_process


# Each command imports its modules inside its body, so that `--help` is fast.


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
) -> int:
    """Run a plan, or resume it: the same command goes on from the last checkpoint.

    On Ctrl-C, on SIGTERM and when its terminal is closed, the run finishes its step, saves and ends; on a
    second signal it ends at once. Exit statuses: 0 the plan ended, 75 it was stopped (the same command
    goes on), 130 by Ctrl-C, 1 an error.

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
    prepare_process(allow, run.parent, programs, hosts)
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
    return train_plans(
        read,
        run,
        options,
        fork=fork,
        evaluations=evaluations,
        reference=second,
        trackers=tracker,
        console=console,
    )


def prepare(
    data: tyro.conf.Positional[tuple[str, ...]] = (),
    plan: Path | None = None,
    cache: Path = Path("runs/cache"),
    tokenizer: str = "bytes",
    validation: str | None = None,
    held_out: int = 20,
    split: str | None = None,
    field: str | None = None,
    allow: Allow = (),
) -> None:
    """Tokenise text once, into a cache that runs share, and print how a plan names it.

    `train` does the same when it starts, if it was not done before. With a cache that was prepared
    elsewhere and copied, a run needs no text at all.

    Args:
        data: A file, a folder, a pattern in quotes such as "books/*.txt.gz", or a URL (gs://, s3://,
            hf://). Text, JSONL or Parquet by the names of the files.
        plan: A plan whose data, validation and tokenizer to prepare, instead of DATA.
        cache: The folder to write to. `train --run runs/NAME` looks into runs/cache.
        tokenizer: "bytes", or the path of a file of the library tokenizers.
        validation: The text to hold out, given as DATA is; all of DATA is trained on then.
        held_out: One document in so many is held out, unless there is --validation.
        split: The text between two documents of a file; by default a file is one document.
        field: The field or column of the text in JSONL and Parquet; by default text.
    """
    allow_packages(allow)
    from growjax.errors import DataError

    if len(data) + (plan is not None) != 1:
        raise DataError(
            "prepare: expected one of DATA and --plan; several files are a pattern in quotes, such as "
            "'books/*.txt'"
        )

    from rich.console import Console

    from growjax.train.planfile import read_plan
    from growjax.train.preparing import prepare_paths, prepare_plan

    console = Console()
    if plan is not None:
        prepare_plan(read_plan(plan), cache, console)
        return
    # The escapes of a shell's string, which "\\n" is easiest to write in
    cut = None if split is None else split.replace("\\n", "\n").replace("\\t", "\t")
    prepare_paths(
        data[0],
        cache,
        tokenizer=tokenizer,
        validation=validation,
        held_out=held_out,
        split=cut,
        field=field,
        console=console,
    )


def choose(
    probe: tyro.conf.Positional[Path],
    run: Path,
    only: bool = False,
    evaluations: int = 20,
    held_out: int = 256,
    held_out_end: int = 4096,
    hosts: bool = False,
    allow: Allow = (),
    programs: str = "",
) -> int:
    """Try each candidate of a probe for some steps, keep the best, and train it to the end.

    If it is stopped, the same command goes on. Exit statuses are those of `train`.

    Args:
        probe: A JSON file, or a Python file that defines `probe`, a growjax.train.Probe.
        run: The folder of the candidates' runs, 0, 1, ..., and of the decision.
        only: Stop after the decision; `train` goes on with the run that was kept.
        evaluations: The number of evaluations on held-out text, at equal distances in cost.
        held_out: The number of held-out windows in each evaluation, and of the decision.
        held_out_end: The number of windows that the finished model is evaluated on; 0 for none.
        hosts: Join the other hosts of a pod first.
        programs: The folder for compiled programs; see `train`.
    """
    prepare_process(allow, run, programs, hosts)
    from rich.console import Console

    from growjax.train import Options
    from growjax.train.commands import choose_and_train
    from growjax.train.planfile import read_probe

    options = Options(held_out=held_out, held_out_end=held_out_end)
    return choose_and_train(
        read_probe(probe), run, options, evaluations=evaluations, only=only, console=Console()
    )


def plan(
    plan: tyro.conf.Positional[Path],
    change: tuple[str, ...] = (),
    target: str | None = None,
    devices: int | None = None,
    kind: str | None = None,
    out: Path | None = None,
    allow: Allow = (),
) -> None:
    """Print the stages of a plan, their cost and memory, and all faults; nothing is computed.

    Args:
        plan: A JSON file, or a Python file that defines `plan`.
        change: Fields of the plan to change, such as batch=16 or layout.fsdp=8.
        target: TPUs to compile every program for, with their real compiler: a slice such as v5e:4x4, or
            several such as 2xv5e:4x4.
        devices: The number of devices to lay the plan out on, without a target.
        kind: A kind of device, such as v5p or h100, to print the least time that the plan takes there.
        out: A file to write the plan to as JSON, changes included, for machines without the Python file.
    """
    allow_packages(allow)
    if target is not None:
        from growjax.forecast.pod import prepare

        # Before any other use of JAX, which would look for a TPU
        prepare(target)

    from rich.console import Console

    from growjax.plan.files import save_plan
    from growjax.train.commands import show_plan
    from growjax.train.planfile import read_plan

    console, read = Console(), read_plan(plan, change)
    show_plan(read, target=target, devices=devices, kind=kind, console=console)
    if out is not None:
        # Only a plan that can run
        save_plan(read, out)
        console.print(f"written to {out}", markup=False)


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
    allow_packages(allow)
    from rich.console import Console

    from growjax.train.commands import calibrate_plans

    sizes = {"warmup": warmup, "steps": steps, "blocks": blocks}
    calibrate_plans(plans, out, name=name, console=Console(), cache=cache, **sizes)


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
) -> int:
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
    prepare_process(allow, run, programs)
    from rich.console import Console

    from growjax.report import sweep as swept
    from growjax.train import Options

    return swept.sweep(
        plan,
        over,
        run,
        Options(held_out=held_out, held_out_end=held_out_end),
        evaluations=evaluations,
        out=out,
        margin=margin,
        console=Console(),
    )[0]
