"""The page about pre-trained checkpoints, run command by command."""

# pyright: reportMissingImports=false
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import growjax as gj
from growjax.evals.commands import open_model
from tests.hf.oracle import random_model, reloaded
from tests.hf.vocabularies import draw


PAGE = Path(gj.__file__).parents[1] / "docs" / "pretrained.md"
BLOCK = re.compile(r"^```(sh|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIZES: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=64,
)
FAMILIES: dict[str, tuple[Any, str, int]] = {
    "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM", 2),
    "gemma3": (transformers.Gemma3TextConfig, "Gemma3ForCausalLM", 5),
}


def source(folder: Path, name: str) -> dict[str, Any]:
    make, architecture, seed = FAMILIES[name]
    folder.mkdir()
    drawn = draw(folder, seed)
    files = {file.name: file.read_text() for file in folder.iterdir()}
    own: dict[str, Any] = {}
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        own = {"sliding_window": 16, "layer_types": kinds, "query_pre_attn_scalar": 8}
    model = random_model(make(vocab_size=drawn["size"], **SIZES, **own), architecture)
    model.save_pretrained(folder)
    for file, text in files.items():
        (folder / file).write_text(text)
    (folder / "LICENSE").write_text("mine")
    return drawn


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_about_checkpoints_runs(name, tmp_path, monkeypatch):
    drawn = source(tmp_path / "checkpoint", name)
    shell, python = [], []
    for language, code in BLOCK.findall(PAGE.read_text()):
        (shell if language == "sh" else python).append(code)
    command = f'set -e\ngrowjax() {{ "{sys.executable}" -m growjax "$@"; }}\n' + "\n".join(shell)
    root = str(Path(gj.__file__).parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(python)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 and 12 is" in done.stdout

    # The grown model computes what the source computes; training has moved it
    tokens = np.arange(20)[None] % drawn["size"]
    with torch.no_grad():
        logits = {
            folder: reloaded(tmp_path / folder)(torch.from_numpy(tokens)).logits[0].numpy()
            for folder in ("checkpoint", "grown", "exported")
        }
    scale = np.abs(logits["checkpoint"]).max()
    assert np.abs(logits["grown"] - logits["checkpoint"]).max() <= 2e-5 * scale
    assert np.abs(logits["exported"] - logits["grown"]).max() > 1e-3 * scale
    # Export is what was trained, and what growjax reads
    monkeypatch.chdir(tmp_path)  # the plan names its tokenizer from there
    ours = open_model("runs/more")[0](jnp.asarray(tokens[0]))
    assert np.abs(logits["exported"] - ours).max() <= 2e-5 * scale
    sizes = gj.sizes(gj.hf.load(tmp_path / "exported"))
    assert (sizes["layers"], sizes["mlp"]) == (8, 48)
    for file in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        read = (tmp_path / "exported" / file).read_text()
        assert read == (tmp_path / "checkpoint" / file).read_text()
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model_type"] == FAMILIES[name][0].model_type and "auto_map" not in config
    assert "bits_per_byte" in (tmp_path / "eval.json").read_text()
    card = (tmp_path / "grown" / "README.md").read_text()
    assert "All new coordinates can learn" in card and "base_model: checkpoint" in card


def test_every_parameter_of_the_grown_model_moves(tmp_path):
    """In transformers' own training, too: no new parameter is dead, and no two copies stay equal."""
    source(tmp_path / "checkpoint", "qwen3")
    from growjax.train.pretrained import grow_pretrained

    grow_pretrained(
        "copy+expand", {"mlp": 48, "layers": 8}, tmp_path / "checkpoint", tmp_path / "big"
    )
    model = reloaded(tmp_path / "big").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (4, 24)))
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        if "embed" not in name:  # rows of tokens that were not read stay
            assert (p != before[name]).float().mean() > 0.99, name
    up = model.model.layers[0].mlp.up_proj.weight
    assert len(torch.unique(up, dim=0)) == 48
