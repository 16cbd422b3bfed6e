"""The recipes of segmenters, and the papers' constants in theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sievit.data.presets import preset
from sievit.engine.recipe import Recipe, open_data, with_classes
from sievit.heads import ATMConfig, SETRNaiveConfig
from sievit.measure.costs import costs
from sievit.models.build import build
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.recipes import recipe, recipes
from sievit.tasks.segmentation import LabelsData

PAPERS = {
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


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_settings(name: str, golden_root: Path):
    settings = json.loads((golden_root / "dtop" / "settings.json").read_text())
    compare(name, settings[f"BASE_segvit_{PAPERS[name]}"])
    compare(f"{name}_dtop", settings[f"prune_segvit_{PAPERS[name]}"])
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
        ("ade20k_segvit_b", 109.9, 1e-3),
        ("ade20k_segvit_l", 617.0, 1e-3),
        ("pascal_context_segvit_l", 315.4, 1e-3),
        ("coco_stuff10k_segvit_l", 366.9, 1e-3),
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


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_differs_from_dense_in_its_policy_and_its_start(name: str):
    dense, pruned = recipe(name.removesuffix("_dtop")), recipe(name)
    assert dense.model.policy == KeepAllConfig()
    assert isinstance(pruned.model.policy, DToPConfig)
    assert pruned.train.init_from == Path("runs") / name.removesuffix("_dtop")
    assert dense.data == pruned.data
    with torch.device("meta"):
        states = [build(chosen.model).state_dict() for chosen in (dense, pruned)]
    assert {key: value.shape for key, value in states[0].items()} == {k: v.shape for k, v in states[1].items()}


@pytest.mark.parametrize("name", PAPERS)
def test_sizes_are_those_of_the_released_models(name: str, golden_root: Path):
    """Less the class token and its position, which they keep and never use."""
    released = json.loads((golden_root / "dtop" / "key_manifest.json").read_text())[f"prune_segvit_{PAPERS[name]}"]
    with torch.device("meta"):
        model = build(recipe(name).model)
    width = recipe(name).model.vit.embed_dim
    assert sum(parameter.numel() for parameter in model.parameters()) == released["n_params"] - 2 * width


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
