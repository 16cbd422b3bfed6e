"""The detector from images to results on their pixels, and the file that holds a model."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sievit
import sievit.vit.loop
from sievit.config import ConfigError
from sievit.models.build import Model, build, load, save
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import KeepAllConfig, RandomConfig, SViTConfig, build_policy
from sievit.vit.execution import Execution
from sievit.vit.executor import execute_run
from sievit.vit.model import _cubic, _linear, resize_weights
from tiny import (
    assert_same_weights,
    random_images,
    random_pixels,
    refused,
    tiny_detector,
    tiny_head,
    tiny_segmenter,
    tiny_vit,
    write_image,
)

ADAPTER = AdapterConfig(conv_inplane=8, deform_num_heads=2)


def tiny_config(**changes: Any) -> DetectorConfig:
    """Three classes, the last of them with ids that have holes, and gates that keep some tokens."""
    fields: dict[str, Any] = {
        "vit": tiny_vit(grid=(6, 6)),
        "policy": SViTConfig(first_block=1, targets=(0.7, 0.5, 0.3)),
        "head": tiny_head(box={"min_score": 0.1, "max_detections": 20}, rpn={"post_nms_test": 1000}),
        "input": InputConfig(min_size=96, max_size=160),
        "classes": ("ball", "box", "cone"),
        "category_ids": (1, 4, 9),
    }
    return tiny_detector(**{**fields, **changes})


@pytest.fixture
def model() -> Detector:
    return build(tiny_config()).eval()


@pytest.fixture(params=["detector", "segmenter"])
def any_model(request) -> Model:
    if request.param == "detector":
        return build(tiny_config()).eval()
    return build(tiny_segmenter(input=InputConfig(min_size=96, max_size=160))).eval()


def random_target(height: int, width: int) -> dict[str, Tensor]:
    boxes = torch.tensor([[4.0, 5.0, 40.0, 30.0], [20.0, 10.0, 50.0, 60.0]])
    return {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": torch.ones(2, height, width, dtype=torch.uint8)}


def assert_same(a: Any, b: Any) -> None:
    """Results of either kind, on tensors."""
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("neck", [PyramidConfig(out_channels=16), ADAPTER])
def test_training_reaches_every_parameter(neck) -> None:
    model = build(tiny_config(neck=neck)).train()
    output = model(random_images((80, 100), (64, 130)), [random_target(80, 100), random_target(64, 130)])
    assert output.detections == []
    assert output.sizes == [(80, 100), (64, 130)]
    assert output.image_size == (96, 160)
    expected = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    assert expected < output.losses.keys()  # the policy's are there too
    sum(output.losses.values()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_results_lie_on_the_image(model) -> None:
    images = random_images((60, 90), (200, 100))
    with torch.inference_mode():
        output = model(images)
    assert output.losses == {}
    assert output.sizes == [(96, 144), (160, 80)]  # short edge 96; long edge at most 160
    assert output.image_size == (160, 160)
    for image, found in zip(images, output.detections, strict=True):
        height, width = image.shape[1:]
        count = len(found["boxes"])
        assert 0 < count <= 20
        assert found["masks"].shape == (count, 1, height, width)
        assert found["masks"].dtype == torch.bool
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert (found["scores"].diff() <= 0).all()


def test_the_batch_changes_nothing(model) -> None:
    images = random_images((60, 90), (60, 90), (60, 90))
    assert_same(model.predict(images, batch_size=3), model.predict(images, batch_size=1))


def test_resizing_is_undone() -> None:
    model = build(tiny_config(input=InputConfig(min_size=None)))
    box = {"boxes": torch.tensor([[10.0, 20.0, 30.0, 60.0]]), "masks": torch.ones(1, 1, 28, 28)}
    found = model._on_image(box, (100, 200), (50, 400))
    assert found["boxes"].tolist() == [[20.0, 10.0, 60.0, 30.0]]
    rows, columns = found["masks"][0, 0].nonzero().unbind(1)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (10, 30, 20, 60)


@pytest.mark.parametrize(
    ("given", "seen"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1000), (400, 1333)), ((800, 1333), (800, 1333))],
)
def test_test_size_is_the_papers(given, seen) -> None:
    assert InputConfig().test_size(given) == seen


def test_predict_takes_every_kind_of_image(any_model, tmp_path) -> None:
    array = random_pixels(0, 50, 70, 3)
    path = write_image(tmp_path / "a.png", array)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    any_model.train()
    found = any_model.predict([path, str(path), Image.fromarray(array), array, tensor, tensor.float() / 255])
    assert any_model.training and any_model.policy.training
    for other in found[1:]:
        assert_same(found[0], other)
    assert (found[0]["masks"] if isinstance(found[0], dict) else found[0]).shape[-2:] == (50, 70)
    grey = any_model.predict([array[..., 0], Image.fromarray(array[..., 0])])
    assert_same(grey[:1], grey[1:])
    assert any_model.predict([]) == []


def test_predict_says_what_it_cannot_take(any_model) -> None:
    for image, message in [
        ("missing.png", "missing.png"),
        (np.zeros((4, 4, 3)), "must be uint8, not float64"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"\(h, w, 3\) or \(h, w\)"),
        (torch.zeros(1, 4, 4), r"\(3, h, w\)"),
        (torch.zeros(4, 4), "tensor must be"),
        (torch.zeros(3, 0, 4), "tensor must be"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "not torch.int64"),
        (None, "NoneType"),
    ]:
        refused(message, any_model.predict, [image])
    for images in ("a.png", torch.zeros(3, 40, 40)):
        refused("takes a list of images", any_model.predict, images)


def test_a_policy_for_one_call() -> None:
    model = build(tiny_config(policy=RandomConfig(first_block=1, shares=(0.5,)))).eval()
    dense = build_policy(KeepAllConfig(), embed_dim=16, depth=4)
    images = random_images((96, 96))
    with torch.inference_mode():
        assert model(images, policy=dense).trace.shares().min() == 1
        assert model(images).trace.shares().min() < 1


def test_classes_must_fit() -> None:
    refused("num_classes is 3, but there are 2 classes", replace, tiny_config(), classes=("a", "b"))


def test_round_trip(model, tmp_path) -> None:
    images = random_images((60, 90))
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert not again.training
    assert_same_weights(again, model)
    assert isinstance(again, Detector)
    assert_same(again.predict(images), model.predict(images))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_three_lines(model, tmp_path) -> None:
    write_image(tmp_path / "a.jpg", random_pixels(0, 40, 50, 3))
    sievit.save(model, tmp_path / "m.safetensors")
    assert len(sievit.load(str(tmp_path / "m.safetensors")).predict([str(tmp_path / "a.jpg")])) == 1
    assert set(sievit.__all__) <= set(dir(sievit))
    for name in sievit.__all__:
        assert getattr(sievit, name) is not None
    with pytest.raises(AttributeError, match="'lod'"):
        sievit.lod  # noqa: B018
    assert sievit.convert.adapter_backbone.__module__ == "sievit.convert.svit", "parts are found when they are used"


def test_half_precision_halves_the_file(tmp_path) -> None:
    model = build(tiny_config(neck=ADAPTER)).eval()
    save(model, tmp_path / "full.safetensors")
    save(model, tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size
    stored = load_file(tmp_path / "half.safetensors")
    assert stored["head.fpn.inner_blocks.0.0.weight"].dtype == torch.float16
    assert all(tensor.dtype != torch.float16 for name, tensor in stored.items() if "running" in name)
    for name, tensor in load(tmp_path / "half.safetensors").state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-3, rtol=1e-3)
    next(model.parameters()).data.fill_(1e6)
    refused("does not fit float16", save, model, tmp_path / "half.safetensors", half=True)


def test_matrices_of_8_bits_quarter_the_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sievit.hub.int8.LEAST", 64)
    path, again = tmp_path / "int8.safetensors", tmp_path / "again.safetensors"
    model = build(tiny_config(head=tiny_head(box={"fc": 512}))).eval()
    save(model, path, int8=True)
    save(model, tmp_path / "full.safetensors")
    assert path.stat().st_size < 0.3 * (tmp_path / "full.safetensors").stat().st_size
    stored, loaded, before = load_file(path), load(path), model.state_dict()
    small = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    assert small and not any(".policy." in name for name in small), "gates decide by a threshold"
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == before[name].dtype
        scale = stored.get(f"{name}.int8_scale", torch.tensor([1e-3])).max().item()
        torch.testing.assert_close(tensor, before[name], atol=0.51 * scale, rtol=1e-3)
    save(loaded, again, int8=True)
    for name, tensor in load(again).state_dict().items():
        torch.testing.assert_close(tensor, loaded.state_dict()[name], atol=0, rtol=1e-5)
    name = next(name for name in stored if name.endswith(".int8_scale"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for wrong in ({}, {name: stored[name][:-1]}):
        save_file({key: tensor for key, tensor in stored.items() if key != name} | wrong, again, metadata)
        refused(r"again\.safetensors: damaged: .* has no scale for each of its rows", load, again)


def test_another_policy(model, tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    save(model, path)
    assert load(path, policy="svit").config == model.config
    for policy in ("keep_all", RandomConfig(first_block=1, shares=(0.5,))):
        other = load(path, policy=policy)
        assert not list(other.policy.parameters())
        assert torch.equal(other.vit.get_parameter("pos_embed"), model.vit.get_parameter("pos_embed"))
    assert load(path, policy="keep_all").config.policy == KeepAllConfig()
    refused("'sviit'; did you mean 'svit'", load, path, policy="sviit")
    save(build(tiny_config(policy=KeepAllConfig())), tmp_path / "dense.safetensors")
    with pytest.raises(ConfigError, match="no weights for the policy 'svit'"):
        load(tmp_path / "dense.safetensors", policy=SViTConfig(first_block=1, targets=(0.5,)))


def test_a_run_folder(model, tmp_path) -> None:
    refused(r"neither model\.safetensors nor best\.safetensors nor last", load, tmp_path)
    save(model, tmp_path / "last.safetensors")
    assert_same_weights(load(tmp_path), model)
    best = build(tiny_config())
    save(best, tmp_path / "best.safetensors")
    assert_same_weights(load(tmp_path), best)


def test_answers_are_found_as_the_configuration_says(tmp_path, monkeypatch) -> None:
    """Losses are not."""
    own = Execution(mode="bucketed", attention="batched", precision="bfloat16")
    save(build(tiny_config(neck=ADAPTER, execution=own)), tmp_path / "m.safetensors")
    seen = set()

    def spy(run, tokens, execution, **options):
        seen.add((execution.mode, execution.attention, torch.is_autocast_enabled("cpu")))
        return execute_run(run, tokens, execution, **options)

    monkeypatch.setattr(sievit.vit.loop, "execute_run", spy)
    again = Detector.from_pretrained(tmp_path / "m.safetensors")
    again.predict(random_images((60, 90)))
    assert seen == {("bucketed", "batched", True)}
    seen.clear()
    again.train()([torch.rand(3, 64, 64)], [random_target(64, 64)])
    assert seen == {("auto", "auto", False)}


def test_files_that_are_no_model(model, tmp_path) -> None:
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    save(model, path)
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:size])
        refused(r"bad\.safetensors: damaged, cut short", load, bad)
    bad.write_bytes(b"\x80\x04pickled, perhaps" * 10)
    refused(r"bad\.safetensors: damaged", load, bad)
    refused(r"absent\.safetensors: no such file", load, tmp_path / "absent.safetensors")
    save_file({"x": torch.zeros(1)}, bad)
    refused("not one that sievit wrote", load, bad)


def test_weights_that_do_not_fit(model, tmp_path) -> None:
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    save(model, path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({k: v for k, v in tensors.items() if k != "backbone.vit.pos_embed"}, bad, metadata)
    refused(r"of another model; missing: backbone\.vit\.pos_embed$", load, bad)
    save_file({**tensors, "extra": torch.zeros(1)}, bad, metadata)
    refused("surplus: extra", load, bad)
    config = json.loads(metadata["config"])
    config["vit"]["embed_dim"] = 32
    save_file(tensors, bad, {**metadata, "config": json.dumps(config)})
    refused(r"of another shape: .* and \d+ more", load, bad)
    config["vit"]["embed_dims"] = config["vit"].pop("embed_dim")
    save_file(tensors, bad, {**metadata, "config": json.dumps(config)})
    refused(r"bad\.safetensors: .*unknown field 'embed_dims'; did you mean 'embed_dim'", load, bad)


@pytest.mark.parametrize(("mode", "antialias"), [("bilinear", True), ("bicubic", True), ("bicubic", False)])
@pytest.mark.parametrize("size", [(9, 14), (20, 31), (16, 24)])
def test_resizing_by_products_is_torchs(mode: str, antialias: bool, size: tuple[int, int]):
    """Smaller, larger, the same; in programs, for runtimes resize otherwise."""
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    kernel = _linear if mode == "bilinear" else partial(_cubic, a=-0.5 if antialias else -0.75)
    lines = zip(size, x.shape[2:], size, strict=True)
    down, across = (resize_weights(torch.tensor([own]), *line, kernel, antialias=antialias) for own, *line in lines)
    expected = F.interpolate(x, size, mode=mode, align_corners=False, antialias=antialias)
    torch.testing.assert_close(down @ x @ across.mT, expected, atol=1e-5, rtol=1e-5)
