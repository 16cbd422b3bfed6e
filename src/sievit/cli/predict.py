"""`sievit predict`."""

from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse


def predict(args: list[str]) -> int:
    from tyro.conf import arg

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        images: Annotated[Path, arg(metavar="IMAGES")],
        /,
        *,
        out: Path,
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        budget: float | None = None,
        score_threshold: float = 0.5,
        ids: Path | None = None,
        device: str = "auto",
    ) -> int:
        """Find objects in, or label every pixel of, an image or a folder of images.

        A detector writes results.json (COCO results) and images.json (which image has which id), a segmenter label
        images in labels/ and classes.json (what their values mean); both write one picture per image.

        Args:
            model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
            images: an image, or a folder of images.
            out: folder for the results.
            policy: takes the place of the model's own, e.g. keep_all for dense.
            thresholds: of the early exits of a segmenter, takes the place of its policy.
            budget: of a model whose gates were trained for a range of budgets: a factor on the tokens to keep.
            score_threshold: pictures show objects of at least this score; results.json holds all.
            ids: COCO annotation file whose image ids results.json shall use; by default 1, 2, ... by file name.
            device: cpu, cuda, cuda:1, or auto.
        """
        from sievit.report import predict

        return predict(
            model,
            images,
            out,
            policy=policy,
            thresholds=thresholds,
            budget=budget,
            score_threshold=score_threshold,
            ids=ids,
            device=device,
        )

    return parse(run, args, "predict")
