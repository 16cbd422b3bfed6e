"""DynamicViT: predictors leave tokens out in three stages (NeurIPS 2021, arXiv 2106.02034)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from sievit.config import NonNegative, Positive, variant
from sievit.policies.base import Notes, register
from sievit.policies.gates import gumbel_gate
from sievit.policies.selection import StagesConfig, StagesPolicy, of_left
from sievit.tokens import Tokens, Trace


@variant("dynamicvit")
@dataclass(frozen=True)
class DynamicViTConfig(StagesConfig):
    """Small networks choose the tokens that stay, in stages; they learn with a fixed rate and from the dense model.

    Attributes:
        ratio_weight: of the loss that holds every image to its shares.
        distill_weight: of the loss that holds the tokens that are left to those of the dense model.
        temperature: of the Gumbel-softmax in training.
    """

    ratio_weight: NonNegative = 2.0
    distill_weight: NonNegative = 0.5
    temperature: Positive = 1.0


class Predictor(nn.Module):
    """Of each token two logits, from itself and from the mean of all that are left (equations 2 to 5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), nn.Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            *(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2))
        )

    def forward(self, x: Float[Tensor, "b k c"], weight: Shaped[Tensor, "b k"]) -> Float[Tensor, "b k 2"]:
        """`weight`: how much each token counts in the mean. Index 0 of the logits means "stay"."""
        x = self.local(x)
        own, shared = x.chunk(2, dim=2)
        weight = weight[..., None].to(x.dtype)
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return self.score(torch.cat([own, mean.expand_as(own)], dim=2))

    @property
    def per_token(self) -> int:
        """Multiply-adds of a token."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)


@register(DynamicViTConfig)
class DynamicViT(StagesPolicy):
    """DynamicViT (arXiv 2106.02034): before each stage a predictor scores the tokens that are left; the best stay.

    Training draws hard Gumbel-softmax samples, which gate the tokens; inference keeps a fixed number. Of the paper's
    losses that on class logits has no meaning here, for the trace of a dense task has none.
    """

    gates_in_training = True
    config: DynamicViTConfig

    def __init__(self, config: DynamicViTConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__(config, embed_dim=embed_dim, depth=depth)
        self.stages = [index for index in range(depth) if self.begins(index)]
        self.predictors = nn.ModuleList(Predictor(embed_dim) for _ in self.stages)
        self.needs_teacher = config.distill_weight > 0

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        if not self.training:
            return super().before_block(index, tokens, trace)
        if index == 0:
            tokens = tokens.select(None)
        earlier = trace.last("gate")  # of the stage before
        if not self.begins(index):
            return (tokens if earlier is None else self._gated(tokens, earlier)), {}
        gate = tokens.valid_or_all().to(tokens.x.dtype) if earlier is None else earlier
        logits = self._predictor(index)(tokens.patches, gate.detach()).float()
        gate = gate * gumbel_gate(logits, temperature=self.config.temperature)
        return self.dropped(self._gated(tokens, gate)), {"logits": logits, "gate": gate}

    def _gated(self, tokens: Tokens, gate: Float[Tensor, "b n"]) -> Tokens:
        return tokens.select(gate.detach() > 0.5, gate)

    def _predictor(self, index: int) -> Predictor:
        predictor = self.predictors[self.stages.index(index)]
        assert isinstance(predictor, Predictor)
        return predictor

    def scored(self, index: int, tokens: Tokens) -> tuple[Float[Tensor, "b n"], Notes]:
        x, real, back = of_left(tokens)
        logits = self._predictor(index)(x, real).float()
        return back(logits[..., 0] - logits[..., 1]), {"macs": self._macs(index, real)}

    def _macs(self, index: int, computed: Bool[Tensor, "b k"]) -> Float[Tensor, " b"]:
        return self._predictor(index).per_token * computed.sum(1).double()

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        return {"macs": self._macs(index, tokens.valid_or_all())} if self.begins(index) else {}

    def dropped(self, chosen: Tokens) -> Tokens:
        if self.config.preserve or chosen.gate is None:
            return super().dropped(chosen)
        return chosen.replace_patches(chosen.patches * chosen.gate[..., None].to(chosen.x.dtype))

    def loss(
        self, trace: Trace, *, teacher: Trace | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """`ratio`: squared distance of each image's share from its target, mean over stages (equation 10); `distill`:
        of the tokens that are left to those of the dense model (equation 8), per channel."""
        gates = [aux["gate"] for aux in trace.aux if "gate" in aux]
        if not gates:
            return {}
        total = trace.valid.sum(1).to(gates[0].dtype)
        wanted = [self.shares[index - self.config.first_block] for index in self.stages]
        errors = [(gate.sum(1) / total - share).square().mean() for gate, share in zip(gates, wanted, strict=True)]
        losses = {"ratio": self.config.ratio_weight * torch.stack(errors).mean()}
        if teacher is not None and self.needs_teacher:
            assert trace.tokens is not None and teacher.tokens is not None, "of a pass of training"
            apart = (trace.tokens.patches - teacher.tokens.patches).float().square().mean(2)  # (b, n)
            left = gates[-1].detach()
            losses["distill"] = self.config.distill_weight * (apart * left).sum() / left.sum().clamp(min=1)
        return losses
