"""Tests that need the TPU compiler, and no TPU: `make test-tpu` has an environment with it."""

import importlib.util


collect_ignore = (
    []
    if importlib.util.find_spec("libtpu")
    else ["test_attention.py", "test_steps.py", "test_target.py"]
)
