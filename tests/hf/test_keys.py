"""The key sweep: every key of config.json that transformers knows is flipped, one at a time.

What moves the outputs of transformers must move those of growjax equally, or be refused. Keys are those
of the configuration class, their old spellings, and every word that the sources of the model and of what
it calls look up in a configuration, so a new version of transformers brings its new keys with it.
"""

# pyright: reportMissingImports=false
import copy
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf

import growjax as gj
from growjax.errors import GrowjaxError
from growjax.hf.convert import FAMILIES
from growjax.hf.families import DECODERS
from growjax.hf.family import ConfigFile
from growjax.hf.keys import is_tolerated
from growjax.models import Labels
from tests.conftest import DEEP
from tests.hf.oracle import outputs, random_model
from tests.hf.test_parity import CASES, ours


class Absent:
    """A key that is removed."""


ABSENT = Absent()
NUMBERS: list[Any] = [0, 1, 2, 3, 4, 8, 16, 56, 0.0, 0.5, 1.0, 0.01, 30.0]
WORDS = [
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "silu",
    "tanh",
    "gated-gelu",
    "gated-relu",
]
WORDS += ["relative_key", "absolute", "full_attention", "sliding_attention", "bfloat16"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPES: list[Any] = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_theta": 50.0},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4.0, "rope_theta": 100.0},
    {"type": "linear", "rope_type": "default", "factor": 4.0},
    {"factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    LLAMA3,
    LLAMA3 | {"rope_theta": 500.0, "low_freq_factor": 2.0},
    {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"},
]


def values_for(key: str, config: dict[str, Any]) -> list[Any]:
    """What a key is set to: more values of its own kind, and one of every other."""
    values = [True, False, None, ABSENT, 0, 3, 0.5, "gelu", [], [0, 1], {}, {"0": {"mlp": 2}}]
    now = config.get(key)
    if "rope" in key:
        values += ROPES
    if isinstance(now, int | float) or now is None:
        values += NUMBERS
    if isinstance(now, str) or "act" in key:
        values += WORDS
    return [value for value in values if key not in config or value is ABSENT or value != now]


# Moves what transformers computes, and not what growjax does, on purpose
EXEMPT = {
    "dtype": "parameters keep the type that they have in the file",
    "torch_dtype": "the same, in its old spelling",
    "model_type": "chooses the family, and architectures the class",
    "architectures": "chooses the class",
}

# Name to a case of the parity tests, what its config.json is changed by before a key is flipped, and
# which keys are flipped
ALL, ROTARY, T5 = "", "rope|rotary|position|theta", "act|feed|tie|scale|proj"
WINDOW = "sliding|window|layer|type"
# The rest is read by the code that reads Llama's and Qwen's
MIXTURE = ALL if DEEP else "expert|moe|rout|sparse|mlp|norm|clip|window|head_dim|size"
OLD_GEMMA = {
    "rope_parameters": ABSENT,
    "layer_types": ABSENT,
    "rope_theta": 2e4,
    "rope_local_base_freq": 100.0,
    "sliding_window_pattern": 2,
    "_sliding_window_pattern": ABSENT,
}
OLD_MODERN = {
    "rope_parameters": ABSENT,
    "layer_types": ABSENT,
    "global_rope_theta": 2e4,
    "local_rope_theta": 100.0,
    "global_attn_every_n_layers": 2,
}
# Where tolerated keys get every value, many keys at a time; elsewhere they get two. The deep profile
# takes them one by one. Without it, keys that Llama has as well get a quarter of their values there, and
# none if all configurations have them
THOROUGH = ("bert", "gpt2", "llama", "t5")
OLD_ROPE = {"rope_parameters": ABSENT, "rope_theta": 200.0, "rope_scaling": None}
BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("bert both heads", {}, ALL),
    "bert labels": ("bert classifier", {}, "label"),
    "roberta": ("roberta", {}, ALL),
    "roberta labels": ("roberta classifier", {}, "label|classifier|pad"),
    "xlm-roberta": ("xlm-roberta", {}, "act|pad|position|is_|cross|tie"),
    "gpt2": ("gpt2 n_inner", {}, ALL),
    "llama": ("llama", {}, ALL),
    "llama old": ("llama", OLD_ROPE, ROTARY),
    "llama linear": ("llama linear", {}, ROTARY),
    "llama3": ("llama3", {"max_position_embeddings": 24}, ROTARY),
    "llama3 without a length": (
        "llama3",
        {"rope_parameters": ROPES[-1] | {"rope_theta": 500.0}, "max_position_embeddings": 24},
        ROTARY,
    ),
    "llama3 old": ("llama3", OLD_ROPE | {"rope_scaling": LLAMA3}, ROTARY),
    "qwen2": ("qwen2", {}, ALL),
    "qwen3": ("qwen3", {}, WINDOW),
    "qwen3 yarn": ("qwen3 yarn", {}, ROTARY),
    "mistral": ("mistral", {}, ALL),
    "olmo2": ("olmo2", {}, ALL),
    "gemma": ("gemma", {}, "act|scal|tie|bidir"),
    "gemma2": ("gemma2", {}, ALL),
    "gemma3": ("gemma3", {}, ALL),
    "gemma3 old": ("gemma3", OLD_GEMMA, f"{ROTARY}|{WINDOW}"),
    "phi3": ("phi3", {}, ALL),
    "phi3 long": ("phi3 long", {}, ROTARY),
    "smollm3": ("smollm3 window", {}, ALL),
    "modernbert": ("modernbert", {}, ALL),
    "modernbert old": ("modernbert biases", OLD_MODERN, "rope|theta|global|local"),
    "modernbert classifier": ("modernbert classifier", {}, "classifier|label"),
    "mixtral": ("mixtral", {}, MIXTURE),
    "olmoe": ("olmoe", {}, MIXTURE),
    "qwen3_moe": ("qwen3_moe window", {}, MIXTURE),
    "qwen2_moe": ("qwen2_moe", {}, ALL if DEEP else "expert|moe|sparse|mlp|bias|window"),
    "llama labels": ("llama classifier", {}, "label|pad|tie|classif"),
    "gpt_neox": ("gpt_neox", {}, ALL),
    "gpt_neox old": (
        "gpt_neox",
        {"rope_parameters": ABSENT, "rotary_pct": 0.5, "rotary_emb_base": 200},
        ROTARY,
    ),
    "t5": ("t5", {}, ALL),
    "t5 v1.1": ("t5 v1.1", {"tie_word_embeddings": False}, T5),
    "t5 of 2020": (
        "t5 v1.1",
        dict.fromkeys(("dense_act_fn", "is_gated_act", "scale_decoder_outputs"), ABSENT)
        | {"tie_word_embeddings": False},
        T5,
    ),
    "t5 encoder": ("t5 encoder", {}, T5),
    "mt5": ("mt5", {}, "feed|tie|scale"),
    "t5 act": ("t5", {"dense_act_fn": "gelu"}, T5),
}


def keys_of(cls: Any) -> list[str]:
    """Every word that the sources of a model look up in its configuration."""
    config = cls.config_class
    source = lambda thing: inspect.getsource(sys.modules[thing.__module__])  # noqa: E731
    made = source(config) + inspect.getsource(hf.configuration_utils)
    made += inspect.getsource(hf.modeling_rope_utils)
    used = source(cls) + inspect.getsource(hf.masking_utils) + inspect.getsource(hf.modeling_utils)
    words = set(re.findall(r"config\.([a-z]\w+)\b(?!\()", made + used))
    words |= set(re.findall(r"(?:config|self), \"(\w+)\"", made + used))
    words |= set(re.findall(r"self\.([a-z]\w+)\b(?!\()", made))
    words |= set(re.findall(r"kwargs\.(?:pop|get)\(\"(\w+)\"", made))
    words |= set(config.__dataclass_fields__) | set(config.attribute_map)
    words |= {"position_embedding_type"}  # of transformers 4, where it was looked up
    return sorted(
        word
        for word in words
        if not hasattr(config, word)
        or word in {*config.__dataclass_fields__, *config.attribute_map}
    )


class Base:
    """One checkpoint on disk, and what both libraries compute with it."""

    def __init__(self, name: str, folder: Path):
        case, changes, self.pattern = BASES[name]
        config, architecture = CASES[case]
        self.cls, self.folder = getattr(hf, architecture), folder
        model = random_model(copy.deepcopy(config), architecture)
        model.save_pretrained(folder)
        self.json = changed(json.loads((folder / "config.json").read_text()), changes)
        self.write(self.json)
        self.config = gj.hf.config(folder)
        self.theirs = self.of_transformers()
        assert self.theirs is not None
        self.ours = ours(gj.hf.load(folder))
        self.computed: dict[str, Any] = {repr(self.config): self.ours}
        assert distance(self.ours, self.theirs) <= LIMIT

    def write(self, config: dict[str, Any]) -> None:
        (self.folder / "config.json").write_text(json.dumps(config))

    def of_transformers(self) -> dict[str, np.ndarray] | None:
        """What transformers computes; None where it refuses, or would invent weights."""
        try:
            model, info = self.cls.from_pretrained(self.folder, output_loading_info=True)
            if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
                return None
            return outputs(model.float().eval())
        except Exception:  # noqa: BLE001 (it raises whatever it comes upon)
            return None

    def of_growjax(self) -> dict[str, np.ndarray] | None:
        """What growjax computes; None where it refuses."""
        try:
            config = gj.hf.config(self.folder)
            if repr(config) not in self.computed:
                self.computed[repr(config)] = ours(gj.hf.load(self.folder))
            return self.computed[repr(config)]
        except GrowjaxError:
            return None

    def fault(self, key: str, value: Any) -> str | None:
        """What is wrong when `key` has this value."""
        self.write(changed(self.json, {key: value}))
        shown = "absent" if value is ABSENT else json.dumps(value)
        mine = self.of_growjax()
        if mine is None and not is_tolerated(key):
            return None
        theirs = self.of_transformers()
        if theirs is None:
            return None
        if mine is None:
            return f"{key}: {shown} is refused, though tolerated"
        gap = distance(mine, theirs)
        return f"{key}: {shown} is off by {gap:.1e}" if gap > LIMIT else None

    def faults_together(self, tolerated: dict[str, list[Any]]) -> list[str]:
        """What is wrong with values of tolerated keys, of which one of every key is set at a time.

        If both libraries compute the same with all of them set, each changes nothing. If not, or if
        transformers refuses them, halves of them are looked at, down to a single key, whose other values
        are looked at alone too.
        """
        faults: list[str] = []
        alone: set[str] = set()

        def look(group: dict[str, Any]) -> None:
            if len(group) > 1:
                self.write(changed(self.json, group))
                mine, theirs = self.of_growjax(), self.of_transformers()
                if mine is None or theirs is None or distance(mine, theirs) > LIMIT:
                    pairs = list(group.items())
                    look(dict(pairs[: len(pairs) // 2]))
                    look(dict(pairs[len(pairs) // 2 :]))
                return
            for key, value in group.items():
                alone.add(key)
                if fault := self.fault(key, value):
                    faults.append(fault)

        for i in range(max(map(len, tolerated.values()), default=0)):
            group = {key: values[i] for key, values in tolerated.items() if i < len(values)}
            for key in sorted(alone & group.keys()):
                look({key: group.pop(key)})
            look({key: value for key, value in group.items() if self.is_accepted(key, value)})
        return faults

    def is_accepted(self, key: str, value: Any) -> bool:
        """Whether transformers makes a configuration with this value, so that there may be a model."""
        try:
            self.cls.config_class.from_dict(changed(self.json, {key: value}))
        except Exception:  # noqa: BLE001 (it raises whatever it comes upon)
            return False
        return True


def _number(value: Any) -> float:
    """The value of a number, and 1 for anything else."""
    return float(value) if isinstance(value, int | float) else 1.0


LIMIT = 3e-5  # of the largest output; a wrong epsilon is off by more


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A config.json with some keys set, and others removed."""
    merged = config | changes
    return {key: value for key, value in merged.items() if value is not ABSENT}


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference, over the largest output."""
    if one.keys() != other.keys():
        return np.inf
    gaps = [np.abs(one[k] - other[k]).max() / np.abs(other[k]).max() for k in other]
    return float(max(gaps)) if np.isfinite(gaps).all() else np.inf


def test_defaults_of_padding_are_those_of_transformers():
    """The sweep does not see them: a row of its tokens has none that is padding."""
    seen = []
    for family in DECODERS:
        keys = hf.AutoConfig.for_model(family.model_type).to_dict()
        default = keys.pop("pad_token_id")
        file = ConfigFile(keys, [*map(str, range(200)), "score.weight"])
        head = family.read(file, lambda one, other: True).head
        if isinstance(head, Labels) and head.of == "sequence":
            assert head.padding == default, family.model_type
            seen.append(default)
    assert {None, 0, 1} < {*seen}


@pytest.mark.parametrize("name", BASES)
def test_what_moves_transformers_moves_growjax_equally_or_is_refused(name: str, tmp_path: Path):
    base = Base(name, tmp_path / "model")
    spellings = set(base.cls.config_class.attribute_map)
    assert spellings <= set(FAMILIES[base.cls.config_class.model_type].aliases)
    faults, shared, of_llama = [], set(), set(keys_of(hf.LlamaForCausalLM))
    together: dict[str, list[Any]] = {}
    if name not in THOROUGH and base.pattern in (ALL, MIXTURE):
        # What every configuration has is swept with Llama: growjax refuses it here, or tolerates it
        shared = of_llama - set(base.cls.config_class.__annotations__)
    thorough = name == "llama" or (name in THOROUGH and DEEP)
    for key in keys_of(base.cls):
        if key in EXEMPT or key in shared or not re.search(base.pattern, key):
            continue
        values = values_for(key, base.json)
        if re.search("softcap|base", key):
            # A tiny cap or base multiplies the rounding of both libraries
            values = [value for value in values if not (value and 0 < _number(value) < 0.1)]
        alone = name in THOROUGH and key not in of_llama
        if is_tolerated(key):
            values = values if thorough or alone else [0, "gelu"]
            if not DEEP:
                together[key] = values
                continue
        elif name not in THOROUGH and key in hf.LlamaConfig.__annotations__ and not DEEP:
            # Read by the code that reads Llama's, but for defaults
            values = [value for i, value in enumerate(values) if value is ABSENT or i % 4 == 0]
        for value in values:
            if fault := base.fault(key, value):
                faults.append(fault)
    faults += base.faults_together(together)
    assert not faults, "\n".join(faults)
