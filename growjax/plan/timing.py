"""When to grow and by how much: published laws, and triggers that read the losses of a run."""

import math
from collections.abc import Sequence

import numpy as np

from growjax.errors import PlanError, raise_all


def stacking_tokens(parameters: float, flops: float) -> float:
    """G_stack's law: the tokens to train a small model on before it is stacked.

    `log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74`, for a stacked model of `parameters` N without
    embeddings and `flops` C of the whole run (6 N times its tokens). The paper fits it for Llamas of
    410M to 3B parameters, and finds a factor of 4 in depth best of 2, 4 and 8.

    Du et al., "Stacking Your Transformers", NeurIPS 2024.

    **Example**

        stacking_tokens(7e9, 6 * 7e9 * 2e12)      # 1.1e10 tokens
    """
    faults = [
        f"{name}: expected more than {least:g}, got {value!r}"
        for name, value, least in (("parameters", parameters, 0), ("flops", flops, 1))
        if not value > least
    ]
    raise_all(PlanError, "G_stack's law does not say:", faults)
    exponent = 0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74
    return 10**exponent


def proportional_shares(stages: int, alpha: float = 1.0) -> tuple[float, ...]:
    """MIDAS's Prop-alpha schedule: stage i of n gets a share of the budget in proportion to `i ** alpha`.

    0 is equal shares. They add up to 1, as `Stage(share=...)` asks for.

    Saunshi et al., "On the Inductive Bias of Stacking Towards Improving Reasoning", NeurIPS 2024.

    **Example**

        proportional_shares(3, 1)       # (1/6, 1/3, 1/2)
    """
    if stages < 1:
        raise PlanError(f"stages: expected at least one, got {stages}")
    weights = np.arange(1, stages + 1, dtype=float) ** alpha
    return tuple((weights / weights.sum()).tolist())


def plateau(losses: Sequence[float], *, window: int, least: float) -> int | None:
    """The first step at which a loss has stopped to fall; None if it has not.

    The mean over the last `window` losses is less than `least` (a share, such as 0.01) below that of the
    window before. Losses are those of every step, oldest first: a trigger for the growth of a model that
    goes on training, and a fork of its run then.

    **Example**

        losses = [row["loss"] for row in read_journal(run) if row["kind"] == "step"]
        plateau(losses, window=200, least=0.005)
    """
    _check_window(window)
    values = np.asarray(losses, float)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    for end in range(2 * window, len(values) + 1):
        new = (sums[end] - sums[end - window]) / window
        old = (sums[end - window] - sums[end - 2 * window]) / window
        if new > old * (1 - least):
            return end
    return None


def mixing(
    grown: Sequence[float], whole: Sequence[float], *, window: int, close: float
) -> int | None:
    """The number of steps after a growth until a grown model is as good as one that was never small.

    Both losses are of the same steps, from the growth on, at a constant rate: the first step after which
    the mean over `window` of the grown model's is less than `close` (a share) above the other's. None if
    it stays above. A pilot's mixing time t, which depends on the data more than on the size, says when to
    grow a long run: at its end minus t and the decay.

    Bu et al., "Scaling Depth Capacity via Zero/One-layer Model Expansion", 2026.

    **Example**

        mixing(losses_of("runs/grown")[start:], losses_of("runs/whole")[start:], window=50, close=0.005)
    """
    _check_window(window)
    if len(grown) != len(whole):
        raise PlanError(
            f"grown, whole: expected losses of the same steps, got {len(grown)} and {len(whole)}"
        )
    small, large = (np.concatenate([[0.0], np.cumsum(each)]) for each in (grown, whole))
    for end in range(window, len(small)):
        ours, theirs = small[end] - small[end - window], large[end] - large[end - window]
        if ours <= theirs * (1 + close):
            return end
    return None


def _check_window(window: int) -> None:
    if window < 1:
        raise PlanError(f"window: expected at least one step, got {window}")
