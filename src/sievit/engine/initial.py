"""The weights that training starts from."""

import dataclasses
from pathlib import Path

import torch

from sievit.config import ConfigError
from sievit.convert.keys import load_strictly
from sievit.convert.pth import read_checkpoint
from sievit.convert.timm import from_timm, timm_state
from sievit.hub.file import of_policy
from sievit.models.base import Model
from sievit.models.build import load, model_file, read
from sievit.policies import Policy
from sievit.vit import ViT, ViTConfig

OWN = "the recipe's ViT"
TIMM = "timm:"
FREE = {
    *("grid", "token_stride", "class_token", "num_registers", "pos_embed", "pos_antialias"),
    *("final_norm", "init_values", "drop_path_rate"),
}
"""In which a recipe's ViT may differ from the one that its weights come from."""


def start_from(model: Model, path: Path) -> tuple[str, ...]:
    """Load the weights of a checkpoint or run.

    The policy's own stay new unless the checkpoint has them, and so do the rows for classes of a checkpoint of other
    classes; optional parts that this model has not are left out.

    Returns:
        The names of the weights that stay new.

    Raises:
        ConfigError: no such file, or other weights that are missing or do not fit.
    """
    file = model_file(path)
    config, tensors = read(file)
    own = model.state_dict()
    left = tuple(part for part in model.optional if not any(name.startswith(part) for name in own))
    tensors = {k: v for k, v in tensors.items() if k in own or not (of_policy(k) or k.startswith(left))}
    counts = len(config.classes), len(model.config.classes)
    other = {k for k in own.keys() & tensors.keys() if _rows_of_classes(tensors[k].shape, own[k].shape, counts)}
    tensors = {k: v for k, v in tensors.items() if k not in other}
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if (name not in tensors and name not in other and not of_policy(name))
        or name not in own
        or (name in tensors and tensors[name].shape != own[name].shape)
    )
    if wrong:
        raise ConfigError(f"{file}: cannot start from it, it is of another model: {', '.join(wrong[:5])} do not fit")
    model.load_state_dict(own | tensors)
    return tuple(name for name in own if name not in tensors)


def _rows_of_classes(theirs: torch.Size, ours: torch.Size, counts: tuple[int, int]) -> bool:
    """Whether the shapes differ in the number of classes alone: a row for each, with or without the background's, or
    four of them for boxes."""
    if counts[0] == counts[1] or len(theirs) != len(ours) or not ours or theirs[1:] != ours[1:]:
        return False
    rows = ((1, 0), (1, 1), (4, 1))
    return any((theirs[0], ours[0]) == tuple(each * (count + more) for count in counts) for each, more in rows)


def dense_teacher(policy: Policy, path: Path | None) -> Model | None:
    """The dense model of `path`, fixed, for a policy whose loss compares with it; None for all others.

    Raises:
        ConfigError: there is no such model.
    """
    if not policy.needs_teacher:
        return None
    if path is None:
        raise ConfigError(f"{type(policy).__name__} learns from the dense model; name it with train.init-from")
    teacher = load(path, policy="keep_all", compile=False).requires_grad_(False)
    teacher.policy.train()  # so that its trace holds the tokens at the end of the pass
    return teacher


def start_vit_from(vit: ViT, source: Path) -> None:
    """Load a pre-trained ViT into the backbone's; its positions are resized to the recipe's grid.

    Prefix tokens and a last norm that the recipe does without are left out.

    Args:
        source: a state dict in timm's naming, .safetensors or of `torch.save`, which may be wrapped in "model" or
            "state_dict"; or `timm:NAME`, the pre-trained weights that timm knows by that name, by its own download.

    Raises:
        ConfigError: no such file or name, weights that cannot be downloaded, or a ViT of another family or shape.
    """
    name = timm_name(source)
    if name is None:
        state, grid = read_checkpoint(source).state, None
    else:
        try:
            theirs = from_timm(name)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}; train.vit-from takes a FILE with these weights too") from error
        _require_same(source, theirs.config, vit.config)
        state, grid = dict(theirs.state_dict()), theirs.config.grid
    try:
        load_strictly(vit, timm_state(state, vit.config, source=OWN, grid=grid), source=OWN)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def timm_name(source: Path) -> str | None:
    """The name in `timm:NAME`; None of a file."""
    text = str(source)
    return text.removeprefix(TIMM) if text.startswith(TIMM) else None


def _require_same(source: Path, theirs: ViTConfig, ours: ViTConfig) -> None:
    """Raise a ConfigError that lists where the configurations of two ViTs differ, in what weights depend on."""
    fields = [name for name in (f.name for f in dataclasses.fields(ours)) if name not in FREE]
    other = [
        f"{name} {getattr(theirs, name)}, not {getattr(ours, name)}"
        for name in fields
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if other:
        raise ConfigError(f"{source}: is not {OWN}: its {'; its '.join(other)}")
