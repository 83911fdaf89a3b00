"""How long does training stand still when a model grows to 12 layers, in steps of the grown model?

The same plan twice: compiling ahead in the background, and compiling when a program is needed. The
first pays with slower steps while it compiles (on a CPU the cores are the same ones), which is printed.
"""

import statistics

import growjax as gj
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.models import GPTConfig
from growjax.train import CorpusFeed, Growth, Options, Plan, Schedule, Stage, Step, train


STEPS, BATCH, LENGTH = 80, 8, 128


def plan(seed: int) -> Plan:
    """6 layers, then 12: embed 256, 4 heads of 64, mlp 1024."""
    small = GPTConfig(
        layers=6, embed=256, heads=4, head_dim=64, mlp=1024, vocab=384, positions=LENGTH
    )
    tokens = BATCH * LENGTH
    return Plan(
        "stall",
        small,
        (
            Stage("6 layers", tokens=STEPS * tokens),
            Stage("12 layers", tokens=20 * tokens, grow=gj.stack(layers=12)),
        ),
        batch=BATCH,
        objective=Causal(LENGTH, packing="concat"),
        rate=Schedule(1e-3),
        seed=seed,
    )


def run() -> dict:
    """Run both and compare the time that they lost at the boundary."""
    text = [" ".join(str(n * n % 9973) for n in range(k, k + 400)) for k in range(0, 80_000, 400)]
    corpora = [Corpus.of(part, ByteTokenizer()) for part in (text[10:], text[:10])]
    stalls = {}
    for name, background in [("ahead", True), ("naive", False)]:
        # Another seed, so that nothing that one compiled is of use to the other
        p = plan(seed=int(background))
        options = Options(background=background, held_out=BATCH, held_out_end=0)
        records = list(train(p, CorpusFeed(p, *corpora), options=options))
        took = {
            s: [r.took for r in records if isinstance(r, Step) and r.stage == s] for s in (0, 1)
        }
        growth = next(r for r in records if isinstance(r, Growth))
        stalls[name] = {
            "stall_seconds": growth.stall,
            "step_seconds": statistics.median(took[1][5:]),
            "stall_in_steps": growth.stall / statistics.median(took[1][5:]),
            "compile_wait": growth.compile_wait,
            "grow_seconds": growth.crossing.grow_seconds,
            "certify_seconds": growth.crossing.certify_seconds,
            "early_step": statistics.median(took[0][5:25]),
            "late_step": statistics.median(took[0][-20:]),
            "seconds_of_stage": sum(took[0]),
        }
    ahead, naive = stalls["ahead"], stalls["naive"]
    for name, numbers in stalls.items():
        print(name, {k: round(v, 3) for k, v in numbers.items()})
    return {
        "ratio": round(ahead["stall_in_steps"], 3),
        "goal": 0.5,
        "unit": "steps of the 12-layer model",
        "naive": round(naive["stall_in_steps"], 1),
        "slowdown_while_compiling": round(ahead["early_step"] / naive["early_step"], 3),
        "details": {n: {k: round(v, 4) for k, v in d.items()} for n, d in stalls.items()},
    }
