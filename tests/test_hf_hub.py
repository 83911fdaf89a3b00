"""Files of config.json as they are published, whatever their authors left in them."""

import pytest

from growjax.errors import HuggingFaceError
from growjax.hf.convert import FAMILIES
from growjax.hf.family import ConfigFile
from tests.published import CONFIGS


def read(keys):
    """The configuration that growjax reads, of a folder whose tied tensors are the same."""
    family = FAMILIES[keys["model_type"]]
    file = ConfigFile(keys, [f"tensor {i}" for i in range(4)])
    file.fixed(family.fixed)
    config = family.read(file, lambda one, other: True)
    file.unread()
    file.check(family.model_type)
    return config


def test_every_published_config_is_read():
    assert {keys["model_type"] for keys in CONFIGS.values()} == set(FAMILIES)
    configs = {name: read(keys) for name, keys in CONFIGS.items()}
    assert configs["Gemma 2 9B"].activation == "gelu_tanh"
    assert [sight.window for sight in configs["Gemma 2 9B"].pattern] == [4096, None]


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("Qwen 2.5 0.5B", "use_mrope", True, "use_mrope: only False can be read"),
        ("Gemma 2 2B", "hidden_act", "relu", "hidden_act: expected that of hidden_activation"),
        ("Gemma 2 2B", "hidden_act", "gelu", "hidden_act: expected that of hidden_activation"),
        ("Gemma 2 9B", "sliding_window_size", 512, "expected the sliding_window, or no such key"),
        ("Phi-3 mini", "attention_bias", True, "attention_bias: only False can be read"),
        ("Phi-4 mini", "lm_head_bias", True, "lm_head_bias: only False can be read"),
        ("Phi-4 mini", "full_attn_mod", 2, "full_attn_mod: only 1 can be read"),
        ("SmolLM 3", "anything", 2, "remove it from the file, or pass ignore="),
        ("Qwen 3 30B-A3B 2507", "use_qk_norm", False, "use_qk_norm: only True can be read"),
    ],
)
def test_what_a_published_key_could_say_as_well_is_refused(name, key, value, message):
    with pytest.raises(HuggingFaceError, match=message):
        read(CONFIGS[name] | {key: value})
