"""A run's folder: checkpoints with their lineage, the journal, the data it reads, where it starts."""

from growjax.extras import require


require("growjax.runs", "orbax", "rich")
