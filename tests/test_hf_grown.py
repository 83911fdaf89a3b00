"""Grown models as stock Hugging Face folders: folded into plain weights, or refused with the reason."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growjax as gj
from growjax.axes import put
from growjax.certificate import distance
from growjax.cli import app
from growjax.errors import (
    CheckpointError,
    GateError,
    GrowjaxError,
    GrowthError,
    HuggingFaceError,
)
from growjax.hf.convert import with_dtype
from growjax.train.pretrained import grow_pretrained
from growjax.values import from_dict
from tests.folders import batch, build, outputs, rewritten


# Grown models ------------------------------------------------------------------------------------

GROWN: dict[str, tuple[str, Any]] = {
    "gpt2 wider": ("gpt2", gj.copy(embed=16, heads=4, mlp=9)),
    "gpt2 larger heads": ("gpt2", gj.copy(embed=16, head_dim=8)),
    "gpt2 more units": ("gpt2", gj.chain(gj.zeros(mlp=10), gj.stack(layers=4, branch="zero"))),
    "bert wider": ("bert", gj.copy(embed=16, heads=4, mlp=12)),
    "roberta classifier wider": ("roberta classifier", gj.copy(embed=16, heads=4, mlp=12)),
    "modernbert wider": ("modernbert", gj.chain(gj.copy(embed=16, heads=4), gj.zeros(mlp=9))),
    "modernbert deeper": ("modernbert", gj.stack(layers=4, branch="zero")),
    "t5 encoder wider": ("t5 encoder", gj.chain(gj.copy(heads=4), gj.zeros(embed=12, mlp=9))),
    "llama wider": ("llama", gj.zeros(embed=12, heads=4, mlp=9)),
    "llama copied": ("llama tied", gj.copy(embed=16, heads=8, kv_heads=4)),
    "gemma3 wider": ("gemma3", gj.copy(embed=16, heads=8, mlp=9)),
    "gemma3 deeper": ("gemma3", gj.stack(layers=6, order="insert", branch="zero")),
    "gpt_neox wider": ("gpt_neox", gj.copy(embed=16, heads=4)),
    "olmo2 wider": ("olmo2", gj.copy(embed=16, kv_heads=4, mlp=7)),
    "mixtral wider": (
        "mixtral",
        gj.chain(gj.copy(embed=16, mlp=9), gj.experts(6, gated=False, per_token="scaled")),
    ),
    "qwen3_moe wider": (
        "qwen3_moe",
        gj.chain(gj.copy(mlp=9, heads=8), gj.stack(layers=4, branch="zero")),
    ),
    "llama no head wider": ("llama no head", gj.copy(embed=16, heads=8)),
    "gpt2 tokens wider": ("gpt2 tokens", gj.copy(embed=16, heads=4, mlp=9)),
    "qwen2_moe wider": ("qwen2_moe", gj.copy(embed=16, heads=8, mlp=9, shared_mlp=8)),
    "llama deeper": ("llama", gj.stack(layers=5, branch="zero")),
    "t5 wider": ("t5", gj.copy(embed=16, head_dim=6, heads=4)),
    "gpt2 lemon": ("gpt2", gj.lemon(embed=12, heads=3, mlp=7)),
    "gpt2 more places": ("gpt2", gj.positions(21, how="tile")),
    "t5 padded": ("t5", gj.zeros(embed=12, mlp=9)),
    "t5 v1.1 wider": ("t5 v1.1", gj.chain(gj.copy(embed=16), gj.zeros(head_dim=5, heads=3))),
}


# One growth of each family, and of each operator, is in the rest
DEEP_ALONE = (
    "modernbert deeper",
    "gpt2 larger heads",
    "gemma3 deeper",
    "llama deeper",
    "t5 padded",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in DEEP_ALONE else []) for n in GROWN],
)
def test_a_grown_model_is_a_stock_one_with_the_function_of_the_small(name, tmp_path):
    family, op = GROWN[name]
    with jax.enable_x64(True):
        small = build(family, jnp.float64)
        big = gj.grow(op, small, key=jax.random.key(1))
        gj.hf.save(big, tmp_path / "big")
        again = gj.hf.load(tmp_path / "big")
        for model in (big, small):
            assert distance(outputs(model, batch(model)), outputs(again, batch(model)))[1] <= 1e-12


@pytest.mark.parametrize(
    "family, op",
    [
        ("gpt2", gj.vocabulary(19)),
        ("bert", gj.vocabulary(19)),
        ("t5", gj.vocabulary(19)),
        ("llama", gj.vocabulary(19)),
        ("llama", gj.growth.context(2, how="interpolate")),
        ("llama", gj.growth.context(2, how="ntk")),
        ("llama tied", gj.growth.context(2, length=64)),
        ("llama", gj.aki(mlp=9)),
    ],
    ids=lambda x: str(x),
)
def test_what_changes_the_function_is_written_with_the_function_that_it_has(family, op, tmp_path):
    with jax.enable_x64(True):
        big = gj.grow(op, build(family, jnp.float64), key=jax.random.key(1))
        gj.hf.save(big, tmp_path / "big")
        again = gj.hf.load(tmp_path / "big")
        assert gj.sizes(again) == gj.sizes(big)
        # Rotary frequencies are drawn anew from the written theta and scaling, in float32
        limit = 1e-6 if "context" in str(op) else 1e-12
        assert distance(outputs(big, batch(big)), outputs(again, batch(big)))[1] <= limit


def _steps(key, shape, dtype):
    """Something to fill new weights with that need not be drawn."""
    return jnp.sin(jnp.arange(np.prod(shape), dtype=dtype) + 1).reshape(shape)


def test_branch_multipliers_and_open_gates_are_folded(tmp_path):
    with jax.enable_x64(True):
        for name in ("gpt2", "bert", "t5"):
            model = build(name, jnp.float64)
            stack = "decoder" if name == "t5" else "blocks"
            depth = getattr(model, stack).block.mlp.up.shape[0]
            branch = jnp.linspace(0.5, 2.0, depth)
            op = gj.msg(mlp=9, embed=12, heads=3, init=_steps)
            model = gj.grow(op, model, key=jax.random.key(0))
            model = gj.ramp(put(model, {(stack, "branch"): branch}), 1.0)
            gj.hf.save(model, tmp_path / name)
            again = gj.hf.load(tmp_path / name)
            read = outputs(again, batch(model))
            assert distance(outputs(model, batch(model)), read)[1] <= 1e-12
            unscaled = put(model, {(stack, "branch"): None})
            assert distance(outputs(unscaled, batch(model)), read)[1] > 1e-3


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", ["t5", "ul2"])
def test_the_scale_of_a_head_is_written_so_that_every_reader_agrees(name, scaled, tmp_path):
    with jax.enable_x64(True):
        model = build(name, jnp.float64, scale_output=scaled)
        gj.hf.save(model, tmp_path / "model")
        written = json.loads((tmp_path / "model" / "config.json").read_text())
        assert written["tie_word_embeddings"] == written["scale_decoder_outputs"] == (name == "t5")
        again = gj.hf.load(tmp_path / "model")
        assert distance(outputs(model, batch(model)), outputs(again, batch(model)))[1] <= 1e-12


def test_biases_that_a_model_has_not_are_zeros(tmp_path):
    for name in ("gpt2", "bert"):
        model = build(name, bias=False)
        gj.hf.save(model, tmp_path / name)
        again = gj.hf.load(tmp_path / name)
        assert not np.any(again.blocks.block.attention.q_bias)
        assert distance(outputs(model, batch(model)), outputs(again, batch(model)))[1] <= 1e-6


def _mixed_epsilon() -> Any:
    model = build("llama")
    eps = model.blocks.block.mlp_norm.eps
    return put(model, {("blocks", "block", "mlp_norm", "eps"): eps.at[1].set(1e-3)})


def _switched_off() -> Any:
    return put(build("gpt2"), {("blocks", "active"): jnp.asarray([True, False])})


def _grown(name: str, op: Any) -> Any:
    return gj.grow(op, build(name), key=jax.random.key(0))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "gates": (
        lambda: gj.ramp(_grown("gpt2", gj.msg(mlp=9)), 0.5),
        GateError,
        "blocks.block.mlp.gate: level 0.5",
    ),
    "heads": (
        lambda: _grown("bert", gj.zeros(heads=4)),
        HuggingFaceError,
        "4 heads of 4 need embed=16, got 8; grow heads along with embed",
    ),
    "embed": (
        lambda: _grown("gemma3", gj.zeros(embed=10)),
        HuggingFaceError,
        "embed: transformers needs a multiple of heads=4, got 10",
    ),
    "frequencies": (
        lambda: _grown("llama", gj.copy(head_dim=8)),
        HuggingFaceError,
        "rotary.freqs: expected 0.001, 0.01, 0.1, 1, as its config determines it, got 0.01, 1",
    ),
    "epsilon": (
        _mixed_epsilon,
        HuggingFaceError,
        "mlp_norm.eps: expected 1e-05, as its config determines it, got 1e-05, 0.001",
    ),
    "two epsilons": (
        lambda: _grown("olmo2", gj.zeros(embed=16)),
        HuggingFaceError,
        "written as olmo2:\n  - blocks.block.attention.k_norm.eps: expected 5e-06",
    ),
    "active": (_switched_off, HuggingFaceError, "blocks.active: layers are switched off"),
    "QK-norm": (
        lambda: build("gpt2", qk_norm=True),
        HuggingFaceError,
        "qk_norm: expected False, got True",
    ),
    "rotary": (
        lambda: build("gpt2", position="rotary", kv_heads=1),
        HuggingFaceError,
        "position: expected 'learned', got 'rotary'",
    ),
    "shared keys": (
        lambda: build("gpt2", kv_heads=1),
        HuggingFaceError,
        "kv_heads: 1 for 2 queries",
    ),
    "pre-LN": (
        lambda: build("bert", post_norm=False),
        HuggingFaceError,
        "post_norm: expected True, got False",
    ),
    "exact GELU": (
        lambda: build("t5 v1.1", activation="gelu"),
        HuggingFaceError,
        "a gated GELU is the tanh form in T5",
    ),
    "grouped queries in T5": (
        lambda: _grown("t5", gj.copy(group=2)),
        HuggingFaceError,
        "attention.q: expected the shape",
    ),
    "experts that every token uses": (
        lambda: build("mixtral", shared_experts=1),
        HuggingFaceError,
        "shared_experts: in this family there are none, got 1",
    ),
    "shared experts without a gate": (
        lambda: build("qwen2_moe", shared_gate=False),
        HuggingFaceError,
        "shared_gate: in this family they have one",
    ),
    "a classifier with another head": (
        lambda: build("bert", labels=3),
        HuggingFaceError,
        "labels: a classifier has no other heads there",
    ),
    "experts of a GPT": (
        lambda: _grown("gpt2", gj.upcycle(experts=3)),
        HuggingFaceError,
        "this GPT has 3 experts, and no family here has mixtures of its class",
    ),
    "experts before a norm": (
        lambda: _grown("olmo2", gj.upcycle(experts=3)),
        HuggingFaceError,
        "experts: their outputs have no norm behind them yet",
    ),
    "another model": (
        lambda: gj.nn.MLP(4, 4, key=jax.random.key(0)),
        HuggingFaceError,
        "expected one of BERT, ModernBERT, GPT, Decoder, T5, got a MLP",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_said_there_is_refused(why, tmp_path):
    make, error, message = REFUSED[why]
    with pytest.raises(error) as caught:
        gj.hf.save(make(), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


# Mixtures ----------------------------------------------------------------------------------------


def test_a_dense_model_that_became_a_mixture_is_of_another_family(saved, tmp_path):
    model, source = saved("llama")
    rewritten(source, pretraining_tp=2, max_position_embeddings=512, use_sliding_window=True)
    op = gj.upcycle(experts=4)
    gj.hf.save(gj.grow(op, model, key=jax.random.key(0)), tmp_path / "big", source=source)
    again = gj.hf.load(tmp_path / "big")
    assert distance(outputs(model, batch(model)), outputs(again, batch(again)))[1] <= 1e-6
    written = json.loads((tmp_path / "big" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("mixtral", ["MixtralForCausalLM"])
    assert written["num_local_experts"] == written["num_experts"] == 4
    # What the source says of a Llama alone is not taken over
    assert written["max_position_embeddings"] == 512 and written["pretraining_tp"] == 2
    assert "use_sliding_window" not in written and "attention_bias" not in written
    normed = gj.grow(op, build("llama", qk_norm=True), key=jax.random.key(0))
    gj.hf.save(normed, tmp_path / "normed")
    assert "qwen3_moe" in (tmp_path / "normed" / "config.json").read_text()


def test_new_experts_behind_open_gates_are_experts_like_others(tmp_path):
    with jax.enable_x64(True):
        small = build("qwen3_moe", jnp.float64)
        big = gj.ramp(gj.grow(gj.experts(5), small, key=jax.random.key(0)), 1.0)
        gj.hf.save(big, tmp_path / "big")
        again = gj.hf.load(tmp_path / "big")
        assert gj.sizes(again)["experts"] == 5
        assert distance(outputs(big, batch(big)), outputs(again, batch(big)))[1] <= 1e-12


# From the command line ---------------------------------------------------------------------------


def test_a_folder_is_grown_into_a_folder_with_a_certificate_and_a_card(tmp_path, capsys):
    gj.hf.save(build("gpt2"), tmp_path / "small")
    args = ["grow", "--from-hf", str(tmp_path / "small"), "--to", "mlp", "9", "layers", "4"]
    args += ["--by", "zeros+expand", "--out"]
    app.cli(prog="growjax", args=[*args, str(tmp_path / "big")])
    assert "exact-given-init, keeps its promise" in capsys.readouterr().out
    small, big = gj.hf.load(tmp_path / "small"), gj.hf.load(tmp_path / "big")
    assert gj.sizes(big)["mlp"] == 9 and gj.sizes(big)["layers"] == 4
    assert distance(outputs(small, batch(small)), outputs(big, batch(big)))[1] <= 1e-5
    record = json.loads((tmp_path / "big" / "certificate.json").read_text())
    assert record["certificate"]["passed"] and record["certificate"]["axes"]["layers"] == [2, 4]
    card = (tmp_path / "big" / "README.md").read_text()
    assert "# small, grown" in card and "keeps its promise" in card and "zeros(mlp=9)" in card
    with pytest.raises(CheckpointError, match="exists already"):
        app.cli(prog="growjax", args=[*args, str(tmp_path / "big")])
    with pytest.raises(GrowthError, match="leaves gates at 0, and a stock model has none"):
        app.cli(prog="growjax", args=[*args, str(tmp_path / "other"), "--by", "msg"])
    with pytest.raises(GrowjaxError, match="expected one of CHECKPOINT and --from-hf"):
        app.cli(prog="growjax", args=["grow", "--to", "mlp", "9", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "other").exists()


def _grow(tmp_path, *args: str) -> Any:
    app.cli(prog="growjax", args=["grow", "--from-hf", str(tmp_path / "small"), *args])


def test_copies_made_from_a_checkpoint_can_learn_unless_they_are_asked_not_to(tmp_path):
    gj.hf.save(build("llama"), tmp_path / "small")
    sizes = ["--to", "embed", "16", "heads", "8", "kv_heads", "4", "mlp", "9"]
    _grow(tmp_path, *sizes, "--out", str(tmp_path / "free"))
    record = json.loads((tmp_path / "free" / "certificate.json").read_text())
    assert set(record["certificate"]["locked"].values()) == {0}
    assert "All new coordinates can learn" in (tmp_path / "free" / "README.md").read_text()
    equal = "copy(embed=16, shares=equal)"
    _grow(tmp_path, "--by", equal, "--out", str(tmp_path / "equal"))
    card = (tmp_path / "equal" / "README.md").read_text()
    assert "8 copies along embed move exactly like their source" in card


def test_the_command_line_says_every_option_of_every_operator(tmp_path):
    gj.hf.save(build("llama"), tmp_path / "small")
    op = gj.chain(
        gj.copy(mlp=(0, 1, 2, 3, 4, 5, 5), shares="random", seed=3),
        gj.stack(layers=(0, 1, 1), branch="zero"),
        gj.zeros(heads=8, init="matched"),
    )
    _grow(tmp_path, "--by", str(op), "--out", str(tmp_path / "big"))
    record = json.loads((tmp_path / "big" / "certificate.json").read_text())
    assert from_dict(record["operator"]) == op
    assert gj.sizes(gj.hf.load(tmp_path / "big"))["layers"] == 3
    with pytest.raises(GrowthError, match="leaves gates at 0"):
        _grow(tmp_path, "--by", "chain(msg(mlp=9))", "--out", str(tmp_path / "other"))
    with pytest.raises(GrowthError, match="has its sizes already"):
        _grow(tmp_path, "--by", "copy(mlp=9)", "--to", "mlp", "9", "--out", str(tmp_path / "other"))


def test_what_a_stock_model_cannot_hold_is_refused_before_it_is_certified(tmp_path, capsys):
    gj.hf.save(build("mixtral"), tmp_path / "small")
    for by in ("experts(5)", "vocabulary(20, gate=True)"):
        with pytest.raises(GrowthError, match=r"leaves gates at 0(.|\n)*in a stage of a plan"):
            _grow(tmp_path, "--by", by, "--out", str(tmp_path / "big"))
    advice = {"experts": "gj.experts experts", "vocab": r"--by \"vocabulary\(75\)\""}
    advice["layers"] = "expand, which keeps the function"
    for axis, message in advice.items():
        for by in ("copy", "zeros"):
            with pytest.raises(GrowthError, match=f"{axis}: nothing (.|\n)*{message}"):
                _grow(tmp_path, "--to", axis, "20", "--by", by, "--out", str(tmp_path / "big"))
    assert "certifying" not in capsys.readouterr().err and not (tmp_path / "big").exists()


def test_a_folder_is_inspected_and_is_no_checkpoint(tmp_path, capsys, monkeypatch):
    gj.hf.save(build("gemma3"), tmp_path / "small")
    monkeypatch.setenv("COLUMNS", "80")
    app.cli(prog="growjax", args=["inspect", str(tmp_path / "small")])
    shown = capsys.readouterr().out
    assert "a Hugging Face folder: gemma3_text (Gemma 3 1B" in shown and "layers=3" in shown
    assert "blocks.block.attention.q_norm.weight" in shown  # whole, on a narrow terminal too
    for command in ("certify", "export", "grow"):
        out = [] if command == "certify" else ["--out", str(tmp_path / "out")]
        to = [] if command == "export" else ["--to", "mlp", "9"]
        with pytest.raises(
            CheckpointError, match="a Hugging Face folder and no checkpoint of growja"
        ):
            app.cli(prog="growjax", args=[command, str(tmp_path / "small"), *to, *out])


def test_a_dtype_that_files_do_not_have_is_refused_before_anything_is_read(tmp_path):
    wrong = {"float8": "dtype: expected one of float64, float32", "int8": "bfloat16, got 'int8'"}
    for dtype, message in (wrong | {"float64": "JAX has no float64 unless"}).items():
        with pytest.raises(HuggingFaceError, match=message):
            grow_pretrained("copy", {"mlp": 9}, tmp_path / "none", tmp_path / "out", dtype=dtype)
        with pytest.raises(HuggingFaceError, match=message):
            gj.hf.load(tmp_path / "none", dtype=dtype)
    model = build("llama")
    large = put(model, {("norm", "weight"): jnp.full(8, 1e5)})
    with pytest.raises(
        HuggingFaceError, match="norm.weight: has numbers that are not finite in fl"
    ):
        gj.hf.save(with_dtype(large, "float16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    gj.hf.save(with_dtype(large, "bfloat16"), tmp_path / "out")


def test_parameters_of_16_bits_grow_in_float32_and_may_be_stored_in_16(tmp_path):
    small = build("llama", jnp.bfloat16)
    gj.hf.save(small, tmp_path / "small")
    _grow(tmp_path, "--to", "mlp", "9", "--out", str(tmp_path / "wide"))
    wide = gj.hf.load(tmp_path / "wide")
    assert wide.blocks.block.mlp.down.dtype == jnp.float32
    exact = outputs(gj.hf.load(tmp_path / "small", dtype="float32"), batch(small))
    assert distance(exact, outputs(wide, batch(small)))[1] <= 1e-6
    half = ["--dtype", "bfloat16", "--out", str(tmp_path / "half")]
    _grow(tmp_path, "--to", "mlp", "9", *half)
    assert gj.hf.load(tmp_path / "half").blocks.block.mlp.down.dtype == jnp.bfloat16
    card = (tmp_path / "half" / "README.md").read_text()
    assert "stored in bfloat16, which moves outputs by" in card
