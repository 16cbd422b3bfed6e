"""Model cards: what a model is, the settings of its policy, its figures and its licence."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sievit.config import Config, ConfigError, kind_of
from sievit.models.inputs import ModelConfig

TAGS = ("sievit", "vision-transformer", "token-selection")
_KNOWN = """
apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research
lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl unknown
other
"""
LICENSES = frozenset(_KNOWN.split())
"""Names that the hub knows; any other is given to it as "other" with a name."""

UNKNOWN_LICENCE = "Unknown: the terms under which these weights may be used are not stated."
TEXT = """---
{header}
---

# {name}

A {kind} for {count} on a plain vision transformer that computes, in each block, only the tokens that its policy
chooses. Made with sievit.

## Use

```python
import sievit

model = sievit.load("{where}")
answers = model.predict(["image.jpg"])  # {result}
```

`sievit.load("{where}", policy="keep_all")` computes all tokens.

## Model

{architecture}

Classes: {classes}

## Policy

{policy}

## Data

{data}

## Figures

{figures}

## Licence

{licence}
{notes}"""


@dataclass(frozen=True, kw_only=True)
class CardOptions(Config):
    """What a model card states that the model itself does not; fields that are left out are marked unknown.

    Attributes:
        license: of the weights, as the hub writes them: apache-2.0, cc-by-nc-4.0, ..., or any other name.
        license_link: address of its text, for a licence that the hub does not know.
        datasets: what the model was trained on, by name, or by the hub's id.
        evaluated_on: the data set of the figures.
        name: title of the card.
        base_model: the hub's id of the model that this one was made from.
    """

    license: str = "unknown"
    license_link: str | None = None
    datasets: tuple[str, ...] = ()
    evaluated_on: str | None = None
    name: str | None = None
    base_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card(CardOptions):
    """What is written on a model card beside what the model's configuration holds.

    Attributes:
        figures: what `sievit eval` printed: accuracy, GFLOPs, milliseconds, shares of tokens.
        notes: further text.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""


TEXTS = ("policy", "device", "failures")
"""What is no number in the figures of an evaluation."""


def read_figures(path: Path) -> dict[str, Any]:
    """The figures of an evaluation from what `sievit eval` printed: the last line of the file is a JSON object.

    Raises:
        ConfigError: no such file, or its last line is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        figures = json.loads(next((line for line in reversed(lines) if line.strip()), ""))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); `sievit eval MODEL ... > {path}` writes it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: its last line is not the JSON that `sievit eval` prints ({error})") from error
    if not isinstance(figures, dict):
        raise ConfigError(f"{path}: its last line is JSON, but not the object that `sievit eval` prints")
    for name, value in figures.items():
        numbers = value if isinstance(value, list) else [value]
        if name not in TEXTS and not all(isinstance(each, int | float) for each in numbers):
            raise ConfigError(f"{path}: {name} is {value!r}, and not a number or a list of them")
    return figures


def model_card(config: ModelConfig, card: Card, *, parameters: int, repo_id: str | None = None) -> ModelCard:
    """The card of a model: a header for the hub, and a text.

    Args:
        parameters: how many the model has.
        repo_id: where it lies on the hub, if that is known.

    Raises:
        ConfigError: figures of another kind of model, or of another policy.
    """
    kind = kind_of(config) or ""
    policy = kind_of(config.policy)
    if card.figures and not any(name in card.figures for name in config.figures):
        expected = f"{kind} ({', '.join(config.figures)})"
        raise ConfigError(f"figures: none of a {expected}; give the JSON that `sievit eval` printed of this model")
    if card.figures.get("policy", policy) != policy:
        other = card.figures["policy"]
        raise ConfigError(
            f"figures: of the policy {other!r}, and the model's is {policy!r}; evaluate the model as it is"
        )
    default = repo_id.rpartition("/")[2] if repo_id else f"{_backbone(config)} {kind} ({policy})"
    name = card.name or default
    known = card.license in LICENSES
    results = _results(config, card)
    data = ModelCardData(
        library_name="sievit",
        license=card.license if known else "other",
        license_name=None if known else card.license,
        license_link=card.license_link,
        datasets=[name for name in card.datasets if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)] or None,
        base_model=card.base_model,
        pipeline_tag=config.hub_task,
        tags=[*TAGS, policy or "", *config.hub_tags],
        model_name=name if results else None,
        eval_results=results or None,
    )
    licence = card.license if card.license_link is None else f"[{card.license}]({card.license_link})"
    text = TEXT.format(
        header=data.to_yaml(),
        name=name,
        kind=kind,
        count="one class" if len(config.classes) == 1 else f"{len(config.classes)} classes",
        where=f"hf:{repo_id}" if repo_id else "FOLDER",
        result=config.result,
        architecture=_rows(_architecture(config, parameters)),
        classes=", ".join(config.classes),
        policy=_policy(config),
        data=f"Trained on {', '.join(card.datasets)}." if card.datasets else "Unknown.",
        figures=_figures(config, card),
        licence=UNKNOWN_LICENCE if card.license == "unknown" else licence,
        notes=f"\n## Notes\n\n{card.notes.strip()}\n" if card.notes.strip() else "",
    )
    return ModelCard(text)


def _results(config: ModelConfig, card: Card) -> list[EvalResult]:
    data = card.evaluated_on or "unnamed data"
    return [
        EvalResult(
            task_type=config.hub_task,
            dataset_type=re.sub(r"[^\w./-]+", "-", data),
            dataset_name=data,
            metric_type=key,
            metric_name=name,
            metric_value=card.figures[key],
        )
        for key, name in config.figures.items()
        if key in card.figures
    ]


def _architecture(config: ModelConfig, parameters: int) -> list[tuple[str, str]]:
    vit = config.vit
    parts = {name: getattr(config, name) for name in ("neck", "head") if getattr(config, name, None) is not None}
    resized = f"short edge {config.input.min_size}, long edge at most {config.input.max_size} pixels"
    return [
        ("backbone", f"{_backbone(config)}: {vit.depth} blocks, {vit.embed_dim} channels, {vit.num_heads} heads"),
        ("trained on a grid of", f"{vit.grid[0]} x {vit.grid[1]} tokens"),
        *((name, kind_of(part) or type(part).__name__.removesuffix("Config")) for name, part in parts.items()),
        ("images", "as they are" if config.input.min_size is None else resized),
        ("parameters", f"{parameters / 1e6:.2f} M"),
    ]


def _backbone(config: ModelConfig) -> str:
    sizes = {192: "ViT-T", 384: "ViT-S", 768: "ViT-B", 1024: "ViT-L", 1280: "ViT-H"}
    return f"{sizes.get(config.vit.embed_dim, 'ViT')}/{config.vit.patch_size}"


def _policy(config: ModelConfig) -> str:
    """What chooses the tokens, and all of its settings."""
    policy = config.policy
    about = (type(policy).__doc__ or "").strip().partition("\n")[0].partition(";")[0].rstrip(".")
    text = f"`{kind_of(policy)}`: {about}."
    if is_dataclass(policy) and fields(policy):
        rows = _rows((f"`{each.name}`", getattr(policy, each.name)) for each in fields(policy))
        text += f"\n\nIts settings:\n\n{rows}"
    return text


def _figures(config: ModelConfig, card: Card) -> str:
    figures = card.figures
    if not figures:
        return "None are given."
    rows = [(name, f"{100 * figures[key]:.2f} %") for key, name in config.figures.items() if key in figures]
    if "gflops" in figures:
        spread = f" (± {figures['gflops_std']:.2f} over images)" if "gflops_std" in figures else ""
        rows.append(("GFLOPs per image", f"{figures['gflops']:.2f}{spread}, multiply-adds"))
    if "ms_per_image" in figures:
        tail = f", 95th percentile {figures['ms_per_image_p95']:.1f}" if "ms_per_image_p95" in figures else ""
        device = f" on {figures['device']}" if "device" in figures else ""
        rows.append(("milliseconds per image", f"{figures['ms_per_image']:.1f}{tail}{device}"))
    for key, name in (("keep", "share of tokens computed, by block"), ("left_at", "share that leaves, by stage")):
        if key in figures:
            rows.append((name, " ".join(f"{share:.2f}" for share in figures[key])))
    if "images" in figures:
        rows.append(("images", str(figures["images"])))
    text = f"By `sievit eval` on {card.evaluated_on or 'unnamed data'}.\n\n{_rows(rows)}"
    if figures.get("failures"):
        text += f"\n\n{len(figures['failures'])} images could not be used and are not counted."
    return text


def _rows(rows: Iterable[tuple[str, Any]]) -> str:
    """A table of two columns."""
    cells = ((name, ", ".join(map(str, v)) if isinstance(v, tuple | list) else v) for name, v in rows)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])
