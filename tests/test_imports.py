"""Who may import whom: the levels of docs/design.md, read from the source, and what importing must not load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sievit"


def levels() -> dict[str, int]:
    """The table of docs/design.md by module; the longest prefix counts, a module imports lower ones and its room."""
    page = (PACKAGE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)
    found = {
        f"sievit.{name.replace('/', '.')}": int(level)
        for level, rooms in rows
        for name in re.findall(r"`([\w/]+)`", re.sub(r"\(.*?\)", "", rooms))
    }
    assert len(rows) == max(found.values()) + 1 == 14
    return {**found, "sievit": 1, "sievit.measure": found["sievit.measure.costs"], "sievit.__main__": 14}


LEVELS = levels()


SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


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
    assert room(name) != "sievit", f"{name} has no level; give it one in the table of docs/design.md"
    for other in imported(name):
        same = room(name) == room(other) or (
            LEVELS[room(name)] == LEVELS[room(other)] and folder(name) == folder(other) != ""
        )
        assert same or LEVELS[room(other)] < LEVELS[room(name)], f"{name} imports {other}"


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("sievit.policies.")])
def test_a_policy_knows_the_canvas_and_no_other_policy(name: str):
    allowed = {
        "sievit.tokens",
        "sievit.rows",
        "sievit.config",
        "sievit.distributed",
        "sievit.policies.base",
        "sievit.policies.selection",
        "sievit.policies.gates",
        "sievit.policies.merging",
    }
    assert imported(name) <= allowed, f"{name} imports {sorted(imported(name) - allowed)}"


@pytest.mark.parametrize(
    ("name", "lazily", "allowed"),
    [
        ("sievit", False, set()),
        ("sievit.viz", True, {"sievit.tokens", "sievit.config"}),
        ("sievit.cli", False, {"sievit.cli.command", "sievit.cli.names", "sievit.config", "sievit.memory"}),
        ("sievit.cli.command", False, {"sievit.config", "sievit.memory"}),
    ],
)
def test_what_is_imported_at_once_is_little_and_pictures_know_no_model(name: str, lazily: bool, allowed: set[str]):
    assert imported(name, lazily=lazily) <= allowed


HEAVY = ("torch", "torchvision", "timm", "lightning", "matplotlib", "numpy", "PIL", "tyro", "rich")
TRAINING = ("lightning", "torchmetrics", "scipy.signal")
"""What Fabric brings along, seconds at each start."""


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import sievit", HEAVY),
        ("import sievit.cli; sievit.cli.main(['--help'])", HEAVY),
        ("import sievit.engine.evaluate, sievit.report.command, sievit.bench, sievit.tune, sievit.video", TRAINING),
    ],
)
def test_nothing_heavy_is_loaded(statement: str, heavy: tuple[str, ...]):
    script = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
    script += f"print('loaded:', *(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
