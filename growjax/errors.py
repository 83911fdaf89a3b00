"""The errors growjax raises. Each is a `ValueError` that lists every fault of its input.

A check collects all faults and raises once. Each fault is a line that names the argument or leaf, the
expected and the actual value, and the remedy.
"""

import traceback
from collections.abc import Iterable
from pathlib import Path


class GrowjaxError(ValueError):
    """Base class of every error that growjax raises on purpose."""


class FormatError(GrowjaxError):
    """A file does not hold a valid value, or a value cannot be written to a file."""


class AxisError(GrowjaxError):
    """Axes are misdeclared, unmatched, unknown or disagree about a size."""


class GrowthError(GrowjaxError):
    """An operator cannot be applied to this model."""


class GateError(GrowjaxError):
    """A gate is missing, still open, or asked for a level outside [0, 1]."""


class SubnetError(GrowjaxError):
    """A sub-network, or a schedule of them, does not fit the model."""


class StateError(GrowjaxError):
    """Optimizer state cannot be carried through an operator, or a part of a model not be held still."""


class CostError(GrowjaxError):
    """A program holds an operation whose FLOPs cannot be counted."""


class BudgetError(GrowjaxError):
    """A clock has no price for an operation, or a budget is invalid."""


class UndecayedError(BudgetError):
    """A score was taken before the learning rate had fallen, and is not comparable."""


class SelectError(GrowjaxError):
    """A rule for choosing examples contradicts itself, or lacks the model that it compares with."""


class PlanError(GrowjaxError):
    """A training plan contradicts itself or does not fit the model."""


class DataError(GrowjaxError):
    """The text to train on is missing, unreadable or too short."""


class LayoutError(GrowjaxError):
    """Devices, hosts or shardings do not fit together."""


class CheckpointError(GrowjaxError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class DamagedError(CheckpointError):
    """A checkpoint's files were changed, cut off or lost since they were written."""


class EvalError(GrowjaxError):
    """A task, its data, a tokenizer or a model do not fit together."""


class HuggingFaceError(GrowjaxError):
    """A Hugging Face folder is broken or unknown, or a model cannot be written as one."""


class TrainingError(GrowjaxError):
    """Training cannot go on: a loss is not finite, or a growth changed the function."""


class ExtraError(GrowjaxError, ImportError):
    """A package is missing that one of the extras of `growjax[...]` installs."""


def raise_all(error: type[GrowjaxError], headline: str, complaints: Iterable[str]) -> None:
    """Raise `error` with the headline and one line per complaint; without complaints, do nothing."""
    complaints = list(complaints)
    if complaints:
        raise error("\n  - ".join([headline, *complaints]))


def expect_one_of(
    error: type[GrowjaxError], name: str, value: object, allowed: Iterable[object]
) -> None:
    """Raise `error` unless the argument `name` has one of the allowed values."""
    allowed = tuple(allowed)
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise error(f"{name}: expected one of {choices}, got {value!r}")


def raised(error: Exception) -> str:
    """An exception of somebody's own code as one line: its type, what it says, and where it comes from.

    That is the innermost line outside of installed packages, which is the user's where a package raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    where = [f" (in {f.name}, {Path(f.filename).name}:{f.lineno})" for f in (own or frames)[-1:]]
    return f"{type(error).__name__}: {error}{''.join(where)}"
