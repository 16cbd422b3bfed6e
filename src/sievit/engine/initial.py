"""The weights that training starts from."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.keys import load_strictly
from sievit.convert.timm import timm_state
from sievit.detector import Detector
from sievit.model import POLICY_PREFIXES, Model, model_file, read
from sievit.vit import ViT

MASK_PREFIX = "head.roi_heads.mask_"


def start_from(model: Model, path: Path) -> tuple[str, ...]:
    """Load the weights of a checkpoint or run.

    The policy's own stay new unless the checkpoint has them, and so do the rows for classes of a checkpoint of other
    classes; its mask branch is left out by a detector of boxes.

    Returns:
        The names of the weights that stay new.

    Raises:
        ConfigError: no such file, or other weights that are missing or do not fit.
    """
    file = model_file(path)
    config, tensors = read(file)
    own = model.state_dict()
    masks = isinstance(model, Detector) and model.config.head.with_masks
    left = POLICY_PREFIXES if masks else (*POLICY_PREFIXES, MASK_PREFIX)
    tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(left)}
    counts = len(config.classes), len(model.config.classes)
    other = {k for k in own.keys() & tensors.keys() if _rows_of_classes(tensors[k].shape, own[k].shape, counts)}
    tensors = {k: v for k, v in tensors.items() if k not in other}
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if (name not in tensors and name not in other and not name.startswith(POLICY_PREFIXES))
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


def start_vit_from(vit: ViT, path: Path) -> None:
    """Load a pre-trained ViT in timm's naming into the backbone's; its positions are resized to the recipe's grid.

    Args:
        path: a state dict, .safetensors or of `torch.save`; the latter may be wrapped in "model" or "state_dict".

    Raises:
        ConfigError: no such file, or a ViT of another family or shape.
    """
    source = f"{path}, as a ViT of the recipe's shape,"
    state = timm_state(_read_state(path), vit.config, source=source)
    load_strictly(vit, state, source=source)


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; train.vit-from is a state dict in timm's naming")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: damaged, or no state dict ({error})") from error
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ConfigError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state
