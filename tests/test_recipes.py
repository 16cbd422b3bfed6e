"""Every recipe, and the papers' constants in theirs."""

import json
from pathlib import Path

import pytest
import torch

from sievit.config import ConfigError, from_json, kind_of, to_json
from sievit.engine.recipe import Recipe, default_data_root, open_data
from sievit.models.build import build
from sievit.models.detector import Detector, DetectorConfig
from sievit.policies import SViTConfig
from sievit.recipes import recipe, recipes

PAPERS = ("coco_vit_adapter_t", "coco_vit_adapter_s", "coco_svit_adapter_t", "coco_svit_adapter_s")


DETECTORS = [name for name in recipes() if isinstance(recipe(name).model, DetectorConfig)]


def detector_config(name: str) -> DetectorConfig:
    config = recipe(name).model
    assert isinstance(config, DetectorConfig)
    return config


def on_meta(name: str) -> Detector:
    with torch.device("meta"):
        return build(detector_config(name))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_survives_json_and_is_listed(name: str):
    chosen = recipe(name)
    stored = json.loads(json.dumps(to_json(chosen)))
    assert from_json(Recipe, stored) == chosen
    stored["data"]["scenes"] = None  # of runs when a recipe could generate its data
    assert from_json(Recipe, stored) == chosen
    assert recipes()[name], "it is listed with a line"


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_builds(name: str):
    chosen = recipe(name)
    assert kind_of(chosen.model.policy) == ("svit" if "svit" in name else "keep_all")
    model = on_meta(name)
    assert len(model.config.classes) == model.config.head.num_classes
    gates = sum("gates" in key and key.endswith("fc1.weight") for key in model.state_dict())
    assert gates == (9 if "svit" in name else 0)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'coco_svit_adapter_t'"):
        recipe("coco_svit_adaptor_t")


@pytest.mark.parametrize(
    ("name", "backbone", "detector"),
    [
        ("coco_vit_adapter_t", 7_962_032, 28_063_904),
        ("coco_vit_adapter_s", 27_494_672, 47_793_152),
        ("coco_svit_adapter_t", 8_049_746, 28_151_618),
        ("coco_svit_adapter_s", 27_835_970, 48_134_450),
    ],
)
def test_sizes_are_those_of_the_papers(name: str, backbone: int, detector: int):
    """Figures of the released models, less the position of the class token, which they keep and never use, plus
    torchvision's predictors for the background, whose boxes and masks are never used either."""
    model, config = on_meta(name), detector_config(name)
    class_position = config.vit.embed_dim
    background = 4 * (config.head.box.fc + 1) + config.head.mask.deconv + 1
    assert count(model.backbone) == backbone - class_position
    assert count(model) == detector - class_position + background


@pytest.mark.parametrize("size", ["t", "s"])
@pytest.mark.parametrize("kind", ["vit", "svit"])
def test_shapes_are_those_of_the_released_models(kind: str, size: str, golden_root: Path):
    """The deformable attention's sampling points tell its heads: rows = heads x levels x points x 2."""
    file = golden_root / "svit" / f"manifest_{kind}_adapter_{size}.json"
    released = {name: entry["shape"] for name, entry in json.loads(file.read_text())["state_dict"].items()}
    ours = on_meta(f"coco_{kind}_adapter_{size}").backbone.state_dict()
    endings = (
        "sampling_offsets.weight",
        "attention_weights.weight",
        "value_proj.weight",
        "dwconv.weight",
        "stem.0.weight",
    )
    for ending in endings:
        theirs = [shape for name, shape in released.items() if name.startswith("backbone.") and name.endswith(ending)]
        assert theirs, ending
        assert sorted(theirs) == sorted(list(value.shape) for name, value in ours.items() if name.endswith(ending))


def test_the_papers_settings(golden_root: Path):
    """What mmdet reported when it built SViT-Adapter-T."""
    said = json.loads((golden_root / "svit" / "settings_mask_rcnn.json").read_text())
    chosen = recipe("coco_svit_adapter_t")
    assert isinstance(chosen.model, DetectorConfig)
    train, head, inputs = chosen.train, chosen.model.head, chosen.model.input
    assert train.lr == said["optimizer"]["lr"]
    assert train.weight_decay == said["optimizer"]["weight_decay"]
    assert (train.schedule, list(train.step_epochs)) == (said["lr_config"]["policy"], said["lr_config"]["step"])
    assert train.warmup_steps == said["lr_config"]["warmup_iters"]
    assert train.warmup_start == said["lr_config"]["warmup_ratio"]
    assert train.loss_scale == said["fp16"]["loss_scale"]["init_scale"]
    assert isinstance(chosen.model.policy, SViTConfig)
    assert chosen.model.policy.loss_weight == said["ratio_loss_weight"]
    assert list(chosen.model.classes) == said["classes"]
    assert [255 * x for x in inputs.mean] == pytest.approx(said["img_norm"]["mean"])
    assert [255 * x for x in inputs.std] == pytest.approx(said["img_norm"]["std"])
    assert (inputs.max_size, inputs.min_size) == tuple(said["test_pipeline"][1]["img_scale"])
    assert inputs.size_divisor == 32
    scale, strides = said["anchor"]["scales"][0], [pair[0] for pair in said["anchor"]["strides"]]
    assert [sizes[0] for sizes in head.anchors.sizes] == [scale * stride for stride in strides]
    assert list(head.anchors.strides or ()) == strides
    assert list(head.anchors.ratios) == said["anchor"]["ratios"]
    rpn, boxes = said["rpn_test"], said["rcnn_test"]
    assert (head.rpn.pre_nms_test, head.rpn.post_nms_test) == (rpn["nms_pre"], rpn["max_per_img"])
    assert head.rpn.nms_iou == rpn["nms"]["iou_threshold"]
    proposals = said["rpn"]["train_proposals"]
    assert (head.rpn.pre_nms_train, head.rpn.post_nms_train) == (proposals["nms_pre"], proposals["max_per_img"])
    assert head.box.min_score == boxes["score_thr"]
    assert head.box.nms_iou == boxes["nms"]["iou_threshold"]
    assert head.box.max_detections == boxes["max_per_img"]
    assert head.mask.threshold == boxes["mask_thr_binary"]
    assert [1 / w for w in head.box.weights] == pytest.approx(said["bbox_head"]["bbox_coder"]["stds"])
    assert head.roi.aligned == said["roi"]["aligned"]
    assert head.roi.sampling_ratio == said["roi"]["sampling_ratio"]
    assert head.roi.finest_size == said["roi"]["bbox_extractor"]["finest_scale"]
    assert head.fpn_channels == said["fpn"]["out_channels"]
    assert head.box.fc == said["bbox_head"]["fc_out"]
    assert head.mask.convs == (said["mask_head"]["conv_out"],) * said["mask_head"]["num_convs"]


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_schedules(name: str):
    train = recipe(name).train
    expected = {
        "coco_vit_adapter_t": (36, (27, 33), 1e-4, 0.05),
        "coco_vit_adapter_s": (36, (27, 33), 1e-4, 0.05),
        "coco_svit_adapter_t": (6, (4,), 1e-5, 1e-6),
        "coco_svit_adapter_s": (4, (3,), 1e-5, 1e-6),
    }[name]
    assert (train.epochs, train.step_epochs, train.lr, train.weight_decay) == expected
    assert train.batch_size == 16
    assert train.precision == "16-mixed"
    assert recipe(name).model.vit.drop_path_rate == (0.1 if name.endswith("t") else 0.2)


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("nuclei")])
def test_small_models_can_be_shipped(name: str):
    with torch.device("meta"):
        model = build(recipe(name).model)
    assert 2 * count(model) < 16e6, "bytes as float16"


@pytest.mark.parametrize("family", ["coco_{}_adapter_t", "coco_{}_adapter_s", "nuclei_{}"])
def test_sparse_differs_from_dense_in_its_policy_alone(family: str):
    dense, sparse = (on_meta(family.format(kind)).state_dict() for kind in ("vit", "svit"))
    extra = sparse.keys() - dense.keys()
    assert dense.keys() <= sparse.keys()
    assert all(name.startswith("backbone.policy.") for name in extra)
    assert all(dense[name].shape == sparse[name].shape for name in dense)


def test_nuclei_are_read(data_root: Path):
    train, val = open_data(recipe("nuclei_vit"))
    assert (len(train), len(val)) == (454, 108)
    image, target = train[0]
    assert image.shape[0] == 3
    assert target["masks"].shape[1:] == image.shape[1:]
    assert default_data_root() is not None


def test_data_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"gone: no such folder of data; give --data-root, or set SIEVIT_DATA"):
        open_data(recipe("nuclei_vit"))
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="nuclei"):
        open_data(recipe("nuclei_vit"))
