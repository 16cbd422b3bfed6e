"""Trained models and exported files beside each other: do they agree, and which is faster?"""

from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from sievit import terminal
from sievit.config import ConfigError, Count
from sievit.data.images import list_images, read_image, to_tensor
from sievit.devices import device_name
from sievit.engine.evaluate import timed
from sievit.files import write_json
from sievit.measure.clock import Quartiles, in_turns, median_and_p95
from sievit.models.base import Model
from sievit.models.build import load
from sievit.tasks import task_of


@torch.inference_mode()
def bench_models(
    models: tuple[Path, ...],
    /,
    images: Path,
    *,
    number: Count = 25,
    threads: Count | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Time checkpoints and exported files in turns, image by image; the first is the one that others are compared with.

    Files run in their own runtimes. Speed-up is the median of the ratios of both times on an image, predicted that of
    the GFLOPs. The last line of the output is one JSON object.

    Args:
        models: checkpoints, names of shipped models, or files of `sievit export`, all of one task.
        images: an image or a folder; the first ones are taken.
        number: of images.
        threads: CPU threads of torch and of the runtimes.
        out: JSON file for the rows.

    Raises:
        ConfigError: fewer than two models, models of several tasks, or one that cannot be read.
    """
    if len(models) < 2:
        raise ConfigError("give two models or more: the first is the one that the others are compared with")
    if threads:
        torch.set_num_threads(threads)
    opened = [load(path) for path in models]
    for path, model in zip(models, opened, strict=True):
        if type(model.config) is not type(opened[0].config):
            raise ConfigError(f"{path}: is of another kind than {models[0]}; compare models of one task")
    paths = ([images] if images.is_file() else list_images(images))[:number]
    rows = _rows(opened, [path.name for path in models], paths)
    content = {"images": len(paths), "threads": torch.get_num_threads(), "device": device_name(opened[0].device)}
    content["rows"] = rows
    if out is not None:
        write_json(out, content)
    terminal.console(stderr=False).print(_table(rows, task_of(opened[0].config).agreed[1]))
    return content


def _rows(models: list[Model], names: list[str], paths: list[Path]) -> list[dict[str, Any]]:
    pictures = [to_tensor(read_image(path)) for path in paths]
    for model in models:
        model([pictures[0]])
    task, results = task_of(models[0].config), dict[int, Any]()
    agreed = [[0, 0] for _ in models]

    def kept(which: int, answer: Any) -> float:
        results[which] = answer.results[0]
        if len(results) == len(models):  # of one image
            for i, total in enumerate(agreed):
                total[:] = (a + b for a, b in zip(total, task.agreement(results[i], results[0]), strict=True))
            results.clear()
        return float(models[which].gflops(answer)[0])

    calls = [lambda image, model=model: timed(model, [image])[::-1] for model in models]
    inputs = terminal.track(pictures, "timing", console=terminal.console())
    taken = in_turns(calls, inputs, lambda _, call: call(), kept)
    (first_ms, first_gflops), *_ = columns = [tuple(zip(*each, strict=True)) for each in taken]
    rows = []
    for name, (ms, gflops), (same, total) in zip(names, columns, agreed, strict=True):
        speedup, predicted = Quartiles.of_ratios(first_ms, ms), Quartiles.of_ratios(first_gflops, gflops).median
        row = {"model": name, **median_and_p95("ms", ms), "gflops": round(sum(gflops) / len(gflops), 2)}
        row |= {"agree": round(same / total, 6) if total else 1.0, "of": total, "predicted": round(predicted, 3)}
        row |= {"speedup": round(speedup.median, 3), "speedup_quartiles": speedup.to_json()["quartiles"]}
        rows.append(row | {"realised": round(speedup.median / predicted, 3)})
    return rows


def _table(rows: list[dict[str, Any]], parts: str) -> Table:
    table = Table(box=SIMPLE, collapse_padding=True, pad_edge=False)
    for column in ("model", "ms", "GFLOPs", f"same {parts}", "speed-up", "predicted", "realised"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        times = (f"{row['speedup']:.2f}", f"{row['predicted']:.2f}", f"{row['realised']:.0%}")
        table.add_row(row["model"], f"{row['ms']:.0f}", f"{row['gflops']:.1f}", f"{row['agree']:.4%}", *times)
    return table
