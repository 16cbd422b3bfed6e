"""What detectors and segmenters share: reading the file, and telling what was found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sievit.config import ConfigError
from sievit.convert import read_checkpoint
from sievit.convert.family import require_family
from sievit.convert.pth import Checkpoint
from sievit.data.label_files import read_text
from sievit.models.base import Model
from sievit.vit import ViT


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A released model.

    Attributes:
        model: in evaluation mode.
        facts: what there is to tell of it, by heading.
        keys: how many the file had. dropped: those that were left out on purpose, by the reason why.
    """

    model: Model
    facts: dict[str, str]
    keys: int
    dropped: dict[str, list[str]]


def of_file(path: Path, kind: str, assemble: Callable[[Checkpoint], Converted]) -> Converted:
    """What `assemble` makes of the file; whatever is wrong with it begins with its name.

    Raises:
        ConfigError: no such file, damaged, of another family, or of things that do not fit together.
    """
    checkpoint = read_checkpoint(path)
    try:
        require_family(checkpoint.state, kind)
        return assemble(checkpoint)
    except ValueError as error:  # a ConfigError is one too
        raise ConfigError(f"{path}: {error}") from error
    except (IndexError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: its tensors do not fit each other ({error})") from error


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
