"""Every recipe, and the papers' constants in theirs; those on DINO have timm's backbones, and shrunken copies train."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed

from sievit.config import ConfigError, from_json, kind_of, to_json
from sievit.convert import timm_config
from sievit.data.presets import preset
from sievit.data.scenes import CLASSES
from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine import train as engine
from sievit.engine.initial import start_vit_from
from sievit.engine.recipe import Recipe, default_data_root, open_data, with_classes
from sievit.engine.train import train
from sievit.heads import ATMConfig, SETRNaiveConfig
from sievit.measure.costs import costs
from sievit.models.build import load
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, KeepAllConfig, SViTConfig
from sievit.recipes import recipe, recipes
from sievit.recipes.common import NAMES
from sievit.tasks.detection import CocoData
from sievit.tasks.segmentation import LabelsData
from sievit.vit import ViT, ViTConfig
from tiny import count, on_meta, refused, tiny_head

PAPERS = ("coco_vit_adapter_t", "coco_vit_adapter_s", "coco_svit_adapter_t", "coco_svit_adapter_s")


DETECTORS = [name for name in recipes() if isinstance(recipe(name).model, DetectorConfig)]


def detector_config(name: str) -> DetectorConfig:
    config = recipe(name).model
    assert isinstance(config, DetectorConfig)
    return config


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
    model = on_meta(detector_config(name))
    assert len(model.config.classes) == model.config.head.num_classes
    gates = sum("gates" in key and key.endswith("fc1.weight") for key in model.state_dict())
    per_stage = getattr(chosen.model.policy, "per_stage", False)
    assert gates == (3 if per_stage else 9 if "svit" in name else 0)
    assert per_stage == (name in ("facade_svit", "facade_adapter_svit"))


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
    model, config = on_meta(detector_config(name)), detector_config(name)
    class_position = config.vit.embed_dim
    background = 4 * (config.head.box.fc + 1) + config.head.mask.deconv + 1
    assert count(model.backbone) == backbone - class_position
    assert count(model) == detector - class_position + background


def test_the_papers_settings(golden_svit: Path):
    """What mmdet reported when it built SViT-Adapter-T."""
    said = json.loads((golden_svit / "settings_mask_rcnn.json").read_text())
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
    assert 2 * count(on_meta(recipe(name).model)) < 16e6, "bytes as float16"


def test_nuclei_are_read(data_root: Path):
    train, val = open_data(recipe("nuclei_vit"))
    assert (len(train), len(val)) == (454, 108)
    image, target = train[0]
    assert image.shape[0] == 3
    assert target["masks"].shape[1:] == image.shape[1:]
    assert default_data_root() is not None


def test_photographs_are_read(data_root: Path):
    for name in ("facade_vit", "facade_setr"):
        train, val = open_data(recipe(name))
        assert (len(train), len(val)) == (418, 90)
        assert train[0][0].shape == (3, *getattr(recipe(name).data, "augment").crop)  # noqa: B009


def test_data_and_recipes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path / "gone"))
    refused(r"gone: no such folder of data; give --data-root, or set SIEVIT_DATA", open_data, recipe("nuclei_vit"))
    monkeypatch.setenv("SIEVIT_DATA", str(tmp_path))
    refused("nuclei", open_data, recipe("nuclei_vit"))

    refused("did you mean 'coco_svit_adapter_t'", recipe, "coco_svit_adaptor_t")


# Of segmenters.


SEGVITS = {
    "ade20k_segvit_b": "ade20k",
    "ade20k_segvit_l": "ade20k_large",
    "pascal_context_segvit_l": "pc",
    "coco_stuff10k_segvit_l": "cocostuff10k",
}
SEGMENTERS = [name for name in recipes() if isinstance(recipe(name).model, SegmenterConfig)]
PRUNED = [name for name in SEGMENTERS if name.removesuffix("_dtop") in SEGMENTERS and name.endswith("_dtop")]


def parts(name: str) -> tuple[Recipe, SegmenterConfig, LabelsData]:
    """A recipe, its model and its data."""
    chosen = recipe(name)
    assert isinstance(chosen.model, SegmenterConfig) and isinstance(chosen.data, LabelsData)
    return chosen, chosen.model, chosen.data


def steps_of(pipeline: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {step["type"]: step for step in pipeline}


def compare(name: str, said: dict[str, Any]) -> None:
    """Everything that a released configuration and a recipe both say."""
    chosen, model, data = parts(name)
    train, augment = chosen.train, data.augment
    vit, backbone, head = model.vit, said["backbone"], said["decode_head"]
    assert [vit.embed_dim, vit.depth, vit.num_heads, vit.patch_size, vit.drop_path_rate, vit.norm_eps] == [
        backbone[key] for key in ("embed_dims", "num_layers", "num_heads", "patch_size", "drop_path_rate")
    ] + [backbone["norm_cfg"]["eps"]]
    assert [16 * side for side in vit.grid] == backbone["img_size"]
    assert (vit.class_token, vit.final_norm) == (backbone["with_cls_token"], backbone["final_norm"])
    assert list(model.out_indices) == said["out_indices"]
    assert isinstance(model.head, ATMConfig)
    assert [model.head.num_heads] * 3 == said["effective_head_num_heads"]
    assert (model.head.channels, model.head.num_layers) == (head["channels"], head["layers_per_decoder"])
    assert len(model.classes) == len(model.palette) == head["num_classes"] == backbone["num_classes"]
    assert model.aux_weight == 1.0
    if isinstance(model.policy, DToPConfig):
        assert list(model.policy.per_stage(3)) == said["thresholds_by_stage"]
    else:
        assert said["thresholds_by_stage"] == [1.0, 1.0, 1.0]
    assert list(model.crop or ()) == said["test_cfg"]["crop_size"] == said["data_preprocessor"]["size"]
    assert list(model.stride or ()) == said["test_cfg"]["stride"]
    assert [255 * x for x in model.input.mean] == pytest.approx(said["data_preprocessor"]["mean"])
    assert [255 * x for x in model.input.std] == pytest.approx(said["data_preprocessor"]["std"])
    assert model.ignore_index == said["data_preprocessor"]["seg_pad_val"]
    test = steps_of(said["test_dataloader"]["dataset"]["pipeline"])
    assert [model.input.max_size, model.input.min_size] == test["Resize"]["scale"]

    wrapped, schedule = said["optim_wrapper"], {part["type"]: part for part in said["param_scheduler"]}
    assert (train.lr, train.weight_decay) == (wrapped["optimizer"]["lr"], wrapped["optimizer"]["weight_decay"])
    assert train.head_lr == wrapped["paramwise_cfg"]["custom_keys"]["head"]["lr_mult"]
    assert train.decay_norms, "nothing is exempted"
    assert train.clip_norm is wrapped["clip_grad"]
    assert (train.schedule, schedule["PolyLR"]["power"], schedule["PolyLR"]["eta_min"]) == ("poly", 0.9, 0.0)
    assert train.steps == schedule["PolyLR"]["end"]
    assert (train.warmup_steps, train.warmup_start) == (
        schedule["LinearLR"]["end"],
        schedule["LinearLR"]["start_factor"],
    )
    assert train.batch_size == 4 * said["train_dataloader"]["batch_size"], "on four GPUs"

    pipeline = steps_of(said["train_dataloader"]["dataset"]["pipeline"])
    assert augment.base == tuple(reversed(pipeline["RandomResize"]["scale"]))
    assert list(augment.ratio_range) == pipeline["RandomResize"]["ratio_range"]
    assert list(augment.crop or ()) == pipeline["RandomCrop"]["crop_size"]
    assert augment.cat_max_ratio == pipeline["RandomCrop"]["cat_max_ratio"]
    assert augment.flip == pipeline["RandomFlip"]["prob"]
    assert augment.photometric and "PhotoMetricDistortion" in pipeline
    assert data.zero_is_ignored == pipeline["LoadAnnotations"]["reduce_zero_label"]
    for part, loader in (("train", "train_dataloader"), ("val", "test_dataloader")):
        dataset = said[loader]["dataset"]
        where = (getattr(data, f"{part}_images"), getattr(data, f"{part}_labels"))
        prefix = dataset["data_prefix"]
        assert tuple(str(Path(*path.parts[1:])) for path in where) == (prefix["img_path"], prefix["seg_map_path"])
        names = getattr(data, f"{part}_names")
        assert (None if names is None else str(Path(*names.parts[1:]))) == dataset.get("ann_file")


@pytest.mark.parametrize("name", SEGVITS)
def test_the_papers_settings_of_segmenters(name: str, golden_dtop: Path):
    settings = json.loads((golden_dtop / "settings.json").read_text())
    compare(name, settings[f"BASE_segvit_{SEGVITS[name]}"])
    compare(f"{name}_dtop", settings[f"prune_segvit_{SEGVITS[name]}"])
    counted = json.loads((golden_dtop / "flops.json").read_text())["encode_decode_dense"]
    total = counted[f"prune_segvit_{SEGVITS[name]}_dense_encode_decode"]["total"]
    assert costs(recipe(name).model)["gflops"] == pytest.approx(total / 1e9, abs=1e-6), "by the papers' tool"
    constants = settings["_code_constants"]
    head, policy = recipe(name).model, recipe(f"{name}_dtop").model.policy
    assert isinstance(head, SegmenterConfig) and isinstance(head.head, ATMConfig) and isinstance(policy, DToPConfig)
    loss = head.head.loss
    assert (loss.class_weight, loss.mask_weight, loss.dice_weight, loss.no_object, loss.alpha, loss.gamma) == tuple(
        constants["loss"][key]
        for key in ("cls_weight", "mask_weight", "dice_weight", "eos_coef", "focal_alpha", "focal_gamma")
    )
    assert head.head.dropout == constants["head_dropout"] == constants["head_cross_attn_drop"]
    assert policy.keep_per_class == constants["keep_per_class"]
    assert (policy.grade, policy.preserve, policy.rejoin) == ("max", False, False)


@pytest.mark.parametrize(
    ("name", "published", "within"),
    [
        ("ade20k_segvit_b", 109.860705, 0),
        ("ade20k_segvit_l", 616.977024, 0),
        ("pascal_context_segvit_l", 315.356311, 0),
        ("coco_stuff10k_segvit_l", 366.857517, 0),
        ("ade20k_setr_b", 107.7, 5e-3),
    ],
)
def test_the_papers_gflops(name: str, published: float, within: float):
    _, model, _ = parts(name)
    assert model.crop is not None
    assert costs(model, size=model.crop)["gflops"] == pytest.approx(published, rel=within)


def test_setr():
    _, dense, _ = parts("ade20k_setr_b")
    chosen, pruned, _ = parts("ade20k_setr_b_dtop")
    assert dense.head == SETRNaiveConfig(channels=256)
    assert pruned.policy == DToPConfig(thresholds=(0.98,), keep_per_class=5)
    assert (dense.vit, chosen.train.steps) == (parts("ade20k_segvit_b")[1].vit, 40_000)


PAIRS: list[tuple[str, str]] = [
    (name.format("vit"), name.format("svit")) for name in ("coco_{}_adapter_t", "coco_{}_adapter_s", "nuclei_{}")
]
PAIRS += [(name.removesuffix("_dtop"), name) for name in PRUNED]


@pytest.mark.parametrize(("dense", "sparse"), PAIRS)
def test_sparse_differs_from_dense_in_its_policy_and_its_start(dense: str, sparse: str):
    one, other = recipe(dense), recipe(sparse)
    assert one.model.policy == KeepAllConfig() != other.model.policy
    assert other.train.init_from == Path("runs") / dense
    assert one.data == other.data
    of_dense, of_sparse = (on_meta(chosen.model).state_dict() for chosen in (one, other))
    extra = of_sparse.keys() - of_dense.keys()
    assert all(name.startswith("backbone.policy.") for name in extra)
    assert {name: value.shape for name, value in of_sparse.items() if name not in extra} == {
        name: value.shape for name, value in of_dense.items()
    }


def test_folders_take_any_images_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for kind, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / kind / part).mkdir(parents=True)
            Image.new(mode, (40, 30), 4 if mode == "L" else (9, 8, 7)).save(tmp_path / kind / part / "a.png")
    train, val = open_data(with_classes(recipe("folders_segvit_s"), num_classes=5, ignore_index=7))
    assert (len(train), len(val)) == (1, 1)
    assert val[0][1]["labels"].unique().tolist() == [4]
    assert train.classes[4] == "class 4"


@pytest.mark.parametrize(
    ("name", "data"), [("ade20k_segvit_b", "ade20k"), ("pascal_context_segvit_l", "pascal_context59")]
)
def test_names_and_colours_are_the_data_sets(name: str, data: str):
    _, model, labels = parts(name)
    assert (model.classes, model.palette) == (preset(data).classes, preset(data).palette)
    assert (labels.image_suffix, labels.label_suffix) == (".jpg", ".png")


# On DINOv2 and DINOv3.


DINO = [name for name in recipes() if "_dino" in name]
MEASURES: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2}


@pytest.mark.parametrize(("vit", "name"), NAMES.items(), ids=NAMES.values())
def test_backbones_are_what_timm_makes(vit: ViTConfig, name: str):
    assert replace(vit, final_norm=True) == timm_config(name)
    with torch.device("meta"):
        ours, theirs = ViT(vit), timm.create_model(name)
    assert count(ours) == count(theirs) - 2 * vit.embed_dim, "all but the last norm"


@pytest.mark.parametrize("name", DINO)
def test_recipes_are_of_their_family(name: str):
    chosen = recipe(name)
    vit, dense = chosen.model.vit, not name.endswith(("_svit", "_dtop"))
    own = replace(vit, token_stride=None, drop_path_rate=0.0)
    _, family, size = name.split("_")[:3]
    assert on_meta(chosen.model).config == chosen.model, "it can be built"
    weights = {"s": "vit_small_", "b": "vit_base_"}[size]
    weights += {"dinov2": "patch14_dinov2.lvd142m", "dinov3": "patch16_dinov3.lvd1689m"}[family]
    [theirs] = [known for of, known in NAMES.items() if replace(of, grid=own.grid) == own]
    assert theirs == weights
    assert own.pos_embed == "none" or own.grid == (37, 37)
    assert chosen.train.layer_decay == 0.8
    assert chosen.train.freeze == "none"
    if dense:
        assert (chosen.train.vit_from, chosen.train.init_from) == (Path(f"timm:{weights}"), None)
    else:
        assert (chosen.train.vit_from, chosen.train.init_from) == (None, Path("runs") / name.rpartition("_")[0])
    if isinstance(chosen.model, DetectorConfig):
        assert vit.stride == 16, "the adapter's"
        assert isinstance(chosen.model.policy, SViTConfig) == name.endswith("_svit")
    else:
        assert isinstance(chosen.model, SegmenterConfig)
        assert chosen.model.crop is not None and isinstance(chosen.data, LabelsData)
        assert chosen.data.augment.crop == chosen.model.crop
        assert all(side % vit.patch_size == 0 for side in chosen.model.crop)
        assert isinstance(chosen.model.policy, DToPConfig) == name.endswith("_dtop")


def test_what_stands_around_a_backbone_is_the_papers():
    """ViT-Adapter-S without its backbone, and ViT-Adapter-B's 120.2 million weights (arXiv 2205.08534, table 1)."""
    ours, papers = on_meta(recipe("coco_dinov3_s").model), on_meta(recipe("coco_vit_adapter_s").model)
    assert count(ours) - count(ours.vit) == count(papers) - count(papers.vit)
    assert count(on_meta(recipe("coco_dinov3_b").model)) == pytest.approx(120.2e6, rel=0.01)


@pytest.fixture(scope="module")
def scenes(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(4, (64, 64), val=1)


def small_timm(name: str) -> torch.nn.Module:
    """timm's architecture, narrow and shallow, with random weights in every place."""
    pixels = 5 * (14 if "patch14" in name else 16)
    torch.manual_seed(7)
    model = timm.create_model(name.partition(".")[0], pretrained=False, img_size=pixels, **MEASURES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def shrunken(chosen: Recipe, root: Path, weights: Path) -> Recipe:
    """A copy that trains two steps in a second; its positions are stored for another grid than those of the weights."""
    model, size = chosen.model, chosen.model.vit.stride * 4
    vit = replace(model.vit, grid=(4, 4), **MEASURES)
    shrunken: DetectorConfig | SegmenterConfig
    data: CocoData | LabelsData
    if isinstance(model, DetectorConfig):
        policy = SViTConfig(first_block=1, targets=(0.5,)) if isinstance(model.policy, SViTConfig) else model.policy
        head = tiny_head(num_classes=model.head.num_classes, with_masks=model.head.with_masks)
        neck = AdapterConfig(conv_inplane=4, deform_num_heads=2, num_interactions=2)
        inputs = InputConfig(min_size=size, max_size=size)
        shrunken = replace(model, vit=vit, policy=policy, neck=neck, head=head, input=inputs)
        assert isinstance(chosen.data, CocoData)
        listings = {f"{part}_annotations": Path(part, "annotations.json") for part in ("train", "val")}
        augment = AugmentConfig(scales=(size,), crop=(size, size))
        data = replace(chosen.data, augment=augment, own_classes=True, **listings)
    else:
        assert isinstance(model, SegmenterConfig) and isinstance(chosen.data, LabelsData)
        shrunken = replace(
            model,
            vit=vit,
            head=ATMConfig(channels=8, num_heads=2, num_layers=2),
            out_indices=(1, 3),
            crop=(size, size),
            stride=(size, size),
            input=InputConfig(min_size=size, max_size=2 * size, size_divisor=vit.patch_size),
            classes=("ground", *CLASSES),
            palette=(),
        )
        folders = {"train_labels": Path("train/labels"), "val_labels": Path("val/labels")}
        augment = SemanticAugmentConfig(scales=(size,), crop=(size, size))
        files = {"image_suffix": None, "label_suffix": None, "zero_is_ignored": False, "values": None}
        data = replace(chosen.data, augment=augment, **folders, **files)
    data = replace(data, root=root, train_images=Path("train/images"), val_images=Path("val/images"))
    start = replace(chosen.train, steps=2, batch_size=2, warmup_steps=0, workers=0, init_from=None, vit_from=weights)
    return replace(chosen, model=shrunken, data=data, train=start)


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("coco_dinov2_s_svit", "none"),
        ("coco_dinov3_s", 1),
        ("coco_dinov3_b_svit", "vit"),
        ("boxes_dinov2_s", "vit"),
        ("ade20k_dinov2_b", "none"),
        ("ade20k_dinov3_b_dtop", 2),
        ("folders_dinov2_s_dtop", "vit"),
    ],
)
def test_shrunken_copies_train(name: str, frozen: Any, scenes: Path, tmp_path: Path):
    family = "vit_small_patch14_dinov2" if "dinov2" in name else "vit_small_patch16_dinov3"
    source = small_timm(family)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    chosen = shrunken(recipe(name), scenes, tmp_path / "vit.pth")
    chosen = replace(chosen, train=replace(chosen.train, freeze=frozen))
    figures = train(chosen, out=tmp_path / "run")
    assert "box_ap" in figures or "miou" in figures
    model = load(tmp_path / "run")
    expected = CLASSES if isinstance(chosen.model, DetectorConfig) else ("ground", *CLASSES)
    assert model.config.classes == expected
    theirs, ours = source.state_dict(), model.vit.state_dict()
    kept = {key: torch.equal(ours[key], theirs[key]) for key in ours if key.endswith("qkv.weight")}
    first = {"none": 0, "vit": 4}.get(frozen, frozen)
    assert list(kept.values()) == [i < first for i in range(4)]
    assert sorted(key for key in ours if key not in theirs) == sorted(
        f"blocks.{i}.ls{j}.gamma" for i in range(4) for j in (1, 2) if "dinov3" in name
    ), "timm's names"


def test_weights_of_another_family_are_refused(tmp_path: Path):
    two, three = (replace(recipe(f"coco_{family}_s").model.vit, **MEASURES) for family in ("dinov2", "dinov3"))
    for vit, architecture, words in (
        (two, "vit_small_patch16_dinov3", "missing: .*pos_embed; of another shape: patch_embed"),
        (three, "vit_small_patch14_dinov2", "missing: reg_token; surplus: .*pos_embed"),
        (two, "vit_small_patch16_224", r"missing: .*ls1\.gamma"),
    ):
        torch.save(small_timm(architecture).state_dict(), tmp_path / "vit.pth")
        refused(rf"vit\.pth: not the recipe's ViT; {words}", start_vit_from, ViT(vit), tmp_path / "vit.pth")


def test_weights_come_by_timms_download(monkeypatch: pytest.MonkeyPatch):
    """timm stands in for its own hub: what it makes for the name, positions resized, is what the ViT starts from."""
    asked = []

    def create(name: str, *, pretrained: bool, **_: Any) -> torch.nn.Module:
        asked.append((name, pretrained))
        return source

    source: Any = small_timm("vit_small_patch14_dinov2")
    vit = ViT(replace(recipe("coco_dinov2_s").model.vit, grid=(4, 7), **MEASURES))
    with monkeypatch.context() as patched:
        patched.setattr(timm, "create_model", create)
        start_vit_from(vit, Path("timm:vit_small_patch14_dinov2.lvd142m"))
        assert asked == [("vit_small_patch14_dinov2.lvd142m", True)]
        other = ViT(replace(recipe("coco_dinov3_s").model.vit, **MEASURES))
        with pytest.raises(ConfigError, match=r"not the recipe's ViT: its patch_size 14, not 16; its qkv_bias True"):
            start_vit_from(other, Path("timm:vit_small_patch14_dinov2.lvd142m"))
    assert torch.equal(vit.blocks[3].get_parameter("mlp.fc2.weight"), source.blocks[3].mlp.fc2.weight)
    expected = resample_abs_pos_embed(source.pos_embed, (4, 7), num_prefix_tokens=1)
    assert torch.allclose(vit.get_parameter("pos_embed"), expected, atol=1e-6)


def test_a_name_of_timm_is_no_path_and_needs_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenes: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    vit = ViT(replace(recipe("coco_dinov2_s").model.vit, **MEASURES))
    with pytest.raises(ConfigError, match=r"timm:vit_small_patch14_dinov2\.lvd142m: .*train\.vit-from takes a FILE"):
        start_vit_from(vit, Path("timm:vit_small_patch14_dinov2.lvd142m"))
    refused(r"timm:vit_smal: timm knows no model called 'vit_smal'", start_vit_from, vit, Path("timm:vit_smal"))

    chosen = shrunken(recipe("boxes_dinov2_s"), scenes, Path("timm:vit_small_patch14_dinov2.lvd142m"))
    assert engine._resolved(chosen).train.vit_from == chosen.train.vit_from
    file = shrunken(recipe("boxes_dinov2_s"), scenes, Path("vit.pth"))
    assert engine._resolved(file).train.vit_from == Path.cwd() / "vit.pth"
