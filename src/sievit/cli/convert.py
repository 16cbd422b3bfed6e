"""`sievit convert ...`: whole models of the papers, from the files that they released."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sievit.hub.file import require_free
from sievit.models.build import save
from sievit.released import DToPOptions, ReleasedOptions, SegViTOptions, SViTOptions, ViTAdapterOptions, convert


def _command(options: ReleasedOptions, text: str) -> Callable[..., dict[str, Any]]:
    """The command that converts files of one family."""

    def run(file: Path, /, *, out: Path, model: Any = options, force: bool = False) -> dict[str, Any]:
        """{}. The last line of the output is one JSON object.

        Args:
            file: .pth of mmcv or mmengine, or .safetensors; nothing in it is run.
            out: the .safetensors file to write.
            force: write over a file that is there.
        """
        require_free(out, force=force)
        converted = convert(file, model)
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
        numbers = {"parameters": parameters, "keys": converted.keys, "used": converted.keys - left_out}
        return {"out": str(out), **converted.facts, **numbers, "dropped": converted.dropped}

    run.__annotations__["model"] = type(options)
    run.__doc__ = (run.__doc__ or "").format(text)
    return run


svit = _command(
    SViTOptions(),
    "Make a model of a released SViT-Adapter with Mask R-CNN; everything is as in the release: anchors, limits, "
    "classes, size and padding of test images",
)
vit_adapter = _command(
    ViTAdapterOptions(), "Make a model of a dense ViT-Adapter with Mask R-CNN, what SViT starts from, as in the release"
)
dtop = _command(DToPOptions(), "Make a model of a released DToP: a SegViT whose easy tokens leave early")
segvit = _command(
    SegViTOptions(),
    "Make a model of a dense SegViT of the DToP release; with auxiliary heads, `sievit eval --policy dtop` prunes it "
    "without any training",
)
