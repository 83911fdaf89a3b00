"""The folder of a grown pre-trained model, with a certificate and a card that says how it was made."""

import json
from pathlib import Path
from typing import Any

from growjax import __version__
from growjax.axes import sizes
from growjax.certificate import Certificate
from growjax.cost import parameters
from growjax.growth import grow
from growjax.hf.convert import save
from growjax.values import to_dict


def written_by(
    op: Any,
    model: Any,
    certificate: Certificate,
    source: Path,
    out: Path,
    *,
    key: Any,
    seed: int,
) -> None:
    """Grow a model and write it as `save` does, with `certificate.json` and `README.md`."""
    big = grow(op, model, key=key)
    record = {"operator": to_dict(op), "seed": seed, "certificate": certificate.to_dict()}
    card = _CARD.format(
        source=source.name,
        version=__version__,
        op=op,
        seed=seed,
        old=f"{parameters(model):,}",
        new=f"{parameters(big):,}",
        sizes=", ".join(f"{axis} {size}" for axis, size in sizes(big).items()),
        promise=_PROMISES[certificate.exactness],
        certificate=certificate,
    )
    more = {"certificate.json": json.dumps(record, indent=2) + "\n", "README.md": card}
    save(big, out, source=source, more=more)


_PROMISES = {
    "exact": "It computes what the source computes, up to rounding.",
    "exact-given-init": "It computes what the source computes, up to rounding.",
    "approximate": "It does **not** compute what the source computes; the certificate has the jump.",
}
_CARD = """---
tags:
- growjax
---

# {source}, grown

Made from `{source}` by growjax {version}, without training:

    {op}

with seed {seed}. {promise} It has {new} parameters, the source has {old}. Its sizes are: {sizes}.

The certificate, measured on random tokens before it was written (`certificate.json` has it in full):

```text
{certificate}
```

Licence, training data and limits are those of the source.
"""
