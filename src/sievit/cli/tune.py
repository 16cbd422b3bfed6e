"""`sievit tune`."""

import sys
from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse, print_json
from sievit.cli.out import require_free


def tune(args: list[str]) -> int:
    from tyro.conf import OmitArgPrefixes, arg

    from sievit.report.semantic import LabelFiles
    from sievit.tune import Goal, Judged, Tuning

    def run(
        checkpoint: Annotated[Path, arg(metavar="CHECKPOINT")],
        /,
        *,
        images: Path,
        out: Path,
        goal: OmitArgPrefixes[Goal] = Goal(),  # noqa: B008
        judged: OmitArgPrefixes[Judged] = Judged(),  # noqa: B008
        tuning: OmitArgPrefixes[Tuning] = Tuning(),  # noqa: B008
        label_files: OmitArgPrefixes[LabelFiles] = LabelFiles(),  # noqa: B008
        policy: str | None = None,
        device: str = "auto",
        force: bool = False,
    ) -> int:
        """Make a trained model fast on this device: never slower than dense, at the size and batch given.

        Blocks that are slower with tokens left out are computed whole, the policy is turned to a target, and the modes
        race against the dense model, with --compile compiled too. Writes the tuned model, which remembers how it is
        run, and beside it a report as .json; the last line of the output is the report. The exit status is 1 where the
        target was missed, or images could not be read.

        Args:
            checkpoint: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
            images: folder of images like those that the model will see.
            out: the .safetensors file to write.
            policy: takes the place of the model's own, e.g. dtop for a dense segmenter with auxiliary heads.
            device: cpu, cuda, cuda:1, or auto.
            force: write over files that are there.
        """
        return _run(checkpoint, images, out, goal, judged, tuning, label_files, policy, device, force)

    return parse(run, args, "tune")


def _run(
    checkpoint: Path,
    images: Path,
    out: Path,
    goal: object,
    judged: object,
    tuning: object,
    label_files: object,
    policy: str | None,
    device: str,
    force: bool,
) -> int:
    from rich.console import Console

    from sievit.report.semantic import LabelFiles
    from sievit.tune import Goal, Judged, Tuning, table_of
    from sievit.tune import tune as run

    assert isinstance(goal, Goal) and isinstance(judged, Judged)
    assert isinstance(tuning, Tuning) and isinstance(label_files, LabelFiles)
    for path in (out, out.with_suffix(".json")):
        require_free(path, force=force)
    figures = run(
        checkpoint,
        images,
        out,
        goal=goal,
        judged=judged,
        tuning=tuning,
        label_files=label_files,
        policy=policy,
        device=device,
        console=Console(stderr=True),
    )
    for failure in figures.get("failures", ()):
        print(f"error: {failure}", file=sys.stderr)
    console = Console()
    console.print(table_of(figures))
    console.print(f"{out}: {figures['policy']}, {figures['mode']}; {figures['why']}", soft_wrap=True, highlight=False)
    if figures["execution"]["compiled"]:
        console.print(
            "it is compiled when it first sees a size; sievit.load(..., compile=False) leaves that out", soft_wrap=True
        )
    missed = figures["target"] is not None and not figures["target"]["met"]
    if missed:
        console.print("the target was missed", soft_wrap=True)
    print_json(figures)
    return 1 if missed or "failures" in figures else 0
