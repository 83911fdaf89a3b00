"""What a process keeps for later: compiled programs in a folder, and memory that was freed."""

import ctypes
import os
import sys
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


def keep_memory() -> bool:
    """Keep freed memory for the next allocation, on Linux with glibc; returns whether it is kept.

    XLA on CPUs allocates the temporaries of a program at every call. glibc returns blocks of that size to
    the system when they are freed, which has to clear their pages again for the next step. Blocks of 1
    GiB and more are still returned. Nothing changes where the environment has settings of the allocator
    (`GLIBC_TUNABLES` or `MALLOC_...`).
    """
    if any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # By their numbers in malloc.h: one arena for all threads (M_ARENA_MAX), blocks below 1 GiB from it
    # (M_MMAP_THRESHOLD), and no end of it returned (M_TRIM_THRESHOLD, as large as can be). Before 2.35,
    # glibc refuses a threshold above 32 MiB. Without one, the other two would fix it at 128 KiB, by which
    # more pages are cleared than without any setting.
    threshold = mallopt(-3, 1 << 30) or mallopt(-3, 1 << 25)
    return bool(threshold and mallopt(-8, 1) and mallopt(-1, -1))
