"""The command line. Everything heavy is imported by the command that needs it: `sievit --help` answers at once.

Exit status: 0 done, 1 something could not be done, 2 something the user has to change, 130 interrupted, 141 nobody
reads the output. docs/reliability.md says what is kept in each case.
"""

import os
import sys
from collections.abc import Sequence

from sievit.cli.command import Command
from sievit.config import ConfigError, nearest
from sievit.memory import keep_memory

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""In torch's errors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `--help` and mistyped options leave by SystemExit instead."""
    if argv is None:  # the process is ours
        keep_memory()
        sys.stdout.reconfigure(errors="backslashreplace")  # ty: ignore  # names of files may hold bytes that are no text
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(args)
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        return _failed(str(error), 2)
    except BrokenPipeError:  # `sievit --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FileExistsError, NotADirectoryError) as error:
        return _failed(f"{error.filename}: is a file where a folder is needed; give another name", 2)
    except OSError as error:  # a full disk, a folder that cannot be written: the machine's, no bug
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        reason = str(error).partition("\n")[0]
        return _failed(f"not enough memory ({reason}); take smaller images or batches", 1)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130


def _failed(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from sievit import __version__

        print(f"sievit {__version__}")
        return 0
    if args[0] in COMMANDS:
        return COMMANDS[args[0]].run(args[0], args[1:])
    group = [name for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if not group:
        raise ConfigError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
    if len(args) == 1 or args[1] in ("-h", "--help"):
        print("\n".join(_line(name) for name in group), file=sys.stdout if len(args) > 1 else sys.stderr)
        return 0 if len(args) > 1 else 2
    name = " ".join(args[:2])
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{nearest(name, group)}")
    return COMMANDS[name].run(name, args[2:])


def _overview() -> str:
    lines = ["usage: sievit COMMAND ...", "", (sys.modules["sievit"].__doc__ or "").partition("\n")[0], ""]
    lines += [_line(name) for name in COMMANDS]
    return "\n".join([*lines, "", "sievit COMMAND --help lists a command's options."])


def _line(name: str) -> str:
    command = COMMANDS[name]
    return f"  {f'{name} {command.usage}':<24} {command.summary}"


COMMANDS = {
    "demo": Command("", "see it: dense against sparse on photographs", "sievit.report:demo"),
    "train": Command("RECIPE", "train a model, or go on with --resume RUN", "sievit.cli.train:train", raw=True),
    "eval": Command("MODEL", "accuracy, tokens, GFLOPs and latency", "sievit.report:evaluate"),
    "predict": Command("MODEL SOURCE", "find objects or label pixels in images", "sievit.report:predict"),
    "serve": Command("MODEL", "a page on this machine to try a model on images, and REST", "sievit.serve:serve"),
    "sweep": Command("MODEL", "a model at many settings of its policy: table and plot", "sievit.report.sweep:sweep"),
    "ablate": Command("[PLAN]", "methods trained from one dense model, and compared", "sievit.lab:ablate"),
    "show": Command("MODEL IMAGE", "one picture: dense, pruned, and which tokens", "sievit.report.show:show"),
    "report": Command("SUBJECT", "an HTML file on a training, model or comparison", "sievit.report.command:report"),
    "inspect": Command("MODEL", "which tokens are computed: by class, size and image", "sievit.report.inspect:inspect"),
    "curve": Command("RUN", "loss, tokens and accuracy of trainings: a picture", "sievit.report.curve:curve"),
    "tune": Command("MODEL", "a model made fast on this device: what pays, to a target", "sievit.tune:tune"),
    "export": Command("MODEL", "an ONNX file that leaves out tokens too", "sievit.export:export"),
    "card": Command("MODEL", "a folder for the Hugging Face Hub: weights, configuration, card", "sievit.cli.card:card"),
    "convert svit": Command("FILE", "a released SViT-Adapter", "sievit.cli.convert:svit"),
    "convert vit_adapter": Command("FILE", "a released dense ViT-Adapter", "sievit.cli.convert:vit_adapter"),
    "convert dtop": Command("FILE", "a released DToP", "sievit.cli.convert:dtop"),
    "convert segvit": Command("FILE", "a released dense SegViT", "sievit.cli.convert:segvit"),
    "init": Command("RECIPE", "a recipe's model with random weights, to try things on", "sievit.cli.init:init"),
    "data scenes": Command("", "generate scenes in COCO format", "sievit.cli.data:scenes"),
    "bench blocks": Command("", "time the backbone's blocks, dense against sparse", "sievit.bench:bench_blocks"),
    "bench backbone": Command("", "time ViT-Adapter, dense against SViT", "sievit.bench:bench_backbone"),
    "bench network": Command("", "time a whole network, dense against its policy", "sievit.bench:bench_network"),
    "bench models": Command("MODEL ...", "time checkpoints and exported files in turns", "sievit.bench:bench_models"),
    "bench heads": Command("", "where a whole detector's time goes, part by part", "sievit.bench:bench_heads"),
    "flops": Command("TARGET", "GFLOPs of a recipe or model, by part and image", "sievit.cli.flops:flops"),
    "recipes": Command("[NAME]", "list the recipes, or print one", "sievit.cli.lists:recipes"),
    "policies": Command("", "list the token policies", "sievit.cli.lists:policies"),
}
