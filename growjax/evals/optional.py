"""Libraries that only evaluation needs, loaded when they are used."""

import importlib
from typing import Any

from growjax.errors import EvalError


def extra(module: str) -> Any:
    """A module of the extra `eval`; raises `EvalError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise EvalError(
            f"this evaluation needs {library} ({error}); pip install 'growjax[eval]'"
        ) from error
