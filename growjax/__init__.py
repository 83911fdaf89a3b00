"""growjax: train a Transformer for less, by growing it or by training part of it, and know why.

Every room is one dot deep: `import growjax as gj`, then `gj.msg`, `gj.data.Text` or `gj.train.train`.
What operators need is loaded at once, and the rest (data, plans, training, reports) on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from growjax import algebra as algebra
from growjax import annotation as annotation
from growjax import axes as axes
from growjax import cards as cards
from growjax import certificate as certificate
from growjax import deferred as deferred
from growjax import draws as draws
from growjax import errors as errors
from growjax import gates as gates
from growjax import growth as growth
from growjax import inference as inference
from growjax import maps as maps
from growjax import models as models
from growjax import nn as nn
from growjax import optim as optim
from growjax import specs as specs
from growjax import state as state
from growjax import subnet as subnet
from growjax import trace as trace
from growjax import trees as trees
from growjax import values as values
from growjax.algebra import NONE as NONE
from growjax.algebra import AxisMap as AxisMap
from growjax.annotation import Annotated as Annotated
from growjax.annotation import annotate as annotate
from growjax.axes import active as active
from growjax.axes import axes_of as axes_of
from growjax.axes import branch as branch
from growjax.axes import buffer as buffer
from growjax.axes import gate as gate
from growjax.axes import param as param
from growjax.axes import partition as partition
from growjax.axes import sizes as sizes
from growjax.axes import stacked as stacked
from growjax.cards import Card as Card
from growjax.cards import Paper as Paper
from growjax.cards import cite as cite
from growjax.certificate import Certificate as Certificate
from growjax.certificate import certify as certify
from growjax.gates import Gate as Gate
from growjax.gates import gated as gated
from growjax.growth import Births as Births
from growjax.growth import Operator as Operator
from growjax.growth import aki as aki
from growjax.growth import chain as chain
from growjax.growth import copy as copy
from growjax.growth import dense as dense
from growjax.growth import experts as experts
from growjax.growth import fresh as fresh
from growjax.growth import lemon as lemon
from growjax.growth import msg as msg
from growjax.growth import new as new
from growjax.growth import positions as positions
from growjax.growth import regroup as regroup
from growjax.growth import stack as stack
from growjax.growth import upcycle as upcycle
from growjax.growth import vocabulary as vocabulary
from growjax.growth import warm as warm
from growjax.growth import zeros as zeros
from growjax.inference import infer as infer
from growjax.optim import carry as carry
from growjax.state import State as State
from growjax.state import grow as grow
from growjax.state import ramp as ramp
from growjax.state import settle as settle
from growjax.subnet import Subnet as Subnet
from growjax.subnet import layer_skip as layer_skip
from growjax.subnet import loop as loop
from growjax.subnet import nested as nested
from growjax.subnet import path_schedule as path_schedule
from growjax.subnet import progressive_layer_drop as progressive_layer_drop
from growjax.subnet import random_part as random_part
from growjax.subnet import random_path as random_path
from growjax.subnet import random_tokens as random_tokens
from growjax.subnet import step_key as step_key
from growjax.values import register as register


if TYPE_CHECKING:
    from growjax import advise as advise
    from growjax import budget as budget
    from growjax import cost as cost
    from growjax import data as data
    from growjax import evals as evals
    from growjax import fitting as fitting
    from growjax import forecast as forecast
    from growjax import hf as hf
    from growjax import parallel as parallel
    from growjax import plan as plan
    from growjax import programs as programs
    from growjax import report as report
    from growjax import runs as runs
    from growjax import select as select
    from growjax import testing as testing
    from growjax import train as train
    from growjax.plan import Plan as Plan
    from growjax.plan import Stage as Stage


__version__ = "0.2.0"

# The names above that only a type checker has seen, and the module of each
_ROOMS = (
    "advise budget cost data evals fitting forecast hf parallel plan programs report runs select "
    "testing train"
)
_LAZY = {name: f"growjax.{name}" for name in _ROOMS.split()}
_PLANS = {"Plan": "growjax.plan", "Stage": "growjax.plan"}


def __getattr__(name: str) -> Any:
    """A room, or a name out of one, that is loaded when it is first used (PEP 562)."""
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    if name in _PLANS:
        return getattr(importlib.import_module(_PLANS[name]), name)
    raise AttributeError(f"module 'growjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_PLANS})
