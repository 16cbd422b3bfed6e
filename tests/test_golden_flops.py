"""The published rule of counting against what the papers' tool counted in the released code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sievit.convert import segvit_segmenter
from sievit.heads import ATMConfig
from sievit.measure.published import published_macs
from sievit.models.build import build
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.vit import ViTConfig

CASES = ("dense", "common_lo", "common_mid", "common_hi", "perstage", "perstage_dec", "stage1_only", "mixed")


def published(golden_root: Path) -> dict:
    return json.loads((golden_root / "dtop" / "flops.json").read_text())


def config(vit: ViTConfig, head: ATMConfig, classes: int, out_indices: tuple[int, ...]) -> SegmenterConfig:
    return SegmenterConfig(
        vit=vit,
        policy=KeepAllConfig(),
        input=InputConfig(),
        classes=tuple(map(str, range(classes))),
        head=head,
        out_indices=out_indices,
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_pruned_passes_of_the_small_model(case: str, batch: int, golden_root: Path):
    folder = golden_root / "dtop"
    said = published(golden_root)["small_cases"][f"small_A_{case}_b{batch}"]
    state = load_file(folder / "small_A_state.safetensors")
    images = load_file(folder / "eval_A_input.safetensors")["input"][:batch]
    policy = DToPConfig(thresholds=tuple(said["thresh"]))
    net = segvit_segmenter(state, num_heads=4, head_num_heads=2, out_indices=(1, 3, 5), policy=policy)
    with torch.no_grad():
        _, trace = net(images)
    head = ATMConfig(channels=32, num_heads=2)
    got = published_macs(net.vit.config, head, 7, net.out_indices, trace)
    around = said["by_operator"]["upsample_bilinear2d"]
    assert around == batch * 4 * 7 * 96 * 96, "counted without the second resizing, of the code around the net"
    assert round(got.sum().item()) == said["total"] + around


@pytest.mark.parametrize("name", ["ade20k", "ade20k_large", "pc", "cocostuff10k"])
def test_dense_passes_of_the_published_models(name: str, golden_root: Path):
    settings = json.loads((golden_root / "dtop" / "settings.json").read_text())[f"prune_segvit_{name}"]
    total = published(golden_root)["encode_decode_dense"][f"prune_segvit_{name}_dense_encode_decode"]["total"]
    backbone, decoder = settings["backbone"], settings["decode_head"]
    side = backbone["img_size"][0]
    vit = ViTConfig(
        grid=(side // 16, side // 16),
        embed_dim=backbone["embed_dims"],
        depth=backbone["num_layers"],
        num_heads=backbone["num_heads"],
    )
    head = ATMConfig(channels=decoder["channels"], num_heads=settings["effective_head_num_heads"][-1])
    chosen = config(vit, head, decoder["num_classes"], tuple(settings["out_indices"]))
    with torch.device("meta"):
        model = build(chosen)
    published_gflops = model.published_gflops(model.dense_answer((side, side)))
    assert published_gflops is not None and round(published_gflops.item() * 1e9) == total
