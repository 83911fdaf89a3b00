# %% [markdown]
# # A pod without a pod
#
# A plan can be tried on eight devices without having any: XLA makes them from one CPU. What splits parameters, gathers
# them and grows them in place is what runs on a pod. This has to be said before JAX is imported; `PJRT_NPROC` gives
# devices that wait for each other a thread each.

# %%
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "32"}

import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np

import growjax as gj
from growjax import parallel
from growjax.data import ByteTokenizer, Causal, Corpus
from growjax.train import CorpusFeed, Layout, Options, Plan, Schedule, Stage, Step, train

print(f"{parallel.self_test()} devices add up their ones")

# %% [markdown]
# ## One plan, two layouts
#
# `fsdp` devices share parameters, gradients and moments, and gather each layer as it runs; `tensor` devices share the
# heads and units of a layer. Growth happens where the arrays are.

# %%
LENGTH = 16
model = gj.models.GPTConfig(
    layers=2, embed=32, heads=4, head_dim=8, mlp=64, vocab=384, positions=LENGTH, bias=False
)
plan = Plan(
    "pod",
    model,
    (
        Stage("small", tokens=6 * 16 * LENGTH),
        Stage("wide", tokens=6 * 16 * LENGTH, grow=gj.msg(mlp=128, heads=8), ramp=4),
    ),
    batch=16,
    objective=Causal(LENGTH, packing="concat"),
    rate=Schedule(1e-2),
)
layouts = {"one device": Layout(), "fsdp=4, tensor=2": Layout(fsdp=4, tensor=2)}
corpus = Corpus.of([f"{n} and {n * n} make {n + n * n}. " * 4 for n in range(400)], ByteTokenizer())

losses, share = {}, {}
for name, layout in layouts.items():
    run = dataclasses.replace(plan, layout=layout)
    devices = jax.devices()[: 1 if name == "one device" else 8]
    options = Options(held_out=8, held_out_end=0)
    records = train(run, CorpusFeed(run, corpus, corpus), options=options, devices=devices)
    losses[name] = [row.loss for row in records if isinstance(row, Step)]
    born, mesh = run.spans[-1].model, layout.mesh(devices)
    share[name] = parallel.per_device_bytes(born, parallel.model_shardings(born, mesh))

for name, values in losses.items():
    print(
        f"{name:18}",
        *(f"{loss:.4f}" for loss in values[::3]),
        f"{share[name] / 1024:.0f} KiB a device",
    )
assert np.allclose(*losses.values(), atol=3e-5)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
    left.plot(values, style, linewidth=2, label=name)
left.axvline(6, color="0.6", linewidth=1)
left.set(xlabel="step", ylabel="loss")
left.legend(frameon=False)
right.bar(list(share), [size / 1024 for size in share.values()], color=["C0", "C1"])
right.set(ylabel="KiB of parameters a device")
right.tick_params(axis="x", labelsize="small")
plt.show()

# %% [markdown]
# The losses are one line, through the growth as well. Two processes on one machine, as two hosts, are
# `GROWJAX_PROCESSES=2` with `GROWJAX_COORDINATOR` and `GROWJAX_PROCESS`; and `growjax plan plan.py --target v5e:16x16`
# compiles every program of a plan for a real slice, without one ([on TPUs](../tpu.md)).
