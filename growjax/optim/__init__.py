"""Optimizers that know growth: state through operators, and an age for every coordinate."""

from growjax.optim.age import adamw as adamw
from growjax.optim.age import matrices as matrices
from growjax.optim.age import scale_by_adam as scale_by_adam
from growjax.optim.carry import carry as carry
