"""Build the documentation site in out/site: the pages of docs/, the library's docstrings, and the source they link to.

Warnings are errors. Everything is read from this checkout, nothing from the network.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import griffe

import sievit

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "out" / "docs"
API = {
    "models": ["base", "build", "inputs", "detector", "segmenter", "features"],
    "policies": ["base", "selection", "options"],
    "tokens": [""],
    "vit": ["model", "config", "execution", "loop", "executor", "block"],
    "tasks": ["base"],
    "engine": ["recipe", "train", "evaluate", "bootstrap", "checkpoint"],
}
"""Pages by the package, and its modules of which every public class and function is shown."""
METHODS = {f"policies.{file.stem}" for file in (ROOT / "src/sievit/policies").glob("[a-z]*.py")}
OTHERS = ["config", "convert.timm", "convert.transformers", "heads.config", "hub.card", "memory"]
SOURCE = """---
search:
  exclude: true
hide: [toc]
---
# {name}

````python linenums="1"
{text}````
"""


def main() -> int:
    """Write all pages into out/docs and build the site; the exit status is zensical's."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for asset in ("site.css", "iframe-worker.js"):
        shutil.copy(ROOT / "scripts" / "site" / asset, PAGES)
    for page in PAGES.glob("*.md"):
        _write(page.name, re.sub(r"\]\(\.\./((?:src|tests|examples)/[^)#]+)", _to_source, page.read_text("utf-8")))
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](").replace("](CHANGELOG.md", "](changelog.md")
        _write(name.lower(), re.sub(r"\]\(((?:src|tests|examples)/[^)#]+)", _to_source, text))
    package: Any = griffe.load("sievit", search_paths=[ROOT / "src"])
    _write("api/index.md", _overview(package))
    pages = {name: [f"{name}.{module}".strip(".") for module in modules] for name, modules in API.items()}
    pages |= {"methods": sorted(METHODS.difference(pages["policies"])), "other": OTHERS}
    for name, modules in pages.items():
        _write(f"api/{name}.md", "\n\n".join([f"# {name.capitalize()}", *(f"::: sievit.{m}" for m in modules)]) + "\n")
        for module in (package[m] for m in modules):
            for shown in (module, *(module[member] for member in module.exports or ())):
                _write_source(shown.filepath)
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(build, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(built.stdout, end="")
    return built.returncode or int("griffe: " in built.stdout)  # zensical does not count what is wrong in a docstring


def _overview(package: Any) -> str:
    """The names of the package itself, each with its first line."""
    lines = ["# Names\n\nWhat `import sievit` offers; the other pages have all of a module.\n\n| | |\n|---|---|"]
    for name in sorted(set(sievit.__all__) - {"__version__", "convert"}):
        found = package[name].final_target
        says = found.docstring.value.partition("\n")[0].replace("|", "\\|")
        lines.append(f"| [`sievit.{name}`][{found.path}] | {says} |")
    return "\n".join(lines) + "\n"


def _to_source(link: re.Match[str]) -> str:
    """A link to a source file as one to its page; a folder's page lists its files."""
    path = ROOT / link[1]
    if not path.is_dir():
        return f"]({_write_source(path)}"
    files = [f"- [{file.name}]({Path(_write_source(file)).name})" for file in sorted(path.glob("[a-z]*.py"))]
    _write(f"source/{link[1]}/index.md", "\n".join([f"# {link[1]}", "", *files]) + "\n")
    return f"](source/{link[1]}/index.md"


def _write_source(file: Path) -> str:
    """Write the page of a source file; its name."""
    path = file.relative_to(ROOT)
    name = f"source/{path.with_suffix('.md').as_posix()}"
    _write(name, SOURCE.format(name=path.as_posix(), text=file.read_text("utf-8")))
    return name


def _write(name: str, text: str) -> None:
    (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / name).write_text(text, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
