"""`sievit ablate`: each run once, whoever does it, and a table of what was measured."""

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sievit.config import ConfigError, from_json, to_json
from sievit.data.images import read_image, to_tensor
from sievit.engine.bootstrap import differences, drawn
from sievit.engine.evaluate import evaluate
from sievit.engine.recipe import Recipe, TrainConfig, open_data
from sievit.engine.train import train
from sievit.lab import PLANS, Variant, corruptions, find_plan, run, trained, with_weights
from sievit.lab.corruptions import CORRUPTIONS, SEVERITIES, corrupting
from sievit.lab.plan import checked, joined
from sievit.models.build import load
from sievit.models.inputs import InputConfig
from sievit.policies import DToPConfig, KeepAllConfig, PolicyConfig, TopNormConfig
from sievit.tasks import task_of
from sievit.tasks.detection import CocoData
from sievit.tasks.segmentation import LabelsData
from tiny import refused, saved, tiny_detector, tiny_segmenter, tiny_vit

Command = Callable[..., Any]
PHOTOGRAPHS = Path(__file__).parents[1] / "examples" / "facade" / "images" / "val"
SIZE = InputConfig(min_size=64, max_size=128, size_divisor=8)


def small(recipe: Recipe) -> list[Variant]:
    """Two trainings, and evaluations with their weights."""
    dense = trained(recipe, "dense")
    norm = trained(recipe, "norm", TopNormConfig(first_block=1, shares=(0.5,)), curve="norm")
    exits = DToPConfig(thresholds=(0.3,), keep_per_class=1)
    return [
        with_weights(norm, "norm_0.3", curve="norm", policy=TopNormConfig(first_block=1, shares=(0.3,))),
        norm,
        dense,
        with_weights(dense, "size_48", input=replace(SIZE, min_size=48, max_size=96)),
        with_weights(replace(dense, weights="start"), "direct", policy=exits),
    ]


@pytest.fixture(scope="module")
def scenes(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(6, (64, 80), val=3)


@pytest.fixture(scope="module")
def start(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense segmenter and a recipe for it."""
    root = tmp_path_factory.mktemp("lab")
    config = tiny_segmenter(vit=tiny_vit(grid=(8, 10), patch_size=8), input=SIZE)
    saved(config, root / "dense.safetensors")
    data = LabelsData(
        train_images=Path("train/images"),
        train_labels=Path("train/labels"),
        val_images=Path("val/images"),
        val_labels=Path("val/labels"),
        root=scenes,
    )
    training = TrainConfig(batch_size=2, warmup_steps=0, workers=0)
    (root / "recipe.json").write_text(json.dumps(to_json(Recipe(model=config, data=data, train=training))))
    return root


@pytest.fixture
def ablate(start: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(run, "find_plan", lambda name: small if name == "small" else find_plan(name))
    given = ["--dense", start / "dense.safetensors", "--recipe", start / "recipe.json", "--steps", 1]
    given += ["--freeze", 0, "--timed-images", 1]
    return lambda *args, **options: command("ablate", "small", *given, *args, **options)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the trainings that are run, as they start."""
    names: list[str] = []

    def noted(*args: Any, out: Path, **options: Any) -> dict:
        names.append(out.name)
        return train(*args, out=out, **options)

    monkeypatch.setattr(run, "train", noted)
    return names


def rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in content["variants"]}


def test_the_table_holds_what_each_variant_does(ablate, trainings, start, tmp_path) -> None:
    found = rows(ablate("--out", tmp_path / "out").figures)
    assert list(found) == ["dense", "norm_0.3", "norm", "size_48", "direct"] and trainings == ["dense-0", "norm-0"]
    recipe = Recipe(**vars(run.find_recipe(str(start / "recipe.json"))))
    _, data = open_data(recipe)
    metrics = {}
    for name, folder, changes in (
        ("dense", "dense-0", {}),
        ("norm_0.3", "norm-0", {"policy": TopNormConfig(first_block=1, shares=(0.3,))}),
        ("size_48", "dense-0", {"input": replace(SIZE, min_size=48, max_size=96)}),
    ):
        model = load(tmp_path / "out" / "trainings" / folder / "best.safetensors").with_config(**changes)
        metrics[name] = task_of(model.config).metric(data)
        figures = evaluate(model, data, metric=metrics[name])
        row = found[name]
        assert [row["miou"], row["gflops"], row["keep"]] == [figures["miou"], figures["gflops"], figures["keep"]]
        assert row["ms"] > 0 and row["miou_spread"] is None
        assert row["realised"] == pytest.approx(row["speedup"] * row["gflops"] / found["dense"]["gflops"], abs=2e-3)
        if name == "dense":
            assert row["miou_difference"] is None and row["speedup"] == 1
        else:
            expected = differences(metrics["dense"], metrics[name], len(data))["miou"]
            assert row["miou_difference"] == pytest.approx(expected, abs=2e-5)
    assert found["direct"]["gflops"] < found["dense"]["gflops"] or found["direct"]["keep"][-1] == 1
    table = list(csv.DictReader((tmp_path / "out" / "ablation.csv").read_text().splitlines()))
    assert [row["variant"] for row in table] == list(found)
    assert float(table[1]["miou_low"]) == found["norm_0.3"]["miou_difference"][1]
    assert (tmp_path / "out" / "ablation.png").is_file()


def test_seeds_give_a_mean_a_spread_and_a_difference_of_pairs(ablate, tmp_path) -> None:
    found = rows(ablate("--out", tmp_path, "--seeds", 0, 1, "--only", "norm", "--against", "norm").figures)
    to_dense, to_norm = found["norm"]["miou_difference"], found["dense"]["miou_to_norm"]
    assert [-to_norm[0], -to_norm[2], -to_norm[1]] == pytest.approx(to_dense, abs=1e-5)
    assert found["norm"]["miou_to_norm"] is None
    refusal = ablate("--out", tmp_path, "--only", "norm", "--against", "nor", status=2).err
    assert "--against nor: the plan has dense, norm" in refusal
    assert list(found) == ["dense", "norm"] and found["norm"]["seeds"] == [0, 1]
    files = {
        (name, seed): json.loads((tmp_path / "figures" / f"{name}-{seed}.json").read_text())
        for name in found
        for seed in (0, 1)
    }
    values = [files["norm", seed]["figures"]["miou"] for seed in (0, 1)]
    assert found["norm"]["miou"] == pytest.approx(np.mean(values), abs=1e-5)
    assert found["norm"]["miou_spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-5)
    apart = [
        np.array(files["norm", seed]["resampled"]["miou"]) - files["dense", seed]["resampled"]["miou"]
        for seed in (0, 1)
    ]
    assert found["norm"]["miou_difference"][0] == pytest.approx(np.mean(apart, axis=0)[0], abs=1e-5)
    assert len(apart[0]) == len(drawn(3)) == 1001


def test_what_was_finished_is_not_done_again(ablate, trainings, monkeypatch, tmp_path) -> None:
    """Stopped in the middle of a training, and once more between a training and its evaluation."""
    finished = run.train

    def stopped(*args: Any, out: Path, **options: Any) -> dict:
        if out.name == "norm-0":
            raise KeyboardInterrupt
        return finished(*args, out=out, **options)

    monkeypatch.setattr(run, "train", stopped)
    ablate("--out", tmp_path, status=130)
    before = (tmp_path / "figures" / "dense-0.json").stat().st_mtime_ns
    monkeypatch.setattr(run, "train", finished)
    measured = run.evaluate

    def failing(*args: Any, title: str, **options: Any) -> dict:
        if title == "norm":
            raise KeyboardInterrupt
        return measured(*args, title=title, **options)

    monkeypatch.setattr(run, "evaluate", failing)
    ablate("--out", tmp_path, status=130)
    monkeypatch.setattr(run, "evaluate", measured)
    assert len(rows(ablate("--out", tmp_path).figures)) == 5
    assert trainings == ["dense-0", "norm-0"]
    assert (tmp_path / "figures" / "dense-0.json").stat().st_mtime_ns == before


def test_at_a_share_of_the_dense_cost_the_dial_is_turned_and_nothing_trained_again(
    ablate, trainings, start, monkeypatch, tmp_path
) -> None:
    ablate("--out", tmp_path, "--only", "norm", "--timed-images", 0)
    found = rows(ablate("--out", tmp_path, "--only", "norm", "--at", 0.9, 0.75).figures)
    assert trainings == ["dense-0", "norm-0"]
    assert list(found) == ["dense", "norm", "norm_at_0.9", "norm_at_0.75"]  # the dense model has no dial
    data, _ = open_data(Recipe(**vars(run.find_recipe(str(start / "recipe.json")))))
    norm = tmp_path / "trainings" / "norm-0" / "best.safetensors"
    for share in (0.9, 0.75):
        policy = json.loads((tmp_path / "figures" / f"norm_at_{share}-0.json").read_text())["policy"]
        models = [load(norm, policy=each) for each in (from_json(PolicyConfig, policy), KeepAllConfig())]
        costs = [sum(model.gflops(model([data[i][0]])).item() for i in range(len(data))) for model in models]
        assert 0.97 * share < costs[0] / costs[1] <= share
        assert found[f"norm_at_{share}"]["curve"] == "norm" and found[f"norm_at_{share}"]["ms"] > 0
    assert sum(found["norm_at_0.75"]["keep"]) < sum(found["norm_at_0.9"]["keep"])
    monkeypatch.setattr(run, "turned", refused)
    assert rows(ablate("--out", tmp_path, "--only", "norm", "--at", 0.9, 0.75).figures) == found


def test_two_processes_give_the_table_of_one(ablate, trainings, tmp_path) -> None:
    first = ablate("--out", tmp_path / "two", "--index", 0, "--of", 2)
    assert "2 of 5 runs are not done yet" in first.err and len(rows(first.figures)) == 3
    second = rows(ablate("--out", tmp_path / "two", "--index", 1, "--of", 2).figures)
    assert trainings == ["dense-0", "norm-0"]
    alone = rows(ablate("--out", tmp_path / "one").figures)
    times = ("ms", "ms_p95", "speedup", "speedup_quartiles", "realised")
    for name, row in alone.items():
        assert all(second[name][key] == value for key, value in row.items() if key not in times)


def test_a_run_that_another_process_is_at_is_left_to_it(ablate, trainings, tmp_path) -> None:
    folder = tmp_path / "claims" / "norm-0"
    script = "from pathlib import Path; from sievit.files import held; import sys\n"
    script += f"with held(Path({str(folder)!r})):\n    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        text = ablate("--out", tmp_path).err
        other.communicate()
    assert "norm-0: another process is at it" in text and trainings == ["dense-0"]


def test_a_dry_run_lists_and_writes_nothing(ablate, tmp_path) -> None:
    printed = ablate("--out", tmp_path / "out", "--dry-run", "--seeds", 0, 1)
    assert [row["runs"] for row in printed.figures["runs"]] == [2] * 5 and printed.figures["hours"] >= 0
    assert "4 trainings" in printed.err and not (tmp_path / "out").exists()


def test_figures_of_other_settings_are_not_mixed(ablate, tmp_path) -> None:
    ablate("--out", tmp_path, "--only", "norm")
    text = ablate("--out", tmp_path, "--only", "norm", "--lr", 1e-6, status=2).err
    assert "was made with another recipe; give another --out" in text
    text = ablate("--out", tmp_path, "--only", "norm", "--limit", 2, status=2).err
    assert "was made with another limit" in text


@pytest.mark.parametrize("kind", ["segmenter", "detector"])
def test_every_plan_that_ships_can_be_built(kind: str) -> None:
    vit, where = tiny_vit(depth=12, patch_size=8, class_token=True), Path("nowhere")
    data: Any
    if kind == "segmenter":
        config: Any = tiny_segmenter(vit=vit, out_indices=(5, 7, 11), input=SIZE)
        data = LabelsData(train_images=where, train_labels=where, val_images=where, val_labels=where)
    else:
        config = tiny_detector(vit=replace(vit, token_stride=16), policy=KeepAllConfig(), input=SIZE)
        data = CocoData(train_images=where, train_annotations=where, val_images=where, val_annotations=where)
    recipe = Recipe(model=config, data=data, train=TrainConfig(steps=12))
    for name, plan in PLANS.items():
        if (kind, name) == ("detector", "exits"):
            refused("'direct_0.98' of the plan.*does not go with this model", checked, plan(recipe))
            continue
        variants = checked(plan(recipe))
        assert variants[0].name == "dense" and len(variants) > 2 and (plan.__doc__ or "").endswith(".")


def test_joined_plans_have_what_they_share_once() -> None:
    where = Path("nowhere")
    data = LabelsData(train_images=where, train_labels=where, val_images=where, val_labels=where)
    model = tiny_segmenter(vit=tiny_vit(depth=12), out_indices=(5, 7, 11), input=SIZE)
    recipe = Recipe(model=model, data=data, train=TrainConfig(steps=12))
    alone = [[variant.name for variant in find_plan(name)(recipe)] for name in ("reactivate", "rate", "gate")]
    together = [variant.name for variant in checked(find_plan("reactivate+rate+gate")(recipe))]
    assert sorted(together) == sorted({name for names in alone for name in names})
    assert sum(map(len, alone)) > len(together)
    checked(find_plan("+".join(PLANS))(recipe))
    other = [Variant(name="svit", recipe=recipe)]
    refused("two variants called 'svit'", checked, joined([find_plan("rate")(recipe), other]))


def test_plans_of_ones_own_and_mistakes(start: Path, command: Command) -> None:
    from outside import contrast

    assert find_plan("outside.contrast:plan") is contrast.plan
    assert "methods" in command("ablate").out
    given = ("--dense", start / "dense.safetensors", "--recipe", start / "recipe.json")
    for args, text in (
        (("method",), "methods"),
        (("rate+method",), "methods"),
        (("no.such:plan",), "PYTHONPATH"),
        (("outside.contrast:plans",), "no function 'plans'"),
        (("outside.contrast:plan", "--only", "x"), "--only x: the plan has dense"),
        (("rate", "--index", "2"), "--index 2 is one of 0 to 0"),
        (("rate",), "the variant 'svit' of the plan: 9 shares for 1 blocks"),
    ):
        assert text in command("ablate", *args, *given, status=2).err
    assert "--dense CHECKPOINT" in command("ablate", "rate", status=2).err
    assert "another --recipe" in command("ablate", "rate", *given[:2], "--recipe", "facade_vit", status=2).err


def test_the_page_on_a_method_of_ones_own_runs(start: Path, command: Command, tmp_path: Path) -> None:
    """The commands of docs/add-a-policy.md, from the file on the page to rows of the table."""
    page = (Path(__file__).parents[1] / "docs" / "add-a-policy.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    given = {
        "facade_setr_dtop": start / "dense.safetensors",
        "facade_setr": start / "recipe.json",
        "120": 1,
        "IMAGES": json.loads((start / "recipe.json").read_text())["data"]["root"] + "/val/images",
        "LABELS": json.loads((start / "recipe.json").read_text())["data"]["root"] + "/val/labels",
        "runs/contrast": tmp_path / "out",
    }
    steps = [[given.get(word, word) for word in shlex.split(line)[1:]] for line in lines if line]
    assert [step[0] for step in steps] == ["eval", "sweep", "bench", "ablate", "ablate"]
    small = {"sweep": ["--out", tmp_path / "sweep"], "bench": ["--repeats", 2, "--batches", 1, "--modes", "dynamic"]}
    for step in steps:
        printed = command(*step, *small.get(step[0], []))
    table = rows(printed.figures)
    assert list(table) == ["dense", "contrast", "random"] and len(table["contrast"]["miou_difference"]) == 3


def test_a_plan_needs_a_control_and_names_of_its_own(start: Path) -> None:
    recipe = run.find_recipe(str(start / "recipe.json"))
    dense = trained(recipe, "dense")
    refused("no variant called 'dense'", checked, [trained(recipe, "other")])
    refused("two variants called 'dense'", checked, [dense, dense])
    refused("the weights of 'other'", checked, [dense, replace(with_weights(dense, "a"), weights="other")])
    refused("take letters, digits", trained, recipe, "a/b")


def test_the_features_of_a_variant_are_held_to_the_dense_ones(start: Path) -> None:
    """`train.distill` is nothing for the dense model itself, and something for one that leaves tokens out."""
    from sievit.engine.batches import Batch, Losses
    from sievit.engine.initial import dense_teacher

    config = TrainConfig(init_from=start / "dense.safetensors", distill=2.0)
    images = [torch.rand(3, 64, 80)]
    batch = Batch(images, [{"labels": torch.zeros(64, 80, dtype=torch.int64)}], torch.device("cpu"))
    found = []
    for policy in (KeepAllConfig(), TopNormConfig(first_block=1, shares=(0.5,))):
        model = load(start / "dense.safetensors").with_config(policy=policy).train()
        losses = Losses(model, dense_teacher(model.policy, config), config.distill)(batch)[0]
        found.append(losses["features"].item())
    assert found[0] == pytest.approx(0, abs=1e-5) and found[1] > 1e-4
    with pytest.raises(ConfigError, match=r"train\.distill learns from the dense model"):
        dense_teacher(model.policy, TrainConfig(distill=1.0))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_a_picture_more_the_more_severe(name: str) -> None:
    picture = to_tensor(read_image(sorted(PHOTOGRAPHS.glob("*.jpg"))[0]))[:, 100:260, 50:250].contiguous()
    target, changes = {"labels": torch.tensor([3], dtype=torch.uint8)}, []
    for severity in SEVERITIES:
        image, kept = corrupting(name, severity)(picture, target, torch.Generator().manual_seed(1))
        assert image.shape == picture.shape and image.dtype == torch.float32 and kept["labels"].dtype == torch.int64
        assert image.min() >= 0 and image.max() <= 1
        changes.append((image - picture / 255).abs().mean().item())
    assert 0.003 < changes[0] < changes[1] < 0.6
    again = corrupting(name, SEVERITIES[1])(picture, target, torch.Generator().manual_seed(1))[0]
    assert torch.equal(image, again), "the same draws, the same picture"


def test_a_blur_is_a_mean_of_what_is_around() -> None:
    x = np.zeros((9, 11, 3))
    x[4, 5] = 1.0
    kernel = np.array([[0.0, 0.2, 0.0], [0.1, 0.3, 0.25], [0.0, 0.15, 0.0]])
    expected = np.zeros((9, 11))
    expected[3:6, 4:7] = kernel
    np.testing.assert_allclose(corruptions._filtered(x, kernel)[..., 0], expected, atol=1e-12)


def test_corrupted_images_are_evaluated_and_counted(ablate, monkeypatch, tmp_path) -> None:
    def plan(recipe: Recipe) -> list[Variant]:
        dense, bad = trained(recipe, "dense"), ("contrast", 5)
        policy = TopNormConfig(first_block=1, shares=(0.3,))
        found = [dense, with_weights(dense, "same"), with_weights(dense, "norm", policy=policy)]
        found.append(with_weights(dense, "bad", curve="dense", corruption=bad))
        return [*found, with_weights(dense, "norm_bad", policy=policy, curve="norm", corruption=bad)]

    monkeypatch.setattr(run, "find_plan", lambda name: plan)
    seen = {}

    def noted(model: Any, data: Any, *, title: str, **options: Any) -> dict:
        seen[title] = data[0][0].std().item()
        return evaluate(model, data, title=title, **options)

    monkeypatch.setattr(run, "evaluate", noted)
    content = ablate("--out", tmp_path).figures
    found = rows(content)
    assert seen["bad"] < 0.7 * seen["dense"] and seen["same"] == seen["dense"]
    assert found["same"]["miou_difference"] == [0, 0, 0] and "ms" in found["norm"] and "ms" not in found["norm_bad"]
    for name, control in (("norm", "dense"), ("norm_bad", "bad"), ("bad", "dense")):  # each beside the same images
        apart = found[name]["miou"] - found[control]["miou"]
        assert found[name]["miou_difference"][0] == pytest.approx(apart, abs=2e-5)
    means = [(row["curve"], row["severity"], row["miou"]) for row in content["severities"]]
    assert means == [("dense", 5, found["bad"]["miou"]), ("norm", 5, found["norm_bad"]["miou"])]
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["ablation.png", "corruptions.png"]
