"""`sievit eval`."""

import sys
from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse, print_json


def evaluate(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.report.semantic import LabelFiles

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        /,
        *,
        images: Path,
        annotations: Path | None = None,
        labels: Path | None = None,
        label_files: OmitArgPrefixes[LabelFiles] = LabelFiles(),  # noqa: B008
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        budget: float | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        max_detections: int = 100,
        device: str = "auto",
    ) -> int:
        """Evaluate a model; the last line of the output is one JSON object with every figure.

        Detectors take --annotations, segmenters --labels. Images that cannot be used are left out and listed in
        `failures`; the exit status is 1 then.

        Args:
            model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
            images: folder that holds the images.
            annotations: COCO annotation file.
            labels: folder of label images: grey or palette images whose values are classes.
            policy: takes the place of the model's own, e.g. keep_all for dense.
            thresholds: of the early exits of a segmenter, takes the place of its policy.
            budget: of a model whose gates were trained for a range of budgets: a factor on the tokens to keep.
            batch_size: images that go through the network together.
            limit: only the first so many images.
            max_detections: the best so many of an image and class are judged; COCO's is 100.
            device: cpu, cuda, cuda:1, or auto.
        """
        from sievit.report import evaluate

        figures = evaluate(
            model,
            images,
            annotations=annotations,
            labels=labels,
            label_files=label_files,
            policy=policy,
            thresholds=thresholds,
            budget=budget,
            batch_size=batch_size,
            limit=limit,
            max_detections=max_detections,
            device=device,
        )
        for failure in figures.get("failures", ()):
            print(f"error: {failure}", file=sys.stderr)
        print_json(figures)
        return 1 if "failures" in figures else 0

    return parse(run, args, "eval")
