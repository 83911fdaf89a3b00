"""Published files of config.json, whose leftovers `transformers` ignores: the same outputs from both."""

# pyright: reportMissingImports=false
import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

import growjax as gj
from tests.hf.oracle import outputs, random_model, reloaded
from tests.hf.test_parity import gap, ours
from tests.published import CONFIGS


# Those with keys that stand in no case of tests/hf/test_parity.py
OWN = {
    *("Qwen 2.5 0.5B", "Gemma 2B", "Gemma 2 9B", "Gemma 3 1B"),
    *("Phi-3 mini", "Phi-4 mini", "SmolLM 3", "Qwen 3 30B-A3B 2507"),
}
CASES = [
    pytest.param(name, marks=() if name in OWN else pytest.mark.slow, id=name) for name in CONFIGS
]


@pytest.mark.parametrize("name", CASES)
def test_a_published_config_is_read_as_by_transformers(name: str, tmp_path: Any):
    keys = CONFIGS[name]
    config = CONFIG_MAPPING[keys["model_type"]](**keys)
    random_model(config, keys["architectures"][0]).float().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(keys | {"torch_dtype": "float32"}))
    theirs = reloaded(tmp_path / "theirs")
    model = gj.hf.load(tmp_path / "theirs")
    assert gap(ours(model), outputs(theirs)) <= 2e-5
    gj.hf.save(model, tmp_path / "ours", source=tmp_path / "theirs")
    assert gap(outputs(reloaded(tmp_path / "ours")), outputs(theirs)) <= 1e-6
