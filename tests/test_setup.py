"""What a wheel holds; fetching uv with the standard library alone, from an index on this machine."""

import hashlib
import importlib.util
import io
import platform
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "get_uv.py"


def test_a_wheel_holds_no_weights():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/sievit"]}
    files = [path for path in (ROOT / "src/sievit").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} <= {".py", ".txt", ".html", ".css", ".js"}
    assert sum(path.stat().st_size for path in files) < 2e6


@pytest.fixture
def get_uv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_uv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the project `uv` on a package index that the environment names."""
    folder = tmp_path / "index" / "uv"
    folder.mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "index")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()
        thread.join()


def put_wheel(folder: Path, version: str, *, digest: str | None = None) -> None:
    """A wheel for this machine, and its link on the page."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"uv-{version}.data/scripts/uv", f"#!/bin/sh\necho uv {version}\n")
    libc = "manylinux_2_17" if platform.libc_ver()[0] == "glibc" else "musllinux_1_1"
    name = f"uv-{version}-py3-none-{libc}_{platform.machine()}.whl"
    (folder / name).write_bytes(content.getvalue())
    digest = hashlib.sha256(content.getvalue()).hexdigest() if digest is None else digest
    with (folder / "index.html").open("a") as page:
        page.write(f'<a href="../uv/{name}#sha256={digest}">{name}</a>\n')


linux = pytest.mark.skipif(platform.system() != "Linux", reason="the wheel made here is for Linux")


@linux
def test_the_newest_version_is_fetched(get_uv: ModuleType, index: Path, tmp_path: Path):
    for version in ("0.9.30", "0.13.8", "0.13.10"):
        put_wheel(index, version)
    get_uv.main(tmp_path / "target")
    binary = tmp_path / "target" / "bin" / "uv"
    assert "0.13.10" in binary.read_text()
    assert binary.stat().st_mode & 0o111


@linux
@pytest.mark.parametrize("digest", ["0" * 64, ""])
def test_a_wheel_that_is_not_what_the_index_states_is_not_used(
    get_uv: ModuleType, index: Path, tmp_path: Path, digest: str
):
    put_wheel(index, "0.13.8", digest=digest)
    with pytest.raises(SystemExit, match="sha256"):
        get_uv.main(tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_an_index_without_a_wheel_is_named(get_uv: ModuleType, index: Path, tmp_path: Path):
    (index / "index.html").write_text("<a href='uv-0.1.0.tar.gz#sha256=0'>uv</a>")
    with pytest.raises(SystemExit, match="has no wheel"):
        get_uv.main(tmp_path / "target")


@pytest.mark.parametrize(
    ("system", "machine", "libc", "name"),
    [
        ("Linux", "x86_64", "glibc", "manylinux_2_17_x86_64.manylinux2014_x86_64"),
        ("Linux", "aarch64", "glibc", "manylinux_2_28_aarch64"),
        ("Linux", "aarch64", "glibc", "manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64"),
        ("Linux", "x86_64", "", "musllinux_1_1_x86_64"),
        ("Darwin", "arm64", "", "macosx_11_0_arm64"),
    ],
)
def test_platforms(get_uv: ModuleType, system: str, machine: str, libc: str, name: str):
    assert get_uv.platform_tag(system, machine, libc).search(name)
    assert not get_uv.platform_tag(system, "riscv64", libc).search(name)
