"""`sievit export`."""

import statistics
from pathlib import Path
from typing import Any, Literal

from sievit import __version__, terminal
from sievit.config import ConfigError, Count, to_json
from sievit.data.images import list_images, read_image, to_tensor
from sievit.engine.evaluate import timed_in_turns
from sievit.export.agreement import agreeing
from sievit.export.onnx import onnx_bytes, require_onnx
from sievit.export.program import program
from sievit.files import digest, write_atomically
from sievit.hub.file import require_free
from sievit.models.base import Model
from sievit.models.build import load, model_file
from sievit.models.exported import load_exported
from sievit.models.runtimes import METADATA
from sievit.policies import PolicyOptions

AGREE = {"segmenter": (0.9999, "pixels"), "detector": (0.99, "detections")}
"""Share of what has to be as the model itself finds it; files in 8 bits are exempt."""


def export(
    model: Path,
    /,
    images: Path,
    *,
    out: Path,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    precision: Literal["float32", "int8"] = "float32",
    number: Count = 8,
    force: bool = False,
) -> dict[str, Any]:
    """Write a segmenter or detector as an ONNX file in which tokens that are left out are not computed.

    Batch, height and width are free. The file holds everything: `sievit predict`, `eval` and others take it like a
    checkpoint, and its metadata say how images are prepared and what the classes are. It is written when it agreed
    with the model on real images. The last line of the output is one JSON object.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: an image or a folder; the file and the model are compared and timed on the first ones.
        out: the .onnx file to write.
        policy: another policy than the model's.
        precision: int8 stores the weights of matrix products in 8 bits per channel, and computes in 8 bits.
        number: of images to compare on.
        force: write over a file that is there.
    """
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: an ONNX file ends with .onnx")
    require_onnx()
    require_free(out, force=force)
    console = terminal.console()
    path = model_file(model)
    eager = load(path, policy=policy, compile=False)
    paths = ([images] if images.is_file() else list_images(images))[:number]
    console.print("exporting", soft_wrap=True)
    made = program(eager)
    metadata = {"config": to_json(eager.config), "model": digest(path), "version": __version__, **made.known}
    content = onnx_bytes(made, {METADATA: metadata}, int8=precision == "int8")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}")
    try:
        write_atomically(part, content)
        figures = _compared(eager, load_exported(part), paths, terminal.console())
        least, what = AGREE[eager.kind]
        if precision == "float32" and figures["agree"] < least:
            raise ConfigError(
                f"{1 - figures['agree']:.3%} of the {what} of the file are not as the model finds them; it was not written"
            )
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    size = len(content) / 2**20
    console.print(
        f"{out}: {size:.1f} MB; {figures['agree']:.4%} of the {what} of {len(paths)} images as the model finds them; "
        f"{figures['ms']:.0f} ms, the model {figures['model_ms']:.0f} ms",
        soft_wrap=True,
    )
    return {"out": str(out), "precision": precision, "megabytes": round(size, 2), "images": len(paths), **figures}


def _compared(eager: Model, file: Model, paths: list[Path], console: Any) -> dict[str, Any]:
    """How far the results of some images agree, and the times of both in turns."""
    images = [to_tensor(read_image(path)) for path in paths]
    options: dict[str, Any] = {"console": console, "title": "comparing", "kept": lambda answer: answer.results[0]}
    taken = timed_in_turns([file, eager], images, **options)
    pairs = [agreeing(own, mine) for (_, mine), (_, own) in zip(*taken, strict=True)]
    same, total = (sum(column) for column in zip(*pairs, strict=True))
    medians = [round(statistics.median(elapsed for elapsed, _ in of_model), 2) for of_model in taken]
    return {"agree": round(same / total, 6) if total else 1.0, "ms": medians[0], "model_ms": medians[1]}
