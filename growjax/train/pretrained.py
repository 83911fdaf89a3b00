"""Growing the model in a Hugging Face folder into another folder, in bounded memory."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from growjax.certificate import Certificate, distance
from growjax.certificate.coordinates import shapes
from growjax.certificate.part import shapes_in
from growjax.certificate.streaming import (
    Progress,
    certify_deferred,
    rows_of,
    streamed,
    with_rows,
)
from growjax.cost import parameters
from growjax.errors import CheckpointError, GrowthError
from growjax.gates import is_gated
from growjax.growth.leafwise import SMALL, grow_deferred
from growjax.hf.card import write_grown
from growjax.hf.convert import check_dtype, has_halves, load_deferred, with_dtype
from growjax.plan.worked import purpose_key
from growjax.train.commands import operator_of, random_batch


def grow_pretrained(
    by: str,
    to: Mapping[str, int],
    source: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    shard: int = 5 * 10**9,
    progress: Progress = lambda text, share: None,
    small: int = SMALL,
    most: int = 2**30,
) -> Certificate:
    """Grow the model in a Hugging Face folder and write it to another one, with a certificate and a card.

    Nothing is held whole: parameters are read, grown, certified and written a layer at a time
    (`growjax.growth.leafwise`). `out` appears under its name when all of it is written.

    **Arguments**

    - `by`, `to`: those of `operator_of`.
    - `dtype`: the type of the parameters to write. By default it is that of the source, but float32 for
      one of 16 bits, which cannot represent the shares of copies exactly. Parameters of 16 bits are grown
      in float32, and the card states how much another type changes the outputs.
    - `shard`: the largest size of a file of weights, in bytes.
    - `progress`: gets a text for each part of the work, with None, and again with the share of it that is
      done.
    - `small`, `most`: as for `grow_deferred` and `certify_deferred`.

    Raises `GrowthError` for an operator that adds gates, which stock models cannot have, and
    `CheckpointError` if `out` exists or the certificate is not passed; nothing is written then.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already, and nothing is overwritten")
    check_dtype(dtype)
    progress(f"reading {source}", None)
    model = load_deferred(source, dtype="float32" if has_halves(source) else None)
    op = operator_of(by, to, model)
    if is_gated(shapes(op, shapes_in(model))):
        raise GrowthError(
            f"by: {op} leaves gates at 0, and a stock model has none; use copy or zeros for widths, "
            "expand for layers, and vocabulary and experts without a gate (gated=False). Or grow in a "
            "stage of a plan that starts from this folder, with a ramp that opens the gates, and export "
            "the run"
        )
    key = purpose_key(seed, "grow")
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since the usual place of temporary files may be in memory
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=parent) as scratch:
        big = grow_deferred(op, model, scratch, key=key, small=small)
        batch = lambda model: random_batch(model, seed)  # noqa: E731
        certificate = certify_deferred(
            op,
            model,
            big,
            batch,
            scratch,
            key=key,
            seed=seed,
            least=small,
            most=most,
            progress=progress,
        )
        if not certificate.passed:
            raise CheckpointError(f"{source}: {op} does not do what it promises:\n{certificate}")
        stored, rounding = big, None
        if dtype is not None:
            stored = with_dtype(big, dtype)
            progress(f"measuring what {dtype} changes", None)
            ids = rows_of(op, model, seed)
            tokens = batch(with_rows(model, ids))
            exact, rounded = (streamed(with_rows(x, ids), tokens) for x in (big, stored))
            rounding = distance(exact, rounded)[1]

        def written(name: str, done: int, total: int) -> None:
            sizes = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
            progress(f"writing {out}: {sizes}, {name}", done / total)

        progress(f"writing {parameters(stored):,} parameters to {out}", None)
        write_grown(
            op,
            stored,
            model,
            certificate,
            source,
            out,
            seed=seed,
            rounding=rounding,
            shard=shard,
            progress=written,
        )
    return certificate
