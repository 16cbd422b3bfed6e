"""`sievit report`: one HTML file on a training, a comparison of methods, or a model on a data set."""

from pathlib import Path
from typing import Any

from sievit import terminal
from sievit.config import ConfigError, Count, Natural, Share, kind_of
from sievit.data.truth import Truth
from sievit.devices import device_name, pick_device
from sievit.engine.checkpoint import RunFolder
from sievit.models.build import load
from sievit.policies import KeepAllConfig, PolicyOptions
from sievit.report.of_ablation import ABLATION, ablation_sections
from sievit.report.of_model import model_sections
from sievit.report.of_run import run_sections
from sievit.report.page import write_page
from sievit.tasks import task_of


def report(
    subject: Path,
    /,
    *,
    images: Path | None = None,
    truth: Truth = Truth(),  # noqa: B008
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    against: Path | None = None,
    out: Path | None = None,
    limit: Count | None = None,
    pictures: Natural = 3,
    score_threshold: Share = 0.5,
    device: str = "auto",
) -> dict[str, Any]:
    """Write one HTML file on a training, on a comparison of `sievit ablate`, or on a model and a data set.

    The file needs nothing beside it and loads nothing: open it in any browser. Of a folder of `sievit ablate` it has
    accuracy against cost and time and the table of variants; of a training the curves, validations and options. With
    --images it has, of any model, accuracy by class and size with intervals, tokens by block, class and size, cost and
    speed, and pictures of the worst disagreements and of the easiest and hardest images. "Dense" is then the same model
    when no token is left out, or that of --against. The last line of the output is one JSON object.

    Args:
        subject: folder of `sievit ablate` or of a training; with --images also a checkpoint, name of a shipped model,
            or hf:user/name.
        images: folder of images, to evaluate the model on.
        truth: the annotations of the images.
        policy: another policy.
        against: another model in place of the dense one, as SUBJECT is named.
        out: the file; by default report.html in the folder, with --images out/report.html.
        limit: only the first so many images.
        pictures: so many pictures of the worst disagreements, of the easiest images and of the hardest ones.
        score_threshold: objects are compared and drawn that have at least this score.
        device: cpu, cuda, cuda:1, or auto.
    """
    is_run = (subject / "recipe.json").is_file()
    if images is None:
        if not is_run and not (subject / ABLATION).is_file():
            raise ConfigError(
                f"{subject}: is the folder neither of a training nor of `sievit ablate`; of a model give the --images "
                "too, and their --annotations or --labels"
            )
        out, name = out or subject / "report.html", subject.resolve().name
        if is_run:
            write_page(_html(out), name, "Report on a training.", run_sections(RunFolder(subject)))
        else:
            write_page(_html(out), name, "Report on a comparison of methods.", ablation_sections(subject))
        return _written(out, {})
    out, console = _html(out or Path("out/report.html")), terminal.console()
    sparse = load(subject, policy=policy, device=pick_device(device)).eval()
    dense = sparse.with_config(policy=KeepAllConfig()) if against is None else load(against, device=sparse.device)
    data = task_of(sparse.config).open(images, truth)
    options: dict[str, Any] = {"limit": limit, "pictures": pictures, "min_score": score_threshold}
    sections, figures = model_sections(dense, sparse, data, **options, console=console)
    if is_run:
        sections += run_sections(RunFolder(subject))
    where, other = device_name(sparse.device), "the same model with all tokens" if against is None else against.name
    text = f"Policy {kind_of(sparse.config.policy)}, against {other}, on {where}."
    write_page(out, subject.stem if subject.suffix else subject.name, text, sections)
    return _written(out, {**figures, "device": where})


def _html(out: Path) -> Path:
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the report is an HTML file; give a name that ends in .html")
    return out


def _written(out: Path, figures: dict[str, Any]) -> dict[str, Any]:
    size = out.stat().st_size
    terminal.console().print(f"{out} ({size / 1e6:.1f} MB)", soft_wrap=True)
    return {**figures, "report": str(out), "bytes": size}
