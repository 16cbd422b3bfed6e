"""The papers' released checkpoints as whole models: the tables of `convert`, and what the recipes state of the rest.

A file holds weights. Anchors, limits, classes, sizes of test images and thresholds are those of the recipe of the same
model; what no recipe states has to be given.
"""

from pathlib import Path

from sievit.config import ConfigError
from sievit.convert import read_checkpoint
from sievit.convert.family import require_family
from sievit.released import detectors, segmenters
from sievit.released.common import Converted, ReleasedOptions
from sievit.released.detectors import SViTOptions, ViTAdapterOptions
from sievit.released.segmenters import DToPOptions, SegViTOptions

__all__ = [
    "Converted",
    "DToPOptions",
    "ReleasedOptions",
    "SViTOptions",
    "SegViTOptions",
    "ViTAdapterOptions",
    "convert",
]


def convert(path: Path, options: ReleasedOptions) -> Converted:
    """The model in a released file of the family of `options`.

    Raises:
        ConfigError: no such file, damaged, of another family, with keys that are missing, unknown or of a shape that
            does not fit, or with classes or constants that neither a recipe nor the options state; the message begins
            with the file.
    """
    checkpoint = read_checkpoint(path)
    try:
        require_family(checkpoint.state, options.family)
        if isinstance(options, ViTAdapterOptions):
            return detectors.assemble(checkpoint, options)
        assert isinstance(options, SegViTOptions)
        return segmenters.assemble(checkpoint, options)
    except ValueError as error:  # a ConfigError is one too
        raise ConfigError(f"{path}: {error}") from error
    except (IndexError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: its tensors do not fit each other ({error})") from error
