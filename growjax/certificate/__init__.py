"""Certificates: the effects of an operator on one model and one batch, as a printable record."""

from growjax.certificate.coordinates import filled as filled
from growjax.certificate.coordinates import new_coordinates as new_coordinates
from growjax.certificate.coordinates import shapes as shapes
from growjax.certificate.measured import call as call
from growjax.certificate.measured import certify as certify
from growjax.certificate.measured import distance as distance
from growjax.certificate.measured import probe as probe
from growjax.certificate.measured import shown_outputs as shown_outputs
from growjax.certificate.record import Certificate as Certificate
from growjax.certificate.record import Difference as Difference
