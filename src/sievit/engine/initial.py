"""The weights that training starts from."""

from pathlib import Path

import torch

from sievit.config import ConfigError
from sievit.convert.keys import load_strictly
from sievit.convert.pth import read_checkpoint
from sievit.convert.timm import from_timm, timm_state
from sievit.engine.recipe import TrainConfig
from sievit.hub.file import load_weights, of_policy
from sievit.models.base import Model, ModelConfig
from sievit.models.build import build, load, model_file, read
from sievit.policies import Policy
from sievit.vit import ViT, ViTConfig

RECIPE = "the recipe's ViT"
TIMM = "timm:"
FREE = {
    *("grid", "token_stride", "class_token", "num_registers", "pos_embed", "pos_antialias"),
    *("final_norm", "init_values", "drop_path_rate"),
}
"""In which a recipe's ViT may differ from the one that its weights come from."""


def new_model(config: ModelConfig) -> Model:
    """The model that `config` describes, with random weights that a training can begin with."""
    model = build(config)
    model.policy.begin()
    return model


def start_from(model: Model, path: Path) -> tuple[str, ...]:
    """Load the weights of a checkpoint or run, and return the names of those that stay new.

    New are those of the policy unless the checkpoint has them, and the rows for classes where its classes are others.
    Optional parts that this model does not have are left out, and the last blocks where its ViT has fewer.

    Raises:
        ConfigError: no such file, or other weights that are missing or do not fit.
    """
    file = model_file(path)
    config, tensors = read(file)
    state = model.state_dict()
    absent = tuple(part for part in model.optional if not any(name.startswith(part) for name in state))
    deeper = tuple(f"vit.blocks.{i}." for i in range(model.config.vit.depth, config.vit.depth))
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name in state or not (of_policy(name) or name.startswith(absent) or any(part in name for part in deeper))
    }
    counts = len(config.classes), len(model.config.classes)
    new = {k for k in state.keys() & tensors.keys() if _rows_of_classes(tensors[k].shape, state[k].shape, counts)}
    new |= {name for name in state.keys() - tensors.keys() if of_policy(name)}
    whole = tensors | {name: state[name] for name in new}
    load_weights(model, whole, error=f"{file}: cannot start from it, it is of another model")
    return tuple(name for name in state if name in new)


def _rows_of_classes(theirs: torch.Size, ours: torch.Size, counts: tuple[int, int]) -> bool:
    """Whether the shapes differ in the number of classes alone: a row for each, with or without the background's, or
    four of them for boxes."""
    if counts[0] == counts[1] or len(theirs) != len(ours) or not ours or theirs[1:] != ours[1:]:
        return False
    rows = ((1, 0), (1, 1), (4, 1))
    return any((theirs[0], ours[0]) == tuple(each * (count + more) for count in counts) for each, more in rows)


def dense_teacher(policy: Policy, config: TrainConfig, device: torch.device | str = "cpu") -> Model | None:
    """The dense model that training starts from, fixed, for `distill` and policies whose loss compares with it; None
    where nothing does."""
    if not (policy.needs_teacher or config.distill):
        return None
    if config.init_from is None:
        who = type(policy).__name__ if policy.needs_teacher else "train.distill"
        raise ConfigError(f"{who} learns from the dense model; name it with train.init-from")
    teacher = load(config.init_from, policy="keep_all", compile=False).requires_grad_(False)
    teacher.policy.train()  # so that its trace holds the tokens at the end of the pass
    return teacher.to(device)


def start_vit_from(vit: ViT, source: Path) -> None:
    """Load a pre-trained ViT into the backbone's; its positions are resized to the recipe's grid.

    Prefix tokens and a last norm that the recipe does without are left out.

    Args:
        source: a state dict in timm's naming, .safetensors or of `torch.save`, which may be wrapped in "model" or
            "state_dict"; or `timm:NAME`, the pre-trained weights that timm downloads under that name.

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
        load_strictly(vit, timm_state(state, vit.config, source=RECIPE, grid=grid), source=RECIPE)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def timm_name(source: Path) -> str | None:
    """The name in `timm:NAME`; None of a file."""
    text = str(source)
    return text.removeprefix(TIMM) if text.startswith(TIMM) else None


def _require_same(source: Path, theirs: ViTConfig, ours: ViTConfig) -> None:
    """Raise a ConfigError that lists where the configurations of two ViTs differ, in what weights depend on."""
    found, expected = vars(theirs), vars(ours)
    other = [
        f"{name} {found[name]}, not {expected[name]}"
        for name in expected
        if name not in FREE and found[name] != expected[name]
    ]
    if other:
        raise ConfigError(f"{source}: is not {RECIPE}: its {'; its '.join(other)}")
