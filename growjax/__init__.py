"""growjax: train a Transformer for less, by growing it or by training part of it, and know why."""

import importlib

from growjax import growth as growth
from growjax import models as models
from growjax import nn as nn
from growjax.annotation import Annotated as Annotated
from growjax.annotation import annotate as annotate
from growjax.axes import axes_of as axes_of
from growjax.axes import buffer as buffer
from growjax.axes import gate as gate
from growjax.axes import param as param
from growjax.axes import partition as partition
from growjax.axes import sizes as sizes
from growjax.certificate import Certificate as Certificate
from growjax.certificate import certify as certify
from growjax.gates import Gate as Gate
from growjax.gates import gated as gated
from growjax.gates import ramp as ramp
from growjax.gates import settle as settle
from growjax.growth import Operator as Operator
from growjax.growth import chain as chain
from growjax.growth import copy as copy
from growjax.growth import grow as grow
from growjax.growth import msg as msg
from growjax.growth import stack as stack
from growjax.growth import zeros as zeros
from growjax.maps import NONE as NONE
from growjax.maps import AxisMap as AxisMap
from growjax.optim import carry as carry
from growjax.subnet import Subnet as Subnet
from growjax.subnet import path_schedule as path_schedule
from growjax.subnet import progressive_layer_drop as progressive_layer_drop
from growjax.subnet import random_part as random_part
from growjax.subnet import random_path as random_path
from growjax.subnet import step_key as step_key


def __getattr__(name: str):
    """Plans are one dot deep too, but what runs them (optax, grain, rich) is loaded when it is used."""
    if name == "hf":
        return importlib.import_module("growjax.hf")
    if name in ("Plan", "Stage"):
        return getattr(importlib.import_module("growjax.train"), name)
    raise AttributeError(f"module 'growjax' has no attribute {name!r}")
