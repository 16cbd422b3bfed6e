"""Each semantic head against its definition; what all of them have in common is in contract/test_heads.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.heads import (
    ATM,
    MLP,
    SETRPUP,
    ATMConfig,
    MLPConfig,
    SemanticHeadConfig,
    SETRNaive,
    SETRNaiveConfig,
    SETRPUPConfig,
    build_head,
)
from sievit.heads.atm import DecoderLayer
from sievit.heads.semantic import resize
from sievit.tokens import Prediction, Tokens
from tiny import refused, scattered

GRID = (3, 4)
DIM, CLASSES = 8, 3


def canvas(b: int = 2, valid: Tensor | None = None) -> Tokens:
    return Tokens(torch.randn(b, GRID[0] * GRID[1], DIM), GRID, valid=valid)


def test_attention_to_mask_is_as_written_out() -> None:
    """Query by query and head by head; the maps are the mean of the scaled products before the softmax."""
    head = build_head(ATMConfig(channels=6, num_heads=2, num_layers=2), embed_dim=DIM, num_classes=CLASSES)
    scattered(head, 0.5)
    assert isinstance(head, ATM)
    tokens = canvas(1)
    with torch.inference_mode():
        said = head(tokens)
        x = F.layer_norm(F.linear(tokens.x[0], head.input_proj.weight, head.input_proj.bias), (6,), *norm(head.norm))
        queries, maps = head.queries, torch.zeros(0)
        for layer in head.layers:
            assert isinstance(layer, DecoderLayer)
            q, k, v = layer.self_attn.qkv(queries).chunk(3, dim=-1)
            mixed, _ = attend(q, k, v)
            queries = F.layer_norm(queries + layer.self_attn.proj(mixed), (6,), *norm(layer.norm1))
            cross = layer.cross_attn
            mixed, maps = attend(cross.q(queries), cross.k(x), cross.v(x))
            queries = F.layer_norm(queries + cross.proj(mixed), (6,), *norm(layer.norm2))
            hidden = F.relu(layer.fc1(queries))
            queries = F.layer_norm(queries + layer.fc2(hidden), (6,), *norm(layer.norm3))
        classes = head.class_embed(queries)
    torch.testing.assert_close(said.maps[0], maps, atol=1e-5, rtol=1e-5)
    assert said.classes is not None
    torch.testing.assert_close(said.classes[0], classes, atol=1e-5, rtol=1e-5)
    expected = classes.softmax(-1)[:, :1] * maps.sigmoid()
    torch.testing.assert_close(said.scores()[0], expected, atol=1e-5, rtol=1e-5)


def norm(module: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two heads of three channels; also the mean of their logits."""
    logits = [q[:, own] @ k[:, own].T / 3**0.5 for own in (slice(0, 3), slice(3, 6))]
    out = [one.softmax(-1) @ v[:, own] for one, own in zip(logits, (slice(0, 3), slice(3, 6)), strict=True)]
    return torch.cat(out, dim=-1), (logits[0] + logits[1]) / 2


def test_an_image_without_tokens_keeps_what_was_said_of_it() -> None:
    head = build_head(ATMConfig(channels=6, num_heads=2), embed_dim=DIM, num_classes=CLASSES)
    scattered(head, 0.5)
    part = torch.ones(3, 12, dtype=torch.bool)
    part[1] = False
    part[2, 3:] = False
    tokens, previous = canvas(3), Prediction(torch.randn(3, CLASSES, 12), torch.randn(3, CLASSES, 2))
    said = head(tokens, part, previous)
    assert said.classes is not None and previous.classes is not None
    assert torch.equal(said.classes[1], previous.classes[1])
    assert torch.equal(said.maps[1], previous.maps[1])
    assert not torch.equal(said.classes[0], previous.classes[0])
    (said.maps.sum() + said.classes.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_dropout_acts_in_training_alone() -> None:
    configs: list[SemanticHeadConfig] = [
        ATMConfig(channels=6, num_heads=2, dropout=0.5),
        SETRNaiveConfig(channels=6, dropout=0.5),
        SETRPUPConfig(channels=6, num_convs=1, dropout=0.5),
    ]
    for config in configs:
        head, tokens = build_head(config, embed_dim=DIM, num_classes=CLASSES), canvas()
        head.train()
        assert not torch.equal(head(tokens).maps, head(tokens).maps), config
        head.eval()
        assert torch.equal(head(tokens).maps, head(tokens).maps), config


def test_heads_that_there_cannot_be() -> None:
    refused("channels 10 is not a multiple of num_heads 4", ATMConfig, channels=10, num_heads=4)

    with pytest.raises(ConfigError, match=r"no head is registered for SemanticHeadConfig.*atm"):
        build_head(SemanticHeadConfig(), embed_dim=DIM, num_classes=CLASSES)


def test_mlp_is_linear_layers() -> None:
    head = scattered(build_head(MLPConfig(hidden_dim=5, num_layers=2), embed_dim=DIM, num_classes=CLASSES), 0.5)
    assert isinstance(head, MLP)
    tokens = canvas()
    with torch.inference_mode():
        first, second = head.layers
        expected = second(first(tokens.x).clamp(min=0)).transpose(1, 2)
        torch.testing.assert_close(head(tokens).maps, expected)


def test_naive_setr_equals_its_convolutions() -> None:
    """On the whole map, and with up-sampling before the last convolution: they commute."""
    head = scattered(build_head(SETRNaiveConfig(channels=5), embed_dim=DIM, num_classes=CLASSES), 0.5)
    assert isinstance(head, SETRNaive)
    tokens = canvas()
    with torch.inference_mode():
        x = head.norm(tokens.x).transpose(1, 2).unflatten(2, GRID)
        x = head.bn(F.conv2d(x, head.fc1.weight[..., None, None])).relu()
        x = F.conv2d(resize(x, (12, 16)), head.fc2.weight[..., None, None], head.fc2.bias)
        torch.testing.assert_close(resize(head(tokens).maps.unflatten(2, GRID), (12, 16)), x, atol=1e-5, rtol=1e-5)


def test_naive_setr_trains_on_hardly_any_token() -> None:
    """Batch norm has no variance of one token."""
    head = build_head(SETRNaiveConfig(channels=5), embed_dim=DIM, num_classes=CLASSES).train()
    part = torch.zeros(2, 12, dtype=torch.bool)
    for _ in range(3):
        said = head(canvas(), part, Prediction(torch.randn(2, CLASSES, 12)))
        assert said.maps.isfinite().all()
        said.maps.sum().backward()
        part[0, int(part.sum())] = True
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert all(buffer.isfinite().all() for buffer in head.buffers())


def test_pup_equals_its_convolutions() -> None:
    head = scattered(build_head(SETRPUPConfig(channels=5, num_convs=2), embed_dim=DIM, num_classes=CLASSES), 0.5)
    assert isinstance(head, SETRPUP)
    tokens = canvas()
    with torch.inference_mode():
        x = head.norm(tokens.x).transpose(1, 2).unflatten(2, GRID)
        for conv, bn in zip(head.convs, head.norms, strict=True):
            x = F.interpolate(bn(conv(x)).relu(), scale_factor=2, mode="bilinear", align_corners=False)
        fine = head.classifier(x)
        said = head(tokens)
    assert said.fine is not None
    torch.testing.assert_close(said.fine, fine)
    torch.testing.assert_close(said.maps, F.avg_pool2d(fine, 4).flatten(2))
