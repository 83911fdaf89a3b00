"""The tutorials, which are notebooks as scripts, run from top to bottom and draw one figure each."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import pytest


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
# They say how many devices there are before JAX is imported
ALONE = ("a-pod-without-a-pod",)


def pages(alone: bool) -> list[Any]:
    """The tutorials that run in a process of their own, or the others."""
    chosen = [page for page in PAGES if (page.stem in ALONE) == alone]
    return [pytest.param(page, id=page.stem) for page in chosen]


@pytest.fixture
def restored_precision():
    before = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize("page", pages(alone=False))
def test_tutorial_runs(page: Path, monkeypatch: pytest.MonkeyPatch):
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    plt.switch_backend("agg")
    try:
        exec(compile(page.read_text(), str(page), "exec"), {"__name__": page.stem})
        # Everything that is shown can be drawn
        for number in shown:
            plt.figure(number).canvas.draw()
    finally:
        plt.close("all")
    assert len(shown) == 1


@pytest.mark.parametrize("page", pages(alone=True))
def test_tutorial_runs_in_a_process_of_its_own(page: Path):
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(page)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_every_tutorial_is_a_page_of_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    assert len(PAGES) == 7 and {*ALONE} <= {page.stem for page in PAGES}
    for page in PAGES:
        assert f": tutorials/{page.name}\n" in site
        # The first cell has the title, and no cell is empty
        cells = page.read_text().split("# %%")
        assert cells[1].startswith(" [markdown]\n# # ") and all(cell.strip() for cell in cells[1:])
