# %% [markdown]
# # Grow a GPT in mid-training
#
# Two plans of one cost: a GPT that has its full size from the start, and one that begins at a quarter of it and
# grows twice, in width behind gates and then in depth. Both train on the help topics that come with Python.

# %%
import pydoc_data.topics

import matplotlib.pyplot as plt

import growjax as gj
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.train import CorpusFeed, End, Growth, Options, Plan, Schedule, Stage, Step, train

topics, tokenizer = list(pydoc_data.topics.topics.values()), ByteTokenizer()
text = (
    Corpus.of(topics[8:], tokenizer),
    Corpus.of(topics[:8], tokenizer),
)  # to train on, and held out

# %% [markdown]
# ## Two plans
#
# A plan is data. It is checked when it is made, to the last stage, and costs are known before anything is computed.
# The small model gets two fifths of the budget. `ramp` opens the gates of new hidden units over 10 steps, so that
# growth changes no output; the copied layers are closed until training opens them.

# %%
LENGTH, BUDGET = 32, 3e10  # tokens of a sequence; FLOPs of a run


def plan(name, model, *stages):
    return Plan(
        name,
        model,
        stages,
        batch=16,
        objective=Causal(LENGTH, packing="concat"),
        rate=Schedule(1e-2, warmup=0.05),
        budget=BUDGET,
    )


small = gj.models.GPTConfig(
    layers=2, embed=32, heads=2, head_dim=16, mlp=32, vocab=384, positions=LENGTH, bias=False
)
large = gj.models.GPTConfig(
    layers=4, embed=32, heads=4, head_dim=16, mlp=128, vocab=384, positions=LENGTH, bias=False
)
plans = [
    plan("whole", large, Stage("large", share=1.0)),
    plan(
        "grown",
        small,
        Stage("small", share=0.4),
        Stage("wide", share=0.2, grow=gj.msg(mlp=128, heads=4), ramp=10),
        Stage("deep", share=0.4, grow=gj.stack(layers=4, branch="zero")),
    ),
]
for each in plans:
    print(each.name, [span.steps for span in each.spans], f"{each.cost:.2g} FLOPs")

# %% [markdown]
# ## Train
#
# `train` yields a record for every step and growth. With `run="runs/grown"` it would also save checkpoints, and the same
# call would go on after a kill; here nothing is saved.

# %%
records = {}
for each in plans:
    options = Options(evaluate_every=each.cost / 10, held_out=32, held_out_end=128)
    records[each.name] = list(train(each, CorpusFeed(each, *text), options=options))

for name, rows in records.items():
    for row in rows:
        if isinstance(row, Growth):
            c = row.crossing
            print(f"{name}, step {row.step}: {row.grew}, loss {c.before:.4f} to {c.after:.4f}")
        if isinstance(row, End):
            print(f"{name}: held-out loss {row.held_out.loss:.3f}")

# %% [markdown]
# ## Look

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, rows in records.items():
    marks = [(row.spent, row.held_out) for row in rows if isinstance(row, Step) and row.held_out]
    axes.plot(*zip(*marks), marker="o", markersize=3, label=name)
for row in records["grown"]:
    if isinstance(row, Growth):
        axes.axvline(row.flops, color="0.6", linewidth=1, linestyle=":")
        axes.annotate(
            ", ".join(row.grew), (row.flops, axes.get_ylim()[1]), rotation=90, va="top", ha="right"
        )
axes.set(xlabel="FLOPs", ylabel="held-out loss, nats a byte")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Small models learn faster for the same FLOPs at the beginning. Whether the lead lasts is a matter of the budget, and
# one run of each proves nothing: [compare six seeds](compare-six-seeds.py). The same from a shell, with checkpoints and
# reports, is on the page about [training](../training.md); in a loop of your own, in
# [your own loop](../own-loop.md).
