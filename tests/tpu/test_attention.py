"""Splash attention compiled by the TPU compiler: chosen for the target, under every layout, and its gain.

The deep profile compiles models of the sizes that people train: GROWJAX_PROFILE=deep make test-tpu.
"""

import dataclasses
from typing import Any

import pytest

from growjax.data import MLM, UL2, Causal, PrefixLM
from growjax.forecast.dryrun import dry_run
from growjax.forecast.pod import Compiled, compile_for
from growjax.forecast.speed import Pace
from growjax.models import BERTConfig, GPTConfig, LlamaConfig, T5Config
from growjax.train import Layout, Plan, Schedule, Stage
from tests.conftest import DEEP


deep = pytest.mark.skipif(not DEEP, reason="minutes: the deep profile runs it")
SIZES: dict[str, Any] = {
    "layers": 2,
    "embed": 128,
    "heads": 4,
    "head_dim": 64,
    "mlp": 256,
    "vocab": 512,
    "dtype": "bfloat16",
}
GPT = GPTConfig(**SIZES, positions=512)
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {"layout": Layout()},
    "shared": {"layout": Layout(fsdp=4)},
    "tensor": {"layout": Layout(tensor=2)},
    "shared tensor in parts": {"layout": Layout(fsdp=2, tensor=2), "accumulate": 2},
    "own paths": {"layout": Layout(step="shard_map")},
}


def compiled(
    target: str, model: Any, objective: Any, *, batch: int = 8, **fields: Any
) -> tuple[Compiled, Pace | None]:
    """The training step of a plan of one stage, and its pace, if the compiler's cycles can be counted."""
    of = Plan(
        "attention",
        model=model,
        batch=batch,
        objective=objective,
        rate=Schedule(1e-3),
        stages=(Stage("only", tokens=1),),
        **fields,
    )
    forecast = compile_for(of, target)
    assert forecast.refusals == ()
    (step,) = [p for p in forecast.programs if p.name == "step"]
    return step, next(iter(forecast.paces), None)


QUICK = ("shared tensor in parts", "own paths")


@pytest.mark.parametrize(
    "layout",
    [
        # The oldest JAX runs this one alone in CI
        pytest.param(n, marks=[pytest.mark.sample] if n == "shared tensor in parts" else [])
        for n in LAYOUTS
        if DEEP or n in QUICK
    ],
)
def test_the_kernel_is_split_by_every_layout(layout):
    """Over replicas, shared state and heads: nothing is gathered or sent for it."""
    model = dataclasses.replace(GPT, kv_heads=2, position="rotary")
    objective = PrefixLM(512) if LAYOUTS[layout]["layout"].tensor > 1 else Causal(512)
    step, _ = compiled("v5e:2x2", model, objective, **LAYOUTS[layout])
    assert step.cycles is not None and step.cycles.kernels > 0
    assert not any(step.collectives[k] for k in ("all-to-all", "collective-permute"))


WIDE: dict[str, Any] = SIZES | {"heads": 2, "head_dim": 128}
PARTS: dict[str, Any] = {name: size for name, size in SIZES.items() if name != "layers"}
MODELS = {
    "prefix": (GPT, PrefixLM(512), True),
    "BERT": (BERTConfig(**SIZES, positions=512), MLM(512), True),
    "Llama of 128": (
        LlamaConfig(**WIDE, kv_heads=1),
        Causal(512, packing="concat"),
        True,
    ),
    "QK-norm": (dataclasses.replace(GPT, qk_norm=True), Causal(512), True),
    "T5": (  # whose attention to memory adds no bias
        T5Config(
            encoder_layers=1,
            decoder_layers=1,
            **PARTS,
        ),
        UL2(512),
        True,
    ),
    "forbidden": (dataclasses.replace(GPT, attention="blockwise"), Causal(512), False),
    "short": (GPT, Causal(128), False),
}


@deep
@pytest.mark.parametrize("name", list(MODELS))
def test_who_takes_the_kernel_on_a_target(name):
    model, objective, expected = MODELS[name]
    step, pace = compiled("v5e:2x2", model, objective)
    if model.attention == "blockwise":
        assert step.cycles is None and pace is None, "its loops depend on the tile"
    else:
        assert step.cycles is not None and (step.cycles.kernels > 0) == expected


def test_a_long_sequence_takes_little_memory():
    """One of 2,048 tokens a chip, whose scores take 64 MiB, and as much again in each direction."""
    model = dataclasses.replace(GPT, positions=2048, layers=1)
    step, pace = compiled("v5e:2x2", model, Causal(2048, packing="concat"), batch=4)
    assert step.temporaries is not None and step.temporaries < 48 << 20, step.temporaries
    assert pace is not None and 0 < pace.mfu < 1
    assert pace.tokens_per_second == pytest.approx(4 * 2048 / pace.step)


@deep
@pytest.mark.parametrize("objective", [Causal(8192), PrefixLM(8192)], ids=["causal", "prefix"])
def test_a_sequence_that_chips_share(objective):
    """One of 8,192 tokens: the kernel on each chip's queries, and a part of the memory of one chip."""
    model = dataclasses.replace(GPT, positions=8192, kv_heads=2, position="rotary")
    memory = {}
    for layout, batch in (
        (Layout(fsdp=4), 4),
        (Layout(context=4), 1),
        (Layout(context=2, tensor=2), 1),
    ):
        step, _ = compiled("v5e:2x2", model, objective, batch=batch, layout=layout)
        assert step.cycles is not None and step.cycles.kernels > 0
        assert step.collectives["all-to-all"] == 0
        memory[layout] = step.temporaries or 0
    whole, *parts = memory.values()
    assert max(parts) < 0.6 * whole, memory


@deep
def test_what_is_kept_for_the_backward_pass():
    """The names of `Layout.remat`, by the compiler: memory, and how often attention's kernel runs."""
    programs = {}
    for remat in ("none", "dots", "full", "offload"):
        model = dataclasses.replace(GPT, layers=4)
        programs[remat], _ = compiled(
            "v5e:2x2", model, Causal(512), batch=64, layout=Layout(remat=remat)
        )
    memory = {name: step.temporaries or 0 for name, step in programs.items()}
    assert memory["full"] < 0.9 * memory["dots"] < 0.8 * memory["none"], memory
    assert memory["offload"] < 0.9 * memory["dots"], memory
    kernels = {name: step.cycles.kernels for name, step in programs.items() if step.cycles}
    assert kernels["none"] == kernels["dots"] < kernels["full"]  # the forward kernel runs again


@deep
def test_what_is_kept_in_the_host_s_memory():
    """Named tensors: a chip needs so much less, and the table says that it sends them."""
    model = dataclasses.replace(GPT, layers=4)
    names: Any = ("layer inputs", "attention inputs")
    layouts = {
        "device": Layout(remat="attention"),
        "tensors": Layout(remat="attention", offload=names),
    }
    programs = {}
    for name, layout in layouts.items():
        programs[name], _ = compiled("v5e:2x2", model, Causal(512), batch=64, layout=layout)
    memory = {name: step.memory for name, step in programs.items()}
    sent = {name: step.to_host for name, step in programs.items()}
    assert sent["device"] == 0 < sent["tensors"], sent
    # 16 sequences a chip of 4 layers: their inputs, and three times as much of queries, keys and values
    stream = 4 * 16 * 512 * 128 * 2
    assert memory["device"] - memory["tensors"] > 3 * stream, memory


def test_the_estimate_of_what_the_host_keeps_is_the_compiler_s():
    """Bytes of one chip, of a part of the names and of all."""
    model = dataclasses.replace(GPT, layers=4)
    # 16 sequences on a chip: of each of 4 layers its input, and its queries, keys and values
    stream = 4 * 16 * 512 * 128 * 2
    for count, names in ((1, ("layer inputs",)), (7, ("layer inputs", "attention inputs"))):
        fields: dict[str, Any] = {"batch": 64, "objective": Causal(512), "model": model}
        fields["layout"] = Layout(remat="attention", offload=names)  # type: ignore[arg-type]
        step, _ = compiled("v5e:2x2", **fields)
        of = Plan("offload", rate=Schedule(1e-3), stages=(Stage("only", tokens=1),), **fields)
        (facts,) = dry_run(of, devices=4).stages
        assert facts.host_bytes == step.host_memory == count * stream


# Of the sizes that people train ----------------------------------------------------------------------


GPT_350M = GPTConfig(
    layers=24,
    embed=1024,
    heads=16,
    head_dim=64,
    mlp=4096,
    vocab=50304,
    positions=1024,
    dtype="bfloat16",
)
LLAMA_1B = LlamaConfig(
    layers=16,
    embed=2048,
    heads=32,
    kv_heads=8,
    head_dim=64,
    mlp=8192,
    vocab=128256,
    dtype="bfloat16",
)


@deep
def test_a_350m_gpt_at_1024_tokens_on_v5p():
    """The compiler's estimate was an MFU of 0.245 with 10.06 GiB before attention was a kernel.

    It was 0.424 with 4.02 GiB before the residual stream was laid out by rows, the output of attention
    kept as its readers want it, and the statistics of norms kept.
    """
    layout = Layout(fsdp=4, remat="attention")
    objective = Causal(1024, packing="concat")
    step, pace = compiled("v5p:2x2x1", GPT_350M, objective, batch=32, layout=layout)
    assert pace is not None
    print(f"MFU {pace.mfu:.3f}, temporaries {(step.temporaries or 0) / 2**30:.2f} GiB")
    assert pace.mfu >= 0.45 and (step.temporaries or 0) < 4 << 30


@deep
def test_a_350m_gpt_at_8192_tokens_fits_a_v5e_chip():
    model = dataclasses.replace(GPT_350M, positions=8192)
    step, pace = compiled("v5e:2x2", model, Causal(8192, packing="concat"), batch=4)
    assert pace is not None
    print(f"MFU {pace.mfu:.3f}, memory {step.memory / 2**30:.2f} GiB")
    assert step.memory < 13 << 30 and pace.mfu >= 0.40


@deep
def test_a_1b_llama_at_4096_tokens_fits_without_accumulation():
    objective, layout = Causal(4096, packing="concat"), Layout(fsdp=16)
    step, pace = compiled("v5e:4x4", LLAMA_1B, objective, batch=16, layout=layout)
    assert pace is not None
    print(f"MFU {pace.mfu:.3f}, memory {step.memory / 2**30:.2f} GiB")
    assert step.memory < 10 << 30 and pace.mfu >= 0.34
