"""Policies of a user's own package in every command, and a kind of model of its own: no other file names them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from outside.tagging import Tagger, TaggerConfig, TagsData
from sievit.bench import HeadsBench, NetworkBench, bench_heads, bench_network
from sievit.data.truth import Truth
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.engine.train import train
from sievit.measure.flops import traced_macs
from sievit.models.build import build, load
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import KeepAllConfig, TopNormConfig
from sievit.policies.options import PolicyOptions, chosen_policy
from sievit.report.demonstration import demonstrate
from sievit.tasks import task_of
from tiny import image_folder, refused, saved, tiny_detector, tiny_segmenter, tiny_vit

Run = Callable[..., dict[str, Any]]
NAMES = ("outside.contrast:Contrast", "tome")
SETTINGS = {NAMES[0]: "shares=0.5", NAMES[1]: "share=0.1"}


@pytest.fixture(scope="module", params=["detector", "segmenter"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scenes(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(2, (64, 96))


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{kind}.safetensors"
    if kind == "detector":
        neck = AdapterConfig(conv_inplane=8, deform_num_heads=2)
        config = tiny_detector(vit=tiny_vit(class_token=True), neck=neck)
    else:
        config = tiny_segmenter(vit=tiny_vit(patch_size=8, class_token=True))
    return saved(config, path)


@pytest.fixture(params=NAMES[:1])
def options(request: pytest.FixtureRequest) -> list[str]:
    return ["--policy", request.param, "--set", SETTINGS[request.param]]


@pytest.fixture
def run(command: Callable[..., Any]) -> Run:
    """The figures of a command."""
    return lambda *args: command(*args, "--device", "cpu").figures


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
        counted.append((traced_macs(whole.vit.config, trace) + policy.cost(trace)).sum().item())
    assert real[0] != real[1]
    assert counted[0] - counted[1] == pytest.approx(real[0] - real[1], rel=1e-9)


def test_eval_and_flops(kind, model, scenes, options, run) -> None:
    figures = run("eval", model, *truth(kind, scenes), *options)
    assert figures["policy"] == options[1].replace("Contrast", "ContrastConfig")
    spent = [run("flops", model, "--images", scenes / "images", *given)["per_image"]["mean"] for given in (options, [])]
    assert figures["gflops"] == pytest.approx(spent[0], abs=6e-4)
    assert spent[0] < spent[1]


def test_sweep(kind, model, scenes, options, run, tmp_path) -> None:
    args = ["sweep", model, *truth(kind, scenes), "--policy", options[1], "--out", tmp_path / "out"]
    points = run(*args)["points"]
    assert len(points) == 4, "three values of its own field, and dense"


def test_tune(model, scenes, options, run, tmp_path) -> None:
    figures = run("tune", model, "--images", scenes / "images", "--out", tmp_path / "tuned.safetensors", *options)
    assert figures["candidates"][0]["mode"] == "dynamic"
    assert (tmp_path / "tuned.safetensors").is_file()
    if figures["mode"] != "dense":
        load(tmp_path / "tuned.safetensors", policy=options[1])


BENCHES = [("detector", "network"), ("detector", "heads"), ("detector", "blocks"), ("detector", "backbone")]


@pytest.mark.parametrize(("kind", "bench"), [*BENCHES, ("segmenter", "network")], scope="module")
def test_bench(bench, model, scenes, options, run) -> None:
    what = ["--checkpoints", model] if bench in ("network", "heads") else ["--models", "vit_t", "--sizes", "64", "64"]
    what += ["--modes", "dynamic"] if bench != "heads" else ["--sizes", "64", "96"]
    given = ["--batches", 1, "--repeats", 2, "--images", scenes / "images"]
    row = run("bench", bench, *what, *given, *options)["rows"][-1]
    assert row["sparse_ms"] > 0 and min(row["keep"]) <= 1


# A kind of model and its task.


SIZES = ((64, 96), (64, 64), (48, 64), (64, 96))
SWEPT = ("--field", "shares", "--values", "0.7", "0.3", "--timed-images", "1")
CONFIG = TaggerConfig(
    vit=tiny_vit(),
    policy=TopNormConfig(first_block=1, shares=(0.5,)),
    input=InputConfig(min_size=None),
    classes=("cat", "dog"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tags")
    image_folder(root / "images", *SIZES)
    (root / "tags.json").write_text(json.dumps({f"{i}.png": CONFIG.classes[i % 2] for i in range(len(SIZES))}))
    return root


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return saved(CONFIG, folder / "model.safetensors")


def test_it_is_trained_and_starts_from_a_checkpoint(folder: Path, checkpoint: Path, tmp_path: Path):
    data = TagsData(train_images=Path("images"), val_images=Path("images"), tags=Path("tags.json"), root=folder)
    settings = TrainConfig(steps=2, batch_size=2, warmup_steps=0, workers=0, init_from=checkpoint)
    figures = train(Recipe(model=CONFIG, data=data, train=settings), out=tmp_path / "run")
    assert 0 <= figures["accuracy"] <= 1 and len(figures["keep"]) == 4
    assert isinstance(load(tmp_path / "run"), Tagger)


def test_its_commands(folder: Path, checkpoint: Path, tmp_path: Path, run: Run, command: Callable[..., Any]):
    truth = ("--images", folder / "images", "--annotations", folder / "tags.json")
    figures = run("eval", checkpoint, *truth, "--batch-size", 2)
    assert figures["images"] == 4 and figures["keep"] == [1.0, 0.5, 0.5, 0.5]
    assert run("eval", checkpoint, *truth, "--policy", "keep_all")["gflops"] > figures["gflops"]
    command("predict", checkpoint, folder / "images", "--out", tmp_path / "out")
    tags = json.loads((tmp_path / "out/tags.json").read_text())
    assert len(tags) == len(list((tmp_path / "out/pictures").iterdir())) == 4
    costs = run("flops", checkpoint, "--images", folder / "images")
    assert costs["size"] == [64, 64] and costs["per_image"]["mean"] == pytest.approx(figures["gflops"], abs=1e-3)
    sweep = run("sweep", checkpoint, *truth, *SWEPT, "--out", tmp_path / "sweep")
    assert [point["value"] for point in sweep["points"]] == [None, 0.7, 0.3] and not sweep["failures"]
    tuned = run("tune", checkpoint, *truth, "--out", tmp_path / "fast.safetensors", "--repeats", 3)
    assert "accuracy" in tuned["dense"] and isinstance(load(tmp_path / "fast.safetensors"), Tagger)


def test_its_card_and_the_demonstration(folder: Path, tmp_path: Path):
    model = build(CONFIG).eval()
    model.save_pretrained(tmp_path / "hub")
    assert "image-classification" in (tmp_path / "hub/README.md").read_text()
    assert isinstance(Tagger.from_pretrained(tmp_path / "hub"), Tagger)
    data = task_of(CONFIG).open(folder / "images", Truth(annotations=folder / "tags.json"))
    figures = demonstrate(model.with_config(policy=KeepAllConfig()), model, data, tmp_path, title="tags", pictures=1)
    assert figures["images"] == 4 and (tmp_path / "0.png").is_file()
    refused("give --annotations", task_of(CONFIG).open, folder, Truth())


def test_its_benches(checkpoint: Path):
    common: dict[str, Any] = {"checkpoints": (checkpoint,), "sizes": ((64, 96),), "batches": (1,), "repeats": 2}
    rows = bench_network(NetworkBench(**common))["rows"] + bench_heads(HeadsBench(**common))["rows"]
    assert all(row["gflops"][0] > row["gflops"][1] for row in rows if row["mode"] != "dense")
    assert rows[-1]["parts"]["head"]["dense_ms"] > 0
