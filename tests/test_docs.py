"""The pages: their commands go through the real command line, and the site that is built of them holds together."""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import sievit
from sievit import cli
from sievit.cli import command as of_commands
from sievit.cli import train as of_train
from sievit.policies import PolicyConfig, PolicyOptions, chosen_policy, policies
from sievit.recipes import recipe, recipes
from test_report_page import CONTRAST, browser

__all__ = ["browser"]  # a fixture
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {".", "cd", "pip", "git", "curl", "pytest", "ruff", "ty"}
"""Programs of which pages may show commands; their options are not ours to check."""


# Commands


def commands(text: str) -> Iterator[tuple[str, list[str], str | None]]:
    """Program, arguments, and the file that the output goes to, of each command in the ```sh blocks of a text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        shell = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
        shell.whitespace_split = True
        for words in re.findall(
            r"(?:[^\n]+\n)+", "\n".join("" if word in (";", "|", "&&") else word for word in shell) + "\n"
        ):
            program, *args = [word for word in words.splitlines() if not re.match(r"[A-Z_]+=", word)]
            args, into = (args[: args.index(">")], args[-1]) if ">" in args else (args, None)
            if "-m" in args and program in ("torchrun", "python", "python3"):
                program, *args = args[args.index("-m") + 1 :]
            yield program, args, into


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Whether the commands of a text are commands: parsed to the end, ranges included, and run where that is cheap."""
    parse = of_commands.parse

    def without_running(function: Callable[..., Any], args: list[str], name: str, **options: Any) -> Any:
        @functools.wraps(function)
        def called(*given: Any, policy: PolicyOptions | None = None, **_: Any) -> None:
            if policy not in (None, PolicyOptions()):
                check_policy(policy, Path(given[0]).name if given else "")

        cheap = name in ("recipes", "policies") or (name == "ablate" and not args)
        return parse(function if cheap else called, args, name, **options)

    monkeypatch.setattr(of_commands, "parse", without_running)
    monkeypatch.setattr(of_train, "parse", without_running)
    monkeypatch.setattr(of_train, "run_training", lambda *_, **__: {})  # of `train --resume RUN`
    monkeypatch.chdir(tmp_path)

    def run(text: str) -> None:
        for program, args, into in commands(text):
            line = " ".join([program, *args])
            if program == "make":
                assert is_target(args[0]), line
            elif program == "sievit":
                try:
                    status = cli.main(args)
                except SystemExit as left:
                    status = left.code
                printed = capsys.readouterr()
                assert not status, f"{line}\n{printed.out}{printed.err}"
                if into:
                    Path(into).write_text(printed.out)
            else:
                assert program in OTHERS, f"{line}: {program} is neither ours nor in OTHERS"
            for word in args:
                if word.startswith("examples/"):
                    assert (ROOT / word).exists(), line
                if re.fullmatch(r"(runs/)?(facade|nuclei|coco|ade20k|boxes|folders)_\w+", word):
                    assert word.removeprefix("runs/") in recipes(), line

    return run


def check_policy(options: PolicyOptions, model: str) -> None:
    """Refuses a policy that there is not, and a field that it has not; of a model of the reader's, that none has."""
    if model in recipes():
        chosen_policy(recipe(model).model.policy, options)
    elif options.policy is not None:
        chosen_policy(PolicyConfig(), options)
    else:
        known = {field.name for config in policies().values() for field in fields(config)}
        assert {text.partition("=")[0] for text in options.set} <= known, options


def is_target(name: str) -> bool:
    return re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_commands(page: Path, check: Callable[[str], None]) -> None:
    check(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "sievit predct facade_svit photos --out found",
        "sievit predict facade_svit photos --ouut found",
        "sievit predict facade_svitt photos --out found",
        "sievit eval facade_svit --images examples/facade/images/vall --annotations a.json",
        "sievit eval facade_setr_dtop --images a --labels b --set tresholds=0.9",
        "sievit eval mine.safetensors --images a --labels b --policy dtopp",
        "sievit tune facade_svit --images a --out b.safetensors --max-drop -1",
        "sievit train boxes_dinov2_s --train.batchsize 8",
        "sievit recipes boxes_dinov2_s > mine.json; sievit train mine.json --train.batchsize 8",
        "torchrun --nproc-per-node 2 -m sievit train boxes_dinov2_s --data-rot my",
        "make democracy",
        "sievitt demo",
    ],
)
def test_a_mistake_on_a_page_is_found(line: str, check: Callable[[str], None]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(f"```sh\n{line}\n```\n")


def test_the_options_in_the_text_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between backticks in a sentence, such as `--train.freeze 6`."""
    known = {"--help", "--version", "--resume", "--nproc-per-node"}
    for module in (of_commands, of_train):
        monkeypatch.setattr(
            module, "parse", lambda function, *_, prefixes=False: known.update(options(function, prefixes))
        )
    started = [f"train {name}" for name in ("boxes_dinov2_s_svit", "folders_dinov2_s_dtop", "facade_svit")]
    for name in [*cli.COMMANDS, *started]:
        if name != "train":
            cli.main(name.split())
    wrong = []
    for page in PAGES:
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8")):
            named = re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)  # a number at the end is a place in a list of lists
            wrong += [(page.stem, name) for name in named if re.sub(r"\.\d+$", "", name) not in known]
    assert not wrong


def options(function: Callable[..., Any], prefixes: bool) -> list[str]:
    return [name for name, _ in of_commands._options(function, prefixes=prefixes)]


# The site


@pytest.fixture(scope="module")
def site() -> Path:
    """What `make docs` builds."""
    built = subprocess.run([sys.executable, "scripts/docs.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return ROOT / "out" / "site"


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    """Pages, anchors, pictures, scripts, lines of source; and nothing is loaded from elsewhere."""
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r"""\bid=["']?([^"'\s>]+)""", text)) for page, text in pages.items()}
    assert {"index.html", "concepts.html", "api/tokens.html", "source/src/sievit/vit/loop.html"} <= {
        page.relative_to(site).as_posix() for page in pages
    }
    for page, text in pages.items():
        assert not re.search(r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"https?:", text), page
        assert "][sievit." not in text, page  # a name without a page
        for link in re.findall(r"""(?:href|src)="([^"]+)\"""", text):
            path, _, anchor = unquote(link).partition("#")
            if "://" not in path and not path.startswith(("mailto:", "data:")):
                target = (page.parent / path).resolve() if path else page
                assert target.is_file(), f"{page}: {link}"
                assert not anchor or target.suffix != ".html" or anchor in anchors[target], f"{page}: {link}"
    for text in ("https://fonts.", "unpkg.com/iframe"):
        assert not any(text in page for page in pages.values())


def test_every_public_name_has_its_place(site: Path) -> None:
    index = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(sievit.__all__) - {"__version__", "convert"}:
        assert re.search(rf"<a[^>]*>\s*<code>sievit\.{name}</code>", index), name


def test_the_site_opens_from_a_file(site: Path) -> None:
    """In Chromium, without network: no request leaves it, nothing fails, the search finds, a phone is wide enough."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 360, "height": 800}, color_scheme="dark").new_page()
        problems: list[str] = []
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url),
        )
        page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.set_default_timeout(90_000)
        for name in ("index", "results", "design", "api/policies"):
            page.goto((site / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)"), name
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        page.keyboard.press("Control+k")
        page.locator("input[placeholder=Search]").fill("reactivate")
        page.get_by_text("The one idea").wait_for()  # of the page on the design
        browser.close()
    assert not problems


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["design", "api/policies"])
def test_the_text_of_the_site_can_be_read(name: str, scheme: str, browser: Any, site: Path) -> None:
    """AA: 4.5 to 1."""
    page = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme).new_page()
    page.set_default_timeout(90_000)
    page.goto((site / f"{name}.html").as_uri())
    seen, wrong = page.evaluate(CONTRAST)
    assert seen > 100 and not wrong, wrong
