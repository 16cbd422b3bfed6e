"""What only a GPU can show of a tuned model: that graphs give its answers, and that those outlive the next pass."""

import pytest
import torch

from sievit.heads import ATMConfig
from sievit.models.build import build
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import KeepAllConfig, SViTConfig
from sievit.vit import ViTConfig
from sievit.vit.execution import Execution

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's, of compiling


@pytest.mark.parametrize("mode", ["dense", "static", "bucketed"])
@torch.inference_mode()
def test_graphs_give_the_answers_of_the_model_as_it_stands(mode: str) -> None:
    """More windows than go through the network together, and several passes: some recorded, others replayed."""
    gates = SViTConfig(first_block=2, static_shares=(0.6, 0.4) if mode == "static" else None, targets=(0.5,))
    config = SegmenterConfig(
        vit=ViTConfig(grid=(8, 8), patch_size=8, embed_dim=64, depth=4, num_heads=2),
        policy=KeepAllConfig() if mode == "dense" else gates,
        head=ATMConfig(channels=16, num_heads=2, num_layers=2),
        out_indices=(3,),
        input=InputConfig(min_size=None, size_divisor=8),
        classes=("ground", "thing"),
        crop=(64, 64),
        stride=(64, 64),
        windows_at_once=2,
        execution=Execution(mode="bucketed" if mode == "bucketed" else "auto", compiled=True),
    )
    torch.manual_seed(0)
    model = build(config).eval().to("cuda")
    batches = [[torch.rand(3, 64, 128) for _ in range(2)] for _ in range(3)]
    answers = [model(batch) for batch in batches]
    for batch, answer in zip(batches, answers, strict=True):
        expected = model(batch, execution=Execution(mode=config.execution.mode))
        agree = [(a == b).double().mean().item() for a, b in zip(answer.labels, expected.labels, strict=True)]
        assert min(agree) > 0.99, agree
        torch.testing.assert_close(answer.trace.shares(), expected.trace.shares(), atol=0.05, rtol=0)
