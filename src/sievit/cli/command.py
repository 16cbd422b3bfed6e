"""What commands share: what one is, how its options are read, how its figures are written."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command: how it is called, what it does in a line, and the function that takes its arguments."""

    usage: str
    summary: str
    run: Callable[[list[str]], int]


def parse(target: Callable[..., Any], args: list[str], name: str) -> Any:
    """Call `target` with the options in `args`, typed by its annotations; tyro names the nearest option of a typo.

    Raises:
        SystemExit: of status 2 on a wrong option, 0 on --help.
    """
    import tyro

    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(target, args=args, prog=f"sievit {name}", config=config)


def print_json(figures: dict[str, Any]) -> None:
    """The last line of a command's output."""
    print(json.dumps(figures), flush=True)


def first_line(documented: object) -> str:
    """Of the docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]
