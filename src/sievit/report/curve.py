"""The course of trainings as a picture, also while they run."""

from pathlib import Path

from sievit import terminal
from sievit.config import ConfigError
from sievit.engine.checkpoint import RunFolder, read_log
from sievit.report.plot import draw_runs
from sievit.tasks import task_of


def curve(run: Path, /, *, also: tuple[Path, ...] = (), out: Path | None = None) -> None:
    """Draw loss, tokens that are computed, and accuracy by step, of one training or of several; also while they run.

    Args:
        run: folder of a training.
        also: further ones, as curves beside it.
        out: the picture; by default curve.png in the folder of the training.
    """
    folders = [RunFolder(path) for path in (run, *also)]
    names = _names([folder.path for folder in folders])
    task = task_of(folders[0].recipe().model)
    tables = {}
    for name, folder in zip(names, folders, strict=True):
        folder.recipe()  # names what is not the folder of a run
        log = columns(folder.log_file)
        if not log.get("loss"):
            raise ConfigError(f"{folder.log_file}: nothing is logged yet; wait for the first step, see train.log-every")
        tables[name] = log, columns(folder.val_file)
    measure = next((name for name in task.shown if any(name in val for _, val in tables.values())), task.shown[0])
    path = out or run / "curve.png"
    draw_runs(tables, path, measure=measure, label=task.config.figures[measure])
    terminal.console(stderr=False).print(str(path), soft_wrap=True)


def _names(paths: list[Path]) -> list[str]:
    """The names of the folders, or their whole paths where two have one name."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def columns(path: Path) -> dict[str, list[float]]:
    """The columns of a log that hold numbers alone; none where it is not there yet."""
    rows = read_log(path) if path.exists() else []
    found: dict[str, list[float]] = {}
    for name in rows[0] if rows else ():
        try:
            found[name] = [float(row[name]) for row in rows]
        except (KeyError, TypeError, ValueError):
            continue
    return found
