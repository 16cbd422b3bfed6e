"""Renaming state dicts strictly: a key that no rule knows, or that is missing, is an error that lists it."""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.hub.file import listed, load_weights
from sievit.vit import ViTConfig

Rules = Sequence[tuple[str, str | None]]
"""Pairs of a pattern that has to match a whole key and its new name; None: the key is left out on purpose."""


def rename(state: dict[str, Tensor], rules: Rules, *, source: str) -> dict[str, Tensor]:
    """The state dict under our names.

    Raises:
        ConfigError: keys that no rule knows; `source` says what they were taken for.
    """
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    renamed, unknown = {}, []
    for key, value in state.items():
        for pattern, name in compiled:
            match = pattern.fullmatch(key)
            if match:
                if name is not None:
                    renamed[match.expand(name)] = value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ConfigError(f"not {source}: {listed(unknown)} have no place in it")
    return renamed


def load_strictly(module: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load under our names; see `load_weights` for the error, which says what `source` was taken for."""
    load_weights(module, state, error=f"not {source}")


def need(state: dict[str, Tensor], key: str, *, source: str, ndim: int | None = None) -> Tensor:
    """One tensor that sizes are read from.

    Raises:
        ConfigError: it is not there, or has not so many dimensions, or one that is empty.
    """
    if key not in state:
        raise ConfigError(f"not {source}: it has no {key!r}")
    shape = state[key].shape
    if ndim is not None and (len(shape) != ndim or 0 in shape):
        raise ConfigError(f"not {source}: {key} is {tuple(shape)}, where {ndim} sizes are expected")
    return state[key]


def numbers(state: Iterable[str], prefix: str) -> set[int]:
    """The numbers behind `prefix` in the keys: of blocks, heads, ..."""
    return {int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix)}


def released_vit(
    state: dict[str, Tensor], *, num_heads: int | None, norm_eps: float, drop_path_rate: float, source: str
) -> ViTConfig:
    """The ViT of a state dict under our names, behind `vit.`, with the positions as the releases store them: a row for
    the class token, which nothing uses and which is removed from `state`, and a square.

    Raises:
        ConfigError: tensors that sizes are read from are missing, or do not fit each other.
    """
    patches = need(state, "vit.patch_embed.proj.weight", source=source, ndim=4)
    state["vit.pos_embed"] = need(state, "vit.pos_embed", source=source, ndim=3)[:, 1:]
    embed_dim, count = patches.shape[0], state["vit.pos_embed"].shape[1]
    side = math.isqrt(count)
    if side**2 != count:
        raise ConfigError(f"not {source}: {count} positions are no square grid")
    if num_heads is None and embed_dim % 64:  # each has 64 channels in every released model
        raise ConfigError(f"{embed_dim} channels are no multiple of 64; give the number of heads, which no shape tells")
    return ViTConfig(
        grid=(side, side),
        patch_size=patches.shape[2],
        embed_dim=embed_dim,
        depth=1 + max(numbers(state, "vit.blocks."), default=0),
        num_heads=embed_dim // 64 if num_heads is None else num_heads,
        mlp_ratio=need(state, "vit.blocks.0.mlp.fc1.weight", source=source, ndim=2).shape[0] / embed_dim,
        norm_eps=norm_eps,
        drop_path_rate=drop_path_rate,
        pos_antialias=False,
    )


def join(state: dict[str, Tensor], name: str, parts: Sequence[str], *, biased: bool | None = None) -> None:
    """Put the layers `parts` of the state dict into one, `name`: their outputs one after the other.

    Args:
        biased: whether it has biases, zeros for the parts that have none; None: if a part has some.
    """
    weights = [state.pop(f"{part}.weight") for part in parts]
    biases = [state.pop(f"{part}.bias", None) for part in parts]
    state[f"{name}.weight"] = torch.cat(weights)
    if biased or (biased is None and any(bias is not None for bias in biases)):
        filled = (w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True))
        state[f"{name}.bias"] = torch.cat(list(filled))
