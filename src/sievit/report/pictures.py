"""An image in a report: the results of both models as layers, and the tokens of each block."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageStat

from sievit import viz
from sievit.data.dataset import ImageDataset
from sievit.engine.evaluate import timed
from sievit.models.base import Answer, Model
from sievit.report.page import Part, data_uri
from sievit.tasks import Task

BOX = (440, 560)
"""Width and height that a picture fits into."""


@dataclass(frozen=True)
class Pair:
    """Two models on a data set, and the score that drawn objects have at least."""

    task: Task
    models: Mapping[str, Model]
    data: ImageDataset
    min_score: float


@dataclass(frozen=True)
class Drawing:
    """A part of a page, and the results that it shows."""

    part: Part
    results: list[Any]


def picture(pair: Pair, index: int, row: dict[str, Any], *, tokens: bool) -> Drawing:
    """The picture of an image.

    Args:
        row: of `Seen`.
        tokens: show at first which tokens the block with the fewest computed, not the result.
    """
    task, (image, target) = pair.task, pair.data[index]
    answers = {name: timed(model, [image])[0] for name, model in pair.models.items()}
    dense, sparse = (answers[name].results[0] for name in ("dense", "sparse"))
    base, truth = viz.to_pil(image), task.as_result(target)
    layers: dict[str, Image.Image] = {"image": viz.fit(base, BOX)}

    def draw(name: str, result: Any, on: Image.Image = base) -> None:
        if result is not None:
            layers[name] = task.picture(on, result, min_score=pair.min_score, box=BOX)

    draw("truth", truth)
    draw("dense", dense)
    draw("pruned", sparse)
    grey = base.convert("L")
    draw("only dense", task.only_in(dense, sparse, min_score=pair.min_score), grey)
    draw("only pruned", task.only_in(sparse, dense, min_score=pair.min_score), grey)
    names = list(layers)
    costs = [f"{word} {row['gflops'][key]:.1f}" for word, key in (("dense", "dense"), ("pruned", "sparse"))]
    notes = [f"GFLOPs: {', '.join(costs)}", f"{row['keep']:.0%} of the tokens computed"]
    if row["differs"] is not None:
        notes.append(f"{row['differs']:.1%} differs")
    part = {
        "kind": "picture",
        "id": f"picture-{index}",
        "title": row["name"],
        "text": " · ".join(notes),
        "layers": [
            {
                "name": name,
                "src": data_uri(drawn),
                "size": drawn.size,
                "alt": f"{_SAID[name]} of {row['name']}",
            }
            for name, drawn in layers.items()
        ],
        "layer": names.index("image" if tokens else "pruned"),
        "dark": sum(ImageStat.Stat(grey).mean) < 100,
        **_blocks(answers["sparse"], tokens=tokens),
    }
    return Drawing(part, [dense, sparse, *([] if truth is None else [truth])])


_SAID = {
    "image": "Photograph",
    "truth": "True labels",
    "dense": "Result of the dense model",
    "pruned": "Result of the pruned model",
    "only dense": "What only the dense model says",
    "only pruned": "What only the pruned model says",
}


def _blocks(answer: Answer, *, tokens: bool) -> dict[str, Any]:
    """Which tokens each block computed: a bit for each token, row by row, and how much of the image they cover."""
    keep = answer.computed(0)
    patch, (height, width) = answer.image_size[0] // answer.trace.grid[0], answer.sizes[0]
    bits = keep[:, ::patch, ::patch]
    rows, columns = bits.shape[1:]
    shares = answer.shares()[0].tolist()
    least = int(np.argmin(shares))
    return {
        "grid": [rows, columns],
        "cover": [round(columns * patch / width, 5), round(rows * patch / height, 5)],
        "blocks": [base64.b64encode(np.packbits(block.numpy()).tobytes()).decode() for block in bits],
        "shares": [round(share, 4) for share in shares],
        "block": least if tokens and shares[least] < 1 else -1,
    }
