"""`sievit export`."""

import statistics
from pathlib import Path
from typing import Any, Literal

import torch

from sievit import __version__, terminal
from sievit.config import ConfigError, Count, to_json
from sievit.data.images import list_images, read_image, to_tensor
from sievit.engine.evaluate import timed_in_turns
from sievit.export.formats import SUFFIX, Format, write_program
from sievit.export.onnx import Precision, require
from sievit.export.program import Made, program, program_of
from sievit.files import digest
from sievit.hub.file import require_free
from sievit.models.base import Model
from sievit.models.build import load, model_file
from sievit.models.exported import load_exported
from sievit.models.inputs import Size, padded_size
from sievit.policies import PolicyOptions
from sievit.tasks import task_of

STORED: dict[Precision, tuple[Format, ...]] = {
    "float32": tuple(SUFFIX),
    "float16": ("onnx", "openvino"),
    "int8": ("onnx",),
}
"""The formats whose files may have weights of a precision."""


def export(
    model: Path,
    /,
    images: Path,
    *,
    out: Path,
    format: Format = "onnx",
    mode: Literal["dynamic", "static"] = "dynamic",
    canvas: tuple[Count, Count] | None = None,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    precision: Precision = "float32",
    number: Count = 8,
    force: bool = False,
) -> dict[str, Any]:
    """Write a segmenter or detector as a file that runs elsewhere, in which tokens that are left out are not computed.

    Batch, height and width are free. The file holds everything: `sievit predict`, `eval` and others take it like a
    checkpoint, and its metadata say how images are prepared and what the classes are. It is written when it agreed
    with the model on real images. The last line of the output is one JSON object.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        images: an image or a folder; the file and the model are compared and timed on the first ones.
        out: the file to write: .onnx, .pt2 (torch-export, aoti) or .xml (openvino, with a .bin beside it).
        format: aoti is compiled for this kind of machine.
        mode: static has fixed counts of tokens, those that the policy needs on the images, and one canvas that smaller
            images are padded to; no shape depends on a value, but for the batch.
        canvas: height and width of a static file; by default what the images need.
        policy: another policy than the model's.
        precision: float16 (onnx, openvino) stores weights in half the bytes; int8 (onnx) stores those of matrix
            products in 8 bits per channel, and computes in 8 bits.
        number: of images to compare on.
        force: write over a file that is there.
    """
    if out.suffix != SUFFIX[format]:
        raise ConfigError(f"--out {out}: a file of --format {format} ends with {SUFFIX[format]}")
    if format not in STORED[precision]:
        raise ConfigError(f"--precision {precision} is of --format {' and '.join(STORED[precision])}, not {format}")
    if canvas is not None and mode == "dynamic":
        raise ConfigError("--canvas is of --mode static; a dynamic file takes images of any size")
    require(format)
    require_free(out, force=force)
    console = terminal.console()
    path = model_file(model)
    eager = load(path, policy=policy, compile=False)
    paths = ([images] if images.is_file() else list_images(images))[:number]
    console.print("exporting", soft_wrap=True)
    if mode == "static":
        eager, size = _static(path, eager, paths)
        made = program(eager, canvas=canvas or size)
    else:
        made = program(eager)
    metadata = {"config": to_json(eager.config), "model": digest(path), "version": __version__, **made.known}
    figures = _write(out, made, metadata, eager, paths, format=format, precision=precision)
    how = {"out": str(out), "format": format, "mode": mode, "precision": precision}
    return {**how, "images": len(paths), **figures}


def _write(
    out: Path,
    made: Made,
    metadata: dict[str, Any],
    eager: Model,
    paths: list[Path],
    *,
    format: Format,
    precision: Precision,
) -> dict[str, Any]:
    """Write the file if it agrees with the model; its size and what `_compared` found."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part, console = out.with_name(f".{out.name}"), terminal.console()
    least, what = task_of(eager.config).agreed
    written = [part]
    try:
        written = write_program(made, part, format, metadata, precision=precision)
        figures, worst = _compared(eager, load_exported(part), paths, console)
        if precision == "float32" and figures["agree"] < least:
            raise ConfigError(
                f"{1 - figures['agree']:.3%} of the {what} of the file are not as the model finds them, most in "
                f"{worst}; it was not written (--images and --number choose what it is compared on)"
            )
        megabytes = sum(each.stat().st_size for each in written) / 2**20
        for each in reversed(written):
            each.replace(out.with_suffix(each.suffix))
    finally:
        for each in written:
            each.unlink(missing_ok=True)
    console.print(
        f"{out}: {megabytes:.1f} MB; {figures['agree']:.4%} of the {what} of {len(paths)} images as the model finds "
        f"them; {figures['ms']:.0f} ms, the model {figures['model_ms']:.0f} ms",
        soft_wrap=True,
    )
    return {"megabytes": round(megabytes, 2), **figures}


def _static(path: Path, eager: Model, paths: list[Path]) -> tuple[Model, Size]:
    """The model with the static counts that its policy needs on the images, and the canvas that these need."""
    with torch.inference_mode():
        answers = [eager([to_tensor(read_image(each))]) for each in paths]
    unit = program_of(eager, static=True).unit
    edges = zip(*(answer.image_size for answer in answers), strict=True)
    height, width = padded_size([max(edge) for edge in edges], unit)
    if eager.policy.is_static:
        return eager, (height, width)
    kept = torch.cat([answer.shares() for answer in answers]).mean(0).tolist()
    static = eager.policy.made_static(kept)
    if static is None:
        raise ConfigError(f"{type(eager.policy).__name__} has no static counts; export with --mode dynamic")
    return load(path, policy=static, compile=False), (height, width)


def _compared(eager: Model, file: Model, paths: list[Path], console: Any) -> tuple[dict[str, Any], Path]:
    """How far the results of some images agree, and the times of both in turns; and the image that agrees least."""
    images = [to_tensor(read_image(path)) for path in paths]
    options: dict[str, Any] = {"console": console, "title": "comparing", "kept": lambda answer: answer.results[0]}
    taken = timed_in_turns([file, eager], images, **options)
    agreement = task_of(eager.config).agreement
    pairs = [agreement(own, mine) for (_, mine), (_, own) in zip(*taken, strict=True)]
    same, total = (sum(column) for column in zip(*pairs, strict=True))
    medians = [round(statistics.median(elapsed for elapsed, _ in of_model), 2) for of_model in taken]
    worst = max(zip(pairs, paths, strict=True), key=lambda each: each[0][1] - each[0][0])[1]
    return {"agree": round(same / total, 6) if total else 1.0, "ms": medians[0], "model_ms": medians[1]}, worst
