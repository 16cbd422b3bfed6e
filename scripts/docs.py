"""Build the documentation site, out/site: the pages of docs/, the library's docstrings, and the source that they link to.

Warnings are errors. Everything is read from this checkout, and nothing from the network.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import griffe

import sievit

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "out" / "docs"

API = {
    "models": ["models.base", "models.build", "models.inputs", "models.detector", "models.segmenter", "models.features"],
    "policies": ["policies.base", "policies.selection", "policies.options"],
    "methods": [f"policies.{file.stem}" for file in sorted((ROOT / "src/sievit/policies").glob("[a-z]*.py"))],
    "tokens": ["tokens"],
    "vit": ["vit.model", "vit.config", "vit.execution", "vit.loop", "vit.executor", "vit.block"],
    "tasks": ["tasks.base"],
    "engine": ["engine.recipe", "engine.train", "engine.evaluate", "engine.bootstrap", "engine.checkpoint"],
    "other": ["config", "convert.timm", "convert.transformers", "heads.config", "hub.card", "memory"],
}
"""Pages by name: modules of which every public class and function is shown."""
API["methods"] = [name for name in API["methods"] if name not in API["policies"]]


def main() -> int:
    """Write the pages into out/docs and build the site; the exit status is zensical's."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for asset in ("site.css", "iframe-worker.js"):
        shutil.copy(ROOT / "scripts" / "site" / asset, PAGES)
    for page in PAGES.glob("*.md"):
        page.write_text(re.sub(r"\]\(\.\./([^)#]+)", _to_source, page.read_text("utf-8")), "utf-8")
    _write("api/index.md", _overview())
    for name, modules in API.items():
        shown = "\n\n".join(f"::: sievit.{module}" for module in modules)
        _write(f"api/{name}.md", f"# {name.capitalize()}\n\n{shown}\n")
        for module in modules:
            _source(ROOT / "src" / "sievit" / f"{module.replace('.', '/')}.py")
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    built = subprocess.run(build, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(built.stdout, end="")
    return built.returncode or int("griffe: " in built.stdout)  # zensical does not count what is wrong in a docstring


def _overview() -> str:
    """The names of the package itself, each with its first line."""
    package = griffe.load("sievit", search_paths=[ROOT / "src"])
    rows = []
    for name in sorted(set(sievit.__all__) - {"__version__", "convert"}):
        found = package[name].final_target
        says = found.docstring.value.partition("\n")[0].replace("|", "\\|")
        rows.append(f"| [`sievit.{name}`][{found.path}] | {says} |")
    head = "# Names\n\nWhat `import sievit` offers. The other pages have all of a module.\n\n| | |\n|---|---|\n"
    return head + "\n".join(rows) + "\n"


def _to_source(link: re.Match[str]) -> str:
    """A link to a file of the repository becomes one to its page; to a folder, one to the files in it."""
    path = ROOT / link[1]
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    pages = [_source(file) for file in files]
    if path.is_dir():
        _write(f"source/{link[1]}/index.md", "\n".join([f"# {link[1]}", "", *(f"- [{f.name}]({f.stem}.md)" for f in files)]))
        return f"](source/{link[1]}/index.md"
    return f"]({pages[0]}"


def _source(file: Path) -> str:
    """The name of the page of a source file, which is written."""
    path = file.resolve().relative_to(ROOT)
    name = f"source/{path.with_suffix('.md').as_posix()}"
    head = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
    _write(name, f'{head}# {path.as_posix()}\n\n````python linenums="1"\n{(ROOT / path).read_text("utf-8")}````\n')
    return name


def _write(name: str, text: str) -> None:
    (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / name).write_text(text, "utf-8")


if __name__ == "__main__":
    sys.exit(main())
