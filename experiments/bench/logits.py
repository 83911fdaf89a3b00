"""Memory of a training step and of an evaluation, with logits read in chunks and all at once.

A GPT of 350M parameters in bfloat16, 8 sequences of 1,024 tokens a device. Nothing runs: the programs are
compiled for this machine and, where the TPU compiler is installed, for four chips of a v5p. The
ratio is that of a step's temporaries on the first.
"""

import importlib.util

import jax

from experiments.bench.mfu import LARGE as MODEL
from growjax.data import Causal
from growjax.forecast.pod import compile_for
from growjax.nn import head
from growjax.plan.stages import Work
from growjax.programs.ahead import Need, lower
from growjax.programs.step import Programs
from growjax.train import Plan, Schedule, Stage


GOAL = 1.2
SLICE, CHIPS, ROWS, LENGTH = "v5p:2x2x1", 4, 8, 1024


def run() -> dict:
    """Compile both forms, one after the other; GiB by target, program and form."""
    memory: dict[str, dict[str, dict[str, float]]] = {}
    usual = head.LARGE
    for form, large in (("chunks", usual), ("whole", 2**62)):
        head.LARGE = large
        try:
            for target, programs in _compiled().items():
                for name, temporaries in programs.items():
                    cell = memory.setdefault(target, {}).setdefault(name, {})
                    cell[form] = round(temporaries / 2**30, 3)
        finally:
            head.LARGE = usual
    step = memory["cpu"]["step"]
    return {"ratio": round(step["whole"] / step["chunks"], 3), "goal": GOAL, "gib": memory}


def _plan(rows: int) -> Plan:
    return Plan(
        "logits",
        MODEL,
        (Stage(tokens=2 * rows * LENGTH),),
        batch=rows,
        objective=Causal(LENGTH, packing="concat"),
        rate=Schedule(1e-3),
    )


def _compiled() -> dict[str, dict[str, int]]:
    """Bytes of temporaries, by target and program."""
    plan = _plan(ROWS)
    mesh = plan.layout.mesh(jax.devices()[:1])
    programs = Programs.of(plan, mesh)
    needs: dict[str, Need] = {"step": ("step", 0, Work()), "evaluation": ("evaluate", 0, None)}
    temporaries: dict[str, dict[str, int]] = {"cpu": {}}
    for name, need in needs.items():
        analysis = lower(plan, programs, need).compile().memory_analysis()
        temporaries["cpu"][name] = analysis.temp_size_in_bytes
    if importlib.util.find_spec("libtpu"):
        compiled = compile_for(_plan(ROWS * CHIPS), SLICE).programs
        temporaries[SLICE] = {program.name: program.temporaries or 0 for program in compiled}
    return temporaries
