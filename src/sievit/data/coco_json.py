"""COCO's JSON files: read, and their entries checked; every error names the file, the entry and the way out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sievit.config import ConfigError, shown
from sievit.text import is_text, is_whole, read_json

Fields = dict[str, Callable[[Any], bool]]
"""The fields that an entry has to have, and what has to be true of their values."""

_EXPECTED = "a COCO file is an object with 'images', 'annotations' and 'categories'"


class CocoFile:
    """A file in one of COCO's formats, or its content."""

    def __init__(self, source: Path | dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the file cannot be read, or is no JSON object.
        """
        self.name = "annotations" if isinstance(source, dict) else str(source)
        content = source if isinstance(source, dict) else read_json(Path(source))
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise ConfigError(f"{source}: holds a JSON {kind}; {_EXPECTED}; is this a results file?")
        self.content: dict[str, Any] = content

    def entries(self, key: str) -> list[Any]:
        """The list `key`, unchecked.

        Raises:
            ConfigError: there is none.
        """
        if not isinstance(self.content.get(key), list):
            problem = f"has no '{key}'" if key not in self.content else f"'{key}' is not a list"
            raise ConfigError(f"{self.name}: {problem}; {_EXPECTED}")
        return self.content[key]

    def records(self, key: str, fields: Fields, *, identity: str = "id") -> list[dict[str, Any]]:
        """The list `key`, whose entries have these fields and a whole number `identity` that no other one has.

        Raises:
            ConfigError: an entry is not so, or there is no such list.
        """
        return self.checked(self.entries(key), f"'{key}'", fields, identity=identity)

    def checked(self, entries: list[Any], what: str, fields: Fields, *, identity: str = "id") -> list[dict[str, Any]]:
        """As `records`, of a list that errors call `what`."""
        seen: set[int] = set()
        for place, record in enumerate(entries):
            if not isinstance(record, dict) or not is_whole(record.get(identity)):
                raise ConfigError(
                    f"{self.name}: entry {place} (counted from 0) of {what} has no whole number '{identity}'; add it"
                )
            number = record[identity]
            for field, fits in fields.items():
                if not fits(record.get(field)):
                    problem = f"has no '{field}'" if field not in record else f"has {shown(record[field])} as '{field}'"
                    raise ConfigError(
                        f"{self.name}: entry with {identity} {number} of {what} {problem}; correct the file"
                    )
            if number in seen:
                raise ConfigError(
                    f"{self.name}: {identity} {number} occurs more than once in {what}; give every entry its own"
                )
            seen.add(number)
        return entries

    def categories(self) -> list[dict[str, Any]]:
        """The categories in the order of the file.

        Raises:
            ConfigError: there is none, or one has no id and name.
        """
        found = self.records("categories", {"name": is_text})
        if not found:
            raise ConfigError(f"{self.name}: 'categories' is empty; list the classes with their ids and names")
        return found
