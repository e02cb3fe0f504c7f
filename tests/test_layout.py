"""What README says of the code is so: the modules, their order, and that none imports a later one."""

import ast
import re

import pytest

from mss_utils.config import ROOT

PACKAGE = ROOT / "mss_utils"
LINE = re.sub(
    r"\s",
    "",
    re.search(r"in the direction data flows: `([^`]+)`", (ROOT / "README.md").read_text()).group(1),
).split("→")


def imported(path):
    """Names of the package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mss_utils":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mss_utils."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (
                name.name.split(".")[1] for name in node.names if name.name.startswith("mss_utils.")
            )


def test_the_line_names_every_module_once():
    modules = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(LINE) == sorted(modules - {"__init__", "__main__"})


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_module_imports_a_later_one(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own != "__main__":
        later = (
            [name for name in imported(path) if name in LINE and LINE.index(name) > LINE.index(own)]
            if own in LINE
            else []
        )
        assert not later


@pytest.mark.parametrize("page", ["README.md", "docs/scale-out.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link
