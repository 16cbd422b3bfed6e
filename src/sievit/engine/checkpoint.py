"""The folder of a run: its files, written so that a killed run loses nothing.

recipe.json is the resolved recipe, log.csv and val.csv the logs, best.safetensors and last.safetensors are models,
metrics.json the figures of the best one, state.pt is all that training needs to go on.
"""

import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from sievit.config import ConfigError, load_json, to_json
from sievit.engine.recipe import Recipe
from sievit.files import write_atomically


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.json"
        self.log_file, self.val_file = path / "log.csv", path / "val.csv"
        self.state_file, self.metrics_file = path / "state.pt", path / "metrics.json"
        self.best_file, self.last_file = path / "best.safetensors", path / "last.safetensors"

    def require_free(self) -> None:
        """Raise a ConfigError if the folder holds a run already."""
        if self.recipe_file.exists():
            raise ConfigError(
                f"{self.path}: holds a run already; go on with --resume {self.path}, or give another --out"
            )

    def start(self, recipe: Recipe) -> None:
        """Make the folder for a new run; a ConfigError if it holds one already."""
        self.require_free()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.recipe_file, to_json(recipe))

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        if not self.recipe_file.exists():
            raise ConfigError(f"{self.path}: is not the folder of a run: it has no recipe.json; start one with --out")
        return load_json(Recipe, self.recipe_file)

    def metrics(self) -> dict[str, Any]:
        """The figures of the best model so far."""
        return json.loads(self.metrics_file.read_text(encoding="utf-8"))

    def remove_parts(self) -> None:
        """Remove what a killed process left of files it was writing."""
        for part in self.path.glob(".*.part"):
            part.unlink(missing_ok=True)

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the training state, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.state_file, buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """The training state; None when the run was stopped before its first one; a ConfigError if it is damaged."""
        if not self.state_file.exists():
            return None
        try:
            return torch.load(self.state_file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"{self.state_file}: damaged ({reason}); start again with another --out") from error


def write_json(path: Path, data: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


class CsvLog:
    """Rows of figures by step; a resumed run drops the rows that it is going to write again."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
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
