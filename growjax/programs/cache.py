"""The folder of compiled programs, so that a run that goes on does not compile them again."""

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_programs(default: Path, requested: str = "") -> Path | None:
    """Store compiled programs in a folder, so that a resumed run does not compile them again.

    `requested` is a folder or "none"; if it is empty, the folder is JAX's own setting
    (`JAX_COMPILATION_CACHE_DIR`), or else `default`. Returns the folder, or None if no programs are
    stored. Several processes on CPUs store none: they crash when they load such a program (JAX 0.10).
    """
    # JAX reads the settings at its first program only, unless its cache is reset
    compilation_cache.reset_cache()
    if requested == "none" or (jax.process_count() > 1 and jax.default_backend() == "cpu"):
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    configured = getattr(jax.config, "jax_compilation_cache_dir", None)
    if not requested and configured:
        return Path(configured)
    folder = Path(requested) if requested else default
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX stores only programs that took a second or more to compile. A plan of small models
    # has none of these, but fifty others.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
