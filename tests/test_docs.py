"""Every Python block in the README and the docs runs, and every public name has its place there."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

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


# Pages about another library, which only the extra `docs` installs
OTHERS = {"flax": "flax"}


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path):
    """All blocks of a page, in order, in one namespace; tracebacks point at lines of the page."""
    if page.stem in OTHERS:
        library = OTHERS[page.stem]
        pytest.importorskip(library, reason=f"{page.name} needs {library}: pip install {library}")
    namespace: dict = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for _, code, line in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_ten_lines():
    """The operator that is promised to be ten lines long is."""
    page = ROOT / "docs" / "write-your-own-operator.md"
    (code,) = [code for options, code, _ in blocks(page) if "ten lines" in options.lower()]
    assert "class " in code and "gj.Operator" in code
    assert len(code.splitlines()) <= 10


# The harness is an extra of its own, which the tests do not install
NOT_INSTALLED = "growjax.evals.harness"


def entries() -> dict[str, Any]:
    """What `docs/api.md` shows: the name in each line `::: growjax...`, and the thing that it names.

    A module, if there is one of that name, as for mkdocstrings.
    """
    modules = {m.name for m in pkgutil.walk_packages(gj.__path__, "growjax.")} | {"growjax"}
    text, things = (ROOT / "docs" / "api.md").read_text(), {}
    for name in re.findall(r"^::: (growjax[\w.]+)$", text, re.MULTILINE):
        if name.startswith(NOT_INSTALLED):
            continue
        module, names = name, []
        while module not in modules:
            module, _, last = module.rpartition(".")
            names.insert(0, last)
        things[name] = importlib.import_module(module)
        for last in names:
            things[name] = getattr(things[name], last)
    return things


def test_every_public_name_has_an_entry():
    """What the rooms export, and the top level, is in `docs/api.md`: by itself or with its module."""
    shown = set()
    for thing in entries().values():
        members = vars(thing).items() if inspect.ismodule(thing) else ()
        shown |= {id(thing), *(id(value) for name, value in members if name[0] != "_")}
    missing = []
    for init in Path(gj.__file__).parent.rglob("__init__.py"):
        room = importlib.import_module(".".join(init.relative_to(ROOT).parent.parts))
        for node in ast.walk(ast.parse(init.read_text())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                thing = getattr(room, alias.asname or "", None)
                if alias.asname and not inspect.ismodule(thing) and id(thing) not in shown:
                    missing.append(f"{room.__name__}.{alias.asname}")
    assert not missing, f"docs/api.md says nothing about {', '.join(missing)}"


def test_entries_stand_once():
    names = re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(names) > 100 and sorted(names) == sorted(set(names))


# Pages with links, those for readers of the repository as well
LINKED = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.py")),
    *sorted((ROOT / "experiments").glob("**/README.md")),
]


def prose(page: Path) -> str:
    """A page without its blocks of code, where an index and a call look like a link."""
    text = page.read_text()
    if page.suffix == ".py":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """The names that the site, and a repository's viewer, give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in plain]
    return {re.sub(r"\s+", "-", heading) for heading in words}


def test_blocks_are_closed():
    for page in PAGES:
        assert page.read_text().count("```") % 2 == 0, f"{page.name}: a block is not closed"


def test_links_between_pages_lead_somewhere():
    """To a file, and to a heading of it; entries of the API page are named by mkdocstrings."""
    dead, followed = [], 0
    for page in LINKED:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if "://" in link or link.startswith("mailto:"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            followed += 1
            if not target.exists():
                dead.append(f"{page.relative_to(ROOT)}: {link} does not exist")
            elif anchor and target.suffix == ".md" and target.stem != "api":
                if anchor not in anchors(target):
                    dead.append(f"{page.relative_to(ROOT)}: {link} has no such heading")
    assert not dead, "\n".join(dead)
    assert followed > 100


def test_every_page_is_in_the_navigation():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert re.search(rf": {re.escape(page.name)}$", site, re.MULTILINE), page.name
