"""Released checkpoints as whole models: every key has its place, what is known of them, and that they run."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sievit.config import ConfigError
from sievit.convert import adapter_backbone
from sievit.convert.family import FAMILIES, family
from sievit.convert.pth import Checkpoint
from sievit.data.scenes import generate
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.engine.train import train
from sievit.models.build import load, save
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig, SViTConfig
from sievit.recipes import recipe
from sievit.recipes.detectors import CATEGORY_IDS, CLASSES
from sievit.released import (
    DToPOptions,
    SegViTOptions,
    SViTOptions,
    ViTAdapterOptions,
    convert,
    detectors,
    segmenters,
)
from tiny import coco_data, count, refused

SMALL = SViTOptions(num_heads=4)
SEGMENTER: dict[str, Any] = {
    "num_heads": 4,
    "head_num_heads": 2,
    "out_indices": (1, 3, 5),
    "stride": 64,
    "mean": (127.5, 127.5, 127.5),
    "std": (127.5, 127.5, 127.5),
}
SEGMENTERS = {
    "prune_segvit_ade20k": "ade20k_segvit_b",
    "prune_segvit_ade20k_large": "ade20k_segvit_l",
    "prune_segvit_pc": "pascal_context_segvit_l",
    "prune_segvit_cocostuff10k": "coco_stuff10k_segvit_l",
}


@pytest.fixture(scope="module")
def svit_state(golden_root: Path) -> dict[str, Tensor]:
    backbone = load_file(golden_root / "svit" / "backbone_small.weights.safetensors")
    heads = load_file(golden_root / "svit" / "heads_small.weights_fp16.safetensors")
    return {**{f"backbone.{key}": value for key, value in backbone.items()}, **heads}


@pytest.fixture(scope="module")
def dtop_state(golden_root: Path) -> dict[str, Tensor]:
    return load_file(golden_root / "dtop" / "small_A_state.safetensors")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes."""
    path = tmp_path_factory.mktemp("names") / "classes.txt"
    path.write_text("".join(f"class {i}\n" for i in range(7)))
    return path


def written(state: dict[str, Tensor], folder: Path, **more: Any) -> Path:
    path = folder / "released.pth"
    torch.save({"state_dict": state, **more}, path)
    return path


def recorded(path: Path) -> Any:
    return json.loads(path.read_text())


def of_manifest(shapes: dict[str, Any]) -> Checkpoint:
    """A state dict of these names and shapes, without memory."""
    state = {}
    for key, entry in shapes.items():
        shape, dtype = (entry["shape"], entry["dtype"]) if isinstance(entry, dict) else (entry, "float32")
        state[key] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return Checkpoint(state)


@pytest.mark.parametrize("size", ["t", "s"])
@pytest.mark.parametrize("options", [SViTOptions, ViTAdapterOptions])
def test_every_key_of_a_released_detector_has_its_place(golden_root: Path, options: Any, size: str):
    kind = options.family
    manifest = recorded(golden_root / "svit" / f"manifest_{kind}_{'adapter_' * (kind == 'svit')}{size}.json")
    checkpoint = of_manifest(manifest["state_dict"])
    with torch.device("meta"):
        converted = detectors.assemble(checkpoint, options())
    model = converted.model
    assert converted.keys == {"svit": 482, "vit_adapter": 428}[kind] == len(model.state_dict())
    assert converted.dropped == {}
    config, expected = model.config, recipe(f"coco_{kind.removesuffix('_adapter')}_adapter_{size}").model
    assert isinstance(config, DetectorConfig) and isinstance(expected, DetectorConfig)
    head = detectors.release_limits(expected.head)
    eps = 1e-5 if kind == "svit" else 1e-6
    assert config == replace(expected, head=head, vit=replace(expected.vit, norm_eps=eps), padding="seen")
    assert (config.classes, config.category_ids) == (CLASSES, CATEGORY_IDS)


@pytest.mark.parametrize("options", [DToPOptions, SegViTOptions])
@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_key_of_a_released_segmenter_has_its_place(golden_root: Path, name: str, options: Any):
    kind = options.family
    manifest = recorded(golden_root / "dtop" / "key_manifest.json")[name]
    with torch.device("meta"):
        converted = segmenters.assemble(of_manifest(manifest["keys"]), options())
    config, expected = converted.model.config, recipe(SEGMENTERS[name] + "_dtop" * (kind == "dtop")).model
    assert isinstance(config, SegmenterConfig)
    assert config == expected
    dropped = [key for keys in converted.dropped.values() for key in keys]
    idle = [key for key in manifest["keys"] if key.endswith("empty_weight")]
    assert sorted(dropped) == sorted(["backbone.cls_token", *idle])
    assert len(converted.model.state_dict()) == manifest["n_keys"] - len(dropped)


def test_a_segvit_without_auxiliary_heads(golden_root: Path):
    manifest = recorded(golden_root / "dtop" / "key_manifest.json")["prune_segvit_ade20k"]
    checkpoint = of_manifest({k: v for k, v in manifest["keys"].items() if not k.startswith("auxiliary_head.")})
    with torch.device("meta"):
        config = segmenters.assemble(checkpoint, SegViTOptions()).model.config
        assert isinstance(config, SegmenterConfig)
        assert config.out_indices == (11,)
        refused(r"no auxiliary heads.*convert segvit", segmenters.assemble, checkpoint, DToPOptions())


def test_pascal_context_with_its_background(golden_root: Path):
    manifest = recorded(golden_root / "dtop" / "key_manifest.json")["prune_segvit_pc"]["keys"]
    shapes = {key: [60 if n == 59 else n for n in shape] for key, shape in manifest.items()}
    with torch.device("meta"):
        config = segmenters.assemble(of_manifest(shapes), DToPOptions()).model.config
    assert isinstance(config, SegmenterConfig)
    assert (len(config.classes), config.classes[0], len(config.palette)) == (60, "background", 60)
    assert config.crop == (480, 480)


def test_the_dense_backbone_equals_the_release(golden_root: Path):
    weights = load_file(golden_root / "svit" / "dense_small.weights_fp16.safetensors")
    cases = load_file(golden_root / "svit" / "dense_small_eval.safetensors")
    backbone = adapter_backbone(weights, num_heads=4)
    assert backbone.config.deform_num_heads == 4
    more = load_file(golden_root / "svit" / "backbone_small_eval.safetensors")
    for case in ("a", "b", "c"):
        images = cases.get(f"{case}/input", more[f"{case}/input"])
        with torch.inference_mode():
            features, _ = backbone(images)
        for i in range(4):
            torch.testing.assert_close(features[str(i)], cases[f"{case}/feat{i}"], atol=1e-4, rtol=0)


def test_a_small_dtop(dtop_state: dict[str, Tensor], names: Path, tmp_path: Path):
    path = written(dtop_state, tmp_path)
    converted = convert(path, DToPOptions(classes=names, thresholds=(0.5, 0.6), **SEGMENTER))
    config = converted.model.config
    assert isinstance(config, SegmenterConfig)
    assert config.policy == DToPConfig(thresholds=(0.5, 0.6))
    assert (config.crop, config.stride, config.vit.grid) == ((96, 96), (64, 64), (6, 6))
    assert (config.input.min_size, config.input.max_size, config.input.mean) == (96, 384, (0.5, 0.5, 0.5))
    assert config.classes[6] == "class 6"
    dense = convert(path, SegViTOptions(classes=names, **SEGMENTER)).model
    assert dense.config.policy == KeepAllConfig()
    save(dense, tmp_path / "dense.safetensors")
    pruned = load(tmp_path / "dense.safetensors", policy=DToPConfig(thresholds=(0.5, 0.6)))
    image = torch.rand(3, 80, 130)
    with torch.inference_mode():
        assert torch.equal(pruned([image]).labels[0], converted.model([image]).labels[0])


@pytest.mark.parametrize(
    ("changes", "thresholds", "words"),
    [
        ({"classes": None}, (0.9,), "has 7 classes.*--classes FILE.*--palette FILE"),
        ({"stride": None, "head_num_heads": None}, (0.9,), "also give --stride, --head-num-heads$"),
        ({"mean": None}, (0.9,), "also give --mean and --std$"),
        ({}, None, "also give --thresholds"),
        ({"head_num_heads": 3}, (0.9,), "multiple of num_heads"),
        ({"out_indices": (3, 5)}, (0.9,), "it has 3 heads"),
    ],
)
def test_what_no_recipe_knows_has_to_be_given(
    dtop_state: dict[str, Tensor], names: Path, tmp_path: Path, changes: Any, thresholds: Any, words: str
):
    options = replace(DToPOptions(classes=names, thresholds=thresholds, **SEGMENTER), **changes)
    with pytest.raises(ConfigError, match=words) as error:
        convert(written(dtop_state, tmp_path), options)
    assert "released.pth: " in str(error.value)


def test_classes_of_a_detector(svit_state: dict[str, Tensor], names: Path, tmp_path: Path):
    path = written(svit_state, tmp_path)
    refused(r"released\.pth: has 5 classes.*COCO's 80.*--annotations.*--classes", convert, path, SMALL)
    refused(r"has 5 classes, but .*classes\.txt names 7", convert, path, replace(SMALL, classes=names))
    coco = tmp_path / "instances.json"
    entries = [{"id": 2 * i + 1, "name": f"thing {i}"} for i in range(5)]
    coco.write_text(json.dumps({"images": [], "annotations": [], "categories": entries}))
    config = convert(path, replace(SMALL, annotations=coco)).model.config
    assert isinstance(config, DetectorConfig)
    assert (config.classes[4], config.category_ids) == ("thing 4", (1, 3, 5, 7, 9))
    refused("give one of them", convert, path, replace(SMALL, annotations=coco, classes=names))
    coco.write_text(json.dumps({"categories": entries[::-1]}))
    refused("do not rise", convert, path, replace(SMALL, annotations=coco))
    coco.write_text("[]")
    refused("holds a JSON list", convert, path, replace(SMALL, annotations=coco))


Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(key: str) -> Edit:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_key(key: str, *shape: int) -> Edit:
    return lambda state: {**state, key: torch.zeros(*shape)}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("backbone.blocks.3.TransformerEncoderLayer.norm1.weight"), r"missing: vit\.blocks\.3\.norm1\.weight"),
        (without("roi_head.mask_head.upsample.bias"), r"missing: roi_heads\.mask_predictor\.conv5_mask\.bias"),
        (without("backbone.pos_embed"), "pos_embed"),
        (with_key("backbone.blob", 1), "blob"),
        (with_key("roi_head.blob", 1), "blob"),
        (with_key("ema_backbone.up.bias", 1), r"ema_backbone\.up\.bias, which no released detector has"),
        (with_key("backbone.up.bias", 3), r"up\.bias \(3,\) instead of \(64,\)"),
        (with_key("rpn_head.rpn_cls.bias", 9), r"cls_logits\.bias \(9,\) instead of \(3,\)"),
        (with_key("backbone.pos_embed", 1, 200, 64), "no square grid"),
        (without("neck.lateral_convs.1.conv.bias"), r"missing: fpn\.inner_blocks\.1\.0\.bias"),
        (with_key("roi_head.bbox_head.fc_reg.weight", 4, 1024), "4 outputs where 5 classes"),
    ],
)
def test_a_detector_that_does_not_fit(svit_state: dict[str, Tensor], tmp_path: Path, edit: Edit, words: str):
    with pytest.raises(ConfigError, match=rf"released\.pth: .*{words}"):
        convert(written(edit(svit_state), tmp_path, meta={"CLASSES": tuple("abcde")}), SMALL)


def segvit(state: dict[str, Tensor], names: Path) -> Any:
    return segmenters.assemble(Checkpoint(state), SegViTOptions(classes=names, **SEGMENTER))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without("backbone.layers.3.ln1.weight"), r"missing: vit\.blocks\.3\.norm1\.weight"),
        (without("decode_head.class_embed.bias"), r"missing: heads\.2\.class_embed\.bias"),
        (without("backbone.pos_embed"), "pos_embed"),
        (without("auxiliary_head.0.q.weight"), r"heads\.0\.queries"),
        (without("backbone.patch_embed.projection.weight"), "patch_embed"),
        (with_key("blob", 1), "blob"),
        (with_key("backbone.blob", 1), "blob"),
        (with_key("decode_head.blob.weight", 1), "blob"),
        (with_key("backbone.layers.0.attn.attn.blob", 1), "blob"),
        (
            with_key("auxiliary_head.1.decoder.layers.3.norm1.weight", 32),
            r"surplus: heads\.1\.layers\.3\.norm1",
        ),
        (with_key("auxiliary_head.1.class_embed.bias", 3), r"heads\.1\.class_embed\.bias \(3,\) instead of \(2,\)"),
        (with_key("backbone.pos_embed", 1, 36, 64), "no square"),
    ],
)
def test_a_segmenter_that_does_not_fit(dtop_state: dict[str, Tensor], names: Path, edit: Edit, words: str):
    refused(words, segvit, edit(dtop_state), names)


def test_every_key_of_a_segmenter_is_needed(dtop_state: dict[str, Tensor], names: Path):
    """But for those that do nothing; of keys that differ in a number, the last one."""
    idle = {key for key in dtop_state if key.endswith("empty_weight")} | {"backbone.cls_token"}
    assert len(idle) == 4
    with torch.device("meta"):  # nothing is computed
        empty = {key: torch.empty(value.shape) for key, value in dtop_state.items()}
        segvit({key: value for key, value in empty.items() if key not in idle}, names)
        for key in {re.sub(r"\d+", "0", key): key for key in empty if key not in idle}.values():
            with pytest.raises(ConfigError):
                segvit(without(key)(empty), names)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 2, 2)])
@pytest.mark.parametrize(
    "key",
    [
        "backbone.pos_embed",
        "backbone.patch_embed.proj.weight",
        "backbone.level_embed",
        "backbone.spm.stem.0.weight",
        "backbone.selective_modules.0.mlp.fc1.weight",
        "backbone.interactions.0.extractor.ffn.fc1.weight",
        "backbone.blocks.0.TransformerEncoderLayer.linear1.weight",
        "neck.lateral_convs.0.conv.weight",
        "roi_head.bbox_head.fc_cls.weight",
        "roi_head.bbox_head.fc_cls.bias",
        "roi_head.mask_head.convs.0.conv.weight",
    ],
)
def test_odd_shapes_of_what_sizes_are_read_from(svit_state: dict[str, Tensor], key: str, shape: tuple[int, ...]):
    with pytest.raises(ConfigError):
        detectors.assemble(Checkpoint({**svit_state, key: torch.zeros(shape)}, tuple("abcde")), SMALL)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 2, 2)])
@pytest.mark.parametrize("key", ["decode_head.q", "backbone.pos_embed", "backbone.patch_embed.projection"])
def test_odd_shapes_of_a_segmenter(dtop_state: dict[str, Tensor], names: Path, key: str, shape: tuple[int, ...]):
    key = key if key.endswith("embed") else f"{key}.weight"
    with pytest.raises(ConfigError):
        segvit({**dtop_state, key: torch.zeros(shape)}, names)


@pytest.mark.parametrize("key", ["config", "cfg"])
def test_attention_inside_windows_is_refused(svit_state: dict[str, Tensor], tmp_path: Path, key: str):
    """The ViT-Adapter of other papers has it, and no key tells."""
    text = "model = dict(backbone=dict(window_attn=[\n    False, {}, False]))"
    for windows, wrong in (("True", True), ("False", False)):
        path = written(svit_state, tmp_path, meta={key: text.format(windows), "CLASSES": tuple("abcde")})
        if wrong:
            refused("attention inside windows", convert, path, SMALL)
        else:
            convert(path, SMALL)


@pytest.mark.parametrize("heads", [{"num_heads": 3}, {"num_heads": 4, "deform_num_heads": 5}])
def test_heads_that_do_not_divide(svit_state: dict[str, Tensor], tmp_path: Path, heads: Any):
    refused(r"released\.pth: .*num_heads", convert, written(svit_state, tmp_path), SViTOptions(**heads))


KEYS = {
    "svit": "backbone.selective_modules.0.mlp.fc1.weight",
    "vit_adapter": "backbone.interactions.0.injector.gamma",
    "segvit": "decode_head.q.weight",
    "timm": "patch_embed.proj.weight",
    "transformers": "embeddings.patch_embeddings.projection.weight",
    "sievit": "backbone.vit.patch_embed.proj.weight",
    "mmdet": "backbone.layer1.0.conv1.weight",
}


@pytest.mark.parametrize("options", [SViTOptions, ViTAdapterOptions, DToPOptions, SegViTOptions])
@pytest.mark.parametrize("found", [*KEYS, None])
def test_weights_of_another_family_are_refused_by_name(tmp_path: Path, options: Any, found: str | None):
    assert KEYS.keys() == FAMILIES.keys()
    state = {KEYS[found] if found else "something.else": torch.zeros(1)}
    assert family(state) == found
    if found == {"dtop": "segvit"}.get(options.family, options.family):
        return
    path = written(state, tmp_path)
    words = FAMILIES[found][1:] if found else ("is not ", "its keys are like something.else")
    with pytest.raises(ConfigError) as error:
        convert(path, options())
    assert str(error.value).startswith(f"{path}: ")
    assert all(word in str(error.value) for word in words)


def test_from_a_released_file_to_results(svit_state: dict[str, Tensor], tmp_path: Path, command: Callable[..., Any]):
    """The converted file runs in every command."""
    generate(tmp_path / "scenes", num_images=1, size=(64, 96), seed=3)
    images, annotations = tmp_path / "scenes" / "images", tmp_path / "scenes" / "annotations.json"
    content = json.loads(annotations.read_text())
    content["categories"] += [{"id": 90 + i, "name": f"more {i}"} for i in range(5)]
    content["categories"] = content["categories"][:5]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 5]
    annotations.write_text(json.dumps(content))
    released, out = written(svit_state, tmp_path), tmp_path / "new" / "model.safetensors"
    args = ["convert", "svit", released, "--out", out, "--num-heads", 4, "--annotations", annotations]
    figures = command(*args).figures
    assert (figures["keys"], figures["used"], figures["dropped"]) == (482, 482, {})
    assert "is there already" in command(*args, status=2).err
    command(*args, "--force", "--sample", True)
    assert load(out).config.policy == SViTConfig(sample=True)

    model = load(out)
    assert isinstance(model, Detector)
    head = model.config.head
    quick = replace(head, rpn=replace(head.rpn, post_nms_test=60), box=replace(head.box, max_detections=6))
    small = replace(model.config.input, min_size=96, max_size=160)
    config = replace(model.config, head=quick, input=small, policy=SViTConfig())
    model.config = config
    save(model, out)
    assert command("eval", out, "--images", images, "--annotations", annotations).figures["images"] == 1
    command("predict", out, images, "--out", tmp_path / "predicted")
    assert json.loads((tmp_path / "predicted" / "results.json").read_text())
    assert command("flops", out, "--images", images).figures["per_image"]["mean"] > 0

    data = coco_data(tmp_path, "scenes", "scenes")
    options = TrainConfig(steps=1, batch_size=1, init_from=out, workers=0, lr=1e-5)
    train(Recipe(model=config, data=data, train=options), out=tmp_path / "run")
    trained = load(tmp_path / "run")
    assert trained.config == config
    gates = "backbone.policy.gates.0.fc1.weight"
    torch.testing.assert_close(trained.state_dict()[gates], model.state_dict()[gates], atol=1e-3, rtol=0)


def test_a_folder_is_no_file_to_write(tmp_path: Path, command: Callable[..., Any]):
    assert "is a folder" in command("convert", "dtop", "x.pth", "--out", tmp_path, status=2).err
    printed = command("convert", "dtop", tmp_path / "x.pth", "--out", tmp_path / "y.safetensors", status=2)
    assert "x.pth: no such file" in printed.err


def test_init_writes_a_recipe_s_model(tmp_path: Path, command: Callable[..., Any]):
    out, same, other = (tmp_path / "new" / f"{name}.safetensors" for name in ("model", "same", "other"))
    figures = command("init", "nuclei_svit", "--out", out, "--seed", 3).figures
    model = load(out)
    assert model.config == recipe("nuclei_svit").model
    assert figures["parameters"] == count(model)
    assert "is there already" in command("init", "nuclei_svit", "--out", out, status=2).err
    command("init", "nuclei_svit", "--out", other)
    command("init", "nuclei_svit", "--out", same, "--seed", 3)
    gates = [load(path).state_dict()["backbone.policy.gates.0.fc1.weight"] for path in (out, same, other)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    assert "did you mean 'nuclei_svit'?" in command("init", "nuclei_svti", "--out", out, status=2).err
