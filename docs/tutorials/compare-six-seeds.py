# %% [markdown]
# # Compare six seeds
#
# Is it better to grow? Two arms of one cost, six seeds each. Runs of one seed share their data and the parameters that
# they are born with, so their difference varies less than either. The protocol, clocks and frontiers are on
# [comparing runs](../comparing.md).

# %%
import dataclasses
import pydoc_data.topics

import matplotlib.pyplot as plt
import numpy as np

import growjax as gj
from growjax.budget import Outcome, compare
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.train import CorpusFeed, Options, Plan, Schedule, Stage, train

topics, tokenizer = list(pydoc_data.topics.topics.values()), ByteTokenizer()
text = Corpus.of(topics[8:], tokenizer), Corpus.of(topics[:8], tokenizer)
LENGTH, BUDGET, SEEDS = 16, 1e9, 6


def arm(name, model, *stages):
    objective, rate = Causal(LENGTH, packing="concat"), Schedule(1e-2, warmup=0.05)
    return Plan(name, model, stages, batch=8, objective=objective, rate=rate, budget=BUDGET)


size = dict(layers=2, embed=16, heads=2, head_dim=8, vocab=384, positions=LENGTH, bias=False)
arms = [
    arm("whole", gj.models.GPTConfig(mlp=64, **size), Stage(share=1.0)),
    arm(
        "grown",
        gj.models.GPTConfig(mlp=16, **size),
        Stage(share=0.5),
        Stage(share=0.5, grow=gj.msg(mlp=64), ramp=10),
    ),
]

# %% [markdown]
# ## Twelve runs
#
# `cache` lets runs share compiled programs, so that ten of the twelve compile nothing. `End.held_out` has the loss of
# every held-out window; with `windows` the comparison pairs these, too.

# %%
outcomes, cache = [], {}
for seed in range(SEEDS):
    for each in arms:
        run = dataclasses.replace(each, seed=seed)
        options = Options(held_out=32, held_out_end=64)
        *_, end = train(run, CorpusFeed(run, *text), options=options, cache=cache)
        windows = np.stack([end.held_out.sums, end.held_out.weights], axis=1)
        outcomes.append(
            Outcome(
                run.name,
                seed,
                budget=BUDGET,
                clock=run.clock.identity,
                spent=run.cost,
                score=end.held_out.loss,
                decayed=True,
                windows=windows,
            )
        )

(row,) = compare(outcomes, "whole")
print(row, "over", row.over)

# %% [markdown]
# Six is the fewest with which a verdict can be reached: with five, the p of a sign-flip test is at least 0.0625. An
# interval over windows *and* seeds counts how the result would vary with the text as well.

# %%
scores = {each.name: np.array([o.score for o in outcomes if o.arm == each.name]) for each in arms}
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
left.plot([0, 1], [scores["whole"], scores["grown"]], "o-", color="C0", alpha=0.6)
left.set(xticks=[0, 1], xticklabels=["whole", "grown"], xlim=(-0.3, 1.3), ylabel="held-out loss")
differences = scores["grown"] - scores["whole"]
right.axhline(0, color="0.6", linewidth=1)
right.plot(range(SEEDS), differences, "o", color="C1")
right.axhspan(*row.interval, color="C1", alpha=0.15)
right.set(xlabel="seed", ylabel="grown - whole", xticks=range(SEEDS))
plt.show()

# %% [markdown]
# Each line on the left is a seed; the band on the right is the interval. From a shell, `growjax compare runs/*` does this
# for runs in folders, with a report.
