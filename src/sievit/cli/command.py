"""A command: the function that does the work, the options read from its signature, and its figures written as JSON."""

import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Annotated, Any

from sievit.config import ConfigError, check_range

RENAMED = {
    "sweep --thresholds": "--policy dtop --values 0.8 0.9",
    "--thresholds": "--policy dtop --set thresholds=0.9",
    "--budget": "--set budget=0.7",
    "--(keep-per-class|grade|preserve|rejoin)": r"--set \1=VALUE",
    r"--model\.head\.round-anchors": "--model.head.anchors.rounded",
    r"--model\.head\.anchor-(.+)": r"--model.head.anchors.\1",
    r"--model\.head\.rpn-box-(.+)": r"--model.head.rpn.\1",
    r"--model\.head\.(rpn|roi|box|mask)-(.+)": r"--model.head.\1.\2",
}
"""What options of earlier versions are called now, of all commands or of one."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        usage: its arguments without a name.
        summary: what it does, in a line.
        function: "module:name" of the function that does the work, imported when the command runs. Its positional-only
            parameters are the arguments, all others are options; it returns its figures, or the exit status.
        raw: the function takes the arguments as they were typed.
    """

    usage: str
    summary: str
    function: str
    raw: bool = False

    def run(self, name: str, args: list[str]) -> int:
        """Run the command called `name`; the exit status is 1 for failures, or a target that was missed."""
        module, _, attribute = self.function.partition(":")
        function = getattr(import_module(module), attribute)
        result = function(args) if self.raw else parse(function, args, name)
        if not isinstance(result, dict):
            return result or 0
        failures = result.get("failures") or ()
        for failure in failures:
            if isinstance(failure, str):
                print(f"error: {failure}", file=sys.stderr)
        print(json.dumps(result), flush=True)
        return 1 if failures or not (result.get("target") or {"met": True})["met"] else 0


def parse(function: Callable[..., Any], args: list[str], name: str, *, prefixes: bool = False) -> Any:
    """Call `function` with the options in `args`, typed by its annotations; tyro names the nearest option of a typo.

    Dataclasses among its parameters are groups of options. A parameter `progress` is a console on standard error.

    Args:
        prefixes: options of a group have the names of the groups they are in before them.

    Raises:
        ConfigError: an option of an earlier version.
        SystemExit: of status 2 on a wrong option, 0 on --help.
    """
    import tyro

    options = dict(_options(function, prefixes=prefixes))
    conf = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed)
    conf = conf if prefixes else (*conf, tyro.conf.OmitArgPrefixes)
    args = list(_spelled_out(args, options, name))
    return tyro.cli(_with_placeholders(function), args=args, prog=f"sievit {name}", config=conf)


def _options(function: Callable[..., Any], *, prefixes: bool) -> Iterator[tuple[str, Any]]:
    """Every option of a function, and its default."""
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_ONLY:
            given = parameter.default is not parameter.empty
            value = parameter.default if given else hints[parameter.name]
            yield from _of_value(value, parameter.name, "", prefixes=prefixes)


def _of_value(value: Any, name: str, prefix: str, *, prefixes: bool, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        yield f"--{prefix}{name.replace('_', '-')}", value
        return
    if prefixes and depth:
        prefix = f"{prefix}{name.replace('_', '-')}."
    for field in dataclasses.fields(value):
        yield from _of_value(getattr(value, field.name, None), field.name, prefix, prefixes=prefixes, depth=depth + 1)


def _spelled_out(args: list[str], options: dict[str, Any], name: str) -> Iterator[str]:
    """The arguments with True behind flags that stand alone.

    Raises:
        ConfigError: an option of an earlier version (its new name is given), or one of several values given twice.
    """
    for place, arg in enumerate(args):
        following = args[place + 1] if place + 1 < len(args) else ""
        option = arg.partition("=")[0].replace("_", "-")
        if isinstance(options.get(option), tuple) and arg in args[:place]:
            raise ConfigError(f"{option} is given twice; write all its values behind one")
        if option.startswith("--") and option not in options:
            for old, new in RENAMED.items():
                if found := re.fullmatch(old, f"{name} {option}") or re.fullmatch(old, option):
                    raise ConfigError(f"{option} is now written {found.expand(new).replace('VALUE', following)}")
        yield arg
        if isinstance(options.get(arg.replace("_", "-")), bool) and following not in ("True", "False"):
            yield "True"


def _with_placeholders(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose positional arguments have their own names in the help, without `progress`."""
    from tyro.conf import arg

    from sievit import terminal

    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            hints[name] = Annotated[hints[name], arg(metavar=name.upper())]  # ty: ignore
    called = partial(function, progress=terminal.console()) if "progress" in hints else function
    shown = {n: f"--{n.replace('_', '-')}" for n, p in signature.parameters.items() if p.kind is not p.POSITIONAL_ONLY}
    parameters = [p.replace(annotation=hints[n]) for n, p in signature.parameters.items() if n != "progress"]

    def run(*args: Any, **options: Any) -> Any:
        for name, value in options.items():
            check_range(hints[name], value, shown.get(name, name))
        return called(*args, **options)

    run.__doc__ = function.__doc__
    run.__signature__ = signature.replace(parameters=parameters)  # ty: ignore
    run.__annotations__ = {name: hint for name, hint in hints.items() if name != "progress"}
    return run
