"""Growth operators: pure functions from parameters to larger parameters."""

from growjax.growth.births import Births as Births
from growjax.growth.births import new as new
from growjax.growth.copying import copy as copy
from growjax.growth.depth import fresh as fresh
from growjax.growth.depth import solar as solar
from growjax.growth.depth import sources as sources
from growjax.growth.depth import stack as stack
from growjax.growth.masked import msg as msg
from growjax.growth.matrices import dense as dense
from growjax.growth.operator import Chain as Chain
from growjax.growth.operator import Exactness as Exactness
from growjax.growth.operator import Operator as Operator
from growjax.growth.operator import atoms as atoms
from growjax.growth.operator import chain as chain
from growjax.growth.operator import grow as grow
from growjax.growth.operator import resolve as resolve
from growjax.growth.regrouping import regroup as regroup
from growjax.growth.upcycling import experts as experts
from growjax.growth.upcycling import upcycle as upcycle
from growjax.growth.written import parse as parse
from growjax.growth.zeroed import zeros as zeros
