"""What detectors and segmenters share."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sievit.config import Config
from sievit.data.text import read_text
from sievit.models.base import Model
from sievit.vit import ViT


class ReleasedOptions(Config):
    """Base of the options for what the files of a family do not hold.

    Attributes:
        family: of released models.
    """

    family: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A released model.

    Attributes:
        model: in evaluation mode.
        facts: to print, by heading.
        keys: how many the file had. dropped: those that were left out on purpose, by reason.
    """

    model: Model
    facts: dict[str, str]
    keys: int
    dropped: dict[str, list[str]]


def lines(path: Path) -> tuple[str, ...]:
    """The names in a file, one a line.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    return tuple(line.strip() for line in read_text(path, "the classes").splitlines() if line.strip())


def described(vit: ViT) -> str:
    """A ViT in a few words."""
    config = vit.config
    return (
        f"ViT {config.embed_dim} wide, {config.depth} blocks, {config.num_heads} heads, patches of {config.patch_size}"
    )
