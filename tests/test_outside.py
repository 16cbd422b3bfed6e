"""Policies of a user's own package, by name, in every command; on a detector with adapter and on a segmenter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sievit import cli
from sievit.data.scenes import generate
from sievit.measure.flops import traced_macs
from sievit.models.build import build, load, save
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig
from sievit.policies.options import PolicyOptions, chosen_policy
from tiny import tiny_detector, tiny_segmenter, tiny_vit

NAMES = ("outside.merging:Merging", "outside.fused:Fused")
SETTINGS = {NAMES[0]: "share=0.1", NAMES[1]: "blocks=1,2"}


@pytest.fixture(scope="module", params=["detector", "segmenter"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    generate(folder, num_images=2, size=(64, 96), seed=0)
    return folder


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{kind}.safetensors"
    if kind == "detector":
        neck = AdapterConfig(conv_inplane=8, deform_num_heads=2)
        config = tiny_detector(vit=tiny_vit(class_token=True), neck=neck)
    else:
        config = tiny_segmenter(vit=tiny_vit(patch_size=8, class_token=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save(build(config), path)
    return path


@pytest.fixture(params=NAMES)
def options(request: pytest.FixtureRequest) -> list[str]:
    return ["--policy", request.param, "--set", SETTINGS[request.param], "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert cli.main([str(arg) for arg in args]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def truth(kind: str, scenes: Path) -> list[object]:
    given = ["--annotations", scenes / "annotations.json"] if kind == "detector" else ["--labels", scenes / "labels"]
    return ["--images", scenes / "images", *given]


@pytest.mark.parametrize("name", NAMES)
def test_its_operations_are_those_of_a_real_pass(model: Path, name: str) -> None:
    """What a policy saves in the whole network, and what it costs itself, as torch counts both."""
    whole = load(model).requires_grad_(False)
    own = chosen_policy(KeepAllConfig(), PolicyOptions(policy=name, set=(SETTINGS[name],)))
    images, real, counted = torch.rand(1, 3, 64, 96), [], []
    for policy in map(whole.build_policy, (own, KeepAllConfig())):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            _, trace = whole.network(images, policy=policy)
        real.append(counter.get_total_flops() / 2)
        counted.append((traced_macs(whole.vit.config, trace) + policy.macs(trace)).sum().item())
    assert real[0] != real[1]
    assert counted[0] - counted[1] == pytest.approx(real[0] - real[1], rel=1e-9)


def test_eval_and_flops(kind, model, scenes, options, capsys) -> None:
    figures = run(capsys, "eval", model, *truth(kind, scenes), *options)
    assert figures["policy"] == options[1].replace("Merging", "MergingConfig").replace("Fused", "FusedConfig")
    spent = [
        run(capsys, "flops", model, "--images", scenes / "images", *given)["per_image"]["mean"]
        for given in (options, ["--device", "cpu"])
    ]
    assert figures["gflops"] == pytest.approx(spent[0], abs=6e-4)
    assert spent[0] < spent[1]


def test_sweep(kind, model, scenes, options, capsys, tmp_path) -> None:
    args = ["sweep", model, *truth(kind, scenes), "--policy", options[1], "--out", tmp_path / "out", "--device", "cpu"]
    points = run(capsys, *args)["points"]
    assert len(points) == 4, "three values of its own field, and dense"


def test_tune(model, scenes, options, capsys, tmp_path) -> None:
    figures = run(
        capsys, "tune", model, "--images", scenes / "images", "--out", tmp_path / "tuned.safetensors", *options
    )
    assert figures["candidates"][0]["mode"] == "dynamic"
    assert (tmp_path / "tuned.safetensors").is_file()
    if figures["mode"] != "dense":
        load(tmp_path / "tuned.safetensors", policy=options[1])


BENCHES = [("detector", "network"), ("detector", "heads"), ("detector", "blocks"), ("detector", "backbone")]


@pytest.mark.parametrize(("kind", "bench"), [*BENCHES, ("segmenter", "network")], scope="module")
def test_bench(bench, model, scenes, options, capsys) -> None:
    what = ["--checkpoints", model] if bench in ("network", "heads") else ["--models", "vit_t", "--sizes", "64", "64"]
    what += ["--modes", "dynamic"] if bench != "heads" else ["--sizes", "64", "96"]
    given = ["--batches", 1, "--repeats", 2, "--images", scenes / "images"]
    row = run(capsys, "bench", bench, *what, *given, *options)["rows"][-1]
    assert row["sparse_ms"] > 0 and min(row["keep"]) <= 1
