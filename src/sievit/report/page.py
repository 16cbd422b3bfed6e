"""A report: one HTML file that holds everything.

The page is page.html, filled with a document in JSON: a title, a text, and sections of parts. What kinds of parts there
are, the functions here say; how they look and what they do is in the page.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sievit.files import write_atomically
from sievit.viz import Colour

Part = dict[str, Any]
PERCENT: dict[str, Any] = {"scale": 100, "digits": 1}
"""Shares of 0..1 as numbers of 0..100."""


def section(title: str, parts: Iterable[Part | None], *, text: str = "") -> dict[str, Any]:
    """A heading and what stands under it; parts that are None are left out."""
    return {"title": title, "text": text, "parts": [part for part in parts if part is not None]}


def tiles(items: Iterable[tuple[str, str, str]]) -> Part:
    """Large figures: name, value and a note, which may be empty."""
    return {"kind": "tiles", "items": [{"label": name, "value": value, "note": note} for name, value, note in items]}


def column(
    name: str,
    *,
    scale: float = 1,
    digits: int = 1,
    sign: bool = False,
    heat: bool = False,
    text: bool = False,
    note: str = "",
) -> dict[str, Any]:
    """A column of a table, and how its numbers are written.

    Args:
        name: the head.
        scale, digits, sign: numbers are shown times `scale`, with so many digits, positive ones with a sign.
        heat: cells of 0..1 have a colour.
        text: cells hold words.
        note: what the head means.
    """
    look = {"scale": scale, "digits": digits, "sign": sign, "heat": heat, "text": text, "note": note}
    return {"name": name, **{key: value for key, value in look.items() if value}, "digits": digits}


def table(
    title: str,
    columns: Sequence[dict[str, Any]],
    rows: Iterable[Sequence[Any]],
    *,
    text: str = "",
    name: str | None = None,
    to: Sequence[str | None] = (),
    wide: bool = True,
) -> Part | None:
    """A table that is sorted by its heads and, where it is long, filtered, without empty columns; None if there is no
    row.

    Args:
        rows: cells: a number, a word, None, or [value, low, high]; the first is the name of the row.
        name: by which charts point at its rows.
        to: by row the picture that its name leads to.
        wide: as wide as the page.
    """
    cells = [list(row) for row in rows]
    used = [i for i in range(len(columns)) if i == 0 or any(row[i] is not None for row in cells)]
    columns, cells = [columns[i] for i in used], [[row[i] for i in used] for row in cells]
    options = {"text": text, "id": name, "to": list(to), "wide": wide}
    return {"kind": "table", "title": title, "columns": columns, "rows": cells, **options} if cells else None


def chart(
    title: str, x: str, choices: Iterable[dict[str, Any] | None], *, xdigits: int = 1, **options: Any
) -> Part | None:
    """Points or lines; with several `choices` the reader selects what stands on the vertical axis.

    Args:
        x: name of the horizontal axis.
        choices: of `choice`; those that are None are left out, without any there is no chart.
        xdigits: of numbers on the horizontal axis.
        options: text, wide; table: the `name` of the table whose rows the points are; bars; small: markers; zero: the
            vertical axis begins at 0; front: a line along the best points.
    """
    found = [each for each in choices if each is not None]
    part = {"kind": "chart", "title": title, "x": x, "xformat": {"digits": xdigits}, "choices": found, **options}
    return part if found else None


def choice(y: str, series: Mapping[str, list[dict[str, Any]]], *, line: bool = False, digits: int = 1) -> Part | None:
    """What stands on the vertical axis: points by series, each with x, y, and maybe low, high, name, row, label."""
    kept = [{"name": name, "points": points, "line": line} for name, points in series.items() if points]
    return {"name": y, "y": y, "format": {"digits": digits}, "series": kept} if kept else None


def legend(title: str, entries: Iterable[tuple[str, Colour]]) -> Part | None:
    """Names with their colours."""
    items = [[name, "rgb({}, {}, {})".format(*colour)] for name, colour in entries]
    return {"kind": "legend", "title": title, "items": items} if items else None


def data_uri(picture: Image.Image, *, quality: int = 75) -> str:
    """A picture as a JPEG that stands in the file itself."""
    buffer = BytesIO()
    picture.save(buffer, format="jpeg", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(path: Path, title: str, text: str, sections: Iterable[dict[str, Any]]) -> None:
    """Write the HTML file, whole or not at all; sections without a part are left out."""
    document = {"title": title, "text": text, "sections": [each for each in sections if each["parts"]]}
    content = json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")  # nothing ends the script element
    page = files("sievit.report").joinpath("page.html").read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.replace("@DATA@", content).encode())
