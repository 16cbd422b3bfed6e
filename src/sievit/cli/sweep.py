"""`sievit sweep`."""

from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse, print_json


def sweep(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.report.sweep import ExitOptions, Labelled, sweep

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        /,
        *,
        data: OmitArgPrefixes[Labelled],
        thresholds: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95, 0.98),
        out: Path = Path("out/sweep"),
        name: str = "DToP",
        also: tuple[str, ...] = (),
        limit: int | None = None,
        batch_size: int = 1,
        timed_images: int = 16,
        exits: OmitArgPrefixes[ExitOptions] = ExitOptions(),  # noqa: B008
        device: str = "auto",
    ) -> int:
        """Evaluate a segmenter at many thresholds of its early exits, and densely.

        Writes sweep.json, sweep.csv and sweep.png; the last line of the output is one JSON object with all `points`.
        Stopped, it goes on where it was.

        Args:
            model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
            thresholds: grades above which tokens leave; 1, the dense model, is always added.
            out: folder for table, JSON and plot.
            name: of the model's curve in table and plot.
            also: further checkpoints as curves of their own: NAME=CHECKPOINT, or NAME=CHECKPOINT@0.9,0.95.
            limit: only the first so many images.
            batch_size: images that go through the network together.
            timed_images: so many images are timed, by all in turns.
            device: cpu, cuda, cuda:1, or auto.
        """
        figures = sweep(
            model,
            data,
            thresholds,
            out,
            name=name,
            also=also,
            limit=limit,
            batch_size=batch_size,
            timed_images=timed_images,
            exits=exits,
            device=device,
        )
        print_json(figures)
        return 1 if figures["failures"] else 0

    return parse(run, args, "sweep")
