"""Axes for models that growjax did not write: declared from outside, by leaf path."""

from growjax.annotation.annotated import Annotated as Annotated
from growjax.annotation.annotated import annotate as annotate
