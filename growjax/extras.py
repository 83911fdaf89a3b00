"""Optional packages: those that `pip install growjax` leaves out, and the extra that installs each.

The operators need JAX, Equinox, Optax, jaxtyping, einops and NumPy. A room that needs more packages calls
`require` in its first line, so that a bare installation names the missing package and its extra instead
of failing with an `ImportError` somewhere inside the room.
"""

import importlib
import importlib.util
from typing import Any

from growjax.errors import ExtraError


# Import name of the package -> the extra that installs it, as in `pip install 'growjax[train]'`
EXTRAS = {
    "grain": "train",
    "matplotlib": "train",
    "orbax": "train",
    "rich": "train",
    "tyro": "train",
    "safetensors": "hf",
    "datasets": "data",
    "fsspec": "data",
    "pyarrow": "data",
    "tokenizers": "data",
    "transformers": "tokenizers",
    "sentencepiece": "tokenizers",
    "jinja2": "tokenizers",
    "lm_eval": "eval",
    "scipy": "eval",
    "sklearn": "eval",
    "chex": "dev",
    "hypothesis": "dev",
}


def require(user: str, *packages: str) -> None:
    """Raise `ExtraError`, in one line, if some of the packages that `user` imports are not installed.

    **Example**

        require("growjax.data", "grain")
    """
    # `find_spec` locates a package without importing it, which may take a second
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extras = sorted({EXTRAS[package] for package in missing})
        raise ExtraError(
            f"{user} needs {', '.join(missing)}: pip install 'growjax[{','.join(extras)}]'"
        )


def load(module: str, user: str) -> Any:
    """Import a module of an optional package, at the moment it is used.

    Raises `ExtraError` if the package is not installed, or if importing it fails.
    """
    package = module.partition(".")[0]
    require(user, package)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtraError(
            f"{user} needs {package}, which cannot be imported ({error}): "
            f"pip install 'growjax[{EXTRAS[package]}]'"
        ) from error
