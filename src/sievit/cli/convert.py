"""`sievit convert ...`: whole models of the papers, from the files that they released."""

from pathlib import Path
from typing import Annotated, Any

from sievit.cli.command import parse, print_json
from sievit.cli.out import require_free


def svit(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.released import DetectorOptions, convert_detector

    def run(
        file: Annotated[Path, arg(metavar="FILE")],
        /,
        *,
        out: Path,
        model: OmitArgPrefixes[DetectorOptions] = DetectorOptions(),  # noqa: B008
        sample: bool = False,
        force: bool = False,
    ) -> int:
        """Make a model of a released SViT-Adapter with Mask R-CNN.

        Everything is as in the release: anchors, limits, classes, size and padding of test images. The last line of the
        output is one JSON object.

        Args:
            file: .pth of mmcv or mmengine, or .safetensors; nothing in it is run.
            out: the .safetensors file to write.
            sample: gates draw at inference, as the released test scripts do, instead of taking the arg-max.
            force: write over a file that is there.
        """
        require_free(out, force=force)
        return _finish(file, out, convert_detector(file, "svit", model, sample=sample))

    return parse(run, args, "convert svit")


def vit_adapter(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.released import DetectorOptions, convert_detector

    def run(
        file: Annotated[Path, arg(metavar="FILE")],
        /,
        *,
        out: Path,
        model: OmitArgPrefixes[DetectorOptions] = DetectorOptions(),  # noqa: B008
        force: bool = False,
    ) -> int:
        """Make a model of a dense ViT-Adapter with Mask R-CNN, what SViT starts from.

        Everything is as in the release: anchors, limits, classes, size and padding of test images. The last line of the
        output is one JSON object.

        Args:
            file: .pth of mmcv or mmengine, or .safetensors; nothing in it is run.
            out: the .safetensors file to write.
            force: write over a file that is there.
        """
        require_free(out, force=force)
        return _finish(file, out, convert_detector(file, "vit_adapter", model))

    return parse(run, args, "convert vit_adapter")


def dtop(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.released import SegmenterOptions, convert_segmenter

    def run(
        file: Annotated[Path, arg(metavar="FILE")],
        /,
        *,
        out: Path,
        model: OmitArgPrefixes[SegmenterOptions] = SegmenterOptions(),  # noqa: B008
        thresholds: tuple[float, ...] | None = None,
        force: bool = False,
    ) -> int:
        """Make a model of a released DToP: a SegViT whose easy tokens leave early.

        The last line of the output is one JSON object.

        Args:
            file: .pth of mmcv or mmengine, or .safetensors; nothing in it is run.
            out: the .safetensors file to write.
            thresholds: grades above which tokens leave; default those of the release.
            force: write over a file that is there.
        """
        require_free(out, force=force)
        return _finish(file, out, convert_segmenter(file, "dtop", model, thresholds=thresholds))

    return parse(run, args, "convert dtop")


def segvit(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.released import SegmenterOptions, convert_segmenter

    def run(
        file: Annotated[Path, arg(metavar="FILE")],
        /,
        *,
        out: Path,
        model: OmitArgPrefixes[SegmenterOptions] = SegmenterOptions(),  # noqa: B008
        force: bool = False,
    ) -> int:
        """Make a model of a dense SegViT of the DToP release, with auxiliary heads or without.

        With auxiliary heads, --thresholds of `sievit eval` and others let tokens leave early without any training. The
        last line of the output is one JSON object.

        Args:
            file: .pth of mmcv or mmengine, or .safetensors; nothing in it is run.
            out: the .safetensors file to write.
            force: write over a file that is there.
        """
        require_free(out, force=force)
        return _finish(file, out, convert_segmenter(file, "segvit", model))

    return parse(run, args, "convert segvit")


def _finish(file: Path, out: Path, converted: Any) -> int:
    """Write the model and tell what it is."""
    from sievit.models.build import save

    out.parent.mkdir(parents=True, exist_ok=True)
    save(converted.model, out)
    parameters = sum(parameter.numel() for parameter in converted.model.parameters())
    left_out = sum(len(keys) for keys in converted.dropped.values())
    facts = {**converted.facts, "parameters": f"{parameters:,}"}
    facts["keys"] = f"{converted.keys}, of which {converted.keys - left_out} used and {left_out} left out"
    print(f"{file}, now {out}")
    print("\n".join(f"  {heading:<12} {fact}" for heading, fact in facts.items()))
    for why, keys in converted.dropped.items():
        print(f"  {'left out':<12} {', '.join(keys)}: {why}")
    print_json(
        {
            "out": str(out),
            **converted.facts,
            "parameters": parameters,
            "keys": converted.keys,
            "used": converted.keys - left_out,
            "dropped": converted.dropped,
        }
    )
    return 0
