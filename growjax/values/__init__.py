"""Values that files hold, such as plans, operators and clocks: their ranges, their names and their codec.

A value is an instance of a frozen dataclass, an `eqx.Module` or a named tuple. Its class declares the
type and range of every field in its annotations (`ranges`), has the same name in every file (`names`),
and is written and read by one pair of functions, `to_dict` and `from_dict` (`codec`).
"""

from growjax.values.checks import check as check
from growjax.values.checks import check_key as check_key
from growjax.values.checks import tuples as tuples
from growjax.values.codec import from_dict as from_dict
from growjax.values.codec import from_json as from_json
from growjax.values.codec import read as read
from growjax.values.codec import to_dict as to_dict
from growjax.values.codec import write as write
from growjax.values.names import allow as allow
from growjax.values.names import allow_option as allow_option
from growjax.values.names import is_value as is_value
from growjax.values.names import path_of as path_of
from growjax.values.names import register as register
from growjax.values.names import resolve_function as resolve_function
from growjax.values.names import tag_of as tag_of
from growjax.values.ranges import Faults as Faults
from growjax.values.ranges import File as File
from growjax.values.ranges import Folder as Folder
from growjax.values.ranges import Name as Name
from growjax.values.ranges import Range as Range
from growjax.values.ranges import Size as Size
from growjax.values.ranges import at_least as at_least
from growjax.values.ranges import base as base
from growjax.values.ranges import faults as faults
from growjax.values.ranges import field_faults as field_faults
from growjax.values.ranges import fits as fits
from growjax.values.ranges import one_of as one_of
from growjax.values.ranges import positive as positive
from growjax.values.ranges import ranged as ranged
from growjax.values.ranges import short as short
