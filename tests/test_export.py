"""Exported files give the model's answers in a runtime of their own, and compute no token that is left out."""

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sievit.config import ConfigError, kind_of, to_json
from sievit.export.onnx import _in_8_bits, _in_16_bits, onnx_bytes
from sievit.export.program import Made, program
from sievit.models.base import Model
from sievit.models.build import build, load, save
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter
from sievit.policies import (
    ALGMConfig,
    ATSConfig,
    DToPConfig,
    EViTConfig,
    EvoViTConfig,
    ExpeditConfig,
    KeepAllConfig,
    PolicyConfig,
    SpreadConfig,
    SViTConfig,
    ToMeConfig,
    TopNormConfig,
)
from sievit.rows import with_sums
from sievit.tasks import task_of
from tiny import refused, saved, scattered, tiny_detector, tiny_segmenter, tiny_vit

pytest.importorskip("onnxruntime", reason="files of ONNX need the packages of sievit[export]")

GATES, EXITS = SViTConfig(first_block=1, targets=(0.6,)), DToPConfig(thresholds=(0.26,), keep_per_class=1)
INPUT = InputConfig(min_size=64, max_size=128, size_divisor=8)
BATCHES = ([(64, 80)], [(64, 64)] * 4, [(96, 64), (64, 96)], [(70, 90), (64, 64), (128, 64)])
"""Sizes of the images of batches."""


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


def detector(path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build(tiny_detector(vit=tiny_vit(depth=2), policy=GATES, input=InputConfig(min_size=96, max_size=192)))
        scattered(model.head, 0.1)  # scores that differ
    save(model, path)
    return path


@pytest.fixture(scope="module", params=["segmenter", "detector"])
def pair(
    request: pytest.FixtureRequest, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint, the file that was exported from it, and the figures of the command."""
    from sievit.export import export

    root = tmp_path_factory.mktemp(request.param)
    path = root / "model.safetensors"
    checkpoint = detector(path) if request.param == "detector" else segmenter(EXITS, path)
    figures = export(checkpoint, images=scenes / "images", out=root / "model.onnx", number=2)
    return checkpoint, root / "model.onnx", figures


only_segmenter = pytest.mark.parametrize("pair", ["segmenter"], indirect=True)


def assert_same_answers(eager: Model, file: Model) -> None:
    """Results, tokens and costs of batches of several sizes; something is left out."""
    generator, less, found = torch.Generator().manual_seed(0), 0, 0
    for sizes in BATCHES:
        images = [torch.rand(3, *size, generator=generator) for size in sizes]
        with torch.inference_mode():
            expected, got = eager(images), file(images)
        for a, b in zip(expected.results, got.results, strict=True):
            same, total = task_of(eager.config).agreement(a, b)
            assert same >= 0.999 * total
            found += total
        assert torch.equal(expected.trace.counts(), got.trace.counts())
        assert got.trace.grid != expected.trace.grid or torch.equal(expected.trace.valid, got.trace.valid)
        torch.testing.assert_close(eager.gflops(expected), file.gflops(got))
        for name, value in eager.policy.report(expected.trace).items():
            assert torch.equal(value, file.policy.report(got.trace)[name])
        less += int((expected.trace.shares() < 1).sum())
    assert less and found, "the policy of this test leaves something out, and something is found"


def test_the_file_answers_as_the_model_does_at_every_size_and_batch(pair) -> None:
    eager, file = load(pair[0]), load(pair[1])
    assert file.config.classes == eager.config.classes and pair[2]["agree"] == 1
    assert_same_answers(eager, file)


@pytest.mark.parametrize(
    "policy",
    [
        replace(GATES, dither="similarity", per_stage=True, propagate=True),
        SpreadConfig(first_block=1, shares=(0.8, 0.6)),
    ],
)
def test_tokens_that_follow_others_do_so_in_the_file(policy, scenes, tmp_path) -> None:
    import onnx

    from sievit.export import export

    path = segmenter(policy, tmp_path / "model.safetensors")
    assert export(path, images=scenes / "images", out=tmp_path / "model.onnx", number=2)["agree"] == 1
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    adding = {node.op_type for node in nodes if any(each.s == b"add" for each in node.attribute)}
    assert adding == {"ScatterElements"}, "ONNX Runtime loses sums of ScatterND"
    assert_same_answers(load(path), load(tmp_path / "model.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize(
    "policy",
    [
        ALGMConfig(local_block=0, global_block=1, threshold=0.3),
        ATSConfig(first_block=1, shares=(0.6, 0.4)),
        EViTConfig(first_block=1, shares=(0.6, 0.4)),
        EvoViTConfig(first_block=1, shares=(0.5,)),
        ToMeConfig(share=0.15),
    ],
    ids=kind_of,
)
def test_policies_that_decide_inside_of_a_block_do_so_in_the_file(policy, suffix, scenes, tmp_path) -> None:
    from sievit.export import export

    path, out = segmenter(policy, tmp_path / "model.safetensors"), tmp_path / f"model{suffix}"
    kind: Any = "onnx" if suffix == ".onnx" else "openvino"
    assert export(path, images=scenes / "images", out=out, format=kind, number=2)["agree"] == 1
    assert_same_answers(load(path), load(out))


def test_commands_take_the_file_like_a_checkpoint(pair, scenes, command, tmp_path) -> None:
    found, is_segmenter = {}, "segmenter" in str(pair[0])
    truth = ("--labels", scenes / "labels") if is_segmenter else ("--annotations", scenes / "annotations.json")
    for name, model in (("model", pair[0]), ("file", pair[1])):
        out = tmp_path / name
        command("predict", model, scenes / "images", "--out", out)
        evaluated = command("eval", model, "--images", scenes / "images", *truth).figures
        pictures = {path.name: path.read_bytes() for path in sorted(out.rglob("*.png"))}
        keys = ("miou", "pixel_accuracy", "box_ap", "mask_ap", "gflops", "keep", "images")
        found[name] = ({key: evaluated[key] for key in keys if key in evaluated}, sorted(pictures))
    assert found["model"] == found["file"]


@pytest.mark.slow
def test_a_detector_that_aotinductor_compiled_answers_as_the_model(scenes: Path, tmp_path: Path) -> None:
    from sievit.export import export

    path = detector(tmp_path / "model.safetensors")
    figures = export(path, images=scenes / "images", out=tmp_path / "model.pt2", format="aoti", number=3)
    assert figures["agree"] == 1
    assert_same_answers(load(path), load(tmp_path / "model.pt2"))


@pytest.mark.slow
def test_a_program_of_torch_computes_the_tokens_that_take_part_alone(tmp_path: Path) -> None:
    from sievit.export.formats import write_program

    path = segmenter(GATES, tmp_path / "model.safetensors")
    model = load(path)
    made = program(model)
    write_program(made, tmp_path / "a.pt2", "torch-export", {"config": to_json(model.config), **made.known})
    file = load(tmp_path / "a.pt2")
    for images in (torch.rand(1, 3, 64, 80), torch.rand(3, 3, 96, 64)):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            scores, trace = file.network(images)
        with torch.inference_mode(), FlopCounterMode(display=False) as own:
            expected, known = model.network(images)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.stack(trace.keep), torch.stack(known.keep)) and not all(k.all() for k in trace.keep)
        # positions are products here
        assert len(images) > 1 or own.get_total_flops() <= counter.get_total_flops() < 1.02 * own.get_total_flops()


@pytest.mark.parametrize(
    ("policy", "computed"),
    [
        (DToPConfig(static_left=(0.3, 0.5)), 128),
        (SpreadConfig(first_block=1, shares=(0.8, 0.6)), 154),
        (ExpeditConfig(first_block=1), 144),
        (replace(GATES, propagate=True, static_shares=(0.6, 0.4)), 103),
    ],
)
def test_a_static_program_has_no_shape_that_depends_on_a_value_and_adds_at_no_position(
    policy: PolicyConfig, computed: int, tmp_path: Path
) -> None:
    from sievit.export.formats import write_program

    model = load(segmenter(policy, tmp_path / "model.safetensors"))
    made = program(model, canvas=(128, 128))
    asked = [str(node.target) for node in made.exported.graph.nodes]
    no = ("nonzero", "_local_scalar_dense", "index_add", "scatter_add", "scatter_reduce", "index_put")
    assert not [name for name in asked if any(each in name for each in no)]
    mlp = [n for n in made.exported.graph.nodes if "linear" in str(n.target) and "blocks_2_mlp_fc1" in str(n.args[1])]
    assert [n.args[0].meta["val"].shape[1] - 1 for n in mlp] == [computed]
    write_program(made, tmp_path / "a.pt2", "torch-export", {"config": to_json(model.config), **made.known})
    file = load(tmp_path / "a.pt2")
    assert_same_answers(model, file)
    with pytest.raises(ConfigError, match="up to 128x128 pixels, and this is 136x64"):
        file.network(torch.rand(1, 3, 136, 64))


def test_onnx_runtime_adds_at_equal_positions_as_torch_does() -> None:
    """Its ScatterND loses some of what two threads add to one row."""
    import onnxruntime

    class Sums(torch.nn.Module):
        def forward(self, values: Tensor, owner: Tensor, others: Tensor) -> Tensor:
            return with_sums(values, owner, others)

    values, owner = torch.rand(1, 1600, 384), torch.randint(0, 800, (1, 1600))
    given, names = (values, owner, torch.ones(1, 1600) == 1), ("values", "owner", "others")
    exported = torch.export.export(Sums(), given)
    content = onnx_bytes(Made(exported, names, ("sums",), {}), {})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    for _ in range(40):
        (sums,) = session.run(None, {name: each.numpy() for name, each in zip(names, given, strict=True)})
        torch.testing.assert_close(torch.from_numpy(sums), with_sums(*given))


def test_openvino_counts_the_tokens_of_a_static_program_in_32_bits(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from sievit.export.formats import write_program

    model = load(segmenter(TopNormConfig(first_block=1, shares=(0.7, 0.343)), tmp_path / "model.safetensors"))
    made = program(model, canvas=(128, 128))
    write_program(made, tmp_path / "a.xml", "openvino", {"config": to_json(model.config), **made.known})
    assert_same_answers(model, load(tmp_path / "a.xml"))


def test_a_file_that_does_not_agree_is_not_written(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    from sievit.export import export

    path = segmenter(GATES, tmp_path / "model.safetensors")
    monkeypatch.setattr(type(task_of(load(path).config)), "agreed", (1.1, "pixels"))
    with pytest.raises(ConfigError, match=r"most in .*000000.png; it was not written"):
        export(path, images=scenes / "images", out=tmp_path / "a.onnx", number=1)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


@only_segmenter
def test_openvino_runs_it_too(pair, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from sievit.export.formats import write_openvino
    from sievit.models.runtimes import runtime

    write_openvino(pair[1].read_bytes(), tmp_path / "a.xml", runtime(pair[1]).known)
    eager, file = load(pair[0]), load(tmp_path / "a.xml")
    for images in (torch.rand(1, 3, 64, 80), torch.rand(3, 3, 96, 64)):
        with torch.inference_mode():
            (expected, known), (scores, trace) = eager.network(images), file.network(images)
        torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)
        assert all(torch.equal(own, other) for own, other in zip(known.keep, trace.keep, strict=True))


@only_segmenter
def test_a_program_in_cpp_runs_the_file(pair, tmp_path: Path) -> None:
    """examples/cpp, with the headers and the library of OpenVINO's package."""
    openvino = pytest.importorskip("openvino")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    root, program = Path(openvino.__file__).parent, tmp_path / "segment"
    library = next((root / "libs").glob("libopenvino.so.*"))
    source = Path(__file__).parents[1] / "examples" / "cpp" / "segment.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", f"-isystem{root / 'include'}", f"-Wl,-rpath,{library.parent}"]
    subprocess.run(["g++", *flags, str(source), str(library), "-o", str(program)], check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.ppm")
    run = [str(program), str(pair[1]), str(tmp_path / "a.ppm"), str(tmp_path / "a.pgm")]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    assert "80 x 64 pixels" in done.stdout
    labels = np.asarray(Image.open(tmp_path / "a.pgm"))
    eager = load(pair[0]).with_config(input=InputConfig(min_size=64, max_size=128, size_divisor=8, antialias=False))
    assert isinstance(eager, Segmenter)
    with torch.inference_mode():
        scores = eager.scores([torch.from_numpy(pixels).permute(2, 0, 1)])[0]
    assert (labels == scores.argmax(0).numpy()).mean() > 0.999
    assert subprocess.run([*run[:2], str(source), run[3]], check=False, capture_output=True).returncode == 1


@only_segmenter
def test_what_is_in_the_file(pair) -> None:
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(str(pair[1]))
    known = json.loads(session.get_modelmeta().custom_metadata_map["sievit"])
    assert known["config"]["classes"] and known["config"]["input"]["mean"] and known["config"]["policy"]["kind"]
    shape = session.get_inputs()[0].shape
    assert shape[1] == 3 and not any(isinstance(shape[i], int) for i in (0, 2, 3)), "batch, height and width are free"
    nodes = onnx.load(pair[1]).graph.node
    assert not [node for node in nodes if node.op_type == "IsNaN"], "attention looks for no rows that see nothing"


@only_segmenter
@pytest.mark.parametrize(("smaller", "kind"), [(_in_8_bits, "INT8"), (_in_16_bits, "FLOAT16")])
def test_a_file_in_fewer_bits(pair, tmp_path, smaller, kind) -> None:
    import onnx

    whole = tmp_path / "model.onnx"
    whole.write_bytes(pair[1].read_bytes())
    small = smaller(whole)
    sizes = dict[str, int]()
    for weights in onnx.load(small).graph.initializer:
        name = onnx.TensorProto.DataType.Name(weights.data_type)
        sizes[name] = sizes.get(name, 0) + math.prod(weights.dims)
    assert sizes[kind] > 0.8 * sizes["FLOAT"], "not a few of the weights alone"
    images = [torch.rand(3, 64, 64)]
    answers = [load(path)(images).results[0] for path in (small, whole)]
    assert answers[0].shape == (64, 64)
    if kind == "FLOAT16":
        assert small.stat().st_size < whole.stat().st_size and (answers[0] == answers[1]).float().mean() > 0.98


def test_files_and_checkpoints_are_timed_beside_each_other(pair, scenes, tmp_path, command) -> None:
    options = ("--images", scenes / "images", "--number", 2, "--out", tmp_path / "rows.json")
    rows = command("bench", "models", pair[0], pair[1], *options).figures["rows"]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    first, second = rows
    assert (first["model"], second["model"]) == ("model.safetensors", "model.onnx")
    assert first["speedup"] == first["predicted"] == second["predicted"] == 1 and second["of"] > 0
    assert second["agree"] == pair[2]["agree"] and second["gflops"] == first["gflops"]
    assert "give two models" in command("bench", "models", pair[0], *options, status=2).err


def test_models_of_two_tasks_are_not_compared(scenes, tmp_path, command) -> None:
    paths = detector(tmp_path / "a.safetensors"), segmenter(EXITS, tmp_path / "b.safetensors")
    error = command("bench", "models", *paths, "--images", scenes / "images", status=2).err
    assert "b.safetensors: is of another kind than" in error


def test_mistakes(scenes, tmp_path, command, monkeypatch) -> None:
    checkpoint = segmenter(GATES, tmp_path / "model.safetensors")
    images, out = ("--images", scenes / "images"), ("--out", tmp_path / "a.onnx")
    assert "ends with .onnx" in command("export", checkpoint, *images, "--out", tmp_path / "a.pt", status=2).err
    for options, message in (
        (("--format", "openvino"), "ends with .xml"),
        (("--canvas", 64, 64), "of --mode static"),
        (("--format", "torch-export", "--precision", "int8"), "is of --format onnx, not torch-export"),
        (("--format", "torch-export", "--precision", "float16"), "is of --format onnx and openvino"),
    ):
        suffix = {"torch-export": "pt2"}.get(str(options[1]), "onnx")
        assert (
            message in command("export", checkpoint, *images, "--out", tmp_path / f"a.{suffix}", *options, status=2).err
        )
    tome = segmenter(ToMeConfig(share=0.15), tmp_path / "tome.safetensors")
    assert "has no static counts" in command("export", tome, *images, *out, "--mode", "static", status=2).err
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*.onnx"))

    (tmp_path / "damaged.onnx").write_bytes(b"no model")
    refused("onnxruntime cannot read it", load, tmp_path / "damaged.onnx")
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

    monkeypatch.setattr(ours, "NEEDED", {"onnx": ("onnx", "no_such_package")})
    text = command("export", checkpoint, *images, *out, status=2).err
    assert "no_such_package: pip install 'sievit[export]'" in text


@only_segmenter
def test_a_file_that_disagrees_is_not_written(pair, scenes, tmp_path, command, monkeypatch) -> None:
    from sievit.export import command as ours

    def wrong(path: Path) -> Model:
        file = load(path)
        inner = file.network.forward

        def forward(*args: Any, **options: Any) -> Any:
            scores, trace = inner(*args, **options)
            return scores.flip(1), trace

        file.network.forward = forward
        return file

    def copied(made: Any, path: Path, *_: Any, **__: Any) -> list[Path]:
        return [Path(shutil.copy(pair[1], path))]

    monkeypatch.setattr(ours, "load_exported", wrong)
    monkeypatch.setattr(ours, "write_program", copied)
    monkeypatch.setattr(ours, "program", lambda model: type("Made", (), {"known": {}}))
    out = tmp_path / "a.onnx"
    text = command("export", pair[0], "--images", scenes / "images", "--number", 1, "--out", out, status=2).err
    assert "are not as the model finds them" in text and not out.exists() and not list(tmp_path.glob(".*"))


@only_segmenter
def test_a_file_keeps_its_policy(pair) -> None:
    refused("runs with the policy that is in it", load, pair[1], policy="keep_all")
    file = load(pair[1])
    other = load(pair[0]).new_policy(KeepAllConfig())
    with pytest.raises(ConfigError, match="runs with the policy that is in it"):
        file([torch.rand(3, 64, 64)], policy=other)
    assert np.isfinite(float(file.gflops(file.dense_answer((64, 80)))[0]))
