"""What `growjax train` compiles is there for the next session, and what it frees for the next step."""

import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from growjax.cli.allowed import prepare_process
from growjax.programs.cache import keep_memory, keep_programs


NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def untold():
    """JAX as it is where nobody named a folder."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_one() -> None:
    jax.clear_caches()
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(3.0)).block_until_ready()


def test_programs_are_kept_by_default_however_small(tmp_path):
    compile_one()  # as hosts do when they meet, before anybody named a folder
    assert keep_programs(tmp_path / "default") == tmp_path / "default"
    compile_one()
    files = {path.name for path in (tmp_path / "default").iterdir()}
    assert files
    compile_one()
    assert {path.name for path in (tmp_path / "default").iterdir()} == files


def test_a_folder_that_was_named_wins(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    assert keep_programs(tmp_path / "default") == tmp_path / "told"
    assert keep_programs(tmp_path / "default", str(tmp_path / "asked")) == tmp_path / "asked"
    compile_one()
    assert [path.name for path in tmp_path.iterdir()] == ["asked"]


@pytest.mark.parametrize("processes, requested", [(1, "none"), (2, ""), (2, "asked")])
def test_none_are_kept_where_that_is_asked_or_where_loading_them_fails(
    processes, requested, tmp_path, monkeypatch
):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    compile_one()
    before = list((tmp_path / "told").iterdir())
    shutil.rmtree(tmp_path / "told")
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert keep_programs(tmp_path / "default", requested) is None
    compile_one()
    assert before == [] and not list(tmp_path.iterdir())


_FAULTS = """
import json, resource, sys
import numpy as np
from growjax.programs.cache import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(1 << 22)  # 32 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([faults(), keep_memory(), faults(), faults()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True
    )
    before, kept, _, after = json.loads(done.stdout)
    assert kept and after < before / 10


@pytest.mark.parametrize("most, kept", [(1 << 30, True), (1 << 25, True), (1 << 20, False)])
def test_a_threshold_that_is_refused_leaves_no_half_of_the_settings(most, kept, monkeypatch):
    """As by an older glibc, where the others would fix it at 128 KiB."""
    made: list[int] = []

    def mallopt(number: int, value: int) -> int:
        taken = number != -3 or value <= most
        made.extend([number] if taken else [])
        return int(taken)

    for name in [n for n in os.environ if n.startswith(("GLIBC_TUNABLES", "MALLOC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(
        "growjax.programs.cache.ctypes.CDLL", lambda _: types.SimpleNamespace(mallopt=mallopt)
    )
    assert keep_memory() == kept and made == ([-3, -8, -1] if kept else [])


@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_an_allocator_that_was_set_up_stays(name, monkeypatch):
    monkeypatch.setenv(name, "")
    assert not keep_memory()


def test_every_command_that_trains_keeps_memory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("growjax.programs.cache.keep_memory", lambda: calls.append("kept"))
    prepare_process((), tmp_path, "none")
    assert calls == ["kept"]
