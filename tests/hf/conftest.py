"""Tests that need torch and transformers: `make test-hf` has an environment with them."""

import importlib.util
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
collect_ignore = (
    []
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")
    else [
        f"test_{n}.py"
        for n in ("downstream", "exports", "keys", "minilm", "page", "parity", "tokenizers")
    ]
)
