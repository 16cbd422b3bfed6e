"""Every plain family of timm, block by block against timm; and that skipping tokens does the same in all of them."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sievit.convert import from_timm, timm_config
from sievit.convert.keys import load_strictly
from sievit.convert.timm import timm_state
from sievit.policies import Policy
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT, ViTConfig
from sievit.vit.execution import AttentionName, Mode
from tiny import dense, each_block, refused

REGISTERED = [
    name
    for name in timm.list_models()
    if _model_to_module[name] in ("vision_transformer", "deit", "eva", "beit", "vision_transformer_sam")
]
REFUSED = {
    "beit_": "bias per pair",
    "beitv2_": "bias per pair",
    "samvit_": "windows",
    "_sam_": "windows",
    "_xp_": "side by side",
    "_18x2_": "side by side",
    "_rpn_": "behind the branches",
    "eva02_enormous_": "behind the branches",
    "_rope_mixed_": "learned per block",
    "vit_dlittle_": "difference of two",
    "vit_dwee_": "difference of two",
    "vit_dpwee_": "side by side",
    "vit_pwee_": "side by side",
    "_sapiens2": "share keys and values",
}
"""What cannot be run exactly, by a part of its name, and words of the reason."""
FAMILIES = {
    "DeiT, AugReg, MAE": "vit_small_patch16_224",
    "DeiT with two class tokens": "deit_tiny_distilled_patch16_224",
    "DeiT III": "deit3_small_patch16_224",
    "CLIP": "vit_base_patch16_clip_quickgelu_224",
    "SigLIP": "vit_base_patch16_siglip_gap_224",
    "AIMv2": "aimv2_large_patch14_224",
    "BEiT-3": "beit3_base_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2",
    "DINOv2, gated": "vit_giant_patch14_reg4_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "DINOv3, gated": "vit_7b_patch16_dinov3",
    "EVA": "eva_giant_patch14_224",
    "EVA-02": "eva02_small_patch14_224",
    "EVA-02, norms inside": "eva02_base_patch16_clip_224",
    "RoPE-ViT": "vit_small_patch16_rope_224",
    "PE": "vit_pe_spatial_small_patch16_512",
    "patch 8": "vit_small_patch8_224",
}
TRUE = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "deit3_base_patch16_224",
    "vit_base_patch14_dinov2",
    "vit_base_patch16_dinov3",
    "eva02_base_patch14_224",
]
DEPTH = 4
GRID = (4, 6)


def small(name: str, *, depth: int = 2) -> Any:
    """The architecture, narrow and shallow, with random weights."""
    with torch.device("meta"):
        full: Any = timm.create_model(name)
    options: dict[str, Any] = {"depth": depth, "embed_dim": 96, "num_heads": 2, "num_classes": 3}
    options["img_size"] = full.patch_embed.patch_size[0] * 5
    if name.endswith("_sapiens2"):
        options["num_kv_heads"] = 1
    if type(full).__module__.endswith((".beit", "_sam")):  # they take no images of any size, and are refused anyhow
        return full
    return randomised(timm.create_model(name, **options, dynamic_img_size=True))


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, around, min(0.1, parameter.shape[-1] ** -0.5), generator=generator)
    return model.eval()


def timm_blocks(model: Any, images: Tensor) -> list[Tensor]:
    """All tokens after every block, and after the last norm."""
    prefix = {"return_prefix_tokens": True} if model.num_prefix_tokens else {}
    last, found = model.forward_intermediates(images, output_fmt="NLC", **prefix)
    return [*(torch.cat(x[::-1], dim=1) if prefix else x for x in found), last]


def assert_same_blocks(model: Any, vit: ViT, images: Tensor) -> None:
    ours = islice(each_block(vit, images), 1, None)
    for own, theirs in zip(ours, timm_blocks(model, images), strict=True):
        assert theirs.std() > 0.1, "features of some size, or nothing is compared"
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-5)


def of_grid(vit: ViT, grid: tuple[int, int], count: int = 3) -> Tensor:
    patch = vit.config.patch_size
    return torch.randn(count, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 6 > 0)) for i, name in enumerate(REGISTERED)]
)
@torch.inference_mode()
def test_every_registered_plain_vit(name: str) -> None:
    model = small(name)
    reason = next((words for part, words in REFUSED.items() if part in name), None)
    if reason is not None:
        refused(f"cannot be run exactly: .*{reason}", from_timm, model)
        return
    vit = from_timm(model)
    for grid in ((5, 5), (3, 7)):
        assert_same_blocks(model, vit, of_grid(vit, grid, count=2))


@torch.inference_mode()
def test_a_rectangle_without_biases_and_a_wide_mlp() -> None:
    """Positions that are stored for another shape than a square, and what no registered model sets."""
    options: dict[str, Any] = {
        "embed_dim": 48,
        "num_heads": 4,
        "depth": 3,
        "patch_size": 8,
        "qkv_bias": False,
        "mlp_ratio": 3.0,
    }
    model = randomised(timm.models.VisionTransformer(img_size=(40, 72), dynamic_img_size=True, **options))
    vit = from_timm(model)
    assert vit.config.grid == (5, 9)
    for grid in ((5, 9), (3, 4)):
        assert_same_blocks(model, vit, of_grid(vit, grid, count=2))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("base" in name)) for name in TRUE])
@torch.inference_mode()
def test_true_configurations(name: str) -> None:
    model = randomised(timm.create_model(name, dynamic_img_size=True))
    vit = from_timm(model)
    assert vit.config == timm_config(name)
    for grid in ((16, 16), (9, 14)):
        assert_same_blocks(model, vit, of_grid(vit, grid, count=1))


class Chosen(Policy):
    """Tokens by a rule of the block, the image (b, 1) and the place (1, n); None are all."""

    def __init__(self, rule: Callable[[int, Tensor, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.rule = rule

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, dict[str, Tensor]]:
        b, n = tokens.valid_or_all().shape
        return tokens.select(self.rule(index, torch.arange(b)[:, None], torch.arange(n)[None])), {}


def half(first: int = 0) -> Policy:
    """Half of the tokens in each block, other ones each time and in every image; `first` is the number of the first."""
    return Chosen(lambda index, image, place: ((place + 3 * (image + first)) * 7 + index * 5) % 4 < 2)


EVERYONE = Chosen(lambda index, image, place: image + place >= 0)
BLINK = Chosen(lambda index, image, place: (place + 0 * image) % 2 == 0 if index == 1 else None)
"""In block 1 the odd tokens rest; everywhere else all take part."""


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[Any, ViT]:
    model = small(FAMILIES[request.param], depth=DEPTH)
    return model, from_timm(model)


@torch.inference_mode()
def test_choosing_all_is_dense(pair) -> None:
    vit = pair[1]
    images = of_grid(vit, GRID)
    expected, _ = vit(images, dense(vit))
    for mode in ("packed", "padded", "masked"):
        torch.testing.assert_close(
            vit(images, EVERYONE, execution=Execution(mode=mode))[0].x, expected.x, atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("mode", "attention"),
    [("packed", "per_image"), ("packed", "batched"), ("padded", "auto"), ("bucketed", "auto"), ("masked", "auto")],
)
@torch.inference_mode()
def test_half_of_a_batch_equals_image_by_image(pair, mode: Mode, attention: AttentionName) -> None:
    vit = pair[1]
    images = of_grid(vit, GRID)
    got, trace = vit(images, half(), execution=Execution(mode=mode, attention=attention))
    assert 0.4 < trace.shares().min() <= trace.shares().max() < 0.6, "the policy skips half of the tokens"
    for i, image in enumerate(images):
        alone, _ = vit(image[None], half(i))
        torch.testing.assert_close(got.x[i], alone.x[0], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_images_of_several_sizes(pair) -> None:
    """In a padded batch every image has its own positions, learned and rotary."""
    vit = pair[1]
    grids, patch, images = [(4, 6), (3, 3), (2, 5)], vit.config.patch_size, of_grid(vit, GRID)
    got, _ = vit(images, dense(vit), [(h * patch, w * patch) for h, w in grids])
    for i, (h, w) in enumerate(grids):
        alone, _ = vit(images[i : i + 1, :, : h * patch, : w * patch], dense(vit))
        torch.testing.assert_close(got.map()[i, :, :h, :w], alone.map()[0], atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_token_that_comes_back_has_its_own_position(pair) -> None:
    """Skipped in block 1, computed in 2 and 3; the same by timm's blocks, given rows of its rotary table."""
    model, vit = pair
    images = of_grid(vit, GRID)
    got, _ = vit(images, BLINK)
    x, rope = model._pos_embed(model.patch_embed(images)), None
    if isinstance(x, tuple):
        x, rope = x
    x = model.norm_pre(x)
    even = torch.arange(GRID[0] * GRID[1]) % 2 == 0
    part = torch.cat([torch.ones(vit.num_prefix, dtype=torch.bool), even])
    for index, block in enumerate(model.blocks):
        seen, table = (part, even) if index == 1 else (torch.ones_like(part), torch.ones_like(even))
        told = {} if rope is None else {"rope": rope[table]}
        x = x.clone()
        x[:, seen] = block(x[:, seen], **told)
    torch.testing.assert_close(got.x, model.norm(x), atol=1e-4, rtol=1e-5)


# Strict loading, images that do not fit, stochastic depth, gradients.


def test_a_state_dict_loads_strictly() -> None:
    oracle = randomised(VisionTransformer(embed_dim=48, num_heads=2, depth=2, img_size=64))
    config, state = timm_config(oracle), oracle.state_dict()

    def load(state: dict[str, Tensor]) -> None:
        load_strictly(ViT(config), timm_state(state, config, source="a file"), source="a file")

    load(state)
    rest = {k: v for k, v in state.items() if k != "blocks.1.norm1.bias"}
    for wrong, words in (
        (rest, r"missing: blocks\.1\.norm1\.bias"),
        ({**state, "blocks.0.ls1.gamma": torch.ones(48)}, r"surplus: blocks\.0\.ls1\.gamma"),
        ({**state, "blocks.0.norm3.weight": torch.ones(48)}, r"blocks\.0\.norm3"),
        ({**state, "blocks.0.mlp.fc1.bias": torch.ones(47)}, "another shape"),
    ):
        refused(words, load, wrong)


@pytest.mark.parametrize("stored", [(4, 4), (6, 6)])
def test_what_the_config_does_without_is_left_out(stored: tuple[int, int]) -> None:
    oracle = randomised(VisionTransformer(embed_dim=48, num_heads=2, depth=2, img_size=16 * stored[0]))
    config = replace(timm_config(oracle), class_token=False, final_norm=False, grid=(4, 4))
    state = timm_state(oracle.state_dict(), config, source="a file")
    load_strictly(ViT(config), state, source="a file")
    if stored == (4, 4):
        torch.testing.assert_close(state["pos_embed"], oracle.state_dict()["pos_embed"][:, 1:])


def test_images_are_whole_patches_and_stochastic_depth_drops_them_whole() -> None:
    vit = ViT(ViTConfig(embed_dim=24, num_heads=2, depth=1))
    with pytest.raises(ValueError, match="50x64"):
        vit.embed(torch.zeros(1, 3, 50, 64))
    with pytest.raises(ValueError, match="does not fit"):
        vit.embed(torch.zeros(1, 3, 64, 64), [(80, 64)])

    vit = ViT(ViTConfig(grid=(4, 4), embed_dim=24, num_heads=2, depth=2, drop_path_rate=0.5)).train()
    images = torch.randn(1, 3, 64, 64).expand(64, -1, -1, -1)
    out = vit(images, dense(vit))[0].x
    kinds = {tuple(row.flatten()[:4].mul(1e4).round().tolist()) for row in out}
    assert 2 <= len(kinds) <= 4, "each of the last block's two branches is there or not, for a whole image"


def test_packed_gradients_equal_masked_ones() -> None:
    torch.manual_seed(3)
    vit = ViT(ViTConfig(grid=(4, 4), embed_dim=24, num_heads=2, depth=3))
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for mode in ("packed", "masked", "padded"):
        vit.zero_grad()
        vit(images, half(), execution=Execution(mode=mode))[0].x.square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
