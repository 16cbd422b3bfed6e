"""The optimiser and the learning rate of a step."""

import math

import torch
from torch import Tensor, nn

from sievit.engine.recipe import TrainConfig

UNDECAYED = ("bias", "pos_embed", "level_embed", "cls_token")
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
POLY_POWER = 0.9


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW's groups, with an `lr_scale` for the policy and for heads.

    Unless `decay_norms`, no weight decay on norms, biases, positions and level embeddings.
    """
    norms = {f"{name}." for name, module in model.named_modules() if isinstance(module, NORMS)}
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parent, _, own = name.rpartition(".")
            plain = not config.decay_norms and (own in UNDECAYED or f"{parent}." in norms)
            scale = config.policy_lr if "policy." in name else config.head_lr if "head" in name else 1.0
            groups.setdefault((plain, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if plain else config.weight_decay, "lr_scale": scale}
        for (plain, scale), parameters in groups.items()
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
