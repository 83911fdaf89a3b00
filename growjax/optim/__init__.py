"""Optimizers for models that grow: update rules, growth of their state, and ages of coordinates."""

from growjax.optim.age import adamw as adamw
from growjax.optim.age import matrices as matrices
from growjax.optim.age import not_biases as not_biases
from growjax.optim.age import scale_by_adam as scale_by_adam
from growjax.optim.age import scale_by_ademamix as scale_by_ademamix
from growjax.optim.carrying import carry as carry
from growjax.optim.divided import Curve as Curve
from growjax.optim.divided import Part as Part
from growjax.optim.divided import Parts as Parts
from growjax.optim.divided import decayed_weights as decayed_weights
from growjax.optim.freezing import freeze as freeze
from growjax.optim.muon import hidden_matrices as hidden_matrices
from growjax.optim.muon import scale_by_muon as scale_by_muon
from growjax.optim.partwise import parts as parts
from growjax.optim.rules import Rule as Rule
from growjax.optim.rules import rule as rule
from growjax.optim.rules import schedule_free as schedule_free
from growjax.optim.scale import scale_by_parameter as scale_by_parameter
from growjax.optim.sophia import scale_by_sophia as scale_by_sophia
from growjax.optim.transfer import Transfer as Transfer
