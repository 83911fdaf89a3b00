"""What becomes of every operator in a Hugging Face folder: written, or refused with the reason.

`tests/test_cards.py` asks for rows of every operator, and transformers reads what is written in
`tests/hf/test_exports.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import growjax as gj
from growjax import fitting
from growjax.axes import axes_of
from growjax.growth import Fit, parse
from tests.folders import batch, build


class Export(NamedTuple):
    """An operator as it prints itself, and the families of `tests.folders` that it is tried on.

    - `refused`: by family, a part of the message with which the grown model is refused, with gates open;
      of the other families it is written.
    - `unfit`: the families whose models it does not grow.
    """

    op: str
    refused: dict[str, str] = {}
    unfit: tuple[str, ...] = ()


FAMILIES = ("gpt2", "llama", "bert", "t5")
MIXTURE = "no family here has mixtures of its class"
NARROW = "expected embed / heads, as transformers derives it"
POST_NORM = ("bert",)
ROTARY, LEARNED, RELATIVE = ("llama",), ("gpt2", "bert"), ("t5",)

EXPORTS: dict[str, list[Export]] = {
    "aki": [Export("aki(mlp=12)")],
    "between": [
        Export("between(layers=3, fill='transport')", unfit=(*POST_NORM, *RELATIVE)),
        Export("between(layers=3, branch='open')", unfit=RELATIVE),
        Export("between(decoder_layers=5)", unfit=("gpt2", "llama", "bert")),
    ],
    "centred": [
        Export("centred()", {"gpt2 untied": "norm: expected 'layer', got 'rms'"}, FAMILIES)
    ],
    "context": [
        Export("context(2, how='interpolate')", unfit=(*LEARNED, *RELATIVE)),
        Export("context(2, length=64)", unfit=(*LEARNED, *RELATIVE)),
    ],
    "copy": [
        Export("copy(mlp=9)"),
        Export("copy(embed=16)", {"gpt2": NARROW, "bert": NARROW}),
    ],
    "dense": [
        Export(
            "dense(mlp=((1, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0), (0, 0, 1, 0, 0, 0), (0, 0, 0, 1, 0, 0), "
            "(0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1), (1, 0, 2, 0, 0, 1)))"
        )
    ],
    "experts": [
        Export(
            "chain(upcycle(experts=3), experts(4))", dict.fromkeys(("gpt2", "bert", "t5"), MIXTURE)
        )
    ],
    "fresh": [Export("fresh(layers=3)", unfit=RELATIVE)],
    "given": [Export("given((), mlp=7)")],
    "gradmax": [Export("gradmax(mlp=7)", unfit=(*ROTARY, *RELATIVE))],
    "learned": [
        Export(
            "learned(depth=(('blocks.block.mlp.up', ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))),))",
            unfit=RELATIVE,
        )
    ],
    "lemon": [
        Export("lemon(mlp=9)"),
        Export("lemon(embed=12, mlp=9)", {"gpt2": NARROW}, POST_NORM),
        Export("lemon(embed=12, heads=3)", unfit=(*ROTARY, *POST_NORM)),
    ],
    "ligo": [Export("ligo(mlp=9, layers=3, batches=1)", unfit=RELATIVE)],
    "msg": [Export("msg(mlp=9)")],
    "pool": [
        Export(
            "pool(kv_heads=1)",
            {
                "gpt2": "kv_heads: 1 for 2 queries; in this family no heads share keys",
                "bert": "attention.q: expected the shape",
                "t5": "attention.q: expected the shape",
            },
        )
    ],
    "positions": [Export("positions(12)", unfit=(*ROTARY, *RELATIVE))],
    "regroup": [Export("regroup(kv_heads=4)", unfit=("gpt2", "bert", "t5"))],
    "stack": [
        Export("stack(layers=4)", unfit=RELATIVE),
        Export("stack(decoder_layers=6, branch='zero')", unfit=("gpt2", "llama", "bert")),
    ],
    "transplant": [Export("transplant(((2,), (0,), (1, 3)), output='first')")],
    "upcycle": [
        Export("upcycle(experts=3)", dict.fromkeys(("gpt2", "bert", "t5"), MIXTURE)),
        Export(
            "upcycle(experts=3, norm_topk_prob=False)",
            {
                **dict.fromkeys(("gpt2", "bert", "t5"), MIXTURE),
                "llama": "norm_topk_prob: expected True, got False",
            },
        ),
    ],
    "vocabulary": [Export("vocabulary(14)"), Export("vocabulary(14, gate=True)")],
    "warm": [Export("warm(mlp=9)")],
    "within": [Export("within(zeros(mlp=9), layers=(1,))", unfit=RELATIVE)],
    "zeros": [
        Export("zeros(mlp=9)"),
        Export("zeros(embed=12)", unfit=("gpt2", "bert")),
    ],
}


def families_of(row: Export) -> list[str]:
    """The families that a row is tried on."""
    return [f for f in dict.fromkeys((*FAMILIES, *row.refused)) if f not in row.unfit]


def grown(row: Export, family: str) -> Any:
    """The model of a family after the operator, fitted first if it has to be, its gates open."""
    small, op = build(family), parse(row.op)
    if isinstance(op, Fit):
        batches = [batch(small)] * op.batches
        op = fitting.fit(op, small, batches, _loss, key=jax.random.key(0)).operator
    big = gj.grow(op, small, key=jax.random.key(1))
    hidden = any(slot.arrays() for slot in axes_of(big).of_kind("gate"))
    return gj.ramp(big, 1.0) if hidden else big


def _loss(model: Any, rows: Any) -> Any:
    outputs = jax.vmap(model)(rows)
    return jnp.mean(getattr(outputs, "mlm_logits", outputs) ** 2)
