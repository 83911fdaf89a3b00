"""Every Python block in the README and the docs runs, and every public name has its place there."""

import ast
import re
from pathlib import Path

import jax
import pytest

import growjax as gj


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The options, the code and the first line of every Python block of a page."""
    text = page.read_text()
    return [
        (match["options"], match["code"], text.count("\n", 0, match.start("code")))
        for match in _BLOCK.finditer(text)
    ]


@pytest.fixture
def restored_precision():
    """A page may turn float64 on for itself."""
    before = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path):
    """All blocks of a page, in order, in one namespace; tracebacks point at lines of the page."""
    namespace: dict = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for _, code, line in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_ten_lines():
    """The operator that is promised to be ten lines long is."""
    page = ROOT / "docs" / "write-your-own-operator.md"
    (code,) = [code for options, code, _ in blocks(page) if "ten lines" in options.lower()]
    assert "class " in code and "gj.Operator" in code
    assert len(code.splitlines()) <= 10


def public_names() -> list[str]:
    """What `growjax/__init__.py` re-exports."""
    tree = ast.parse(Path(gj.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in imports for alias in node.names]


def test_public_names_are_documented():
    """`docs/api.md` has an entry, `::: growjax...name` or a heading, for every public name."""
    text = (ROOT / "docs" / "api.md").read_text()
    entries = re.findall(r"^(?::::|#+) `?(?:growjax|gj)\.([\w.]+)`?", text, re.MULTILINE)
    missing = sorted(set(public_names()) - {entry.rpartition(".")[2] for entry in entries})
    assert not missing, f"docs/api.md says nothing about {', '.join(missing)}"


def test_pages_stand_alone():
    """No unclosed blocks, and no links between pages that lead nowhere."""
    for page in PAGES:
        text = page.read_text()
        assert text.count("```") % 2 == 0, f"{page.name}: a block is not closed"
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" in link:
                continue
            assert (page.parent / link).exists(), f"{page.name}: {link} does not exist"
