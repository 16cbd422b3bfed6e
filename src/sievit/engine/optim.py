"""Frozen weights, the optimiser, and the learning rate of a step."""

import math

import torch
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.engine.recipe import Frozen, TrainConfig
from sievit.models.base import Model
from sievit.vit import Block, ViT

UNDECAYED = ("bias", "pos_embed", "level_embed", "cls_token", "reg_token")
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
POLY_POWER = 0.9


def freeze(model: Model, what: Frozen) -> None:
    """Have a part of a model keep its weights: no gradients, no drop path, no dropout, no new statistics of norms.

    Args:
        what: "model": everything but the policy, so that what leaves tokens out is all that is trained; "vit": all of
            the ViT; a number: its embedding and so many first blocks.

    Raises:
        ConfigError: the ViT has fewer blocks, or the policy has no weights that could be trained.
    """
    if what == "none":
        return
    if what == "model":
        _freeze_all_but_policy(model)
        return
    depth = len(model.vit.blocks)
    if isinstance(what, int) and what > depth:
        raise ConfigError(f"train.freeze is {what}, but the ViT has {depth} blocks; vit freezes all of it")
    layers = depth + 1 if what == "vit" else what
    for name, parameter in model.vit.named_parameters():
        if layer_of(name, depth) <= layers:
            parameter.requires_grad_(False)
    for block in model.vit.blocks[:layers]:
        assert isinstance(block, Block)
        block.drop_path = 0.0


def _freeze_all_but_policy(model: Model) -> None:
    """Norms in training mode look at `requires_grad` themselves."""
    policy = model.policy
    learning = set(policy.parameters())
    if not learning:
        raise ConfigError(
            f"train.freeze is model, but a policy of {type(policy).__name__} has no weights: nothing would be trained; "
            "evaluate the dense model with this policy, or give train.freeze vit"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in learning)
    for module in set(model.modules()) - set(policy.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif "drop_path" in vars(module):
            vars(module)["drop_path"] = 0.0


def layer_of(name: str, depth: int) -> int:
    """Of a ViT's parameter: 0 of the embedding, i + 1 of block i, depth + 1 of the norm behind them."""
    first, _, rest = name.partition(".")
    if first == "blocks":
        return int(rest.partition(".")[0]) + 1
    return depth + 1 if first == "norm" else 0


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW's groups of what is trained, with an `lr_scale` for the policy, for heads, and for each layer of the ViT.

    Unless `decay_norms`, no weight decay on norms, biases, layer scales, positions and other embeddings. The scale of
    a ViT's layer is decay ** (depth + 1 - layer), see `layer_of` (BEiT, arXiv 2106.08254; ViTDet, arXiv 2203.16527).
    """
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, NORMS)}
    vits = {f"{name}." if name else "": module for name, module in model.named_modules() if isinstance(module, ViT)}
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parent, _, last = name.rpartition(".")
            undecayed = last in UNDECAYED or f"{parent}." in norms
            scale = config.policy_lr if "policy." in name else config.head_lr if "head" in name else 1.0
            for prefix, vit in vits.items():
                if name.startswith(prefix):
                    depth = len(vit.blocks)
                    undecayed |= parameter.ndim == 1  # of layer scales
                    scale = config.layer_decay ** (depth + 1 - layer_of(name[len(prefix) :], depth))
            groups.setdefault((undecayed and not config.decay_norms, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if undecayed else config.weight_decay, "lr_scale": scale}
        for (undecayed, scale), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.999) over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr)


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """How long training takes."""
    return config.epochs * steps_per_epoch if config.steps is None else config.steps


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Of the 0-based `step`: the schedule times the linear warm-up; `poly` begins where that ends, and ends with 0."""
    total = total_steps(config, steps_per_epoch)
    progress = step / total
    if config.schedule == "cosine":
        factor = 0.5 + 0.5 * math.cos(math.pi * progress)
    elif config.schedule == "poly":
        begin = min(config.warmup_steps, total - 1)
        factor = (1 - max(0, step - begin) / max(1, total - 1 - begin)) ** POLY_POWER
    elif config.schedule == "step":
        factor = 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.step_epochs)
    else:
        factor = 1.0
    if step < config.warmup_steps:
        factor *= config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    return config.lr * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


class Average:
    """An exponential moving average of a model's state; buffers that are not floats are copied.

    The decay starts low, (1 + t) / (10 + t), so that early weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value.detach(), 1 - decay)
            else:
                self.values[name].copy_(value)

    def state_dict(self) -> dict:
        """For `load_state_dict`."""
        return {"updates": self.updates, "values": self.values}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`."""
        self.updates, self.values = state["updates"], state["values"]
