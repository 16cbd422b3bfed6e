"""Hostile versions of JSON documents and of files, drawn from a `random.Random` (or one of hypothesis's)."""

import copy
import json
import math
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS: tuple[int | float, ...] = (
    *(0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**70, -(2**31), -(2**63)),
    *(-(2**64), 10**30, 10**307, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -3.7, 1e7, 1e8, 1e9, -1e9, 1e18, 1e300, 1e308),
    *(5e-324, math.nan, math.inf, -math.inf),
)
TEXTS = (
    "",
    " ",
    "0",
    "5",
    "1.5",
    "true",
    "null",
    "a",
    "\0",
    "\ud800",
    "äöü",
    "..",
    "a/../../b",
    "x" * 5000,
    "~o~o~o",
    "P",
)
PATH = tuple[str | int, ...]


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def hostile(random: Random) -> Any:
    """A value of any kind, most of them where they cannot be meant."""
    kind = random.randrange(6)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind == 2:
        return random.choice(TEXTS)
    if kind == 3:
        return random.choice((None, True, False, [], {}, [[]], [{}], {"": None}, {"id": 1}, nested(50)))
    if kind == 4:
        return [random.choice(NUMBERS) for _ in range(random.randrange(1, 9))]
    return {random.choice(("size", "counts", "id", "a")): random.choice(NUMBERS) for _ in range(2)}


def places(document: Any, path: PATH = ()) -> Iterator[PATH]:
    """The way to every value in a document, itself left out."""
    keys = range(len(document)) if isinstance(document, list) else document if isinstance(document, dict) else ()
    for key in keys:
        yield (*path, key)
        yield from places(document[key], (*path, key))


def mutate(document: Any, random: Random, *, changes: int = 3) -> Any:
    """A copy of a JSON document with up to so many hostile changes, at least one."""
    document = copy.deepcopy(document)
    for _ in range(random.randint(1, changes)):
        _change(document, random)
    return document


def _change(document: Any, random: Random) -> None:
    """Change one value somewhere: replace it, take it out, have it twice, move a number, or put another one there."""
    found = list(places(document))
    if not found:
        return
    *way, key = random.choice(found)
    holder = _at(document, way)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 2:
        holder[key] = copy.deepcopy(_at(document, random.choice(found)))
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = _moved(holder[key], random)
    elif kind == 4 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = holder.pop(key)
    else:
        holder[key] = hostile(random)


def _moved(number: int | float, random: Random) -> int | float:
    moved = (lambda: -number, lambda: number + 0.5, lambda: number * 10 ** random.randrange(12), lambda: number == 1)
    try:
        return random.choice(moved)()
    except OverflowError:
        return math.inf


def _at(document: Any, path: Any) -> Any:
    for key in path:
        document = document[key]
    return document


def spoilt(document: Any, random: Random) -> bytes:
    """A document as the bytes of a file that is damaged, or only looks so."""
    data = json.dumps(document).encode()
    kind = random.randrange(8)
    if kind == 0:
        return b"\xef\xbb\xbf" + data
    if kind == 1:
        return data[: random.randrange(len(data))]
    if kind == 2:
        return json.dumps(document).encode(random.choice(("utf-16", "utf-32")))
    if kind == 3:
        return data.replace(b"[", b"[" * random.choice((2, 100_000)), 1)
    if kind == 4:
        return data.replace(b'"id": ', random.choice((b'"id": 1, "id": ', b'"id": -', b'"id": ' + b"9" * 5000)))
    place = random.randrange(len(data))
    if kind == 5:
        return data[:place] + random.randbytes(random.randrange(1, 9)) + data[place:]
    if kind == 6:
        return data[:place] + random.choice((b"NaN", b"Infinity", b"\0", b"\\ud800", b"}", b'"')) + data[place + 1 :]
    return data[:place] + data[place + random.randrange(1, 99) :]
