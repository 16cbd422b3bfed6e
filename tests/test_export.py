"""Exported files give the model's answers in a runtime of their own, and compute no token that is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sievit.config import ConfigError
from sievit.export.program import program
from sievit.models.base import Model
from sievit.models.build import load
from sievit.models.inputs import InputConfig
from sievit.policies import DToPConfig, EViTConfig, KeepAllConfig, PolicyConfig, SViTConfig
from tiny import refused, saved, tiny_detector, tiny_segmenter, tiny_vit

pytest.importorskip("onnxruntime", reason="files of ONNX need the packages of sievit[export]")

POLICIES: dict[str, PolicyConfig] = {  # with choices from gates and from heads
    "svit": SViTConfig(first_block=1, targets=(0.6,)),
    "dtop": DToPConfig(thresholds=(0.26,), keep_per_class=1),
}
INPUT = InputConfig(min_size=64, max_size=128, size_divisor=8)


def segmenter(policy: PolicyConfig, path: Path) -> Path:
    from sievit.heads import SETRNaiveConfig

    vit = tiny_vit(grid=(6, 6), depth=3, patch_size=8, class_token=True, pos_antialias=False)
    config = tiny_segmenter(
        vit=vit, policy=policy, input=INPUT, out_indices=(0, 1, 2), head=SETRNaiveConfig(channels=8)
    )
    return saved(config, path)


@pytest.fixture(scope="module")
def scenes(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(3, (64, 80))


@pytest.fixture(scope="module", params=["dtop"])
def pair(
    request: pytest.FixtureRequest, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint, the file that was exported from it, and the figures of the command."""
    from sievit.export import export

    root = tmp_path_factory.mktemp(request.param)
    checkpoint = segmenter(POLICIES[request.param], root / "model.safetensors")
    figures = export(checkpoint, images=scenes / "images", out=root / "model.onnx", number=2)
    return checkpoint, root / "model.onnx", figures


def test_the_file_answers_as_the_model_does_at_every_size_and_batch(pair) -> None:
    eager, file = load(pair[0]), load(pair[1])
    assert file.config.classes == eager.config.classes and pair[2]["agree"] == 1
    generator, less = torch.Generator().manual_seed(0), 0
    for sizes in ([(64, 80)], [(64, 64)] * 4, [(96, 64), (64, 96)], [(70, 90), (64, 64), (128, 64)]):
        images = [torch.rand(3, *size, generator=generator) for size in sizes]
        with torch.inference_mode():
            expected, got = eager(images), file(images)
        for a, b in zip(expected.results, got.results, strict=True):
            assert (a == b).float().mean() > 0.999
        assert torch.equal(expected.trace.counts(), got.trace.counts())
        assert torch.equal(expected.trace.valid, got.trace.valid)
        torch.testing.assert_close(eager.gflops(expected), file.gflops(got))
        for name, value in eager.policy.report(expected.trace).items():
            assert torch.equal(value, file.policy.report(got.trace)[name])
        less += int((expected.trace.shares() < 1).sum())
    assert less, "the policy of this test leaves something out"


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_program_computes_the_tokens_that_take_part_alone(name: str, tmp_path: Path) -> None:
    model = load(segmenter(POLICIES[name], tmp_path / "model.safetensors"))
    call = program(model)[0].module()
    for images in (torch.rand(1, 3, 64, 80), torch.rand(3, 3, 96, 64)):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            scores, keep, *_ = call(images)
        with torch.inference_mode(), FlopCounterMode(display=False) as own:
            expected, trace = model.network(images)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(keep, torch.stack(trace.keep, dim=1)) and not keep.all()
        assert len(images) > 1 or counter.get_total_flops() == own.get_total_flops()


def test_commands_take_the_file_like_a_checkpoint(pair, scenes, command, tmp_path) -> None:
    found = {}
    for name, model in (("model", pair[0]), ("file", pair[1])):
        out = tmp_path / name
        command("predict", model, scenes / "images", "--out", out)
        evaluated = command("eval", model, "--images", scenes / "images", "--labels", scenes / "labels").figures
        pictures = {path.name: path.read_bytes() for path in sorted(out.rglob("*.png"))}
        keys = ("miou", "pixel_accuracy", "gflops", "keep", "images")
        found[name] = ({key: evaluated[key] for key in keys}, sorted(pictures))
    assert found["model"] == found["file"]


def test_what_is_in_the_file(pair) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(pair[1]))
    known = json.loads(session.get_modelmeta().custom_metadata_map["sievit"])
    assert known["config"]["classes"] and known["config"]["input"]["mean"] and known["config"]["policy"]["kind"]
    shape = session.get_inputs()[0].shape
    assert shape[1] == 3 and not any(isinstance(shape[i], int) for i in (0, 2, 3)), "batch, height and width are free"


def test_a_file_in_eight_bits(pair, tmp_path) -> None:
    import onnx

    from sievit.export.onnx import _in_8_bits

    whole = tmp_path / "model.onnx"
    whole.write_bytes(pair[1].read_bytes())
    small = _in_8_bits(whole)
    assert onnx.TensorProto.INT8 in {weights.data_type for weights in onnx.load(small).graph.initializer}
    assert load(small)([torch.rand(3, 64, 64)]).results[0].shape == (64, 64)


def test_mistakes(scenes, tmp_path, command, monkeypatch) -> None:
    checkpoint = segmenter(POLICIES["svit"], tmp_path / "model.safetensors")
    detector = saved(tiny_detector(policy=KeepAllConfig()), tmp_path / "detector.safetensors")
    images, out = ("--images", scenes / "images"), ("--out", tmp_path / "a.onnx")
    assert (
        "a detector cannot be exported yet"
        in command("export", detector, *images, "--out", tmp_path / "a.onnx", status=2).err
    )
    assert "ends with .onnx" in command("export", checkpoint, *images, "--out", tmp_path / "a.pt", status=2).err
    evit = segmenter(EViTConfig(first_block=1, shares=(0.5,)), tmp_path / "evit.safetensors")
    assert "decides inside blocks" in command("export", evit, *images, *out, status=2).err
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*.onnx"))

    (tmp_path / "damaged.onnx").write_bytes(b"no model")
    refused("ONNX Runtime cannot read it", load, tmp_path / "damaged.onnx")
    refused("no such file", load, tmp_path / "none.onnx")
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node("Identity", ["images"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "y")]
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), ir_version=10),
        tmp_path / "other.onnx",
    )
    refused("was not written by sievit export", load, tmp_path / "other.onnx")

    from sievit.export import onnx as ours

    monkeypatch.setattr(ours, "NEEDED", ("onnx", "no_such_package"))
    text = command("export", checkpoint, *images, *out, status=2).err
    assert "no_such_package: pip install 'sievit[export]'" in text


def test_a_file_that_disagrees_is_not_written(scenes, tmp_path, command, monkeypatch) -> None:
    from sievit.export import command as ours

    def wrong(path: Path) -> Model:
        file = load(path)
        inner = file.network.forward

        def forward(*args: Any, **options: Any) -> Any:
            scores, trace = inner(*args, **options)
            return scores.flip(1), trace

        file.network.forward = forward
        return file

    monkeypatch.setattr(ours, "load_exported", wrong)
    checkpoint = segmenter(KeepAllConfig(), tmp_path / "model.safetensors")
    out = tmp_path / "a.onnx"
    text = command("export", checkpoint, "--images", scenes / "images", "--number", 1, "--out", out, status=2).err
    assert "of the pixels another label" in text and not out.exists() and not list(tmp_path.glob(".*"))


def test_a_file_keeps_its_policy(pair) -> None:
    refused("runs with the policy that is in it", load, pair[1], policy="keep_all")
    file = load(pair[1])
    other = load(pair[0]).new_policy(KeepAllConfig())
    with pytest.raises(ConfigError, match="runs with the policy that is in it"):
        file([torch.rand(3, 64, 64)], policy=other)
    assert np.isfinite(float(file.gflops(file.dense_answer((64, 80)))[0]))
