"""The evaluation of a run's model: its loss on a fixed set of held-out windows, and the hooks' scores."""

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


# (model to evaluate, record of the step before) -> numbers by name
Hook = Callable[[Any, Step], Mapping[str, float]]
# The compiled evaluation: (state, batch, level of the gates) -> losses and weights, [B, T] both
Evaluate = Callable[[Any, Any, Any], tuple[Any, Any]]


class Judge:
    """Evaluates the model of a run, always on the same windows.

    Windows are spread evenly over the held-out text and made by the plan's own objective, so that they
    depend neither on the batch nor on the stage. The last batch is filled up with windows of weight 0.
    """

    def __init__(self, plan: Plan, feed: Feed, mesh: Mesh, hooks: Sequence[Hook]):
        self.plan, self.feed, self.mesh, self.hooks = plan, feed, mesh, hooks
        self._windows: dict[int, Mapping[str, np.ndarray]] = {}  # by the requested number of them

    def held_out(
        self, evaluate: Evaluate, state: Any, level: float, *, windows: int, batch: int
    ) -> HeldOut:
        """The losses on a number of windows (or on all, if the text has fewer), `batch` at a time."""
        rows = self._rows(windows)
        count = len(rows["weights"])
        sums, weights = np.zeros(count), np.zeros(count)
        for start in range(0, count, batch):
            index = np.arange(start, min(start + batch, count))
            started = self._started(evaluate, state, level, rows, index, batch)
            losses, position_weights = started()
            sums[index] = (losses * position_weights).sum(1)[: len(index)]
            weights[index] = position_weights.sum(1)[: len(index)]
        return HeldOut(sums, weights)

    def by_source(self, held_out: HeldOut, windows: int) -> dict[str, float]:
        """The held-out loss on the text of each of several sources, by `held_out/` and its name."""
        parts_of = getattr(self.feed, "held_out_parts", None)
        parts = {} if parts_of is None else parts_of(self.plan.objective, windows)
        losses = {}
        for name, rows in parts.items():
            weight = held_out.weights[rows].sum()
            if weight > 0:
                losses[f"held_out/{name}"] = float(held_out.sums[rows].sum() / weight)
        return losses

    def probe(
        self, evaluate: Evaluate, state: Any, level: float, batch: int
    ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """Start to evaluate one batch of windows, which certifies a growth.

        Returns a function that waits for the losses and weights `[batch, T]`.
        """
        rows = self._rows(batch)
        index = np.arange(len(rows["weights"]))
        return self._started(evaluate, state, level, rows, index, batch)

    def scores(self, model: Any, step: Step) -> dict[str, float]:
        """The numbers of all hooks, called with a model and the last step.

        Raises `TrainingError` that names the hook and the step, if a hook fails, returns anything but
        numbers by name, or returns a name of another hook.
        """
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
            repeated = sorted(new.keys() & scores.keys())
            raise_all(
                TrainingError, f"{where}: another hook returns these names as well:", repeated
            )
            scores |= new
        return scores

    def _rows(self, windows: int) -> Mapping[str, np.ndarray]:
        """The examples of this many windows, made once."""
        if windows not in self._windows:
            self._windows[windows] = self.feed.held_out(self.plan.objective, windows)
        return self._windows[windows]

    def _started(
        self,
        evaluate: Evaluate,
        state: Any,
        level: float,
        rows: Mapping[str, np.ndarray],
        index: np.ndarray,
        batch: int,
    ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """Start to evaluate the windows `index`.

        Returns a function that waits for the losses and weights: float64 `[batch, T]`, padded with
        weight 0.
        """
        # The compiled program takes whole batches, so the last window is repeated
        filled = np.concatenate([index, np.full(batch - len(index), index[-1])])
        per_host = batch // jax.process_count()
        mine = slice(jax.process_index() * per_host, (jax.process_index() + 1) * per_host)
        examples = {name: values[filled[mine]] for name, values in rows.items()}
        examples = from_host(examples, self.mesh)
        results = evaluate(state, examples, np.float32(level))
        real = np.arange(batch) < len(index)

        def wait() -> tuple[np.ndarray, np.ndarray]:
            losses, weights = jax.device_get(results)
            return losses.astype(np.float64), weights.astype(np.float64) * real[:, None]

        return wait
