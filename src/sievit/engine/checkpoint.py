"""The folder of a run: its files, written so that a killed run loses nothing.

recipe.json is the resolved recipe, run.json its name and what tells whether the data was changed, log.csv and val.csv
are the logs, best.safetensors and last.safetensors are models,
metrics.json the figures of the best one, state.pt is all that training needs to go on.
"""

import csv
import io
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sievit.config import ConfigError, to_json
from sievit.engine.recipe import Recipe
from sievit.files import write_atomically, write_json
from sievit.text import load_json, read_json

DAMAGE = (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, TypeError, LookupError, AttributeError)
"""What reading a damaged file may raise."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file, self.started_file = path / "recipe.json", path / "run.json"
        self.log_file, self.val_file = path / "log.csv", path / "val.csv"
        self.state_file, self.metrics_file = path / "state.pt", path / "metrics.json"
        self.best_file, self.last_file = path / "best.safetensors", path / "last.safetensors"

    def require_free(self) -> None:
        """Raise a ConfigError if the folder holds a run already."""
        if self.recipe_file.exists():
            raise ConfigError(
                f"{self.path}: holds a run already; go on with --resume {self.path}, or give another --out"
            )

    def start(self, recipe: Recipe, started: dict[str, Any] | None = None) -> None:
        """Begin a new run.

        Args:
            started: `name` of the recipe, and `data`: the fingerprint of each set.
        """
        self.require_free()
        self.path.mkdir(parents=True, exist_ok=True)
        if started is not None:
            write_json(self.started_file, started)
        write_json(self.recipe_file, to_json(recipe))

    def require_same(self, name: str | None, data: dict[str, dict[str, Any]]) -> None:
        """Raise a ConfigError if the run was started with another recipe, or with data that was changed since."""
        if not self.started_file.exists():  # a run of an earlier version
            return
        with reading(self.started_file):
            started = read_json(self.started_file)
            then, before = started["name"], {part: dict(started["data"][part]) for part in data}
        if None not in (name, then) and name != then:
            raise ConfigError(f"{self.path}: is a run of the recipe {then}, not {name}; --resume needs no recipe")
        changed = [
            f"{part} {key} ({before[part].get(key)} then, {now} now)"
            for part, found in data.items()
            for key, now in found.items()
            if before[part].get(key) != now
        ]
        if changed:
            raise ConfigError(
                f"{self.path}: its data was changed since it was started: {', '.join(changed)}; restore the data, or "
                f"start another run from its weights, --train.init-from {self.path}"
            )

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        if not self.recipe_file.exists():
            raise ConfigError(f"{self.path}: is not the folder of a run: it has no recipe.json; start one with --out")
        return load_json(Recipe, self.recipe_file)

    def metrics(self) -> dict[str, Any]:
        """The figures of the best model so far."""
        with reading(self.metrics_file):
            figures = read_json(self.metrics_file)
            return {**figures, "step": int(figures["step"]), "images": int(figures["images"])}

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the training state, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.state_file, buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """The training state; None when the run was stopped before its first one; a ConfigError if it is damaged."""
        if not self.state_file.exists():
            return None
        with reading(self.state_file):
            return torch.load(self.state_file, map_location="cpu", weights_only=True)


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Around code that takes apart what a file holds: a ConfigError that names the file where it is damaged."""
    try:
        yield
    except (ConfigError, PermissionError):
        raise
    except DAMAGE as error:
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ConfigError(f"{path}: damaged ({reason}); start again with another --out") from error


class CsvLog:
    """Rows of figures by step; a resumed run drops the rows that it is going to write again."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        with reading(path):
            self.rows = [row for row in read_log(path) if int(row["step"]) <= step] if path.exists() else []
        self._write_all()

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a column that is new rewrites the file."""
        row = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        columns = self._columns()
        self.rows.append(row)
        if len(self._columns()) > len(columns):
            self._write_all()
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, list(columns), restval="").writerow(row)

    def _columns(self) -> dict[str, None]:
        return {name: None for row in self.rows for name in row}

    def _write_all(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self._columns()), restval="", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, text.getvalue().encode())


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without empty cells and without a last line that was cut short."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = file.readlines()
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [{k: v for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(lines)]
