"""Losses of a policy that compare with the dense model (distillation)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sievit.config import ConfigError
from sievit.engine.batches import Batch, Losses
from sievit.engine.initial import dense_teacher
from sievit.models.build import build, save
from sievit.policies import KeepAllConfig, register
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.tokens import Tokens, Trace
from tiny import tiny_detector, tiny_segmenter


@dataclass(frozen=True)
class DistilledConfig(SharesConfig):
    """Tokens at the left."""


@register(DistilledConfig)
class Distilled(SharesPolicy):
    """Its tokens are to be those of the dense model (DynamicViT, arXiv 2106.02034, equation 11)."""

    needs_teacher = True

    def scores(self, index: int, tokens: Tokens) -> Tensor:
        return -torch.arange(tokens.patches.shape[1]).expand(len(tokens.x), -1)

    def loss(
        self, trace: Trace, *, teacher: Trace | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        assert teacher is not None and trace.tokens is not None and teacher.tokens is not None and targets is not None
        return {"distilled": (trace.tokens.x - teacher.tokens.x).square().mean()}


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_a_policy_learns_from_the_dense_model(kind: str, tmp_path: Path) -> None:
    config = (tiny_detector if kind == "detector" else tiny_segmenter)(policy=KeepAllConfig())
    dense = build(config)
    save(dense, tmp_path / "dense.safetensors")
    box = {
        "boxes": torch.tensor([[4.0, 4, 30, 40]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64).bool(),
    }
    target = box if kind == "detector" else {"labels": torch.zeros(64, 64, dtype=torch.int64)}
    batch = Batch([torch.rand(3, 64, 64)], [target], torch.device("cpu"))
    for share in (1.0, 0.5):
        model = build(replace(config, policy=DistilledConfig(first_block=1, shares=(share,)))).train()
        model.load_state_dict(dense.state_dict())
        losses = Losses(model, dense_teacher(model.policy, tmp_path / "dense.safetensors"))
        assert {*losses.state_dict()} == {f"model.{name}" for name in model.state_dict()}, "the teacher is not trained"
        found = losses(batch)[0]["distilled"]
        assert (found.item() == 0) == (share == 1)
    found.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.vit.parameters())


def test_without_a_dense_model_it_cannot_be_trained() -> None:
    model = build(tiny_detector(policy=DistilledConfig(first_block=1)))
    with pytest.raises(ConfigError, match=r"name it with train\.init-from"):
        dense_teacher(model.policy, None)
