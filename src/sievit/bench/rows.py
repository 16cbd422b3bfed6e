"""The file of a bench: each row is in it as soon as it is measured, so that a run that was stopped can go on."""

import json
from pathlib import Path
from typing import Any

from sievit.bench.plot import draw_rows
from sievit.config import ConfigError
from sievit.files import write_atomically

KEY = ("model", "size", "batch", "device", "precision", "mode")
"""What tells the rows of a file apart."""


class RowsFile:
    """The rows of a bench, and OUT/<bench>.json, which always holds all of them.

    Args:
        settings: what all rows are measured with; `options` among them are those of the command line.
        out: the folder; None: nothing is written.
        resume: begin with the rows that are in the file, but for those that could not be timed.

    Raises:
        ConfigError: rows to be kept that were measured with other settings, or a file that is none of a bench.
    """

    def __init__(self, bench: str, settings: dict[str, Any], out: Path | None, *, resume: bool) -> None:
        if resume and out is None:
            raise ConfigError("--resume keeps the rows of the file in --out; say which folder")
        self.bench, self.settings = bench, settings
        self.path = None if out is None else out / f"{bench}.json"
        self.rows = _measured(self.path, settings) if resume and self.path is not None and self.path.exists() else []
        self._write()

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether there is a row of the same model, size, batch, device, precision and mode."""
        return any(_key(row) == _key(other) for other in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Put a row behind those of its model, size and batch, and write the file."""
        self.rows.append(row)
        groups: dict[tuple, int] = {}
        self.rows.sort(key=lambda row: groups.setdefault(_key(row)[:-1], len(groups)))
        self._write()

    def content(self) -> dict[str, Any]:
        """What stands in the file."""
        return {"bench": self.bench, **self.settings, "rows": self.rows}

    def draw(self) -> None:
        """Put a picture of the rows beside the file."""
        if self.path is not None:
            draw_rows(self.rows, self.path.with_suffix(".png"), title=f"sievit bench {self.bench}")

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, (json.dumps(self.content(), indent=1) + "\n").encode())


def _key(row: dict[str, Any]) -> tuple:
    return tuple(str(row[name]) for name in KEY)


def _measured(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    way_out = "leave out --resume to start the file anew, or give another --out"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, were = content["rows"], _flat(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not the file of a bench ({error}); {way_out}") from error
    for name, value in _flat(settings).items():
        if were.get(name, "unknown") != value:
            raise ConfigError(f"{path}: its rows have {name} {were.get(name, 'unknown')}, not {value}; {way_out}")
    return [row for row in rows if "skipped" not in row]


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, options among the others."""
    return {**{name: value for name, value in content.items() if name != "options"}, **content.get("options", {})}
