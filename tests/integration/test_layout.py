"""Import order, sizes and links of the project."""

import ast
import re

import pytest

from mss_utils.config import ROOT

PACKAGE = ROOT / "mss_utils"
ORDER = [
    "files",
    "config",
    "songs",
    "data",
    "environment",
    "checks",
    "mixing",
    "models",
    "separation",
    "evaluation",
    "training",
    "analysis",
    "figures",
    "listening",
    "report",
    "pipeline",
]
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES = 7750, 45


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mss_utils":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mss_utils."):
            yield node.module.split(".")[1]


def test_order_names_every_room():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms - {"__init__", "__main__", "metrics"} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_a_later_room(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ORDER:
        later = ORDER[ORDER.index(room) + 1 :]
        assert not set(imported_rooms(path)) & set(later)


def test_package_is_thin():
    modules = [path for path in MODULES if "songs" not in path.parts]
    assert sum(len(path.read_text().splitlines()) for path in modules) <= MAX_LINES
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                assert n_lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {n_lines} lines"


PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link
