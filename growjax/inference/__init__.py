"""Axes of a model that nobody declared: found by tracing it once, and written as an annotation."""

from growjax.inference.inferred import infer as infer
