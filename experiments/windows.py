"""Losses of trained models by window of held-out text, kept next to a study's lines of results.

A difference of two arms has an error of the text as well as of the seed. Losses of the same windows,
paired, say how large it is. The windows depend on the text and the objective alone, on no batch and no
stage.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growjax.data import Corpus, Objective, held_out_batch
from growjax.train import cross_entropy


# How many windows losses are kept of
WINDOWS = {"smoke": 64, "small": 4096, "paper": 4096}
# How many are computed at once
_BATCH = 64
Key = tuple[str, str, str, int]


@jax.jit
def token_losses(model: Any, examples: dict[str, Any]) -> Any:
    """Losses and weights of some examples; one program for every model of the same shapes."""
    losses, weights, *_ = jax.vmap(lambda row: cross_entropy(model, row))(examples)
    return losses, weights


def windows_of(corpus: Corpus, objective: Objective, rows: int) -> dict[str, np.ndarray]:
    """At most `rows` windows at even distances, none of which overlap, as examples of an objective."""
    length = objective.raw_length + objective.lookahead
    return held_out_batch(corpus, objective, max(1, min(rows, len(corpus) // length)))


def digest_of(windows: Mapping[str, np.ndarray]) -> str:
    """What tells one set of windows from another."""
    digest = hashlib.sha256()
    for name in sorted(windows):
        digest.update(name.encode() + np.ascontiguousarray(windows[name]).tobytes())
    return digest.hexdigest()[:16]


def losses_by_window(model: Any, windows: Mapping[str, np.ndarray]) -> np.ndarray:
    """The sum of losses in nats and the number of predictions of each window; float64[windows, 2]."""
    rows = len(windows["targets"])
    pairs = np.zeros((rows, 2))
    for start in range(0, rows, _BATCH):
        # The last batch is filled up with the last window, so that all have one program
        places = np.minimum(np.arange(start, start + _BATCH), rows - 1)
        part = {name: jnp.asarray(value[places]) for name, value in windows.items()}
        losses, weights = (np.asarray(x, np.float64) for x in token_losses(model, part))
        stop = min(start + _BATCH, rows)
        pairs[start:stop, 0] = (losses * weights).sum(1)[: stop - start]
        pairs[start:stop, 1] = weights.sum(1)[: stop - start]
    return pairs


# Files -------------------------------------------------------------------------------------------


class WindowFile:
    """The losses by window of a file of results, in a file next to it.

    A line for each set of windows has the numbers of predictions (uint16); a line for each run has its
    mean loss over all predictions, and each window's mean loss in half precision: 1/2048 of it is the
    largest error.

    **Example**

        file = WindowFile(Path("results/small.jsonl"))
        sums, counts = file.read()["gpt", "1x", "msg", 0].T
        sums.sum() / counts.sum()
    """

    def __init__(self, results: Path) -> None:
        self.path = results.with_name(f"{results.stem}-windows.jsonl")

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):
                    yield json.loads(line)

    def keys(self) -> set[Key]:
        """The runs that have a line: workload, budget, arm, seed."""
        return {_key(line) for line in self._lines() if "losses" in line}

    def read(self) -> dict[Key, np.ndarray]:
        """Of each run, the sum of losses in nats and the number of predictions; float64[windows, 2]."""
        counts, windows = {}, {}
        for line in self._lines():
            if "losses" in line:
                count = counts[line["windows"]]
                sums = _decoded(line["losses"], "<f2") * count
                windows[_key(line)] = np.stack([sums, count], axis=1)
            else:
                counts[line["windows"]] = _decoded(line["counts"], "<u2")
        return windows

    def add(self, key: Key, score: float, model: Any, windows: Mapping[str, np.ndarray]) -> None:
        """Judge a model by some windows and add its line. `score` is the score in its line of results."""
        self.write(key, score, losses_by_window(model, windows), digest_of(windows))

    def write(self, key: Key, score: float, pairs: np.ndarray, digest: str) -> None:
        """Add a line of losses: `pairs` as `read` returns them, `digest` of their windows."""
        sums, counts = pairs.T
        losses = np.divide(sums, counts, out=np.zeros(len(counts)), where=counts > 0)
        lines = []
        if all(line["windows"] != digest for line in self._lines()):
            lines.append(
                {"windows": digest, "rows": len(counts), "counts": _encoded(counts, "<u2")}
            )
        lines.append(
            {
                **dict(zip(("workload", "budget", "arm", "seed"), key, strict=True)),
                "score": score,
                "mean": float(sums.sum() / counts.sum()),
                "windows": digest,
                "losses": _encoded(losses, "<f2"),
            }
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _key(line: Mapping[str, Any]) -> Key:
    return line["workload"], line["budget"], line["arm"], line["seed"]


def _encoded(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _decoded(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).astype(float)
