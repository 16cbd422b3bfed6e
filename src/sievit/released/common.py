"""What detectors and segmenters share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sievit.config import Config, ConfigError
from sievit.models.base import Model
from sievit.text import read_text
from sievit.vit import ViT

Names = tuple[str, ...]


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


def lines(path: Path) -> tuple[Names, tuple]:
    """The names in a file, one a line, and nothing beside.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    return tuple(line.strip() for line in read_text(path, "the classes").splitlines() if line.strip()), ()


def class_names(
    count: int,
    stored: tuple[str, ...],
    usual: tuple[Names, tuple] | None,
    files: Mapping[str, tuple[Path | None, Callable[[Path], tuple[Names, tuple]]]],
    *,
    way_out: str,
) -> tuple[Names, tuple]:
    """The names of `count` classes, and what a file or a known data set says beside (colours, ids).

    Args:
        stored: the names in the checkpoint; empty for none.
        usual: the answer where that many classes are those of a known data set.
        files: by option the file that was given, and what reads it.
        way_out: the end of the message where nothing names them.

    Raises:
        ConfigError: two files, one with another number of names, or nothing that names the classes.
    """
    given = [(path, read) for path, read in files.values() if path is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(files)} both name the classes; give one of them")
    for path, read in given:
        names, more = read(path)
        if len(names) != count:
            raise ConfigError(f"has {count} classes, but {path} names {len(names)}")
        return names, more
    if usual is None and len(stored) != count:
        raise ConfigError(f"has {count} classes, which are {way_out}")
    return usual or (stored, ())


def described(vit: ViT) -> str:
    """A ViT in a few words."""
    config = vit.config
    return (
        f"ViT {config.embed_dim} wide, {config.depth} blocks, {config.num_heads} heads, patches of {config.patch_size}"
    )
