"""Any backbone with a policy around it, in three lines; and tokens at a stride that is not the patch's."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sievit
from sievit.config import ConfigError
from sievit.convert import from_timm
from sievit.measure.flops import traced_macs
from sievit.models.backbone import build_backbone
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import AttentionConfig, KeepAllConfig
from sievit.vit import ViT, ViTConfig
from tiny import dense, refused

ARCHITECTURES = {
    "class token": "vit_tiny_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "rotary": "vit_small_patch16_dinov3",
    "no class token": "vit_base_patch16_siglip_gap_224",
}


def model_of(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=6, embed_dim=96, num_heads=2, img_size=112, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=min(0.15, parameter.shape[-1] ** -0.5))
    return model.eval()


@pytest.mark.parametrize("policy", ["spread", "attention", "top_norm", "random"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_three_lines(family: str, policy: str) -> None:
    model = model_of(ARCHITECTURES[family])
    sieved = sievit.sieve(model, policy, first_block=2, shares=(0.6, 0.3))
    patch = model.patch_embed.patch_size[0]
    features = sieved(torch.randn(2, 3, 6 * patch, 9 * patch))
    assert features.map.shape == (2, 96, 6, 9) and features.prefix.shape == (2, model.num_prefix_tokens, 96)
    assert not features.map.requires_grad and not any(p.requires_grad for p in sieved.parameters())
    torch.testing.assert_close(
        features.trace.shares()[:, 0], torch.tensor([1, 1, 33 / 54, 33 / 54, 17 / 54, 17 / 54]), atol=1e-6, rtol=0
    )
    everyone = sieved(torch.randn(2, 3, 6 * patch, 9 * patch), policy=dense(sieved.vit)).trace
    assert (traced_macs(sieved.vit.config, features.trace) < traced_macs(sieved.vit.config, everyone)).all()


def test_all_shares_are_dense() -> None:
    model = model_of("vit_tiny_patch16_224", dynamic_img_size=True)
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected = model.forward_intermediates(images, norm=True, intermediates_only=True)[-1]
    got = sievit.sieve(model, "attention", shares=(1.0,))(images)
    torch.testing.assert_close(got.map, expected, atol=1e-4, rtol=1e-5)


def attention_by_hand(model: Any, x: Tensor, index: int, rope: Tensor | None) -> Tensor:
    """(b, heads, t, t) of timm's block, written out."""
    from timm.layers import apply_rot_embed_cat

    block, p = model.blocks[index], model.num_prefix_tokens
    bias = block.attn.qkv.bias
    if getattr(block.attn, "q_bias", None) is not None:
        bias = torch.cat([block.attn.q_bias, block.attn.k_bias, block.attn.v_bias])
    qkv = F.linear(block.norm1(x), block.attn.qkv.weight, bias)
    q, k, _ = qkv.unflatten(2, (3, 2, 48)).permute(2, 0, 3, 1, 4)
    if rope is not None:
        half = block.attn.rotate_half
        q, k = (torch.cat([y[:, :, :p], apply_rot_embed_cat(y[:, :, p:], rope, half=half)], dim=2) for y in (q, k))
    return (q @ k.transpose(2, 3) / 48**0.5).softmax(-1)


@pytest.mark.parametrize("family", ["class token", "registers", "rotary"])
@torch.inference_mode()
def test_attention_is_that_of_the_class_token(family: str) -> None:
    model = model_of(ARCHITECTURES[family])
    vit = from_timm(model)
    images = torch.randn(2, 3, 112, 112)
    tokens = vit.embed(images)
    x = model._pos_embed(model.patch_embed(images))
    x, rope = x if isinstance(x, tuple) else (x, None)
    expected = attention_by_hand(model, model.norm_pre(x), 3, rope)[:, :, 0, model.num_prefix_tokens :].mean(1)
    torch.testing.assert_close(vit.project(3, tokens).attention(), expected, atol=1e-6, rtol=1e-4)


@torch.inference_mode()
def test_padding_gets_no_attention() -> None:
    for name in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_gap_224"):
        vit = from_timm(model_of(name))
        images = torch.randn(1, 3, 112, 112)
        images[..., 48:, :] = images[..., :, 80:] = 0
        got = vit.project(1, vit.embed(images, [(48, 80)])).attention()[0].unflatten(0, (7, 7))
        alone = vit.project(1, vit.embed(images[..., :48, :80])).attention()[0].unflatten(0, (3, 5))
        torch.testing.assert_close(got[:3, :5], alone, atol=1e-6, rtol=1e-4)
        assert got[3:].sum() == 0 and got[:, 5:].sum() == 0


@torch.inference_mode()
def test_a_choice_stands_until_the_share_changes() -> None:
    sieved = sievit.sieve(model_of("vit_tiny_patch16_224"), "attention", first_block=2, shares=(0.5, 0.5, 0.4, 0.4))
    trace = sieved(torch.randn(1, 3, 112, 112)).trace
    assert torch.equal(trace.keep[2], trace.keep[3]) and torch.equal(trace.keep[4], trace.keep[5])
    assert ["scores" in aux for aux in trace.aux[:6]] == [False, False, True, False, True, False]


def test_what_cannot_be_sieved() -> None:
    model = model_of("vit_tiny_patch16_224")
    wrong: list[tuple[Any, str, dict[str, Any], str]] = [
        (model, "attention", {"share": 0.5}, r"no such option.*share"),
        (model, "atention", {}, "did you mean 'attention'"),
        (model, "dtop", {}, "goes with a segmenter"),
        (nn.Conv2d(3, 3, 1), "random", {}, "a Conv2d of 'torch'"),
        ("vit_tiny_patch15", "random", {}, "timm knows no model called 'vit_tiny_patch15'"),
    ]
    for backbone, policy, options, message in wrong:
        refused(message, sievit.sieve, backbone, policy, **options)
    refused("not a multiple of patch 16", sievit.sieve(model), torch.randn(1, 3, 100, 112))


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ConfigError, match=r"weights of 'vit_tiny_patch16_224\.augreg_in21k'.*no route.*pretrained=False"
    ):
        from_timm("vit_tiny_patch16_224.augreg_in21k")


def test_our_own_vit_is_copied() -> None:
    vit = ViT(ViTConfig(depth=4, embed_dim=32, num_heads=2))
    sieved = sievit.sieve(vit, AttentionConfig(first_block=1, shares=(0.5,)))
    assert all(p.requires_grad for p in vit.parameters())
    assert not any(p.requires_grad for p in sieved.parameters())


@pytest.mark.parametrize("patch", [8, 14])
@torch.inference_mode()
def test_tokens_at_another_stride(patch: int) -> None:
    """A patch-14 ViT at 16 pixels per token sees the image at 14/16 of its size, and nothing of the padding."""
    torch.manual_seed(0)
    config = ViTConfig(grid=(4, 4), patch_size=patch, token_stride=16, embed_dim=64, num_heads=2, depth=2)
    vit = ViT(config).eval()
    image = torch.rand(1, 3, 96, 128)
    tokens = vit.embed(image)
    assert tokens.grid == (6, 8)
    smaller = F.interpolate(image, (6 * patch, 8 * patch), mode="bilinear", antialias=True)
    inner = vit.patch_embed(smaller).unflatten(1, (6, 8))[:, :5, :7]
    positions = vit._grid_positions((6, 8))
    assert positions is not None
    own = (tokens.patches - positions).unflatten(1, (6, 8))[:, :5, :7]
    torch.testing.assert_close(own, inner, atol=1e-5, rtol=1e-4)
    padded = F.pad(image, (0, 32, 0, 64))
    batch = vit.embed(torch.cat([padded, torch.rand_like(padded)]), [(96, 128), (160, 160)])
    torch.testing.assert_close(batch.map()[0, :, :6, :8], tokens.map()[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_maps_of_a_patch_14_backbone_stand_at_the_usual_strides() -> None:
    config = ViTConfig(patch_size=14, token_stride=16, embed_dim=64, num_heads=2, depth=2)
    backbone = build_backbone(PyramidConfig(out_channels=8), config, KeepAllConfig()).eval()
    maps, _ = backbone(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    with pytest.raises(ConfigError, match="token per 16 pixels, not 14: set token_stride=16"):
        build_backbone(PyramidConfig(), ViTConfig(patch_size=14), KeepAllConfig())
