"""Two processes compute what one does with the same global batch. This file is also what torchrun runs."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sievit import cli
from sievit.data.coco import CocoDetection
from sievit.data.scenes import CLASSES, generate
from sievit.engine.batches import Batch, Losses
from sievit.engine.evaluate import evaluate
from sievit.engine.optim import freeze
from sievit.engine.recipe import Frozen, Recipe, TrainConfig
from sievit.engine.train import train
from sievit.heads import ATMConfig, LinearConfig, SemanticHeadConfig, SETRNaiveConfig
from sievit.models.build import build, load
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter
from sievit.necks import NeckConfig
from sievit.necks.adapter import AdapterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import DToPConfig, SViTConfig, gates
from test_metrics import one_process, several_processes
from tiny import coco_data, refused, run_two_processes, tiny_detector, tiny_head, tiny_segmenter, tiny_vit

EVERYTHING = 10**6
ADAPTER = AdapterConfig(conv_inplane=4, deform_num_heads=2, num_interactions=2)
DETECTORS: dict[str, tuple[NeckConfig, bool, Frozen]] = {
    "batch mean": (PyramidConfig(out_channels=16), False, "none"),
    "per sample": (PyramidConfig(out_channels=16), True, "none"),
    "batch norm": (ADAPTER, False, "none"),
    "frozen": (ADAPTER, False, "vit"),
    "gates alone": (ADAPTER, False, "model"),
    "frozen blocks": (PyramidConfig(out_channels=16), False, 2),
    "budgets": (PyramidConfig(out_channels=16), False, "none"),
    "selected": (PyramidConfig(out_channels=16), False, "none"),
}
SEGMENTERS: dict[str, SemanticHeadConfig] = {
    "atm": ATMConfig(channels=16, num_heads=2, num_layers=2, dropout=0.0),
    "linear": LinearConfig(),
    "naive": SETRNaiveConfig(channels=8, dropout=0.0),
}
CASES = [*DETECTORS, *SEGMENTERS]


def tiny_model(
    *, neck: NeckConfig = ADAPTER, per_sample: bool = False, budgets: tuple[float, float] | None = None
) -> DetectorConfig:
    """A detector whose samplers take everything there is, so that nothing is left to chance."""
    return tiny_detector(
        neck=neck,
        policy=SViTConfig(first_block=1, targets=(0.7, 0.5, 0.3), per_sample=per_sample, budgets=budgets),
        head=tiny_head(
            rpn={"batch_size": EVERYTHING, "post_nms_train": 30},
            roi={"sampling_ratio": 2},
            box={"batch_size": EVERYTHING, "max_detections": 100},
        ),
        input=InputConfig(min_size=64, max_size=64),
    )


def batch(rows: slice) -> Batch:
    """Some of four images with 3, 0, 1 and 6 objects: every count of a loss differs between the halves."""
    generator = torch.Generator().manual_seed(5)
    images, targets = [], []
    for objects in (3, 0, 1, 6):
        images.append(torch.rand(3, 64, 64, generator=generator))
        corner = torch.rand(objects, 2, generator=generator) * 30
        boxes = torch.cat([corner, corner + 8 + 24 * torch.rand(objects, 2, generator=generator)], dim=1)
        masks = torch.zeros(objects, 64, 64, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(objects) % len(CLASSES) + 1, "masks": masks})
    return Batch(images[rows], targets[rows], torch.device("cpu"))


def segmenter(head: SemanticHeadConfig) -> Segmenter:
    model = build(
        tiny_segmenter(
            vit=tiny_vit(patch_size=8, embed_dim=24, depth=3, num_heads=3),
            policy=DToPConfig(thresholds=(0.3,), keep_per_class=1),
            head=head,
            out_indices=(0, 2),
            classes=tuple("abcd"),
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def labelled(rows: slice) -> Batch:
    """Some of four images with label maps: one without any label, one of a single class, one in part unknown."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 4, (4, 32, 32), generator=generator)
    labels[0] = labels[2, :20] = 255
    labels[1] = 1
    return Batch(list(images[rows]), [{"labels": one} for one in labels[rows]], torch.device("cpu"))


def gradients(rows: slice, case: str) -> dict[str, Tensor]:
    """Of the sum of losses on some images, averaged over processes; and the running statistics afterwards."""
    torch.manual_seed(0)
    if case in SEGMENTERS:
        model, given = segmenter(SEGMENTERS[case]), labelled(rows)
    else:
        (neck, per_sample, frozen), given = DETECTORS[case], batch(rows)
        budgets = (0.5, 1.2) if case == "budgets" else None
        model = build(tiny_model(neck=neck, per_sample=per_sample, budgets=budgets))
        freeze(model, frozen)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.1)  # at zero the injectors have no gradient
    losses = Losses(model.train())
    wrapped = DistributedDataParallel(losses) if dist.is_initialized() else losses
    torch.manual_seed(rows.start)  # the second process draws something else than the first
    values, shares = wrapped(given, selected=case == "selected")
    assert 0 < shares.min() < 1
    torch.stack(list(values.values())).sum().backward()
    result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert result.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return {**result, **dict(model.named_buffers())}


def recipe(root: Path) -> Recipe:
    return Recipe(
        model=tiny_model(),
        data=coco_data(root, ".", "."),
        train=TrainConfig(epochs=1, batch_size=4, accumulate=1, lr=1e-3, warmup_steps=1, workers=0, ema=0.5),
    )


def dataset(root: Path) -> CocoDetection:
    return CocoDetection(root / "images", root / "annotations.json", with_masks=False)


def worker(folder: Path) -> None:
    """What each process of torchrun does; process 0 writes the results."""
    torch.set_num_threads(1)
    rank, store = int(os.environ["RANK"]), f"file://{folder / 'store'}"
    train(recipe(folder / "data"), out=folder / "run")  # leaves no process group behind
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    assert predicted(folder, "two") == 1
    half = slice(2 * rank, 2 * rank + 2)
    with mock.patch.object(gates, "gumbel_noise", torch.zeros_like):
        results = {case: gradients(half, case) for case in CASES}
    figures = evaluate(load(folder / "run"), dataset(folder / "data"))
    several_processes(folder, rank)
    if rank == 0:
        torch.save(results, folder / "gradients.pt")
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    dist.destroy_process_group()


def predicted(folder: Path, out: str) -> int:
    """The exit status of a job over five images, one of which is broken."""
    args = ["predict", folder / "run", folder / "photos", "--out", folder / out, "--batch-size", 2, "--pictures", False]
    return cli.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    generate(folder / "data", num_images=5, size=(64, 64), seed=1)
    shutil.copytree(folder / "data" / "images", folder / "photos")
    next(iter(sorted((folder / "photos").iterdir()))).write_bytes(b"no image")
    run_two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(folder: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gates, "gumbel_noise", torch.zeros_like)
    two = torch.load(folder / "gradients.pt", weights_only=True)[case]
    one = gradients(slice(0, 4), case)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        scale = float(expected.double().abs().max())
        difference = float((two[name] - expected).abs().max())
        assert difference <= 1e-4 * scale + 1e-6, f"{name}: {difference} of {scale}"
    policy = [float(value.abs().max()) for name, value in one.items() if "policy" in name]
    assert case in SEGMENTERS or max(policy) > 0


def test_figures_are_those_of_one_process(folder: Path):
    two = json.loads((folder / "figures.json").read_text())
    one = evaluate(load(folder / "run"), dataset(folder / "data"))
    assert two["images"] == one["images"] == 5
    for name in one:
        if not name.startswith("ms_"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_metrics_are_those_of_one_process(folder: Path):
    one = one_process()
    assert [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)] == [one, one]


def test_several_processes_share_a_job(folder: Path):
    """Their files are those of one process, byte for byte, and none of theirs is left."""
    assert predicted(folder, "one") == 1
    one, two = ({p.name: p.read_bytes() for p in (folder / out).iterdir()} for out in ("one", "two"))
    assert one == two
    assert len(one["results.jsonl"].splitlines()) == 5 and b"no image" not in one["results.json"]
    assert len(one["failures.jsonl"].splitlines()) == 1


def test_runs_are_resumed_by_as_many_processes_and_batches_split(folder: Path, monkeypatch: pytest.MonkeyPatch):
    refused("was run by 2 processes", train, None, out=folder / "run", resume=True)

    monkeypatch.setenv("WORLD_SIZE", "3")
    changed = replace(recipe(folder / "data"), train=replace(recipe(folder).train, batch_size=4))
    refused("does not split over 3 processes", train, changed, out=folder / "other")
    assert not (folder / "other").exists()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
