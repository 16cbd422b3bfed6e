"""Training: resuming bit for bit, starting weights, signals, folders, and what goes wrong."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from sievit.config import ConfigError
from sievit.data.scenes import CLASSES
from sievit.data.transforms import AugmentConfig
from sievit.engine import launch
from sievit.engine import train as engine
from sievit.engine.batches import Batch, EpochBatches, Losses
from sievit.engine.checkpoint import RunFolder, read_log
from sievit.engine.initial import dense_teacher, start_from, start_vit_from
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.engine.train import Interrupted, train
from sievit.heads.config import BoxConfig
from sievit.models.build import build, load, save
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.necks.adapter import AdapterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import KeepAllConfig, SViTConfig, register
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.policies.svit import SViT
from sievit.tasks.detection import CocoData
from sievit.tokens import Tokens, Trace
from tiny import (
    assert_same_weights,
    coco_data,
    count,
    killed_at,
    refused,
    stopping_at,
    tiny_detector,
    tiny_head,
    tiny_segmenter,
    tiny_vit,
)

MODEL = tiny_detector(
    vit=tiny_vit(drop_path_rate=0.1),
    neck=AdapterConfig(conv_inplane=4, deform_num_heads=2, num_interactions=2, drop_path_rate=0.1),
    policy=SViTConfig(first_block=1, targets=(0.7, 0.5, 0.3)),
    head=tiny_head(roi={"sampling_ratio": 2}, box={"min_score": 0.05}),
    input=InputConfig(min_size=64, max_size=64),
)


@pytest.fixture(scope="module")
def recipe(scenes_of: Callable[..., Path]) -> Recipe:
    """Everything that draws random numbers or keeps a state is on: drop path, gates, augmentation, averages, parts."""
    return Recipe(
        model=MODEL,
        data=coco_data(
            scenes_of(12, (64, 64), val=3),
            augment=AugmentConfig(scales=(64, 80), crop=(64, 64), rot90=True, brightness=0.1),
        ),
        train=TrainConfig(
            epochs=2,
            batch_size=4,
            accumulate=2,
            lr=1e-3,
            warmup_steps=2,
            schedule="cosine",
            clip_norm=1.0,
            ema=0.9,
            precision="bf16-mixed",
            val_images=2,
            log_every=2,
            workers=0,
        ),
    )


def trained(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other settings of training."""
    return replace(recipe, train=replace(recipe.train, **changes))


def state_of(out: Path) -> dict[str, Any]:
    state = RunFolder(out).load_state()
    assert state is not None
    return state


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The finished run of the recipe."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(recipe, out=out)
    return RunFolder(out)


def same(a: Any, b: Any, *, where: str = "state") -> None:
    """Bit for bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for name in a:
            if name not in ("figures", "ms_per_image"):
                same(a[name], b[name], where=f"{where}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, where=f"{where}[{i}]")
    else:
        assert a == b, where


def test_a_run_leaves_a_model_a_log_and_figures(recipe: Recipe, whole: RunFolder):
    figures = whole.metrics()
    assert figures["images"] == 3, "the final figures are those of all images"
    assert {"box_ap", "mask_ap_small", "keep", "tokens", "gflops", "gflops_std", "ms_per_image"} <= figures.keys()
    rows = read_log(whole.log_file)
    assert [int(row["step"]) for row in rows] == [2, 3, 4, 6]
    names = {"epoch", "lr", "loss", "loss_mask", "ratio", "keep_0", "keep_3", "grad_norm", "images_per_s", "s_per_step"}
    assert names <= rows[0].keys()
    assert float(rows[0]["keep_0"]) == 1
    assert [row["epoch"] for row in read_log(whole.val_file)] == ["0", "1"]
    assert whole.recipe() == recipe
    for path in (whole.path, whole.last_file):
        assert load(path).config == recipe.model


def test_the_course_of_a_run_is_a_picture(whole: RunFolder, tmp_path: Path, command: Callable[..., Any]):
    command("curve", whole.path, "--also", whole.path, "--out", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1920, 576)
    assert "is not the folder of a run" in command("curve", tmp_path, status=2).err
    (tmp_path / "recipe.json").write_text((whole.path / "recipe.json").read_text())
    assert "nothing is logged yet" in command("curve", tmp_path, status=2).err


@pytest.mark.parametrize(("workers", "step"), [(0, 2), (1, 5)])
def test_a_killed_run_goes_on_exactly(workers: int, step: int, recipe: Recipe, whole: RunFolder, tmp_path: Path):
    killed = RunFolder(tmp_path / "killed")
    killed_at(step, trained(recipe, workers=workers, save_every=0.0), killed.path)
    train(None, out=killed.path, resume=True)
    same(whole.load_state(), killed.load_state())
    for file in ("best.safetensors", "last.safetensors"):
        same(*(dict(load(run.path / file).state_dict()) for run in (whole, killed)))
    timeless = {"images_per_s": "", "s_per_step": ""}
    logs = [[{**row, **timeless} for row in read_log(run.log_file)] for run in (whole, killed)]
    assert logs[0] == logs[1]


@pytest.fixture
def cheap(recipe: Recipe) -> Recipe:
    """From the third step on it computes the selected tokens alone; its gates are trained for a range of budgets."""
    policy = SViTConfig(first_block=1, targets=(0.7, 0.5, 0.3), budgets=(0.5, 1.2))
    return trained(replace(recipe, model=replace(MODEL, policy=policy)), selected_after=2, save_every=0.0)


def test_selected_tokens_alone_after_so_many_steps_and_a_killed_run_goes_on_exactly(
    cheap: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    modes = []
    original = Detector.forward

    def spied(self: Detector, images: list, targets: Any = None, **options: Any) -> Any:
        if targets is not None:
            modes.append(options["execution"].mode)
        return original(self, images, targets, **options)

    monkeypatch.setattr(Detector, "forward", spied)
    train(cheap, out=tmp_path / "whole")
    assert modes == ["auto"] * 4 + ["selected"] * 8, "two parts per step"
    selected = state_of(tmp_path / "whole")
    for step in (1, 4):
        out = tmp_path / f"killed{step}"
        killed_at(step, cheap, out)
        train(None, out=out, resume=True)
        same(selected, state_of(out))
    train(trained(cheap, selected_after=None), out=tmp_path / "masked")
    masked = state_of(tmp_path / "masked")["model"]
    assert not all(torch.equal(selected["model"][name], value) for name, value in masked.items())


def test_gradients_of_selected_tokens_reach_gates_and_backbone_even_where_nothing_is_selected(cheap: Recipe):
    torch.manual_seed(0)
    steady = replace(cheap.model.vit, drop_path_rate=0.0)
    model = build(replace(cheap.model, vit=steady, neck=AdapterConfig(conv_inplane=4, deform_num_heads=2))).train()
    gate = model.policy.get_submodule("gates.1")
    torch.nn.init.zeros_(gate.get_parameter("fc2.weight"))
    gate.get_parameter("fc2.bias").data = torch.tensor([-50.0, 50.0])  # nobody in block 2
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.1)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "masks": torch.ones(1, 64, 64).byte()}
    losses, shares = Losses(model)(Batch([torch.rand(3, 64, 64)], [target], torch.device("cpu")), selected=True)
    assert shares[2] == 0 and shares[1] > 0 and shares[3] > 0
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name}: processes would wait for it"
    for block in range(4):
        moved = model.vit.blocks[block].get_parameter("mlp.fc1.weight").grad
        assert moved is not None and bool(moved.any()) == (block != 2)
    for i in (0, 2):
        gradient = model.policy.get_parameter(f"gates.{i}.fc1.weight").grad
        assert gradient is not None and gradient.any()


def test_gates_for_a_range_of_budgets_start_from_gates_without(cheap: Recipe, tmp_path: Path):
    torch.manual_seed(3)
    plain, ranged = build(MODEL), build(cheap.model)
    save(plain, tmp_path / "plain.safetensors")
    new = start_from(ranged, tmp_path / "plain.safetensors")
    assert new == tuple(f"backbone.policy.gates.{i}.budget" for i in range(3))
    same(dict(plain.state_dict()), {n: v for n, v in ranged.state_dict().items() if n not in new})
    save(ranged, tmp_path / "ranged.safetensors")
    assert start_from(plain, tmp_path / "ranged.safetensors") == ()


@pytest.fixture
def vit_file(tmp_path: Path) -> Path:
    """A pre-trained ViT, in a manner of speaking."""
    state = build(replace(MODEL, policy=KeepAllConfig())).vit.state_dict()
    torch.save(dict(state), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


def test_gates_learn_alone_in_a_trained_model(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And what is wrong with them is said at the end, once."""
    monkeypatch.setattr(SViT, "hint", lambda self, kept: f"gates: {len(kept)} blocks")
    said = io.StringIO()
    start = tmp_path / "start.safetensors"
    save(build(MODEL), start)
    steps = trained(recipe, init_from=start, freeze="model", epochs=2, save_every=0.0)
    train(steps, out=tmp_path / "run", console=Console(file=said))
    assert said.getvalue().count("gates: 4 blocks; --train.policy-lr is") == 1 < said.getvalue().count("epoch ")
    before, after = dict(load(start).state_dict()), dict(load(tmp_path / "run/last.safetensors").state_dict())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if ".policy.gates." in name}


@pytest.mark.parametrize("what", ["vit", pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_frozen_stays_and_a_killed_run_goes_on_exactly(
    what: Literal["vit"] | int, recipe: Recipe, vit_file: Path, tmp_path: Path
):
    recipe = trained(recipe, vit_from=vit_file, freeze=what, save_every=0.0)
    said = io.StringIO()
    train(recipe, out=tmp_path / "whole", console=Console(file=said))
    whole = state_of(tmp_path / "whole")
    vit = {f"backbone.vit.{n}": value for n, value in torch.load(vit_file, weights_only=True).items()}
    fixed = {n for n in vit if what == "vit" or not n.startswith(("backbone.vit.blocks.2", "backbone.vit.blocks.3"))}
    for name, value in vit.items():
        equal = torch.equal(whole["model"][name], value), torch.equal(whole["average"]["values"][name], value)
        assert equal == ((True, True) if name in fixed else (False, False)), name
    moved = set(whole["optimizer"]["state"])
    assert len(moved) == sum(len(group["params"]) for group in whole["optimizer"]["param_groups"])
    model = build(MODEL)
    assert len(moved) == len(list(model.parameters())) - len(fixed)
    learned = sum(p.numel() for name, p in model.named_parameters() if name not in fixed)
    assert f"training {learned:,} of {count(model):,} parameters" in said.getvalue()
    torch.manual_seed(recipe.train.seed)
    first = build(MODEL).policy.state_dict()
    for name, value in first.items():
        assert not torch.equal(whole["model"][f"backbone.policy.{name}"], value), f"{name}: the gates learn"
    killed_at(5, recipe, tmp_path / "killed")
    vit_file.unlink()
    train(None, out=tmp_path / "killed", resume=True)
    same(whole, state_of(tmp_path / "killed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state(number: signal.Signals, recipe: Recipe, tmp_path: Path):
    out = tmp_path / "run"
    handler = signal.getsignal(number)
    with stopping_at(2, lambda: os.kill(os.getpid(), number)), pytest.raises(Interrupted, match=f"--resume {out}"):
        train(trained(recipe, workers=1), out=out)
    assert signal.getsignal(number) is handler
    assert state_of(out)["step"] == 2


def test_a_signal_during_validation_loses_nothing(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(engine, "evaluate", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="--resume"):
            train(recipe, out=out)
    state = state_of(out)
    assert (state["step"], state["validated"]) == (3, 0)
    train(None, out=out, resume=True)
    assert [row["epoch"] for row in read_log(RunFolder(out).val_file)] == ["0", "1"]
    same(whole.load_state(), RunFolder(out).load_state())


@pytest.mark.slow
def test_a_process_killed_outright_goes_on_exactly(recipe: Recipe, tmp_path: Path):
    """SIGKILL at any moment, with a worker process, from the command line's function."""
    recipe = trained(recipe, epochs=20, val_every=20, workers=1, save_every=0.0, threads=1)
    train(recipe, out=tmp_path / "whole")
    RunFolder(tmp_path / "killed").start(recipe)
    script = (
        "from pathlib import Path; from sievit.engine.train import train; "
        f"train(None, out=Path({str(tmp_path / 'killed')!r}), resume=True)"
    )
    for wait in (0.2, 1.0):
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while not (tmp_path / "killed" / "state.pt").exists():
            time.sleep(0.1)
        time.sleep(wait)
        process.kill()
        process.wait()
    train(None, out=tmp_path / "killed", resume=True)
    same(state_of(tmp_path / "whole"), state_of(tmp_path / "killed"))


def test_a_folder_with_a_run_stays_as_it_is(recipe: Recipe, tmp_path: Path, whole: RunFolder):
    RunFolder(tmp_path).start(recipe)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    refused(r"holds a run already.*--resume.*--out", train, recipe, out=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    files = {p.name: p.read_bytes() for p in whole.path.iterdir()}
    assert train(None, out=whole.path, resume=True) == whole.metrics()
    assert {p.name: p.read_bytes() for p in whole.path.iterdir()} == files


def test_a_full_disk_keeps_the_last_state(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, calls = tmp_path / "run", []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*--resume") as failed:
            train(trained(recipe, save_every=0.0), out=out)
    assert Path(failed.value.filename).parent == out
    assert not list(out.glob(".*")), "nothing half-written is left"
    train(None, out=out, resume=True)
    same(whole.load_state(), RunFolder(out).load_state())


def test_a_missing_image_and_a_loss_that_is_no_number_stop(recipe: Recipe, tmp_path: Path):
    assert recipe.data.root is not None and isinstance(recipe.data, CocoData)
    source = json.loads((recipe.data.root / recipe.data.train_annotations).read_text())
    source["images"][5]["file_name"] = "gone.png"
    listing = tmp_path / "broken.json"
    listing.write_text(json.dumps(source))
    for workers in (0, 1):
        data = replace(recipe.data, train_annotations=listing)
        with pytest.raises(ConfigError, match=r"gone\.png") as failed:
            train(trained(replace(recipe, data=data), workers=workers), out=tmp_path / f"broken{workers}")
        assert "Traceback" not in str(failed.value)

    with pytest.raises(ConfigError, match=r"is (nan|inf) at step \d+; lower train.lr"):
        train(trained(recipe, lr=1e30, clip_norm=None, warmup_steps=0), out=tmp_path)


def test_classes_come_from_the_annotations(recipe: Recipe, tmp_path: Path):
    """Other ids, in another order, and boxes alone."""
    data = recipe.data
    assert data.root is not None and isinstance(data, CocoData)
    source = json.loads((data.root / data.train_annotations).read_text())
    source["categories"] = [{"id": 50 - c["id"], "name": f"my {c['name']}"} for c in source["categories"]]
    for annotation in source["annotations"]:
        annotation["category_id"] = 50 - annotation["category_id"]
        del annotation["segmentation"]
    (tmp_path / "mine.json").write_text(json.dumps(source))
    data = replace(
        data,
        train_annotations=tmp_path / "mine.json",
        val_annotations=tmp_path / "mine.json",
        val_images=data.train_images,
        own_classes=True,
    )
    head = replace(MODEL.head, num_classes=1, with_masks=False)
    model = replace(MODEL, classes=("thing",), category_ids=(1,), head=head)
    own = trained(replace(recipe, model=model, data=data), epochs=1, ema=0.0, val_images=None)
    figures = train(own, out=tmp_path / "run")
    assert "box_ap" in figures and "mask_ap" not in figures, "no masks needed for boxes"
    found = load(tmp_path / "run").config
    assert isinstance(found, DetectorConfig)
    assert found.classes == tuple(f"my {name}" for name in reversed(CLASSES))
    assert found.category_ids == tuple(range(50 - len(CLASSES), 50))
    assert found.head.num_classes == len(CLASSES)
    assert RunFolder(tmp_path / "run").recipe().model == found
    assert train(None, out=tmp_path / "run", resume=True) == figures
    with pytest.raises(ConfigError, match=r"are not the model's \(1: thing\); --data\.own-classes takes those"):
        train(replace(own, data=replace(data, own_classes=False)), out=tmp_path / "other")
    (tmp_path / "mine.json").write_text(json.dumps({**source, "categories": []}))
    refused(r"mine\.json: 'categories' is empty", train, own, out=tmp_path / "other")


def test_sparse_training_starts_from_dense(tmp_path: Path):
    dense = build(replace(MODEL, policy=KeepAllConfig()))
    save(dense, tmp_path / "dense.safetensors")
    sparse = build(MODEL)
    gates = {name: value.clone() for name, value in sparse.policy.state_dict().items()}
    start_from(sparse, tmp_path / "dense.safetensors")
    for name, value in dense.state_dict().items():
        assert torch.equal(sparse.state_dict()[name], value)
    same(gates, dict(sparse.policy.state_dict()))
    save(sparse, tmp_path / "sparse.safetensors")
    start_from(dense, tmp_path / "sparse.safetensors")  # the gates are left out
    other = build(replace(MODEL, head=replace(MODEL.head, box=BoxConfig(fc=24))))
    shallow = build(replace(MODEL, vit=replace(MODEL.vit, depth=3), neck=PyramidConfig(8), policy=KeepAllConfig()))
    deep = build(replace(MODEL, neck=PyramidConfig(8), policy=KeepAllConfig()))
    save(deep, tmp_path / "deep.safetensors")
    assert start_from(shallow, tmp_path / "deep.safetensors") == ()
    assert_same_weights(shallow.vit.blocks[2], deep.vit.blocks[2])
    save(shallow, tmp_path / "shallow.safetensors")
    refused(r"another model.*blocks\.3", start_from, deep, tmp_path / "shallow.safetensors")
    refused(r"another model.*box_head", start_from, other, tmp_path / "dense.safetensors")
    refused("no such file", start_from, other, tmp_path / "nowhere.safetensors")


def test_training_starts_from_a_model_of_other_classes(tmp_path: Path):
    known = build(MODEL)
    save(known, tmp_path / "trained.safetensors")
    head = replace(MODEL.head, num_classes=2)
    two = replace(MODEL, head=head, classes=("cat", "dog"), category_ids=(1, 2))
    for masks, more in ((True, {"mask_predictor.mask_fcn_logits"}), (False, set())):
        model = build(replace(two, head=replace(head, with_masks=masks)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        new = start_from(model, tmp_path / "trained.safetensors")
        rows = {"box_predictor.cls_score", "box_predictor.bbox_pred", *more}
        assert set(new) == {f"head.roi_heads.{name}.{kind}" for name in rows for kind in ("weight", "bias")}
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name] if name in new else known.state_dict()[name]), name
    boxes = build(replace(two, head=replace(head, with_masks=False)))
    save(boxes, tmp_path / "boxes.safetensors")
    refused(r"another model.*mask_head", start_from, known, tmp_path / "boxes.safetensors")


def test_a_run_starts_from_a_run(recipe: Recipe, tmp_path: Path):
    recipe = trained(recipe, epochs=1, ema=0.0, lr=0.0, warmup_steps=0)
    dense = replace(recipe, model=replace(MODEL, policy=KeepAllConfig()))
    train(dense, out=tmp_path / "dense")
    train(trained(recipe, init_from=tmp_path / "dense"), out=tmp_path / "sparse")
    first, second = load(tmp_path / "dense"), load(tmp_path / "sparse")
    for name, value in first.named_parameters():
        assert torch.equal(second.get_parameter(name), value), name
    refused("leave out", replace, recipe.train, init_from=tmp_path, vit_from=tmp_path)


def test_a_pretrained_vit_is_loaded(tmp_path: Path):
    import timm

    source: Any = timm.models.VisionTransformer(img_size=64, embed_dim=16, depth=4, num_heads=2, num_classes=3)
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    vit = build(MODEL).vit
    start_vit_from(vit, tmp_path / "vit.pth")
    assert torch.equal(vit.blocks[3].get_parameter("mlp.fc2.weight"), source.blocks[3].mlp.fc2.weight)
    assert torch.equal(vit.get_parameter("pos_embed"), source.pos_embed[:, 1:])
    wide = build(replace(MODEL, vit=replace(MODEL.vit, embed_dim=32))).vit
    refused(r"vit\.pth: not the recipe's ViT; of another shape", start_vit_from, wide, tmp_path / "vit.pth")
    (tmp_path / "vit.pth").write_bytes(b"nothing")
    refused("damaged", start_vit_from, vit, tmp_path / "vit.pth")
    refused("no such file", start_vit_from, vit, tmp_path / "gone.pth")


def test_an_epoch_is_a_permutation_that_processes_share():
    config = TrainConfig(batch_size=8, accumulate=2, seed=3)
    alone = EpochBatches(20, replace(config, accumulate=1), rank=0, processes=1)
    ranks = [EpochBatches(20, config, rank=rank, processes=2) for rank in range(2)]
    whole = list(alone)
    assert len(whole) == len(alone) == 2
    assert len({index for batch in whole for index in batch}) == 16
    parts = [list(rank) for rank in ranks]
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(i for rank in parts for part in rank[2 * step : 2 * step + 2] for i in part)
    alone.start = 1
    assert list(alone) == whole[1:]
    alone.start, alone.epoch = 0, 1
    assert list(alone) != whole
    refused("more than the 7 training images", EpochBatches, 7, config, rank=0, processes=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"batch_size": 5}, "does not split into 2 parts"),
        ({"ema": 1.0}, r"ema is 1\.0"),
        ({"selected_after": -1}, "selected_after is -1"),
        ({"layer_decay": 0.0}, r"layer_decay is 0\.0"),
        ({"layer_decay": 1.1}, r"layer_decay is 1\.1"),
        ({"freeze": 0}, "freeze is 0"),
        ({"freeze": -2}, "freeze is -2"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], words: str, recipe: Recipe):
    refused(words, replace, recipe.train, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"selected_after": 6}, r"selected_after 6: the run has 6 steps; give fewer"),
        ({"freeze": "vit"}, r"would keep random weights; give train\.vit-from or train\.init-from"),
        ({"freeze": "model", "vit_from": Path("vit.pth")}, r"would keep random weights; give train\.init-from, a"),
        ({"freeze": 5, "vit_from": Path("vit.pth")}, r"freeze is 5, but the ViT has 4 blocks"),
        ({"init_from": Path("nothing.safetensors")}, r"nothing\.safetensors"),
        ({"precision": "16-mixed"}, "16-mixed needs a CUDA device"),
        ({"model": replace(MODEL, category_ids=tuple(i + 1 for i in MODEL.category_ids))}, "categories"),
        ({"train_annotations": Path("nowhere.json")}, "nowhere"),
    ],
)
def test_a_recipe_that_cannot_start_leaves_no_run_behind(
    change: dict[str, Any], words: str, recipe: Recipe, vit_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(vit_file.parent)
    if "model" in change:
        wrong = replace(recipe, **change)
    elif "train_annotations" in change:
        wrong = replace(recipe, data=replace(recipe.data, **change))
    else:
        wrong = trained(recipe, **change)
    refused(words, train, wrong, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Losses of a policy that compare with the dense model (distillation).


@dataclass(frozen=True)
class DistilledConfig(SharesConfig):
    """Tokens at the left."""


@register(DistilledConfig)
class Distilled(SharesPolicy):
    """Its tokens are to be those of the dense model (DynamicViT, arXiv 2106.02034, equation 11)."""

    needs_teacher = True

    def scores(self, index: int, tokens: Tokens) -> Tensor:
        return -torch.arange(tokens.patches.shape[1]).expand(len(tokens.x), -1)

    def loss(
        self, trace: Trace, *, teacher: Trace | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        assert teacher is not None and trace.tokens is not None and teacher.tokens is not None and targets is not None
        return {"distilled": (trace.tokens.x - teacher.tokens.x).square().mean()}


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_a_policy_learns_from_the_dense_model(kind: str, tmp_path: Path) -> None:
    config = (tiny_detector if kind == "detector" else tiny_segmenter)(policy=KeepAllConfig())
    dense = build(config)
    save(dense, tmp_path / "dense.safetensors")
    box = {
        "boxes": torch.tensor([[4.0, 4, 30, 40]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64).bool(),
    }
    target = box if kind == "detector" else {"labels": torch.zeros(64, 64, dtype=torch.int64)}
    batch = Batch([torch.rand(3, 64, 64)], [target], torch.device("cpu"))
    for share in (1.0, 0.5):
        model = build(replace(config, policy=DistilledConfig(first_block=1, shares=(share,)))).train()
        model.load_state_dict(dense.state_dict())
        losses = Losses(model, dense_teacher(model.policy, TrainConfig(init_from=tmp_path / "dense.safetensors")))
        assert {*losses.state_dict()} == {f"model.{name}" for name in model.state_dict()}, "the teacher is not trained"
        found = losses(batch)[0]["distilled"]
        assert (found.item() == 0) == (share == 1)
    found.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.vit.parameters())


def test_without_a_dense_model_it_cannot_be_trained() -> None:
    model = build(tiny_detector(policy=DistilledConfig(first_block=1)))
    refused(r"name it with train\.init-from", dense_teacher, model.policy, TrainConfig())


@pytest.mark.parametrize(("bfloat16", "float32", "said"), [(30.0, 10.0, True), (11.0, 10.0, False)])
def test_a_cpu_that_is_slow_in_bfloat16_is_named(
    bfloat16: float, float32: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {torch.bfloat16: bfloat16, torch.float32: float32}
    monkeypatch.setattr(launch, "clocked", lambda call, device: (times[call().dtype], None))
    text = launch.slow_bfloat16(TrainConfig(precision="bf16-mixed"), torch.device("cpu"))
    assert bool(text) is said and ("3.0 times" in text) is said
    assert launch.slow_bfloat16(TrainConfig(precision="32-true"), torch.device("cpu")) == ""
