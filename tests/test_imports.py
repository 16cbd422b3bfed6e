"""Who may import whom: the levels of docs/design.md, read from the source, and what importing must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sievit"

# The longest prefix counts. A module imports lower levels, and its own room (the folder, or the prefix here).
LEVELS = {
    "sievit": 0,
    "sievit.tokens": 0,
    "sievit.config": 0,
    "sievit.files": 0,
    "sievit.memory": 0,
    "sievit.distributed": 0,
    "sievit.devices": 1,
    "sievit.policies": 1,
    "sievit.losses": 1,
    "sievit.necks": 1,
    "sievit.data": 1,
    "sievit.vit.packed": 1,
    "sievit.vit.execution": 1,
    "sievit.heads": 2,
    "sievit.vit": 2,
    "sievit.models.inputs": 3,
    "sievit.measure.flops": 3,
    "sievit.measure.published": 3,
    "sievit.necks.adapter": 3,
    "sievit.models.backbone": 4,
    "sievit.hub": 4,
    "sievit.models": 5,
    "sievit.convert": 6,
    "sievit.models.build": 6,
    "sievit.models.features": 7,
    "sievit.tasks.metrics": 2,
    "sievit.viz": 6,
    "sievit.measure.clock": 1,
    "sievit.measure.meters": 1,
    "sievit.measure.modes": 2,
    "sievit.measure": 7,
    "sievit.tasks": 7,
    "sievit.engine": 8,
    "sievit.bench": 9,
    "sievit.report": 9,
    "sievit.recipes": 9,
    "sievit.released": 10,
    "sievit.tune": 10,
    "sievit.cli": 11,
    "sievit.__main__": 12,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    """The longest prefix that has a level."""
    parts = name.split(".")
    return next(p for p in (".".join(parts[:i]) for i in range(len(parts), 0, -1)) if p in LEVELS)


def folder(name: str) -> str:
    """The folder inside the package that the module lies in; empty for those that lie in the package itself."""
    parts = SOURCES[name].relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imported(name: str, *, lazily: bool = True) -> set[str]:
    """The modules of the package that this one imports, anywhere in the file or (not lazily) at its top level."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} line {node.lineno}: relative import; write the full name"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in SOURCES else node.module)
    return {other for other in found if other.split(".")[0] == "sievit"}


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "sievit"])
def test_imports_point_downwards(name: str):
    assert room(name) != "sievit", f"{name} has no level; give it one in this file and in docs/design.md"
    for other in imported(name):
        same = room(name) == room(other) or (
            LEVELS[room(name)] == LEVELS[room(other)] and folder(name) == folder(other) != ""
        )
        assert same or LEVELS[room(other)] < LEVELS[room(name)], f"{name} imports {other}"


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("sievit.policies.")])
def test_a_policy_knows_the_canvas_and_no_other_policy(name: str):
    allowed = {
        "sievit.tokens",
        "sievit.config",
        "sievit.distributed",
        "sievit.policies.base",
        "sievit.policies.selection",
    }
    assert imported(name) <= allowed, f"{name} imports {sorted(imported(name) - allowed)}"


def test_the_package_itself_imports_nothing_at_once():
    assert imported("sievit", lazily=False) == set()


def test_pictures_know_no_model():
    assert imported("sievit.viz") <= {"sievit.tokens", "sievit.config"}


@pytest.mark.parametrize("name", ["sievit.cli", "sievit.cli.command"])
def test_the_command_line_imports_lazily(name: str):
    assert {other for other in imported(name, lazily=False) if room(other) != "sievit.cli"} <= {
        "sievit.config",
        "sievit.memory",
    }


@pytest.mark.parametrize("statement", ["import sievit", "import sievit.cli; sievit.cli.main(['--help'])"])
def test_nothing_heavy_is_loaded(statement: str):
    heavy = ("torch", "torchvision", "timm", "lightning", "matplotlib", "numpy", "PIL", "tyro", "rich")
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
    script += f"print('loaded:', *(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
