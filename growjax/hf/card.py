"""The folder of a grown pre-trained model, with its certificate and a model card."""

import json
from pathlib import Path
from typing import Any

from growjax import __version__
from growjax.axes import sizes
from growjax.certificate import Certificate
from growjax.cost import parameters
from growjax.growth import Chain, Operator
from growjax.hf.companions import base_model, front_matter
from growjax.hf.convert import save
from growjax.values import to_dict


def write_grown(
    op: Operator | Chain,
    model: Any,
    small: Any,
    certificate: Certificate,
    source: Path,
    out: Path,
    *,
    seed: int,
    rounding: float | None = None,
    **options: Any,
) -> None:
    """Write a grown model as `save` does, with `certificate.json` and a model card as `README.md`.

    **Arguments**

    - `small`, `source`: the model that was grown, and the folder that it came from.
    - `seed`: the seed of the operator's draws.
    - `rounding`: the largest change of an output when the grown parameters were cast to the dtype of the
      file, relative to the largest output; None if they were not cast.
    - `options`: further arguments of `save`.
    """
    record = {"operator": to_dict(op), "seed": seed, "certificate": certificate.to_dict()}
    stored = f"Its parameters are stored in {model.embedding.table.dtype}"
    if rounding is not None:
        stored += f", which moves outputs by {rounding:.1e} of the largest"
    card = _CARD.format(
        metadata=front_matter(source),
        source=base_model(source),
        version=__version__,
        op=op,
        seed=seed,
        old=f"{parameters(small):,}",
        new=f"{parameters(model):,}",
        sizes=", ".join(f"{axis} {size}" for axis, size in sizes(model).items()),
        promise=_PROMISES[certificate.exactness],
        stored=stored,
        learning=_learning(certificate),
        certificate=certificate,
    )
    texts = {"certificate.json": json.dumps(record, indent=2) + "\n", "README.md": card}
    save(model, out, source=source, more=texts, **options)


def _learning(certificate: Certificate) -> str:
    """A sentence that says which of the new coordinates training cannot move, or that it can move all."""
    faults = []
    for axis, (_, dead) in certificate.dead.items():
        if dead:
            share = f"{dead:.0%}" if dead >= 0.005 else "under 1%"
            faults.append(
                f"{share} of the new coordinates of {axis} still have no gradient after two steps"
            )
    for axis, count in certificate.locked.items():
        if count:
            faults.append(
                f"{count} copies along {axis} move exactly like their source, and never differ from it"
            )
    if faults:
        return f"**Some of the new coordinates cannot learn**: {'; '.join(faults)}."
    return "All new coordinates can learn: each gets a gradient, and no copy moves just like its source."


_PROMISES = {
    "exact": "It computes what the source computes, up to rounding.",
    "exact-given-init": "It computes what the source computes, up to rounding.",
    "approximate": "It does **not** compute what the source computes; the certificate has the jump.",
}
_CARD = """---
{metadata}---

# {source}, grown

Made from `{source}` by growjax {version}, without training:

    {op}

with seed {seed}. {promise} It has {new} parameters, the source has {old}. Its sizes are: {sizes}.
{stored}. {learning}

The certificate, measured on random tokens before it was written (`certificate.json` has it in full):

```text
{certificate}
```

Licence, training data and limits are those of the source.
"""
