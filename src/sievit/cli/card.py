"""`sievit card`."""

from pathlib import Path
from typing import Any

from sievit.config import ConfigError
from sievit.hub.card import Card, CardOptions, read_figures
from sievit.models.build import load
from sievit.policies import PolicyOptions


def card(
    model: Path,
    /,
    *,
    out: Path,
    about: CardOptions = CardOptions(),  # noqa: B008
    figures: Path | None = None,
    notes: Path | None = None,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    half: bool = False,
    push: str | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """Write a model and its card into a folder, ready for the Hugging Face Hub; with --push put it there.

    The folder holds model.safetensors, config.json and README.md; every command takes it as MODEL, and from the hub as
    hf:USER/NAME. The last line of the output is one JSON object.

    Args:
        model: checkpoint, folder of a training run, or name of a shipped model.
        out: folder to write.
        figures: file whose last line is what `sievit eval` printed of the model.
        notes: text file that is added to the card.
        policy: another policy, which the written model has from then on.
        half: store the parameters as float16.
        push: user/name on the hub, made where it is not there yet.
        private: a new repository is not visible to others.
    """
    try:
        text = "" if notes is None else notes.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--notes {notes}: cannot be read as text ({error})") from error
    content = Card(**vars(about), figures={} if figures is None else read_figures(figures), notes=text)
    opened = load(model, policy=policy)
    opened.save_pretrained(out, card=content, half=half, repo_id=push)
    url = None if push is None else opened.push_to_hub(push, card=content, half=half, private=private or None)
    return {"folder": str(out), "files": sorted(p.name for p in out.iterdir()), "license": about.license, "url": url}
