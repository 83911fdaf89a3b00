"""Tests that need torch and transformers: `make test-hf` has an environment with them."""

import importlib.util
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
collect_ignore = (
    []
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    else ["test_downstream.py", "test_keys.py", "test_minilm.py", "test_parity.py"]
)
