"""The axes of a model without annotations, inferred from one trace and written as an annotation."""

from growjax.inference.inferred import infer as infer
