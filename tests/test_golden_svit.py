"""Parity with the released SViT from recorded data: the backbone, and a whole detector, converted from its file."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sievit.convert import adapter_backbone
from sievit.convert.keys import rename
from sievit.convert.pth import read_checkpoint
from sievit.convert.svit import ADAPTER_RULES, SPARSE_RULES, _number_extra_extractors
from sievit.heads import MaskRCNNConfig
from sievit.models.build import load, save
from sievit.models.detector import Detector
from sievit.necks.adapter import ViTAdapter
from sievit.policies import KeepAllConfig, build_policy, gates, svit
from sievit.released.detectors import SViTOptions, assemble, release_limits
from sievit.vit import Execution
from sievit.vit.execution import Mode
from tiny import assert_gradient, released_names

HEADS: dict[str, Any] = {"num_heads": 4, "deform_num_heads": 4}


@pytest.fixture(scope="module")
def weights(golden_svit: Path) -> dict[str, Tensor]:
    return load_file(golden_svit / "backbone_small.weights.safetensors")


@pytest.fixture(scope="module")
def backbone(weights: dict[str, Tensor]) -> ViTAdapter:
    return adapter_backbone(weights, **HEADS)


@pytest.fixture(scope="module")
def cases(golden_svit: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(golden_svit / "backbone_small_eval.safetensors").items():
        case, name = key.split("/", 1)
        found.setdefault(case, {})[name] = value
    return found


def check(backbone: ViTAdapter, images: Tensor, case: dict[str, Tensor], mode: Mode) -> None:
    with torch.inference_mode():
        features, trace = backbone(images, execution=Execution(mode=mode))
    chosen = torch.stack(trace.keep, 1).unflatten(2, trace.grid)
    assert torch.equal(chosen, case["selectors"].bool())
    for i in range(4):
        torch.testing.assert_close(features[str(i)], case[f"feat{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["packed", "padded", "masked"])
@pytest.mark.parametrize("name", ["a", "b", "c", "c_nested"])
def test_evaluation_equals_the_release(backbone, cases, name, mode) -> None:
    case = cases[name]
    images = case["input"] if "input" in case else cases["c"]["input"]
    check(backbone, images, case, mode)
    if mode == "packed" and "gate_logits_0" in case:
        with torch.inference_mode():
            logits = [aux["logits"] for aux in backbone(images)[1].aux if "logits" in aux]
        for k, own in enumerate(logits):
            torch.testing.assert_close(own, case[f"gate_logits_{k}"], atol=1e-4, rtol=1e-4)


def test_sampled_gates_equal_the_release(weights, cases, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = adapter_backbone(weights, **HEADS)
    assert isinstance(sampling.policy, svit.SViT)
    sampling.policy.config = dataclasses.replace(sampling.policy.config, sample=True)
    noise = iter([cases["d"][f"noise_{k}"] for k in range(9)])
    monkeypatch.setattr(svit, "gumbel_noise", lambda like: next(noise))
    check(sampling, cases["a"]["input"], cases["d"], "packed")


@pytest.mark.parametrize(
    ("name", "shifts"),
    [
        ("e_all_keep", dict.fromkeys(range(9), 1e4)),
        ("e_gate4_empty", {4: -1e4}),
        ("e_all_gates_empty", dict.fromkeys(range(9), -1e4)),
        ("e_gate4_tie", {4: None}),
        ("e_all_keep_batch2", dict.fromkeys(range(9), 1e4)),
        ("e_gate4_empty_batch2", {4: -1e4}),
    ],
)
def test_edge_cases_equal_the_release(weights, cases, name: str, shifts: dict[int, float | None]) -> None:
    edited = {key: value.clone() for key, value in weights.items()}
    for gate, shift in shifts.items():
        prefix = f"selective_modules.{gate}.mlp.fc2"
        if shift is None:
            edited[f"{prefix}.weight"].zero_()
            edited[f"{prefix}.bias"].zero_()
        else:
            edited[f"{prefix}.bias"][0] += shift
    images = cases["c" if name.endswith("batch2") else "a"]["input"]
    check(adapter_backbone(edited, **HEADS), images, cases[name], "packed")


def test_training_equals_the_release(weights, golden_svit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_file(golden_svit / "backbone_small_train.safetensors")
    backbone = adapter_backbone(weights, **HEADS).train()
    noise = iter([data[f"noise_{k}"] for k in range(9)])
    monkeypatch.setattr(gates, "gumbel_noise", lambda like: next(noise))
    images = data["input"].clone().requires_grad_()

    features, trace = backbone(images)
    ratio = backbone.policy.loss(trace)["ratio"]
    loss = ratio + sum((features[str(k)] * data[f"loss_weight{k}"]).sum() for k in range(4))
    loss.backward()

    assert torch.equal(torch.stack(trace.keep[3:]), data["selectors"].bool())
    for k in range(4):
        torch.testing.assert_close(features[str(k)], data[f"feat{k}"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ratio, 4 * data["ratio_loss"].reshape(()), atol=0, rtol=1e-3)
    torch.testing.assert_close(loss.detach(), data["loss"].reshape(()), atol=0, rtol=1e-3)
    assert_gradient("input", images.grad, data["grad_input"])
    rules = (*SPARSE_RULES, *ADAPTER_RULES)
    names = released_names(weights, lambda state: rename(_number_extra_extractors(state), rules, source="released"))
    checked = 0
    for key, expected in data.items():
        if not key.startswith("grad/"):
            continue
        name = key.removeprefix("grad/")
        parameter = dict(backbone.named_parameters())[names[name]]
        if name == "pos_embed":
            assert not expected[:, 0].any()
            expected = expected[:, 1:]
        assert_gradient(name, parameter.grad, expected, ZERO_GRADIENTS.get(name))
        checked += 1
    assert checked > 300
    buffers = dict(backbone.named_buffers())
    for key, expected in data.items():
        if key.startswith("buffer_after/"):
            torch.testing.assert_close(
                buffers[names[key.removeprefix("buffer_after/")]], expected, atol=1e-5, rtol=1e-4
            )


ZERO_GRADIENTS = dict.fromkeys(("up.bias", "spm.fc1.bias"), 1.0)  # a constant before a batch norm: round-off alone


# The detector, as a file.


PADDED, CONTENT, GIVEN = (128, 192), (120, 180), (80, 120)
OPTIONS = SViTOptions(num_heads=4)
HEAD = release_limits(MaskRCNNConfig(num_classes=5))
CONSTANTS = replace(HEAD, rpn=replace(HEAD.rpn, pre_nms_test=300, post_nms_test=120))


@pytest.fixture(scope="module")
def want(golden_svit: Path) -> dict[str, Tensor]:
    return load_file(golden_svit / "detector_small_e2e.safetensors")


@pytest.fixture(scope="module")
def released(golden_svit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, as mmcv writes it."""
    backbone = load_file(golden_svit / "backbone_small.weights.safetensors")
    heads = load_file(golden_svit / "heads_small.weights_fp16.safetensors")
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
    """From the padded network input that was recorded, which is noise beside the image too, to masks on the image; what
    the head says on the way is in test_mask_rcnn.py."""
    image = want["image" if "image" in want else "input"]
    monkeypatch.setattr("sievit.models.detector.batched", lambda *_: image)
    with torch.inference_mode():
        output = detector([torch.zeros(3, *GIVEN)])
        features, trace = detector.backbone(image)
    assert (output.sizes, output.image_size) == ([CONTENT], PADDED)
    assert torch.equal(torch.stack(output.trace.keep, 1).unflatten(2, trace.grid), want["selectors"].bool())
    for i in range(4):
        torch.testing.assert_close(features[str(i)], want[f"backbone_feat{i}"], atol=1e-4, rtol=1e-4)
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
