"""Text and JSON files, with a byte order mark or without; what is wrong with one is said of the file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from sievit.config import ConfigError, from_json, shown

T = TypeVar("T")

_LARGEST = 1e300
"""No number of a file is larger: beyond, whole numbers and floats do not go together."""


def unreadable(path: Path, what: str, error: OSError) -> ConfigError:
    """The error of a file that the system does not hand out; it says nothing about what the file holds."""
    way_out = "you may not read it: change the permissions" if isinstance(error, PermissionError) else "check the path"
    return ConfigError(f"{path}: cannot be read as {what} ({error.strerror or error}); {way_out}")


def read_text(path: Path, what: str) -> str:
    """
    Args:
        what: the file is meant to be, for the error.

    Raises:
        ConfigError: there is no such file, it may not be read, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise unreadable(path, what, error) from error
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as {what} ({error}); save it as text in UTF-8") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, "a JSON file"), where=str(path))


def parse_json(text: str, *, where: str) -> Any:
    """What a JSON text holds.

    Raises:
        ConfigError: it is not JSON, says two things of one key, or is nested too deeply; it begins with `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({error}); correct it") from error


def load_json(cls: type[T], path: Path) -> T:
    """Read a configuration of type `cls` from a JSON file.

    Raises:
        ConfigError: the file cannot be read, or does not describe a `cls`; the message names it.
    """
    return from_json(cls, read_json(path), where=str(path))


def is_number(value: Any) -> bool:
    """Whether a field is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def is_whole(value: Any) -> bool:
    """Whether a field is a whole number."""
    return isinstance(value, int) and is_number(value)


def is_text(value: Any) -> bool:
    """Whether a field is a string that is not empty."""
    return isinstance(value, str) and bool(value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {shown(twice)} more than once")
    return found


def first_line(documented: object) -> str:
    """Of the docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]
