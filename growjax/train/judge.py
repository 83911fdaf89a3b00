"""What a model is worth: its loss on held-out windows that stay the same, and what hooks say of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from growjax.errors import GrowjaxError, TrainingError, raise_all
from growjax.parallel import from_host
from growjax.plan.plan import Plan
from growjax.runs.feed import Feed
from growjax.runs.records import HeldOut, Step


# The model that is judged and the record of the step it was judged after, to numbers by name
Hook = Callable[[Any, Step], Mapping[str, float]]
# The compiled evaluation: (state, batch, level) to losses [B, T] and their weights
Evaluate = Callable[[Any, Any, Any], tuple[Any, Any]]


class Judge:
    """Judges the model of a run, always on the same windows.

    Windows are spread evenly over the whole held-out text and made by the plan's own objective, whatever
    the stage trains on: neither the batch nor the stage has a say in what is read. Batches only carry
    them to the device, and the last one is filled up with windows of no weight.
    """

    def __init__(self, plan: Plan, feed: Feed, mesh: Mesh, hooks: Sequence[Hook]):
        self.plan, self.feed, self.mesh, self.hooks = plan, feed, mesh, hooks
        self._windows: dict[int, Mapping[str, np.ndarray]] = {}

    def held_out(
        self, evaluate: Evaluate, state: Any, level: float, *, windows: int, batch: int
    ) -> HeldOut:
        """The losses on a number of windows (or on all there are), `batch` at a time."""
        rows = self._rows(windows)
        count = len(rows["weights"])
        sums, weights = np.zeros(count), np.zeros(count)
        for start in range(0, count, batch):
            index = np.arange(start, min(start + batch, count))
            losses, counts = self._evaluated(evaluate, state, level, rows, index, batch)
            sums[index] = (losses * counts).sum(1)[: len(index)]
            weights[index] = counts.sum(1)[: len(index)]
        return HeldOut(sums, weights)

    def probe(
        self, evaluate: Evaluate, state: Any, level: float, batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses and weights `[batch, T]` of one batch of windows: what a growth is certified on."""
        rows = self._rows(batch)
        index = np.arange(len(rows["weights"]))
        return self._evaluated(evaluate, state, level, rows, index, batch)

    def scores(self, model: Any, step: Step) -> dict[str, float]:
        """What all hooks say of a model; raises `TrainingError` that names the hook and the step."""
        scores: dict[str, float] = {}
        for hook in self.hooks:
            name = getattr(hook, "__name__", type(hook).__name__)
            where = f"plan {self.plan.name!r}: hook {name}, after step {step.step}"
            try:
                new = {key: float(value) for key, value in hook(model, step).items()}
            except GrowjaxError:
                raise
            except Exception as error:
                raise TrainingError(
                    f"{where}: expected numbers by name, got {type(error).__name__}: {error}"
                ) from error
            twice = sorted(new.keys() & scores.keys())
            raise_all(TrainingError, f"{where}: another hook says these, too:", twice)
            scores |= new
        return scores

    def _rows(self, windows: int) -> Mapping[str, np.ndarray]:
        if windows not in self._windows:
            self._windows[windows] = self.feed.held_out(self.plan.objective, windows)
        return self._windows[windows]

    def _evaluated(
        self,
        evaluate: Evaluate,
        state: Any,
        level: float,
        rows: Mapping[str, np.ndarray],
        index: np.ndarray,
        batch: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses and weights of the windows with these numbers; float64, 0 where a batch is filled up."""
        # The compiled program takes whole batches: the last window again, with no weight
        filled = np.concatenate([index, np.full(batch - len(index), index[-1])])
        each = batch // jax.process_count()
        mine = slice(jax.process_index() * each, (jax.process_index() + 1) * each)
        examples = {name: values[filled[mine]] for name, values in rows.items()}
        examples = from_host(examples, self.mesh)
        losses, weights = jax.device_get(evaluate(state, examples, np.float32(level)))
        real = np.arange(batch) < len(index)
        return losses.astype(np.float64), weights.astype(np.float64) * real[:, None]
