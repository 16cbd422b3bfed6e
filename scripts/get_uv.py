"""Fetch the uv binary for this machine from the package index, with the standard library alone.

    python3 scripts/get_uv.py DIRECTORY     -> DIRECTORY/bin/uv

For machines whose Python has no pip. The index is the one that UV_DEFAULT_INDEX, UV_INDEX_URL or PIP_INDEX_URL names,
else PyPI; the wheel's sha256 must be the one that the index states.
"""

import hashlib
import io
import os
import platform
import re
import sys
import urllib.error
import urllib.request
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin

TIMEOUT = 60  # seconds without a byte


class Links(HTMLParser):
    """The addresses on one page of a package index (PEP 503), without what was yanked (PEP 592)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and values.get("href") and "data-yanked" not in values:
            self.found.append(values["href"] or "")


def index_url() -> str:
    """The package index to ask, with a slash at the end."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if value := os.environ.get(name):
            return value.rpartition("=")[2].rstrip("/") + "/"  # uv allows `name=https://...`
    return "https://pypi.org/simple/"


def platform_tag(system: str, machine: str, libc: str) -> re.Pattern[str]:
    """What the platform part of a suitable wheel's name looks like."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
    if system == "Linux":
        return re.compile(rf"{'manylinux' if libc == 'glibc' else 'musllinux'}[_0-9]*_{machine}\b")
    if system == "Darwin":
        return re.compile(rf"macosx[_0-9]*_{'arm64' if machine == 'aarch64' else machine}\b")
    raise SystemExit(f"get_uv: no wheel is known for {system}; install uv by hand (https://docs.astral.sh/uv)")


def newest(links: list[str], tag: re.Pattern[str]) -> str | None:
    """The link to the wheel of the highest released version for that platform."""
    best: tuple[tuple[int, ...], str] | None = None
    for link in links:
        name = urldefrag(link).url.rpartition("/")[2]
        match = re.fullmatch(r"uv-(\d+(?:\.\d+)*)-py3-none-(.+)\.whl", name)
        if match and tag.search(match[2]):
            version = tuple(map(int, match[1].split(".")))
            best = max(best or (version, link), (version, link))
    return best[1] if best else None


def fetch(url: str) -> bytes:
    """What lies at the address."""
    request = urllib.request.Request(url, headers={"User-Agent": "sievit-setup", "Accept": "text/html, */*"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise SystemExit(f"get_uv: {url} cannot be fetched ({error})") from error


def main(target: Path) -> None:
    """Put the binary at `target`/bin/uv; nothing is left there when something fails."""
    page = urljoin(index_url(), "uv/")
    links = Links()
    links.feed(fetch(page).decode("utf-8", "replace"))
    tag = platform_tag(platform.system(), platform.machine(), platform.libc_ver()[0])
    link = newest(links.found, tag)
    if link is None:
        raise SystemExit(f"get_uv: {page} has no wheel for this machine ({tag.pattern}); install uv by hand")
    url, fragment = urldefrag(urljoin(page, link))
    stated = fragment.removeprefix("sha256=")
    if stated == fragment:
        raise SystemExit(f"get_uv: {page} states no sha256 for {url}; not used")
    wheel = fetch(url)
    found = hashlib.sha256(wheel).hexdigest()
    if found != stated:
        raise SystemExit(f"get_uv: {url} has sha256 {found}, the index says {stated}; not used")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".data/scripts/uv"))
        binary = archive.read(name)
    (target / "bin").mkdir(parents=True, exist_ok=True)
    partial = target / "bin" / "uv.partial"
    partial.write_bytes(binary)
    partial.chmod(0o755)
    partial.replace(target / "bin" / "uv")
    print(f"get_uv: {url.rpartition('/')[2]} -> {target / 'bin' / 'uv'}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} DIRECTORY")
    main(Path(sys.argv[1]))
