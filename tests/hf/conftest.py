"""Tests that need torch and transformers: `make test-hf` has an environment with them."""

import importlib.util
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The harness is tested without them as well
NEEDING = [p.name for p in Path(__file__).parent.glob("test_*.py") if p.stem != "test_harness"]
collect_ignore = (
    []
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    else NEEDING
)
