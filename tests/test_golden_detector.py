"""A released detector as a file, converted whole, gives what the release gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sievit.convert.pth import read_checkpoint
from sievit.heads import MaskRCNNConfig
from sievit.heads.masks import paste_masks
from sievit.models.build import load, save
from sievit.models.detector import Detector, DetectorConfig
from sievit.policies import KeepAllConfig, build_policy
from sievit.released.detectors import SViTOptions, assemble, release_limits

PADDED, CONTENT, GIVEN = (128, 192), (120, 180), (80, 120)
OPTIONS = SViTOptions(num_heads=4)
HEAD = release_limits(MaskRCNNConfig(num_classes=5))
CONSTANTS = replace(HEAD, rpn=replace(HEAD.rpn, pre_nms_test=300, post_nms_test=120))


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> Path:
    return golden_root / "svit"


@pytest.fixture(scope="module")
def want(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "detector_small_e2e.safetensors")


@pytest.fixture(scope="module")
def released(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, as mmcv writes it."""
    backbone = load_file(golden / "backbone_small.weights.safetensors")
    heads = load_file(golden / "heads_small.weights_fp16.safetensors")
    state = {**{f"backbone.{key}": value for key, value in backbone.items()}, **heads}
    path = tmp_path_factory.mktemp("released") / "epoch_4.pth"
    meta = {"epoch": 4, "CLASSES": ("a", "b", "c", "d", "e"), "config": "model = dict()"}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


@pytest.fixture(scope="module")
def detector(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Converted, written, and read again; made for the small test images of the recording."""
    model = assemble(read_checkpoint(released), OPTIONS, constants=CONSTANTS).model
    path = tmp_path_factory.mktemp("converted") / "model.safetensors"
    save(model, path)
    loaded = load(path)
    assert isinstance(loaded, Detector)
    loaded.config = replace(loaded.config, input=replace(loaded.config.input, min_size=120, max_size=180))
    return loaded


def test_the_release_end_to_end(detector: Detector, want: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
    """From the padded network input that was recorded, which is noise beside the image too, to masks on the image."""
    image = want["image" if "image" in want else "input"]
    monkeypatch.setattr("sievit.models.detector.batched", lambda *_: image)
    with torch.inference_mode():
        output = detector([torch.zeros(3, *GIVEN)])
        features, trace = detector.backbone(image)
        maps = detector.head.pyramid(features)
        proposals = detector.head.rpn(maps, PADDED, [CONTENT], None)[0][0]
        found = detector.head(features, PADDED, [CONTENT])[0][0]
        logits = detector.head.roi_heads.mask_branch(maps[:4], [found["boxes"]], PADDED)
    assert (output.sizes, output.image_size) == ([CONTENT], PADDED)
    assert torch.equal(torch.stack(output.trace.keep, 1).unflatten(2, trace.grid), want["selectors"].bool())
    for i in range(4):
        torch.testing.assert_close(features[str(i)], want[f"backbone_feat{i}"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(proposals, want["proposals"][:, :4], atol=1e-2, rtol=0)
    torch.testing.assert_close(found["boxes"], want["det_bboxes_netscale"][:, :4], atol=1e-2, rtol=0)
    own = logits[torch.arange(len(logits)), found["labels"]]
    torch.testing.assert_close(own, want["mask_logits"], atol=1e-2, rtol=0)

    detected = output.detections[0]
    torch.testing.assert_close(detected["boxes"], want["det_bboxes_rescaled"][:, :4], atol=1e-2, rtol=0)
    torch.testing.assert_close(detected["scores"], want["det_bboxes_rescaled"][:, 4], atol=1e-4, rtol=0)
    assert torch.equal(detected["labels"] - 1, want["det_labels_rescaled"])
    assert detected["masks"].shape == (96, 1, *GIVEN)
    assert (detected["masks"][:, 0] != want["masks"].bool()).float().mean() <= 1e-4


def test_hidden_padding_is_something_else(detector: Detector, monkeypatch: pytest.MonkeyPatch):
    """Which is why converted models see it."""
    image = torch.rand(3, *GIVEN)
    with torch.inference_mode():
        seen = detector([image])
        monkeypatch.setattr(detector, "config", replace(detector.config, padding="hidden"))
        hidden = detector([image])
    assert seen.trace.valid.all()
    assert hidden.trace.valid.all()  # tokens that hold a part of the image take part
    assert not torch.equal(seen.detections[0]["scores"], hidden.detections[0]["scores"])


def test_what_a_model_that_sees_padding_costs(detector: Detector):
    """All of the batch's canvas, which is what it computes."""
    wide, high = torch.rand(3, 80, 120), torch.rand(3, 120, 80)
    dense = build_policy(KeepAllConfig(), embed_dim=64, depth=12)
    with torch.inference_mode():
        alone = detector.count(detector([wide], policy=dense))
        together = detector.count(detector([wide, high], policy=dense))
    for name in ("patch_embed", "blocks", "neck", "fpn", "rpn"):
        assert together[name][0] == together[name][1] > alone[name][0], name
    assert together["patch_embed"][0] == pytest.approx(alone["patch_embed"][0] * 192 / 128)  # 192x192 for 128x192


def test_the_configuration_of_the_release(released: Path):
    converted = assemble(read_checkpoint(released), OPTIONS)
    config = converted.model.config
    assert isinstance(config, DetectorConfig)
    assert (config.input.min_size, config.input.max_size, config.input.size_divisor) == (800, 1333, 32)
    assert not config.input.antialias
    assert config.padding == "seen"
    assert config.vit.norm_eps == 1e-5
    assert config.classes == ("a", "b", "c", "d", "e")  # named in the file
    assert config.category_ids == (1, 2, 3, 4, 5)
    assert (config.head.rpn.pre_nms_test, config.head.box.max_detections) == (1000, 100)
    assert converted.keys == len(read_checkpoint(released).state)


def test_a_detection_without_area_can_be_drawn():
    """mmdet keeps them, so converted models do."""
    masks = paste_masks(torch.rand(2, 1, 28, 28), torch.tensor([[5.0, 5, 5, 9], [3, 3, 3, 3]]), (12, 14), CONSTANTS)
    assert masks.shape == (2, 1, 12, 14)
