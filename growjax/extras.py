"""What `pip install growjax` leaves out, and the extra that brings each package.

The operators need JAX, Equinox, Optax, jaxtyping, einops and NumPy. A room that needs more asks for it in
its first line, so that a bare installation says what is missing instead of failing somewhere below.
"""

import importlib
import importlib.util
from typing import Any

from growjax.errors import ExtraError


# Import name -> the extra of `growjax[...]`
EXTRAS = {
    "grain": "train",
    "matplotlib": "train",
    "orbax": "train",
    "rich": "train",
    "tyro": "train",
    "safetensors": "hf",
    "datasets": "data",
    "pyarrow": "data",
    "tokenizers": "data",
    "lm_eval": "eval",
    "scipy": "eval",
    "sklearn": "eval",
    "chex": "dev",
    "hypothesis": "dev",
}


def require(user: str, *packages: str) -> None:
    """Raise `ExtraError` in one line if some of the packages that `user` imports are not installed.

    **Example**

        require("growjax.data", "grain")
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extras = sorted({EXTRAS[package] for package in missing})
        raise ExtraError(
            f"{user} needs {', '.join(missing)}: pip install 'growjax[{','.join(extras)}]'"
        )


def load(module: str, user: str) -> Any:
    """A module of a package that an extra brings, imported when it is used.

    Raises `ExtraError` if the package is not installed, or cannot be imported.
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
