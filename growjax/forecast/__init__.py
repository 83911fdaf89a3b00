"""The cost of a plan, and whether it fits: dry run, XLA count, pods, memory, calibration."""

from growjax.extras import require


require("growjax.forecast", "rich")
