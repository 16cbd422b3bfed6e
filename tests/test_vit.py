"""Our ViT is timm's, block by block; positions follow the image and not the batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.convert import from_timm, timm_config
from sievit.convert.keys import load_strictly
from sievit.convert.timm import timm_state
from sievit.policies import KeepAllConfig, Policy, SViTConfig, build_policy
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT, ViTConfig

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3, "depth": 12, "patch_size": 16, "img_size": 224},
    "rectangle": {"embed_dim": 48, "num_heads": 4, "depth": 3, "patch_size": 8, "img_size": (40, 72)},
    "no class token": {
        "embed_dim": 48,
        "num_heads": 2,
        "depth": 2,
        "patch_size": 16,
        "img_size": 64,
        "class_token": False,
        "global_pool": "avg",
    },
    "no bias, wide": {
        "embed_dim": 48,
        "num_heads": 2,
        "depth": 2,
        "patch_size": 16,
        "img_size": 64,
        "qkv_bias": False,
        "mlp_ratio": 3.0,
    },
}


def randomised(model: VisionTransformer) -> VisionTransformer:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def each_block(vit: ViT, images: Tensor) -> list[Tensor]:
    dense = build_policy(KeepAllConfig(), embed_dim=vit.config.embed_dim, depth=vit.config.depth)
    tokens = vit.embed(images)
    trace = Trace.start(tokens)
    found = []
    for index in range(vit.config.depth):
        tokens, trace = vit.run_blocks(tokens, dense, trace, start=index, stop=index + 1)
        found.append(tokens.x)
    return [*found, vit.norm(tokens.x)]


@pytest.mark.parametrize("name", SIZES)
@torch.inference_mode()
def test_every_block_equals_timm(name: str) -> None:
    oracle = randomised(VisionTransformer(num_classes=3, **SIZES[name]))
    ours = from_timm(oracle)
    assert {k for k in oracle.state_dict() if not k.startswith(("head.", "fc_norm."))} == set(ours.state_dict())
    images = torch.randn(2, 3, *oracle.patch_embed.img_size)
    x = oracle.norm_pre(oracle.patch_drop(oracle._pos_embed(oracle.patch_embed(images))))
    got = each_block(ours, images)
    for block, own in zip(oracle.blocks, got, strict=False):
        x = block(x)
        torch.testing.assert_close(own, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[-1], oracle.norm(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(96, 64), (32, 160), (64, 64)])
@torch.inference_mode()
def test_positions_are_resized_as_timm_does(size: tuple[int, int]) -> None:
    oracle = randomised(VisionTransformer(embed_dim=48, num_heads=2, depth=2, img_size=64, dynamic_img_size=True))
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(
        each_block(from_timm(oracle), images)[-1], oracle.forward_features(images), atol=1e-4, rtol=1e-4
    )


def test_a_state_dict_loads_strictly() -> None:
    oracle = randomised(VisionTransformer(embed_dim=48, num_heads=2, depth=2, img_size=64))
    config, state = timm_config(oracle), oracle.state_dict()

    def load(state: dict[str, Tensor]) -> None:
        load_strictly(ViT(config), timm_state(state, config, source="a file"), source="a file")

    load(state)
    with pytest.raises(ConfigError, match=r"missing: blocks\.1\.norm1\.bias"):
        load({k: v for k, v in state.items() if k != "blocks.1.norm1.bias"})
    with pytest.raises(ConfigError, match=r"surplus: blocks\.0\.ls1\.gamma"):
        load({**state, "blocks.0.ls1.gamma": torch.ones(48)})
    with pytest.raises(ConfigError, match=r"blocks\.0\.norm3"):
        load({**state, "blocks.0.norm3.weight": torch.ones(48)})
    with pytest.raises(ConfigError, match="another shape"):
        load({**state, "blocks.0.mlp.fc1.bias": torch.ones(47)})


@pytest.mark.parametrize("stored", [(4, 4), (6, 6)])
def test_what_the_config_does_without_is_left_out(stored: tuple[int, int]) -> None:
    oracle = randomised(VisionTransformer(embed_dim=48, num_heads=2, depth=2, img_size=16 * stored[0]))
    config = replace(timm_config(oracle), class_token=False, final_norm=False, grid=(4, 4))
    state = timm_state(oracle.state_dict(), config, source="a file")
    load_strictly(ViT(config), state, source="a file")
    if stored == (4, 4):
        torch.testing.assert_close(state["pos_embed"], oracle.state_dict()["pos_embed"][:, 1:])


def test_images_that_are_not_whole_patches_are_an_error() -> None:
    vit = ViT(ViTConfig(embed_dim=24, num_heads=2, depth=1))
    with pytest.raises(ValueError, match="50x64"):
        vit.embed(torch.zeros(1, 3, 50, 64))
    with pytest.raises(ValueError, match="does not fit"):
        vit.embed(torch.zeros(1, 3, 64, 64), [(80, 64)])


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean() -> None:
    vit = ViT(ViTConfig(grid=(4, 4), embed_dim=24, num_heads=2, depth=2, drop_path_rate=0.5)).train()
    dense = build_policy(KeepAllConfig(), embed_dim=24, depth=2)
    images = torch.randn(1, 3, 64, 64).expand(64, -1, -1, -1)
    out = vit(images, dense)[0].x
    kinds = {tuple(row.flatten()[:4].mul(1e4).round().tolist()) for row in out}
    assert 2 <= len(kinds) <= 4, "each of the last block's two branches is there or not, for a whole image"


class _Half(Policy):
    """Keeps the given tokens in every block."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep = keep

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        return tokens.select(self.keep), {}


def test_packed_gradients_equal_masked_ones() -> None:
    torch.manual_seed(3)
    vit = ViT(ViTConfig(grid=(4, 4), embed_dim=24, num_heads=2, depth=3))
    images = torch.randn(2, 3, 64, 64)
    keep = torch.rand(2, 16) > 0.4
    gradients = []
    for mode in ("packed", "masked", "padded"):
        vit.zero_grad()
        vit(images, _Half(keep), execution=Execution(mode=mode))[0].x.square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_svit_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="reactivate=False"):
        build_policy(SViTConfig(preserve=False), embed_dim=24, depth=12)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        build_policy(SViTConfig(targets=(1.2,)), embed_dim=24, depth=12)
    with pytest.raises(ConfigError, match="blocks 0 to 11"):
        build_policy(SViTConfig(first_block=12), embed_dim=24, depth=12)
