"""Recipes on DINOv2 and DINOv3: their backbones are timm's, their weights load, and shrunken copies train."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from sievit.config import ConfigError
from sievit.convert import timm_config
from sievit.data.scenes import CLASSES, generate
from sievit.data.semantic import SemanticAugmentConfig
from sievit.data.transforms import AugmentConfig
from sievit.engine import train as engine
from sievit.engine.initial import start_vit_from
from sievit.engine.recipe import Recipe
from sievit.engine.train import train
from sievit.heads import ATMConfig
from sievit.models.build import build, load
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, SViTConfig
from sievit.recipes import recipe, recipes
from sievit.recipes.backbones import NAMES
from sievit.tasks.detection import CocoData
from sievit.tasks.segmentation import LabelsData
from sievit.vit import ViT, ViTConfig
from tiny import tiny_head

DINO = [name for name in recipes() if "_dino" in name]
SIZES = {
    "coco_dinov2_s": 48_188_421,
    "coco_dinov2_b": 120_954_837,
    "coco_dinov3_s": 47_719_173,
    "coco_dinov3_b": 120_016_341,
    "boxes_dinov2_s": 45_140_009,
    "ade20k_dinov2_b": 108_940_806,
    "ade20k_dinov3_b": 108_002_310,
    "folders_dinov2_s": 27_621_894,
}
MEASURES: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return build(config)


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


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str):
    model = on_meta(recipe(name).model)
    assert count(model) == SIZES[name]


def test_what_stands_around_a_backbone_is_the_papers():
    """ViT-Adapter-S without its backbone, and ViT-Adapter-B's 120.2 million weights (arXiv 2205.08534, table 1)."""
    ours, papers = on_meta(recipe("coco_dinov3_s").model), on_meta(recipe("coco_vit_adapter_s").model)
    assert count(ours) - count(ours.vit) == count(papers) - count(papers.vit)
    assert count(on_meta(recipe("coco_dinov3_b").model)) == pytest.approx(120.2e6, rel=0.01)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root / "train", num_images=4, size=(64, 64), seed=1)
    generate(root / "val", num_images=1, size=(64, 64), seed=2)
    return root


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


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("coco_dinov2_s", "vit_small_patch14_dinov2"), ("coco_dinov3_s", "vit_small_patch16_dinov3")],
)
def test_the_true_architectures_are_loaded(name: str, architecture: str, tmp_path: Path):
    """Every weight but those of the last norm, which the adapter does without."""
    source = timm.create_model(architecture, pretrained=False)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    vit = ViT(recipe(name).model.vit)
    start_vit_from(vit, tmp_path / "vit.pth")
    names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    ours, used = vit.state_dict(), set()
    for key, value in source.state_dict().items():
        parent, _, own = key.rpartition(".")
        key = f"{parent}.{names[own]}" if own in names else key
        if not key.startswith("norm."):
            assert torch.equal(ours[key], value), key
            used.add(key)
    assert used == set(ours)


def test_weights_of_another_family_are_refused(tmp_path: Path):
    two, three = (replace(recipe(f"coco_{family}_s").model.vit, **MEASURES) for family in ("dinov2", "dinov3"))
    for vit, architecture, words in (
        (two, "vit_small_patch16_dinov3", "missing: .*pos_embed; of another shape: patch_embed"),
        (three, "vit_small_patch14_dinov2", "missing: reg_token; surplus: .*pos_embed"),
        (two, "vit_small_patch16_224", r"missing: .*ls1\.gamma"),
    ):
        torch.save(small_timm(architecture).state_dict(), tmp_path / "vit.pth")
        with pytest.raises(ConfigError, match=rf"vit\.pth: not the recipe's ViT; {words}"):
            start_vit_from(ViT(vit), tmp_path / "vit.pth")


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


def test_without_a_network_a_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    vit = ViT(replace(recipe("coco_dinov2_s").model.vit, **MEASURES))
    with pytest.raises(ConfigError, match=r"timm:vit_small_patch14_dinov2\.lvd142m: .*train\.vit-from takes a FILE"):
        start_vit_from(vit, Path("timm:vit_small_patch14_dinov2.lvd142m"))
    with pytest.raises(ConfigError, match=r"timm:vit_smal: timm knows no model called 'vit_smal'"):
        start_vit_from(vit, Path("timm:vit_smal"))


def test_a_name_of_timm_is_no_path(scenes: Path, tmp_path: Path):
    chosen = shrunken(recipe("boxes_dinov2_s"), scenes, Path("timm:vit_small_patch14_dinov2.lvd142m"))
    assert engine._resolved(chosen).train.vit_from == chosen.train.vit_from
    file = shrunken(recipe("boxes_dinov2_s"), scenes, Path("vit.pth"))
    assert engine._resolved(file).train.vit_from == Path.cwd() / "vit.pth"
