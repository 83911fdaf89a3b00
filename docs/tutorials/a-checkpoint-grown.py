# %% [markdown]
# # A Hugging Face checkpoint, grown and trained on
#
# From a folder of safetensors to a larger one: read, grow without a change of the outputs, train on text of your own,
# write. The commands for the same, with a tokenizer, and how `transformers` reads the result are on
# [from a checkpoint to a checkpoint](../pretrained.md); growjax downloads nothing, so this page makes a small Llama
# for itself, in place of `hf download`.

# %%
import pydoc_data.topics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import growjax as gj
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.train import CorpusFeed, Growth, Options, Plan, Schedule, Stage, Start, Step, train

folder, LENGTH = Path(tempfile.mkdtemp()), 32
config = gj.models.LlamaConfig(
    layers=2, embed=32, heads=2, kv_heads=1, head_dim=16, mlp=48, vocab=384
)
gj.hf.save(gj.models.Llama(config, key=jax.random.key(0)), folder / "checkpoint")
sorted(path.name for path in (folder / "checkpoint").iterdir())

# %% [markdown]
# ## A plan that starts from the folder
#
# `hf.config` reads the configuration alone, and `Start` the weights. The first stage trains the checkpoint as it is, the
# second one grows it by copies with random shares, and by copied layers between the old ones that are closed at first.

# %%
grow = gj.chain(gj.copy(mlp=96, shares="random"), gj.stack(layers=4, order="insert", branch="zero"))
plan = Plan(
    "more",
    model=gj.hf.config(folder / "checkpoint"),
    start=Start(str(folder / "checkpoint")),
    stages=(Stage("as it is", tokens=40 * 256), Stage("grown", tokens=40 * 256, grow=grow)),
    batch=8,
    objective=Causal(LENGTH, packing="concat"),
    rate=Schedule(1e-2, warmup=0.05),
)
topics, tokenizer = list(pydoc_data.topics.topics.values()), ByteTokenizer()
text = Corpus.of(topics[8:], tokenizer), Corpus.of(topics[:8], tokenizer)
options = Options(evaluate_every=plan.cost / 8, held_out=32, held_out_end=0)
records = list(train(plan, CorpusFeed(plan, *text), options=options))

(growth,) = [row for row in records if isinstance(row, Growth)]
print(growth.grew, f"loss {growth.crossing.before:.5f} to {growth.crossing.after:.5f}")

# %% [markdown]
# ## Back to a folder
#
# `source=` keeps the family and the files that came with it. What is read again is the trained model, bit by bit.

# %%
model = records[-1].model
gj.hf.save(model, folder / "grown", source=folder / "checkpoint")
again = gj.hf.load(folder / "grown")
tokens = jnp.asarray(tokenizer.encode("A tree grows in layers."))
outputs = jax.jit(lambda model, tokens: model(tokens))
assert jnp.array_equal(outputs(again, tokens), outputs(model, tokens))
print(gj.sizes(again))

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
steps = [row for row in records if isinstance(row, Step)]
axes.plot([row.loss for row in steps], linewidth=1, label="training")
marks = [(row.step, row.held_out) for row in steps if row.held_out]
axes.plot(*zip(*marks), "o-", markersize=3, label="held out")
axes.axvline(growth.step, color="0.6", linewidth=1, linestyle=":")
axes.text(growth.step + 1, max(row.loss for row in steps), "grown", va="top")
axes.set(xlabel="step", ylabel="loss, nats a byte")
axes.legend(frameon=False)
plt.show()
