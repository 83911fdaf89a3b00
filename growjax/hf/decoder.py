"""Decoders in config.json: the parts that a family is put together from, as data.

A family says how it spells the fields of a `DecoderConfig`, which of them it fixes, and what its tensors
are called; `growjax.hf.families` has them. Reading, writing and the table of rows are the same for all.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from growjax.axes import put, sizes
from growjax.hf.family import ConfigFile, Family, activation_name, config_sizes, epsilon
from growjax.hf.heads import DecoderHeads, head_of
from growjax.hf.mixtures import Mixture, experts_of
from growjax.hf.sights import Sights, shortest
from growjax.hf.table import Row, linear, norm
from growjax.models import Decoder, DecoderConfig, Sight
from growjax.nn import NO_WINDOW, Norm, Rotary


_BLOCK = "blocks.block"
_HEADS = "(kv_heads group head_dim)"
# The dimensions of the weights, from and to, by the leaf
_LINEAR = {
    "attention.q": ("embed", "(kv_heads group turned)"),
    "attention.k": ("embed", "(kv_heads turned)"),
    "attention.v": ("embed", "(kv_heads head_dim)"),
    "attention.q|k|v": ("embed", "(kv_heads group turned)"),
    "attention.o": (_HEADS, "embed"),
    "mlp.glu": ("embed", "mlp"),
    "mlp.up": ("embed", "mlp"),
    "mlp.glu|up": ("embed", "mlp"),
    "mlp.down": ("mlp", "embed"),
    "mlp.router": ("embed", "experts"),
    "mlp.shared.glu": ("embed", "shared_mlp"),
    "mlp.shared.up": ("embed", "shared_mlp"),
    "mlp.shared.down": ("shared_mlp", "embed"),
    # A number for every token, of which the file has a matrix of one row
    "mlp.shared_gate": ("embed", "1"),
}
_NORMS = ("attention_norm", "attention_after", "mlp_norm", "mlp_after")

# The names of tensors by leaf, as in Llama and most of its descendants
NAMES: dict[str, str] = {
    "attention_norm": "layers.{}.input_layernorm",
    "attention.q": "layers.{}.self_attn.q_proj",
    "attention.k": "layers.{}.self_attn.k_proj",
    "attention.v": "layers.{}.self_attn.v_proj",
    "attention.o": "layers.{}.self_attn.o_proj",
    "attention.q_norm": "layers.{}.self_attn.q_norm",
    "attention.k_norm": "layers.{}.self_attn.k_norm",
    "mlp_norm": "layers.{}.post_attention_layernorm",
    "mlp.glu": "layers.{}.mlp.gate_proj",
    "mlp.up": "layers.{}.mlp.up_proj",
    "mlp.down": "layers.{}.mlp.down_proj",
    "norm": "norm",
}
# With norms behind the branches, the one that was named after attention has another name
AROUND = {
    "attention_after": "layers.{}.post_attention_layernorm",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "mlp_after": "layers.{}.post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Spelling:
    """What a family of decoders computes, and how its files say it.

    **Fields**

    - `choices`: fields of the `DecoderConfig` with the one value that the family has.
    - `flags`: fields that are true or false, the key of config.json and its default.
    - `numbers`: fields that may be null, and their keys with a default.
    - `names`: changes of `NAMES`; None leaves a leaf out.
    - `each`: whether queries, keys and values of a fused tensor stand head by head.
    - `sights`: how windows and rotary positions are said.
    - `kv_heads`, `head_dim`: the keys of these sizes; None if the family derives them.
    - `activation`, `eps`: the key, and its default. `other_activation`, which other readers take, has to
      agree. With `tanh_gelu`, "gelu" is the tanh form, whatever readers of the other key say (Gemma 1).
    - `parts`: whether transformers needs `hidden_size` to be a multiple of the heads.
    - `embed_scale`: whether embeddings are multiplied by `sqrt(embed)`.
    - `scale`: the key and the default of the number whose root divides scores; None: `head_dim`.
    - `experts`: how the numbers of experts are said; None for a dense feed-forward.
    """

    choices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, tuple[str, bool]] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, tuple[str, float | None]] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    each: bool = False
    sights: Sights = dataclasses.field(default_factory=Sights)
    kv_heads: str | None = "num_key_value_heads"
    kv_default: int | None = None
    head_dim: str | None = "head_dim"
    head_default: int | None = None
    activation: tuple[str, str] = ("hidden_act", "silu")
    other_activation: str | None = None
    tanh_gelu: bool = False
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    parts: bool = False
    embed_scale: bool = False
    scale: tuple[str, float] | None = None
    experts: Mixture | None = None

    def rows(self, config: Any) -> tuple[Row, ...]:
        """The table of tensors."""
        names = {**NAMES, **self.names}
        turned = getattr(config, "turned", None)
        rows: list[Row] = []
        for leaf, (into, out) in _LINEAR.items():
            name = names.get(leaf)
            if name is None:
                continue
            if self.each and "|" in leaf:
                out = "(kv_heads each turned)"
            # A fused weight is [out, in], and its parts are joined along the first dimension
            rows += [
                dataclasses.replace(row, joined=0, rotated=turned)
                for row in linear(name, f"{_BLOCK}.{leaf}", into, out)
            ]
        for leaf in _NORMS:
            if names.get(leaf) is not None:
                rows += norm(names[leaf], f"{_BLOCK}.{leaf}")
        for leaf, layout in (
            ("q_norm", "(kv_heads group turned)"),
            ("k_norm", "(kv_heads turned)"),
        ):
            name = f"{names[f'attention.{leaf}']}.weight"
            path = f"{_BLOCK}.attention.{leaf}.weight"
            rows.append(Row(name, f"{path}: {layout}", rotated=turned))
        rows += norm(names["norm"], "norm")
        return tuple(rows)

    def read(self, file: ConfigFile, head: Mapping[str, Any]) -> DecoderConfig:
        """The configuration that config.json describes; `head` has the fields of its head."""
        embed, heads = file.size("hidden_size"), file.size("num_attention_heads")
        kv_heads = heads
        if self.kv_heads is not None:
            default = heads if self.kv_default is None else self.kv_default
            kv_heads = file.size(self.kv_heads, default=default)
            file.share(self.kv_heads, heads, kv_heads)
        if self.head_dim is not None and file.get(self.head_dim, default=self.head_default):
            head_dim = file.size(self.head_dim, default=self.head_default)
        else:
            head_dim = file.share("hidden_size", embed, heads)
        if self.parts:
            file.share("hidden_size", embed, heads)
        if head_dim % 2:
            file.complaints.append(
                f"head_dim: expected an even number, since rotary positions turn pairs, got {head_dim}"
            )
        layers = file.layers("num_hidden_layers")
        pattern, turned = self.sights.read(file, layers, head_dim)
        fields: dict[str, Any] = dict(self.choices)
        for field, (key, default) in self.flags.items():
            fields[field] = file.flag(key, default=default)
        for field, (key, default) in self.numbers.items():
            file.get(key)
            # A null in the file means none, whatever the default
            given = file.values.get(key, default)
            fields[field] = None if given is None else file.number(key, default=given)
        if self.scale is not None:
            key, default = self.scale
            fields["scale"] = file.number(key, default=default) ** -0.5
        if self.embed_scale:
            fields["embed_scale"] = embed**0.5
        fields |= {
            **head,
            "mlp": file.size(self.units),
            "vocab": file.size("vocab_size"),
            "eps": file.number(self.eps[0], default=self.eps[1]),
            "activation": self._activation(file),
        }
        if self.experts is not None:
            fields |= self.experts.read(file)
        # DecoderConfig would refuse such values with a message that does not name the keys of the file
        file.check(str(file.get("model_type")))
        sized = dict(layers=layers, embed=embed, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        return DecoderConfig(**sized, pattern=pattern, turned=turned, **fields)

    def _activation(self, file: ConfigFile) -> str:
        """The activation, by its name in growjax."""
        key, default = self.activation
        own = file.activation(key, default)
        if self.other_activation is None:
            return own
        known = {own, file.activation(self.other_activation, file.get(key, default=default))}
        meant = {"gelu_tanh" if self.tanh_gelu and name == "gelu" else name for name in known}
        if len(meant) > 1:
            file.complaints.append(f"{self.other_activation}: expected that of {key}")
        return meant.pop()

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """The keys of config.json."""
        c = config
        keys = {
            "num_hidden_layers": c.layers,
            "hidden_size": c.embed,
            "num_attention_heads": c.heads,
            self.units: c.mlp,
            "vocab_size": c.vocab,
            self.activation[0]: activation_name(c.activation, self.activation[1]),
            self.eps[0]: c.eps,
            **self.sights.write(c),
        }
        if self.experts is not None:
            keys |= self.experts.write(c)
        if self.kv_heads is not None:
            keys[self.kv_heads] = c.kv_heads
        if self.head_dim is not None:
            keys[self.head_dim] = c.head_dim
        for field, (key, _) in {**self.flags, **self.numbers}.items():
            keys[key] = getattr(c, field)
        if self.scale is not None:
            number = (c.head_dim**-0.5 if c.scale is None else c.scale) ** -2
            keys[self.scale[0]] = (
                round(number) if abs(number - round(number)) < 1e-9 * number else number
            )
        return keys

    def limits(self, config: DecoderConfig) -> list[str]:
        """Everything that a family cannot say of a model."""
        c = config
        faults = self.sights.limits(c)
        spelled = {*self.flags, *self.numbers, *self.choices}
        plain = DecoderConfig(1, 1, 1, 1, 2, 1, 1)
        for field in _CHOICES:
            if field in spelled or field in ("scale", "embed_scale", "turned"):
                continue
            if getattr(c, field) != getattr(plain, field):
                faults.append(
                    f"{field}: expected {getattr(plain, field)!r}, got {getattr(c, field)!r}"
                )
        by_key: dict[str, list[str]] = {}
        for field, (key, _) in self.flags.items():
            by_key.setdefault(key, []).append(field)
        for key, fields in by_key.items():
            told = {field: getattr(c, field) for field in fields}
            if len({*told.values()}) > 1:
                pairs = ", ".join(f"{field}={value}" for field, value in told.items())
                faults.append(f"{key}: one key says them all, and the model has {pairs}")
        if self.experts is not None:
            faults += self.experts.limits(c)
        if self.tanh_gelu and c.activation == "gelu":
            faults.append("activation: in this family a GELU is the tanh form, got the exact one")
        if (c.embed_scale is not None) != self.embed_scale:
            faults.append(f"embed_scale: {'missing' if self.embed_scale else 'in the way'}")
        if self.kv_heads is None and c.kv_heads != c.heads:
            faults.append(
                f"kv_heads: {c.kv_heads} for {c.heads} queries; in this family no heads share keys"
            )
        if self.head_dim is None and c.heads * c.head_dim != c.embed:
            faults.append(
                f"head_dim: expected embed / heads, as transformers derives it; {c.heads} heads of "
                f"{c.head_dim} need embed={c.heads * c.head_dim}, got {c.embed}; grow heads along with "
                "embed"
            )
        if self.parts and c.embed % c.heads:
            faults.append(f"embed: transformers needs a multiple of heads={c.heads}, got {c.embed}")
        return faults

    @property
    def units(self) -> str:
        """The key of the hidden units of a feed-forward, or of an expert."""
        return "intermediate_size" if self.experts is None else self.experts.units

    def scale_of(self, attention: Any) -> float:
        """The factor that the family multiplies scores by."""
        return attention.scale if self.scale is not None else attention.q.shape[-1] ** -0.5

    def folded(self, model: Decoder) -> Decoder:
        """A plain `Decoder`: kinds of layers in order, and the family's scale of embeddings."""
        plain = object.__new__(Decoder)
        for field in dataclasses.fields(Decoder):
            object.__setattr__(plain, field.name, getattr(model, field.name))
        model = _ordered(plain)
        own = 1.0 if model.embed_scale is None else float(model.embed_scale)
        dtype = model.embedding.table.dtype
        wanted = sizes(model)["embed"] ** 0.5 if self.embed_scale else 1.0
        scale = jnp.asarray(wanted, dtype) if self.embed_scale else None
        if own == float(jnp.asarray(wanted, dtype)):
            return put(model, {("embed_scale",): scale})
        ratio = own / wanted
        values: dict[tuple, Any] = {
            ("embed_scale",): scale,
            ("embedding", "table"): model.embedding.table * ratio,
        }
        if model.head is None and model.lm:
            # A head that is the table would be multiplied too, but the last norm takes that back
            values[("norm",)] = _shrunk(model.norm, ratio)
        return put(model, values)


_CHOICES = (
    *("norm", "norm_bias", "placement", "plus_one", "parallel", "bias", "o_bias", "mlp_bias"),
    *("qk_norm", "glu", "scale", "embed_scale", "attention_cap", "logit_cap", "turned"),
)


def _shrunk(norm: Norm, ratio: float) -> Norm:
    """A norm whose output is divided by `ratio`."""
    assert norm.weight is not None
    # A product: XLA divides by a number in another way than NumPy, which has leaves that are read late
    factor = 1 / ratio
    weight = (1 + norm.weight) * factor - 1 if norm.plus_one else norm.weight * factor
    bias = None if norm.bias is None else norm.bias * factor
    return put(norm, {("weight",): weight, ("bias",): bias})


def _ordered(model: Decoder) -> Decoder:
    """The model with its rotations in the order of the layers that use them."""
    attention = model.blocks.block.attention
    if attention.turn is None or not attention.turn.shape[0]:
        return model
    turns = np.asarray(attention.turn).tolist()
    first = list(dict.fromkeys(turns))
    rotaries = [(model.rotary, *model.others)[kind] for kind in first]
    own = None if len(first) == 1 else jnp.asarray([first.index(kind) for kind in turns], jnp.int32)
    return put(
        model,
        {
            ("rotary",): rotaries[0],
            ("others",): tuple(rotaries[1:]),
            ("blocks", "block", "attention", "turn"): own,
        },
    )


def config_of(model: Decoder) -> DecoderConfig:
    """The configuration of a decoder, grown or not, from its sizes, arrays and static fields."""
    n, block = sizes(model), model.blocks.block
    attention, mlp = block.attention, block.mlp
    before, after = block.attention_norm, block.attention_after
    qk_norm = None
    if attention.q_norm is not None:
        qk_norm = "head" if isinstance(attention.q_norm, Norm) else "width"
    scale = attention.scale
    return DecoderConfig(
        layers=n["layers"],
        **config_sizes(model),
        kv_heads=n["kv_heads"],
        pattern=pattern_of((model.rotary, *model.others), [attention]),
        turned=next((r.turned for r in (model.rotary, *model.others) if r.turned != 0), None),
        norm="layer" if model.norm.centre else "rms",
        norm_bias=model.norm.bias is not None or not model.norm.centre,
        placement="both" if before and after else "before" if after is None else "after",
        plus_one=model.norm.plus_one,
        parallel=block.parallel,
        bias=attention.q_bias is not None,
        o_bias=attention.o_bias is not None,
        mlp_bias=mlp.down_bias is not None,
        qk_norm=qk_norm,
        glu=mlp.glu is not None,
        activation=mlp.activation,
        scale=None if scale == n["head_dim"] ** -0.5 else scale,
        embed_scale=None if model.embed_scale is None else float(model.embed_scale),
        attention_cap=attention.cap,
        logit_cap=model.logit_cap,
        eps=epsilon(model.norm.eps),
        tied=model.head is None and model.lm,
        head=head_of(model),
        dtype=model.dtype,
        attention=attention.body,
        remat=model.blocks.remat,
        **experts_of(block.mlp, n),
    )


def pattern_of(rotaries: Sequence[Rotary], attentions: Sequence[Any]) -> tuple[Sight, ...]:
    """How layers see, by the shortest list that repeats; attentions are of one layer or of a stack."""
    kinds: list[tuple[int, int]] = []
    for attention in attentions:
        count = attention.q.shape[0] if attention.q.ndim == 5 else 1
        turns = np.broadcast_to(0 if attention.turn is None else attention.turn, count)
        windows = NO_WINDOW if attention.window is None else attention.window
        kinds += zip(turns.tolist(), np.broadcast_to(windows, count).tolist(), strict=True)
    every = []
    for turn, window in kinds or [(0, NO_WINDOW)]:
        rotary, reach = rotaries[turn], None if window == NO_WINDOW else window
        if rotary.turned == 0:
            every.append(Sight(reach, rotary=False))
        else:
            every.append(Sight(reach, rotary.theta, rotary.scaling))
    return shortest(tuple(every))


def decoder_family(
    model_type: str,
    heads: DecoderHeads,
    spelling: Spelling,
    *,
    public: Callable[[DecoderConfig], Any] = lambda config: config,
    **fields: Any,
) -> Family:
    """The family of a spelling; `public` turns a config into that of a class of its own."""
    only = {field: value for field, value in spelling.choices.items()}
    defaults = {
        "max_position_embeddings": spelling.sights.positions,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    free = "embed, heads, kv_heads" if spelling.head_dim else "embed together with heads"
    free += ", mlp, layers"
    if spelling.experts is not None:
        free += ", experts" + ", shared_mlp" * (spelling.experts.shared is not None)
    common: dict[str, Any] = dict(
        growth=free,
        prefix="model.",
        heads=heads.prefixes,
        base=heads.base,
        defaults=defaults,
        ignored=("layers.*.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    )
    return Family(
        model_type=model_type,
        model=Decoder,
        accepts=Decoder,
        architecture=heads.architecture,
        rows=lambda config: (*heads.rows(config), *spelling.rows(config)),
        read=lambda file, same: public(spelling.read(file, heads.read(file, same))),
        write=lambda config: spelling.write(config) | heads.write(config),
        config_of=config_of,
        limits=lambda config: spelling.limits(config) + heads.limits(config),
        only=only,
        scale=spelling.scale_of,
        mixture=spelling.experts is not None,
        fold_scales=spelling.folded,
        **(common | fields),
    )
