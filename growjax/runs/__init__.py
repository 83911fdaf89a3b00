"""A run's folder: checkpoints with their lineage, the journal, the batches, the starting model."""

from growjax.extras import require


require("growjax.runs", "orbax", "rich")
