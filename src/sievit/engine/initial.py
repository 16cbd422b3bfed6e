"""The weights that training starts from."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sievit.config import ConfigError
from sievit.convert.timm import timm_vit
from sievit.model import POLICY_PREFIXES, Model, model_file, read
from sievit.vit import ViT


def start_from(model: Model, path: Path) -> None:
    """Load the weights of a checkpoint or run; the policy's own stay new unless the checkpoint has them.

    Raises:
        ConfigError: no such file, or weights outside the policy that are missing or do not fit.
    """
    file = model_file(path)
    _, tensors = read(file)
    own = model.state_dict()
    tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(POLICY_PREFIXES)}
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if (name not in tensors and not name.startswith(POLICY_PREFIXES))
        or name not in own
        or (name in tensors and tensors[name].shape != own[name].shape)
    )
    if wrong:
        raise ConfigError(f"{file}: cannot start from it, it is of another model: {', '.join(wrong[:5])} do not fit")
    model.load_state_dict(own | tensors)


def start_vit_from(vit: ViT, path: Path) -> None:
    """Load a pre-trained ViT (DeiT, AugReg, MAE) in timm's naming into the backbone's.

    Args:
        path: a state dict, .safetensors or of `torch.save`; the latter may be wrapped in "model" or "state_dict".

    Raises:
        ConfigError: no such file, or a ViT of another family or shape.
    """
    source = timm_vit(_read_state(path), num_heads=vit.config.num_heads)
    own = vit.state_dict()
    state = {name: tensor for name, tensor in source.state_dict().items() if name in own}
    if source.num_prefix > vit.num_prefix:  # a class token that ours does without
        state["pos_embed"] = state["pos_embed"][:, source.num_prefix :]
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong:
        raise ConfigError(f"{path}: its ViT is not of the recipe's shape: {', '.join(wrong[:5])} do not fit model.vit")
    vit.load_state_dict(state)


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
