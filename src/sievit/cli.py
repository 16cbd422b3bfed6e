"""The command line. Everything heavy is imported by the command that needs it: `sievit --help` answers at once.

Exit status: 0 done, 1 something could not be done, 2 something the user has to change, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from sievit.config import ConfigError, nearest


@dataclass(frozen=True)
class Command:
    """One command: how it is called, what it does in a line, and the function that takes its arguments."""

    usage: str
    summary: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `--help` and mistyped options leave by SystemExit instead."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written: the machine's, no bug
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from sievit import __version__

        print(f"sievit {__version__}")
        return 0
    if args[0] in COMMANDS:
        return COMMANDS[args[0]].run(args[1:])
    group = [name for name in COMMANDS if name.startswith(f"{args[0]} ")]
    if not group:
        raise ConfigError(f"unknown command {args[0]!r}{nearest(args[0], COMMANDS)}")
    if len(args) == 1 or args[1] in ("-h", "--help"):
        print("\n".join(_line(name) for name in group), file=sys.stdout if len(args) > 1 else sys.stderr)
        return 0 if len(args) > 1 else 2
    name = " ".join(args[:2])
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{nearest(name, group)}")
    return COMMANDS[name].run(args[2:])


def _overview() -> str:
    lines = ["usage: sievit COMMAND ...", "", (sys.modules["sievit"].__doc__ or "").partition("\n")[0], ""]
    lines += [_line(name) for name in COMMANDS]
    return "\n".join([*lines, "", "sievit COMMAND --help lists a command's options."])


def _line(name: str) -> str:
    command = COMMANDS[name]
    return f"  {f'{name} {command.usage}':<22} {command.summary}"


def _parse(target: Callable[..., Any], args: list[str], name: str) -> Any:
    """Call `target` with the options in `args`, typed by its annotations; tyro names the nearest option of a typo.

    Raises:
        SystemExit: of status 2 on a wrong option, 0 on --help.
    """
    import tyro

    config = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(target, args=args, prog=f"sievit {name}", config=config)


def _print_json(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


def _train(args: list[str]) -> int:
    from sievit.recipes import recipe as find
    from sievit.recipes import recipes

    if not args or args[0].startswith("-"):
        if args and args[0] in ("-h", "--help"):
            print(
                f"usage: sievit train RECIPE [OPTIONS]\n\n{_recipe_list()}\n\nsievit train RECIPE --help lists options"
            )
            return 0
        raise ConfigError(f"sievit train needs the name of a recipe first{nearest('', recipes())}")
    name = args[0]
    default = find(name)

    from dataclasses import replace

    from tyro.conf import arg

    from sievit.engine.recipe import Recipe, with_classes

    def run(
        recipe: Annotated[Recipe, arg(name="")] = default,
        *,
        out: Path = Path("runs") / name,
        resume: Path | None = None,
        data_root: Path | None = None,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        palette: Path | None = None,
    ) -> int:
        """Train a model; the last line of the output is one JSON object with the figures of the last validation.

        Args:
            out: folder of the run.
            resume: go on with the run in this folder, as it was started; takes no other option.
            data_root: folder of the data sets; default the recipe's, else the environment's SIEVIT_DATA, else
                ../shared/data.
            num_classes: of a segmenter's labels, where they are not the recipe's.
            ignore_index: label of pixels of which nothing is known.
            palette: file with a line `red green blue name` for each class; label images may be in these colours.
        """
        if data_root is not None:
            recipe = replace(recipe, data=replace(recipe.data, root=data_root))
        if (num_classes, ignore_index, palette) != (None, None, None):
            recipe = with_classes(recipe, num_classes=num_classes, ignore_index=ignore_index, palette=palette)
        return _run_training(None if resume else recipe, resume or out)

    if any(option.partition("=")[0] == "--resume" for option in args[1:]) and len(args) > 3:
        raise ConfigError("--resume goes on with the run as it was started and takes no other option")
    return _parse(run, args[1:], f"train {name}")


def _run_training(recipe: Any, out: Path) -> int:
    """Train `recipe`, or go on with the run in `out` when there is none."""
    from rich.console import Console

    from sievit.engine.train import train

    figures = train(recipe, out=out, resume=recipe is None, console=Console(stderr=True))
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        _print_json(figures)
    return 0


def _eval(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.report.semantic import LabelFiles

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        /,
        *,
        images: Path,
        annotations: Path | None = None,
        labels: Path | None = None,
        label_files: OmitArgPrefixes[LabelFiles] = LabelFiles(),  # noqa: B008
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        max_detections: int = 100,
        device: str = "auto",
    ) -> int:
        """Evaluate a model; the last line of the output is one JSON object with every figure.

        Detectors take --annotations, segmenters --labels. Images that cannot be used are left out and listed in
        `failures`; the exit status is 1 then.

        Args:
            model: checkpoint, folder of a training run, or name of a model that comes with sievit.
            images: folder that holds the images.
            annotations: COCO annotation file.
            labels: folder of label images: grey or palette images whose values are classes.
            policy: takes the place of the model's own, e.g. keep_all for dense.
            thresholds: of the early exits of a segmenter, takes the place of its policy.
            batch_size: images that go through the network together.
            limit: only the first so many images.
            max_detections: the best so many of an image and class are judged; COCO's is 100.
            device: cpu, cuda, cuda:1, or auto.
        """
        from sievit.report import evaluate

        figures = evaluate(
            model,
            images,
            annotations=annotations,
            labels=labels,
            label_files=label_files,
            policy=policy,
            thresholds=thresholds,
            batch_size=batch_size,
            limit=limit,
            max_detections=max_detections,
            device=device,
        )
        for failure in figures.get("failures", ()):
            print(f"error: {failure}", file=sys.stderr)
        _print_json(figures)
        return 1 if "failures" in figures else 0

    return _parse(run, args, "eval")


def _predict(args: list[str]) -> int:
    from tyro.conf import arg

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        images: Annotated[Path, arg(metavar="IMAGES")],
        /,
        *,
        out: Path,
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        score_threshold: float = 0.5,
        ids: Path | None = None,
        device: str = "auto",
    ) -> int:
        """Find objects in, or label every pixel of, an image or a folder of images.

        A detector writes results.json (COCO results) and images.json (which image has which id), a segmenter label
        images in labels/ and classes.json (what their values mean); both write one picture per image.

        Args:
            model: checkpoint, folder of a training run, or name of a model that comes with sievit.
            images: an image, or a folder of images.
            out: folder for the results.
            policy: takes the place of the model's own, e.g. keep_all for dense.
            thresholds: of the early exits of a segmenter, takes the place of its policy.
            score_threshold: pictures show objects of at least this score; results.json holds all.
            ids: COCO annotation file whose image ids results.json shall use; by default 1, 2, ... by file name.
            device: cpu, cuda, cuda:1, or auto.
        """
        from sievit.report import predict

        return predict(
            model,
            images,
            out,
            policy=policy,
            thresholds=thresholds,
            score_threshold=score_threshold,
            ids=ids,
            device=device,
        )

    return _parse(run, args, "predict")


def _demo(args: list[str]) -> int:
    def run(
        *,
        out: Path = Path("out/demo"),
        num_images: int = 32,
        pictures: int = 8,
        seed: int = 2024,
        data_root: Path | None = None,
        device: str = "auto",
    ) -> int:
        """Dense against sparse on freshly generated scenes, and on nuclei where the data is there.

        Args:
            out: folder for the pictures.
            num_images: per data set.
            pictures: how many images get a picture, per data set.
            seed: of the scenes; those of the training sets lie elsewhere.
            data_root: folder with nuclei/; default the environment's SIEVIT_DATA, else ../shared/data.
            device: cpu, cuda, cuda:1, or auto.
        """
        from sievit.report import demo

        _print_json(demo(out, num_images=num_images, pictures=pictures, seed=seed, data_root=data_root, device=device))
        return 0

    return _parse(run, args, "demo")


def _data_scenes(args: list[str]) -> int:
    def run(*, out: Path, num_images: int = 100, size: tuple[int, int] = (512, 512), seed: int = 0) -> int:
        """Generate scenes in COCO format: images/, annotations.json, labels/ (semantic).

        Args:
            out: folder to write; has to be new or empty.
            num_images: how many.
            size: height and width in pixels.
            seed: the same seed gives the same scenes.
        """
        from sievit.data.scenes import generate

        generate(out, num_images=num_images, size=size, seed=seed)
        print(f"{out}: {num_images} scenes")
        return 0

    return _parse(run, args, "data scenes")


def _sweep(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.report.sweep import ExitOptions, Labelled, sweep

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        /,
        *,
        data: OmitArgPrefixes[Labelled],
        thresholds: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95, 0.98),
        out: Path = Path("out/sweep"),
        name: str = "DToP",
        also: tuple[str, ...] = (),
        limit: int | None = None,
        batch_size: int = 1,
        timed_images: int = 16,
        exits: OmitArgPrefixes[ExitOptions] = ExitOptions(),  # noqa: B008
        device: str = "auto",
    ) -> int:
        """Evaluate a segmenter at many thresholds of its early exits, and densely.

        Writes sweep.json, sweep.csv and sweep.png; the last line of the output is one JSON object with all `points`.
        Stopped, it goes on where it was.

        Args:
            model: checkpoint, folder of a training run, or name of a model that comes with sievit.
            thresholds: grades above which tokens leave; 1, the dense model, is always added.
            out: folder for table, JSON and plot.
            name: of the model's curve in table and plot.
            also: further checkpoints as curves of their own: NAME=CHECKPOINT, or NAME=CHECKPOINT@0.9,0.95.
            limit: only the first so many images.
            batch_size: images that go through the network together.
            timed_images: so many images are timed, by all in turns.
            device: cpu, cuda, cuda:1, or auto.
        """
        figures = sweep(
            model,
            data,
            thresholds,
            out,
            name=name,
            also=also,
            limit=limit,
            batch_size=batch_size,
            timed_images=timed_images,
            exits=exits,
            device=device,
        )
        _print_json(figures)
        return 1 if figures["failures"] else 0

    return _parse(run, args, "sweep")


def _bench_blocks(args: list[str]) -> int:
    from sievit.bench import BlocksBench, bench_blocks

    _print_json(bench_blocks(_parse(BlocksBench, args, "bench blocks")))
    return 0


def _bench_network(args: list[str]) -> int:
    from sievit.bench import NetworkBench, bench_network

    _print_json(bench_network(_parse(NetworkBench, args, "bench network")))
    return 0


def _flops(args: list[str]) -> int:
    from tyro.conf import arg

    def run(
        target: Annotated[str, arg(metavar="TARGET")],
        /,
        *,
        size: tuple[int, int] | None = None,
        images: Path | None = None,
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        device: str = "auto",
    ) -> int:
        """Count what a model costs, by part; the last line of the output is one JSON object.

        Without --images every token takes part: `gflops` is by the papers' rule, `gflops_full` is everything.

        Args:
            target: recipe, checkpoint, folder of a training run, or name of a model that comes with sievit.
            size: height and width in pixels; default the training crop, of a detector the largest test image.
            images: folder of images that a trained model is run on, for what it spends on each.
            policy: takes the place of the model's own, for --images.
            thresholds: of the early exits of a segmenter, for --images.
            batch_size: images that go through the network together.
            limit: only the first so many images.
            device: cpu, cuda, cuda:1, or auto.
        """
        return _run_flops(target, size, images, policy, thresholds, batch_size, limit, device)

    return _parse(run, args, "flops")


def _run_flops(
    target: str,
    size: tuple[int, int] | None,
    images: Path | None,
    policy: str | None,
    thresholds: tuple[float, ...] | None,
    batch_size: int,
    limit: int | None,
    device: str,
) -> int:
    from rich.console import Console

    from sievit.costs import costs, per_image
    from sievit.model import model_file, read
    from sievit.recipes import recipe, recipes
    from sievit.report import open_model
    from sievit.report.common import find_model

    path, names = find_model(Path(target)), recipes()
    if images is None and (policy is not None or thresholds is not None):
        raise ConfigError("--policy and --thresholds say who is left out, which depends on the image; give --images")
    if target in names and not path.exists():
        if images is not None:
            raise ConfigError(f"{target!r} is a recipe, its weights are random; --images needs a trained model")
        _print_json(costs(recipe(target).model, size=size, console=Console()))
        return 0
    if not path.exists():
        raise ConfigError(f"{target!r} is neither a recipe nor a file or folder{nearest(target, names)}")
    figures = costs(read(model_file(path))[0], size=size, console=Console())
    if images is not None:
        model = open_model(path, policy=policy, thresholds=thresholds, device=device)
        figures["per_image"] = per_image(
            model, images, batch_size=batch_size, limit=limit, console=Console(), progress=Console(stderr=True)
        )
    failures = figures.get("per_image", {}).get("failures", ())
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    _print_json(figures)
    return 1 if failures else 0


def _recipes(args: list[str]) -> int:
    def run(name: str | None = None, /) -> int:
        """List the recipes, or print one as JSON.

        Args:
            name: of the recipe to print.
        """
        from sievit.config import to_json
        from sievit.recipes import recipe

        print(_recipe_list() if name is None else json.dumps(to_json(recipe(name)), indent=2))
        return 0

    return _parse(run, args, "recipes")


def _recipe_list() -> str:
    from sievit.recipes import recipes

    return "\n".join(f"  {name:<22} {_first_line(function)}" for name, function in recipes().items())


def _policies(args: list[str]) -> int:
    def run() -> int:
        """List the policies that `--policy` takes."""
        from sievit.policies import policies

        print("\n".join(f"  {name:<22} {_first_line(config)}" for name, config in policies().items()))
        return 0

    return _parse(run, args, "policies")


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


COMMANDS = {
    "demo": Command("", "see it: dense against sparse on fresh scenes", _demo),
    "train": Command("RECIPE", "train a model, or go on with --resume RUN", _train),
    "eval": Command("MODEL", "accuracy, tokens, GFLOPs and latency", _eval),
    "predict": Command("MODEL IMAGES", "find objects or label pixels, in an image or a folder", _predict),
    "sweep": Command("MODEL", "a segmenter at many thresholds: table and plot", _sweep),
    "data scenes": Command("", "generate scenes in COCO format", _data_scenes),
    "bench blocks": Command("", "time the backbone's blocks, dense against sparse", _bench_blocks),
    "bench network": Command("", "time a whole segmenter, dense against DToP", _bench_network),
    "flops": Command("TARGET", "GFLOPs of a recipe or model, by part and image", _flops),
    "recipes": Command("[NAME]", "list the recipes, or print one", _recipes),
    "policies": Command("", "list the token policies", _policies),
}
