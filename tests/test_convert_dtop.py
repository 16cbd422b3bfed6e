"""Released DToP state dicts: every key has its place, and a wrong one is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sievit.config import ConfigError
from sievit.convert import segvit_segmenter
from sievit.heads import ATM
from sievit.models.segmenter import SegmentationNet
from sievit.policies import DToPConfig
from sievit.policies.dtop import DToP

MODEL: dict[str, Any] = {"num_heads": 4, "head_num_heads": 2, "out_indices": (1, 3, 5)}
RELEASED = {
    "prune_segvit_ade20k": (12, 6, (5, 7, 11), 12, (32, 32)),
    "prune_segvit_ade20k_large": (16, 8, (7, 15, 23), 24, (40, 40)),
    "prune_segvit_pc": (16, 16, (7, 15, 23), 24, (30, 30)),
    "prune_segvit_cocostuff10k": (16, 16, (7, 15, 23), 24, (32, 32)),
}
"""Heads of the blocks and of the decoders, places, depth, grid."""


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> Path:
    return golden_root / "dtop"


@pytest.fixture(scope="module")
def weights(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "small_A_state.safetensors")


def convert(state: dict[str, Tensor], **changes: Any) -> SegmentationNet:
    options: dict[str, Any] = {**MODEL, "policy": DToPConfig(thresholds=(0.9,)), **changes}
    return segvit_segmenter(state, **options)


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(golden: Path, name: str) -> None:
    manifest = json.loads((golden / "key_manifest.json").read_text())[name]
    settings = json.loads((golden / "settings.json").read_text())[name]
    heads, decoder_heads, places, depth, grid = RELEASED[name]
    assert list(places) == settings["out_indices"]
    assert decoder_heads == settings["effective_head_num_heads"][0]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in manifest["keys"].items()}
        assert len(state) == manifest["n_keys"]
        net = segvit_segmenter(
            state,
            num_heads=heads,
            head_num_heads=decoder_heads,
            out_indices=places,
            policy=DToPConfig(thresholds=tuple(settings["thresholds_by_stage"])),
        )
    config = net.vit.config
    assert (config.depth, config.grid, config.embed_dim) == (depth, grid, manifest["keys"]["backbone.cls_token"][2])
    assert not config.final_norm
    unused = 2 * config.embed_dim  # the class token and its position
    assert sum(p.numel() for p in net.parameters()) + unused == manifest["n_params"]
    idle = sum(key.endswith("empty_weight") for key in state) + 1  # constants of the losses, and the class token
    assert len(net.state_dict()) == manifest["n_keys"] - idle
    assert not list(net.buffers())


def test_what_is_read_from_shapes(weights) -> None:
    net = convert(weights, policy=DToPConfig(thresholds=(0.5, 0.6), keep_per_class=2))
    head, policy = net.heads[0], net.policy
    assert isinstance(head, ATM)
    assert isinstance(policy, DToP)
    assert not net.training
    assert (head.config.channels, head.config.num_heads, head.config.num_layers, head.config.mlp_ratio) == (32, 2, 3, 4)
    assert (net.vit.config.depth, net.vit.config.patch_size, net.vit.config.grid) == (6, 16, (6, 6))
    assert policy.config == DToPConfig(thresholds=(0.5, 0.6), keep_per_class=2)
    assert len(head.queries) == 7


def test_every_key_is_needed(weights) -> None:
    """But for those that do nothing."""
    idle = {key for key in weights if key.endswith("empty_weight")} | {"backbone.cls_token"}
    assert len(idle) == 4
    with torch.device("meta"):  # nothing is computed
        empty = {key: torch.empty(value.shape) for key, value in weights.items()}
        for key in weights:
            rest = {k: v for k, v in empty.items() if k != key}
            if key in idle:
                convert(rest)
            else:
                with pytest.raises(ConfigError):
                    convert(rest)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("backbone.layers.3.ln1.weight", r"missing: vit\.blocks\.3\.norm1\.weight"),
        ("decode_head.class_embed.bias", r"missing: heads\.2\.class_embed\.bias"),
        ("backbone.pos_embed", "pos_embed"),
        ("auxiliary_head.0.q.weight", r"heads\.0\.queries"),
        ("backbone.patch_embed.projection.weight", "patch_embed"),
    ],
)
def test_a_missing_key_is_named(weights, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert({k: v for k, v in weights.items() if k != key})


def test_a_surplus_key_is_named(weights) -> None:
    for key in ("blob", "backbone.blob", "decode_head.blob.weight", "backbone.layers.0.attn.attn.blob"):
        with pytest.raises(ConfigError, match="blob"):
            convert({**weights, key: torch.zeros(1)})
    more = {**weights, "auxiliary_head.1.decoder.layers.3.norm1.weight": torch.zeros(32)}
    with pytest.raises(ConfigError, match=r"surplus: heads\.1\.layers\.3\.norm1\.weight"):
        convert(more)


def test_a_key_of_another_shape_is_named(weights) -> None:
    wrong = {**weights, "auxiliary_head.1.class_embed.bias": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"heads\.1\.class_embed\.bias \(3,\) instead of \(2,\)"):
        convert(wrong)
    with pytest.raises(ConfigError, match="no square"):
        convert({**weights, "backbone.pos_embed": torch.zeros(1, 36, 64)})


def test_heads_and_their_places_have_to_match(weights) -> None:
    with pytest.raises(ConfigError, match="it has 3 heads"):
        convert(weights, out_indices=(3, 5))
    with pytest.raises(ConfigError, match="the last is behind 5"):
        convert(weights, out_indices=(1, 3, 4))
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        convert(weights, head_num_heads=3)
    with pytest.raises(ConfigError):
        convert({})
