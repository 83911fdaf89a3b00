"""The axes and roles of a program's parameters, from a walk over its jaxpr."""

from growjax.trace.dims import Node as Node
from growjax.trace.dims import factored as factored
from growjax.trace.dims import unify as unify
from growjax.trace.expressions import Expressions as Expressions
from growjax.trace.indices import Read as Read
from growjax.trace.indices import reads as reads
from growjax.trace.program import Differs as Differs
from growjax.trace.program import Program as Program
from growjax.trace.program import grown_shape as grown_shape
from growjax.trace.program import live as live
from growjax.trace.program import powers as powers
from growjax.trace.program import tie as tie
from growjax.trace.program import trace as trace
from growjax.trace.program import unbalanced as unbalanced
from growjax.trace.roles import Place as Place
from growjax.trace.roles import Roles as Roles
