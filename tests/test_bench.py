"""The bench keeps the shares and images that it is given, reports what it timed, and loses nothing when stopped."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import sievit
from sievit.bench import (
    BackboneBench,
    BlocksBench,
    HeadsBench,
    NetworkBench,
    bench_backbone,
    bench_blocks,
    bench_heads,
    bench_network,
    timing,
)
from sievit.bench.common import load_images, normalised, run
from sievit.bench.heads import _part_rows, machine_rates, stopwatch
from sievit.bench.network import timed_blocks, timed_model, timed_network
from sievit.bench.random_models import ADAPTERS, SEGMENTERS, SIZES, random_exits, random_segmenter, random_vit
from sievit.bench.rows import draw_rows
from sievit.bench.timing import Cost, time_modes
from sievit.config import ConfigError
from sievit.heads import ATMConfig, build_head
from sievit.measure.clock import Pair
from sievit.measure.meters import counted_syncs, memory
from sievit.measure.modes import DENSE, MODES, RunMode
from sievit.models.detector import Detector
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter
from sievit.necks.adapter import AdapterConfig
from sievit.policies import DToPConfig, PolicyConfig, PolicyOptions, RandomConfig, SViTConfig
from sievit.policies.svit import SViT
from sievit.tokens import Trace
from sievit.vit import Execution, ViTConfig
from sievit.vit.packed import Packing
from tiny import image_folder, refused, tiny_detector, tiny_head, tiny_vit

QUIET = Console(quiet=True)
TINY = tiny_vit(embed_dim=32, depth=6)
HEAD = ATMConfig(channels=32, num_heads=4)
BENCHES: dict[str, tuple[Any, Any]] = {
    "blocks": (BlocksBench, bench_blocks),
    "backbone": (BackboneBench, bench_backbone),
    "network": (NetworkBench, bench_network),
    "heads": (HeadsBench, bench_heads),
}


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that benches make by name."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setitem(SIZES, "deep", replace(TINY, depth=8))
    monkeypatch.setitem(ADAPTERS, "deep", AdapterConfig(conv_inplane=8, deform_num_heads=2))
    monkeypatch.setitem(SEGMENTERS, "tiny", (HEAD, (1, 3, 5)))
    monkeypatch.setattr("sievit.bench.random_models.HEAD", tiny_head())


def rows_of(bench: str, console: Console = QUIET, **options: Any) -> list[dict[str, Any]]:
    """What a bench of tiny models gives."""
    made = {} if "checkpoints" in options else {"models": ("deep" if bench in ("backbone", "heads") else "tiny",)}
    config, run = BENCHES[bench]
    return run(config(**{"batches": (2,), "repeats": 2, "sizes": ((64, 96),), **made, **options}), console)["rows"]


def scenes(size: tuple[int, int], count: int) -> torch.Tensor:
    return normalised(load_images(None, size, count))


@torch.inference_mode()
def test_calibrated_gates_keep_their_share_of_these_images() -> None:
    images = scenes((96, 128), 4)
    vit, sparse = random_vit(TINY, images, PolicyOptions(), (0.7, 0.3))
    assert isinstance(sparse, SViT)
    traces = [vit(image, sparse)[1] for image in images.split(1)]
    shares = torch.stack([trace.shares()[:, 0] for trace in traces]).mean(0)
    assert shares[:3].tolist() == [1.0, 1.0, 1.0]
    assert shares[3:].tolist() == pytest.approx([sparse.targets[i] for i in range(3)], abs=0.03)


CPU = torch.device("cpu")
EVERY_ROW = {"model", "size", "batch", "device", "precision", "mode", "tokens", "dense_ms", "dense_ms_p95", "sparse_ms"}
EVERY_ROW |= {"sparse_ms_p95", "speedup", "predicted", "realised", "realised_quartiles", "pairs", "gflops", "keep"}
EVERY_ROW |= {"memory_mb", "syncs", "sync_places"}


def test_a_row_for_each_mode_holds_what_was_timed(tmp_path: Path) -> None:
    modes = ("dense", "dynamic", "bucketed", "static")
    every = rows_of("blocks", repeats=3, modes=(*modes, "static_graphs"), out=tmp_path)
    *rows, graphs = every
    assert [row["mode"] for row in rows] == list(modes)
    for row in rows:
        assert set(row) >= EVERY_ROW
        assert row["tokens"] == 24 and row["batch"] == 2 and row["pairs"] == 3 and row["size"] == [64, 96]
        assert row["dense_ms_p95"] >= row["dense_ms"] > 0 and row["sparse_ms_p95"] >= row["sparse_ms"] > 0
        assert len(row["keep"]) == 6 and min(row["memory_mb"]) > 0
    dense, dynamic, bucketed, static = rows
    assert dense["predicted"] == 1 and dense["keep"] == [1.0] * 6 and dense["syncs"] == 0
    assert "predicted_blocks" not in dense, "there are no gates"
    assert dynamic["predicted_blocks"] > dynamic["predicted"] > 1.1, "fewer tokens cost less, and gates cost something"
    assert bucketed["keep"] == dynamic["keep"] and bucketed["syncs"] < dynamic["syncs"]
    assert static["syncs"] == 0
    for share, of_choice in zip(static["keep"], dynamic["keep"], strict=True):
        assert of_choice - 1e-3 <= share < of_choice + 8 / 24 and round(share * 24) in (8, 16, 24)
    assert graphs["skipped"] == "graphs are CUDA's"
    assert json.loads((tmp_path / "blocks.json").read_text())["rows"] == every
    with Image.open(tmp_path / "blocks.png") as picture:
        assert picture.width > 800


@torch.inference_mode()
@pytest.mark.parametrize(("policy", "share"), [("svit", 0.55), ("random", 0.76), ("tome", 0.9)])
def test_any_policy_is_timed_at_a_like_share(policy: str, share: float) -> None:
    """The dial of one with weights is set on the images; others run as they are configured, as does one of a user."""
    images = scenes((96, 128), 4)
    vit, chosen = random_vit(TINY, images, PolicyOptions(policy=policy), (0.1,))
    rows = list(time_modes(timed_blocks(vit, chosen, images.split(2)), ("dynamic", "static"), multiple=1))
    assert sum(rows[0]["keep"]) / 6 == pytest.approx(share, abs=0.02)
    assert "merging" not in policy or rows[1]["skipped"].endswith("has no static counts")
    assert policy == "svit" or "skipped" in rows[1] or rows[0]["keep"] == rows[1]["keep"], "its counts are static"


@torch.inference_mode()
@pytest.mark.parametrize("name", ["bucketed", "static", "dynamic_batched"])
def test_what_is_timed_is_what_the_model_computes(name: str) -> None:
    """The dynamic choice in buckets gives the numbers of the packed one; static counts those of the same counts."""
    images, mode = scenes((96, 128), 3), RunMode.of(name)
    vit, sparse = random_vit(TINY, images, PolicyOptions(), (0.7, 0.3))
    timed = timed_blocks(vit, sparse, [images])
    policy = timed.static_policy(8) if name == "static" else sparse
    assert policy is not None
    got, trace = timed.call(policy, mode)(timed.inputs[0])
    expected, _ = vit.run_blocks(vit.embed(images), policy, Trace.start(vit.embed(images)), execution=MASKED)
    torch.testing.assert_close(got, expected.x, atol=1e-5, rtol=1e-4)
    if name == "static":
        wanted = (vit(images, sparse)[1].shares()[3:].mean(1) * 48 / 8 - 1e-6).ceil() * 8
        assert trace.counts()[3:, 0].tolist() == wanted.tolist()


MASKED = Execution(mode="masked")


def a_segmenter() -> Segmenter:
    return random_segmenter(TINY, HEAD, (1, 3, 5)).eval()


def test_a_mode_that_cannot_be_compiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler, say; the other rows are there all the same."""

    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        def call(*args: Any) -> None:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nhere\nmore")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    console = Console(record=True, width=200, quiet=False, file=StringIO())
    first, second = rows_of("blocks", console, batches=(1,), modes=("dense_compiled", "dense"))
    assert first["skipped"] == "RuntimeError: InvalidCxxCompiler: No working C++ compiler found here"
    assert first["model"] == "tiny" and "speedup" not in first and "skipped" not in second
    assert "dense_compiled: RuntimeError: InvalidCxxCompiler" in console.export_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "modes",
    [pytest.param(modes, marks=pytest.mark.slow) for modes in ("bucketed_compiled", "dense_compiled static_compiled")],
)
def test_compiled_modes_are_timed(modes: str) -> None:
    """On the CPU, where compiling takes a while."""
    rows = rows_of("blocks", modes=tuple(modes.split()), targets=(0.5,))
    assert all("skipped" not in row and row["sparse_ms"] > 0 for row in rows), rows
    if len(rows) > 1:
        assert rows[0]["predicted"] == 1 and rows[1]["predicted"] > 1 and rows[1]["syncs"] == 0


def test_images_of_a_folder_are_fitted(tmp_path: Path) -> None:
    images = load_images(image_folder(tmp_path, (40, 90), (200, 60)), (64, 96), 3)
    assert [image.shape for image in images] == [(3, 64, 96)] * 3
    torch.testing.assert_close(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@torch.inference_mode()
def test_exits_are_set_to_the_shares_that_really_leave() -> None:
    """Static ones let as many go, of every image."""
    images, segmenter = scenes((256, 320), 4), a_segmenter()
    policy = segmenter.net.policy = random_exits(segmenter, images, PolicyOptions(), (0.35, 0.55), 2)
    traces = [segmenter.net(image, policy=policy)[1] for image in images.split(1)]
    left = torch.stack([torch.stack([exited.double().mean() for exited in trace.exited]) for trace in traces])
    assert left.mean(0).tolist() == pytest.approx([0.35, 0.55, 0.55], abs=0.02)
    assert left[:, 0].std() > 0.01, "each image has its own"
    static = timed_network(segmenter, images.split(1)).static_policy(1)
    assert static is not None and static.config.static_left == pytest.approx((0.35, 0.55), abs=0.02)
    exited = segmenter.net(images, policy=static)[1].exited[:2]
    for gone, share in zip(exited, static.config.static_left, strict=True):
        assert gone.double().mean(1).tolist() == pytest.approx([share] * 4, abs=1 / 320)


@torch.inference_mode()
def test_a_row_of_a_network_holds_what_was_timed() -> None:
    common: dict[str, Any] = {"sizes": ((256, 320),), "repeats": 3, "keep_per_class": 1}
    dense, row, static = rows_of("network", **common)
    assert [each["mode"] for each in (dense, row, static)] == ["dense", "dynamic", "static"]
    assert dense["left"] == [] and static["left"] == pytest.approx([0.35, 0.55], abs=0.05) and static["syncs"] == 0
    assert row["tokens"] == 320 and row["batch"] == 2 and row["pairs"] == 3
    assert row["dense_ms_p95"] >= row["dense_ms"] > 0 and row["sparse_ms_p95"] >= row["sparse_ms"] > 0
    assert row["left"] == pytest.approx([0.35, 0.55], abs=0.05)
    assert row["realised"] == pytest.approx(row["speedup"] / row["predicted"], rel=0.3)
    heads = 2 * build_head(HEAD, embed_dim=32, num_classes=150).macs(torch.tensor([320]), (16, 20)).item() / 1e9
    extra = (row["predicted_with_heads"] - row["predicted"]) * row["gflops"][1]
    assert extra == pytest.approx(heads, rel=0.05)
    (row,) = rows_of("network", **common, policy="svit", set=("first_block=2", "targets=0.5"), modes=("dynamic",))
    assert "left" not in row and row["gflops"][1] < row["gflops"][0]
    assert sum(row["keep"]) / 6 == pytest.approx((2 + 2 * 0.65 + 2 * 0.45) / 6, abs=0.02), "as many as DToP keeps"


@torch.inference_mode()
def test_exits_do_not_change_how_scores_lie_in_memory() -> None:
    """Resizing maps that lie token by token takes ten times as long."""
    segmenter = a_segmenter()
    policy = segmenter.net.build_policy(DToPConfig(thresholds=(0.3,), keep_per_class=0))
    scores, trace = segmenter.net(scenes((64, 96), 1), policy=policy)
    assert trace.exited[-1].sum() > 0
    assert scores.is_contiguous()


def exits_of(left: tuple[float, ...]) -> object:
    return random_exits(a_segmenter(), torch.zeros(1, 3, 64, 64), PolicyOptions(), left)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(RunMode.of, "static_compile"), "did you mean 'static_compiled'"),
        (partial(rows_of, "blocks", models=("vits",)), "did you mean 'vit_s'"),
        (partial(rows_of, "network", repeats=1), "at least 2"),
        *((partial(exits_of, left), "left") for left in ((0.5,), (0.6, 0.5), (0.0, 0.5), (0.5, 1.0))),
    ],
)
def test_what_cannot_be_timed_is_named(make: Callable[[], object], message: str) -> None:
    refused(message, make)


def test_modes_have_one_name_each() -> None:
    assert [RunMode.of(name).name for name in MODES] == list(MODES)
    assert RunMode("dynamic", Execution("bucketed", compiled=True)).name == "bucketed_compiled"


HALF = RandomConfig(first_block=1, shares=(0.5,))


def detector(policy: PolicyConfig = HALF, **changes: Any) -> Detector:
    return sievit.build(tiny_detector(vit=replace(TINY, depth=4), policy=policy, **changes)).eval()


NO_MASKS = tiny_head(with_masks=False)
"""What the mask branch costs depends on what is found."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images of several sizes."""
    return image_folder(tmp_path / "images", (128, 160), (128, 192), (96, 96))


def test_a_trained_model_is_timed_by_its_own_rules(tmp_path: Path, images: Path) -> None:
    resized = InputConfig(min_size=64, max_size=96)
    detector(head=NO_MASKS, input=resized).save_pretrained(tmp_path / "balls")
    segmenter = a_segmenter()
    segmenter.config = replace(segmenter.config, input=resized)
    sievit.save(segmenter, tmp_path / "dense.safetensors")
    common: dict[str, Any] = {"policy": "random", "images": images, "modes": ("dynamic",)}
    both = (tmp_path / "balls", tmp_path / "dense.safetensors")
    rows = rows_of("network", checkpoints=both, sizes=(), batches=(3,), **common)
    assert [row["model"] for row in rows] == ["balls", "dense"]
    for row in rows:
        assert row["size"] == "own" and row["mode"] == "dynamic" and row["pairs"] == 2 and row["policy"] == "random"
        assert row["tokens"] == round((4 * 5 + 4 * 6 + 4 * 4) / 3), "64x80, 64x96 and 64x64 pixels"
        assert row["dense_ms"] > 0 and row["sparse_ms"] > 0 and min(row["memory_mb"]) > 0
        assert row["gflops"][0] > row["gflops"][1] > 0 and row["predicted"] > 1
        assert row["realised"] == pytest.approx(row["speedup"] / row["predicted"], rel=0.5)
    assert rows[0]["kind"] == "detector" and "detections" in rows[0] and rows[1]["kind"] == "segmenter"
    (row,) = rows_of("network", checkpoints=both[:1], sizes=((128, 96),), **common)
    assert row["size"] == [128, 96] and row["tokens"] == 8 * 6


def test_static_counts_of_a_trained_detector_and_its_compiled_backbone(tmp_path: Path) -> None:
    """A compiled mode sees the backbone alone, once for each pass, and leaves nothing behind."""
    model, seen = detector(SViTConfig(first_block=1, targets=(0.5,))), []

    def compiler(call: Callable[..., Any], *, fullgraph: bool, **options: Any) -> Callable[..., Any]:
        assert fullgraph

        def compiled(given: Any) -> Any:
            seen.append(given)
            return call(given)

        return compiled

    images = [[torch.rand(3, 64, 96)] for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "compile", compiler)
        static, compiled = time_modes(timed_model(model, images), ("static", "static_compiled"), multiple=8)
        (row,) = time_modes(timed_model(model, [*images, [torch.rand(3, 32, 96)]]), ("static_compiled",), multiple=8)
    assert len(seen) == 2 + 2 + 1, "warm-up, two timed, and for the memory"
    assert compiled["keep"] == static["keep"] and static["syncs"] < 60
    assert "forward" not in vars(model.backbone)
    assert "give --sizes" in row["skipped"]


@pytest.mark.parametrize(
    "bench", [pytest.param(bench, marks=[pytest.mark.slow] * (bench in ("backbone", "heads"))) for bench in BENCHES]
)
def test_benches_run_in_bfloat16(bench: str) -> None:
    rows = rows_of(bench, sizes=((96, 128),), precision="bfloat16")
    assert [row["mode"] for row in rows] == (["dynamic"] if bench == "heads" else ["dense", "dynamic", "static"])
    assert all(row["precision"] == "bfloat16" and row["sparse_ms"] > 0 for row in rows)


@torch.inference_mode()
def test_gflops_and_shares_of_a_row_are_the_model_s(images: Path) -> None:
    model, batches = detector(head=NO_MASKS), [[image] for image in load_images(images, None, 3)]
    (figures,) = time_modes(timed_model(model, batches), ("dynamic",), multiple=1)
    dense = [model.gflops(model(batch, policy=model.build_policy(DENSE))).item() for batch in batches]
    assert figures["gflops"][0] == pytest.approx(sum(dense) / 3, abs=0.0001)
    assert figures["keep"][0] == 1.0 and figures["keep"][1:] == pytest.approx([0.5] * 3, abs=0.03)


def test_a_dense_segmenter_is_timed_with_another_policy(tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    sievit.save(a_segmenter(), path)
    dense, row, static = rows_of("network", checkpoints=(path,), policy="dtop", set=("thresholds=0.3",), batches=(1,))
    assert dense["keep"][-1] == 1 and row["policy"] == "dtop" and row["keep"][-1] < 1
    assert static["mode"] == "static" and static["keep"][-1] == pytest.approx(row["keep"][-1], abs=0.34)
    refused(r"dense\.safetensors: its policy computes every token", rows_of, "network", checkpoints=(path,))


def test_memory_is_what_is_held_at_once() -> None:
    one = memory(lambda: torch.zeros(500, 500).sum(), CPU).peak
    assert one == pytest.approx(1.0, abs=0.1)
    in_turn = memory(lambda: [torch.zeros(500, 500).sum() for _ in range(5)], CPU).peak
    assert in_turn == pytest.approx(one, abs=0.1)
    together = memory(lambda: torch.stack([torch.zeros(500, 500) for _ in range(5)]), CPU).peak
    assert together == pytest.approx(10.0, abs=0.2)


@torch.inference_mode()
def test_memory_of_the_blocks_falls_with_the_tokens() -> None:
    """Blocks 0 to 2 compute every token, so that the peak of the pass is theirs; that of the others falls."""
    images, held = scenes((512, 512), 1), []
    for target in (0.7, 0.3):
        vit, sparse = random_vit(replace(TINY, embed_dim=64), images, PolicyOptions(), (target,))
        for policy in (vit.build_policy(DENSE), sparse):
            held.append(memory(lambda policy=policy, vit=vit: vit(images, policy), CPU, list(vit.blocks)))
    dense, most, _, least = held
    assert most.peak == pytest.approx(dense.peak, rel=0.05)
    for i in (3, 4, 5):
        assert least.blocks[i] < 0.65 * most.blocks[i] < 0.65 * 0.9 * dense.blocks[i]
    assert not vit.blocks[0]._forward_hooks and not vit.blocks[0]._forward_pre_hooks, "nothing is left on them"


def test_what_asks_for_a_value_is_counted_with_its_place() -> None:
    x, mask = torch.arange(6.0), torch.tensor([True, False] * 3)
    asking: list[Callable[[], object]] = [
        lambda: x[0].item(),
        lambda: bool(mask.any()),
        lambda: int(x.sum()),
        lambda: x.tolist(),
        lambda: mask.nonzero(),
        lambda: torch.where(mask),
        lambda: x[mask],
        lambda: x.repeat_interleave(mask.long()),
    ]
    silent: list[Callable[[], object]] = [
        lambda: torch.where(mask, x, 0.0),
        lambda: x[torch.tensor([1, 2])],
        lambda: x.index_select(0, torch.tensor([1])),
        lambda: x.repeat_interleave(2),
        lambda: (x.sum(), x.sort(), x.argmax()),
    ]
    for inference in (True, False):
        with torch.inference_mode(inference):
            for calls, expected in ((asking, 1), (silent, 0)):
                for i, call in enumerate(calls):
                    with counted_syncs(CPU) as places:
                        call()
                    assert places.total() == expected, (inference, expected, i, places)
    with counted_syncs(CPU) as places:
        Packing.of(mask[None])
    assert sorted(place.partition(" ")[2] for place in places) == ["nonzero", "tolist"]
    assert all(place.startswith("vit/packed.py:") for place in places)


def test_the_picture_of_rows(tmp_path: Path) -> None:
    """One row or none, and one that could not be timed."""
    row: dict[str, Any] = {"model": "vit_s", "tokens": 1024, "batch": 1, "size": [512, 512], "mode": "static_compiled"}
    row |= {"speedup": 1.4, "predicted": 1.5, "realised": 0.93, "realised_quartiles": [0.9, 0.95]}
    row |= {"device": "cpu", "precision": "float32"}
    for rows in ([], [row], [row, {**row, "skipped": "no"}]):
        draw_rows(rows, tmp_path / "rows.png", title="bench")
        with Image.open(tmp_path / "rows.png") as picture:
            assert picture.height > 100


def test_the_stopwatch_counts_each_moment_once() -> None:
    class Work:
        def outer(self) -> int:
            time.sleep(0.02)
            return self.inner() + self.inner()

        def inner(self) -> int:
            time.sleep(0.03)
            return 1

    work = Work()
    with stopwatch([(work, "outer", "a"), (work, "inner", "b")], torch.device("cpu")) as spent:
        start = time.perf_counter()
        assert work.outer() == 2
        elapsed = (time.perf_counter() - start) * 1e3
    assert spent["a"] >= 20 and spent["b"] >= 60
    assert sum(spent.values()) <= elapsed
    assert not vars(work), "nothing is left on what was timed"


def test_a_row_of_a_backbone() -> None:
    row, static = rows_of("backbone", sizes=((64, 90),), targets=(0.5,), modes=("dynamic", "static"))
    assert static["syncs"] == 0 and static["predicted"] > 1
    assert row["tokens"] == 24, "sides are whole multiples of 32"
    assert row["keep"][:3] == [1.0] * 3 and row["keep"][3:] == pytest.approx([0.5] * 5, abs=0.15)
    assert row["predicted_blocks"] > row["predicted"] > 1 and row["gflops"][0] > row["gflops"][1]
    assert set(row) >= EVERY_ROW and min(row["memory_mb"]) > 0 and row["syncs"] > 0


def test_the_parts_of_a_detector_are_all_of_it() -> None:
    console = Console(record=True, width=200, quiet=False, file=StringIO())
    (row,) = rows_of("heads", console, sizes=((96, 128),), batches=(1,), targets=(0.5,), candidates=40)
    assert set(row) >= EVERY_ROW and row["detections"] > 0 and row["syncs"] > 0
    parts: dict[str, dict[str, Any]] = row["parts"]
    assert all(part["dense_ms"] > 0 and part["sparse_ms"] > 0 for name, part in parts.items() if name != "neck: rest")
    assert parts["neck"]["dense_ms"] == pytest.approx(
        sum(part["dense_ms"] for name, part in parts.items() if name.startswith("neck: ")), abs=0.05
    )
    assert parts["blocks, gates"]["dense_gflops"] > parts["blocks, gates"]["sparse_gflops"]
    assert parts["FPN"]["dense_gflops"] == parts["FPN"]["sparse_gflops"] > 0
    rates = {name: part["sparse_gflops_per_s"] for name, part in parts.items() if "sparse_gflops_per_s" in part}
    assert rates.keys() == detector().counted_parts().keys() and min(rates.values()) > 0
    assert set(row["machine_gflops_per_s"]) == {"linear", "conv3x3", "attention"}
    assert min(row["machine_gflops_per_s"].values()) > 0
    text = console.export_text()
    assert "3x3 convolution" in text and "two operations per multiply-add" in text


def test_rates_of_parts_are_those_of_the_sparse_passes() -> None:
    """Medians over the batches; the neck is the sum of its parts, and what took no time has none."""

    def cost(gflops: float) -> Cost:
        parts = {"RPN layers": 0.0, "FPN": gflops, "neck": 3.0, "mask layers": 1.0}
        return Cost(images=2, tokens=48, gflops=9, policy=0, keep=(), extra={"parts": parts})

    def spent(ms: float) -> dict[str, float]:
        return {"FPN": ms, "neck: maps": 10.0, "neck: rest": 20.0, "RPN layers": 1.0, "mask layers": 0.0}

    pairs = [Pair(1.0, 1.0, cost(99.0), cost(gflops)) for gflops in (1.0, 2.0, 4.0)]
    watched = [Pair(1.0, 1.0, spent(99.0), spent(ms)) for ms in (4.0, 5.0, 5.0)]
    rows = _part_rows(pairs, watched, cost(0.0).extra["parts"])
    rates = {name: row["sparse_gflops_per_s"] for name, row in rows.items() if "sparse_gflops_per_s" in row}
    assert rates == {"FPN": 800.0, "neck": 200.0}
    assert rows["neck"]["sparse_ms"] == 30 and rows["FPN"]["dense_gflops"] == 49.5


def test_rates_count_two_operations_per_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two images of 4 x 6 tokens, at a millisecond per call."""

    def clock(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
        result = call()
        shapes.append(tuple(result.shape))
        return 1.0, result

    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr("sievit.bench.heads.clocked", clock)
    rates = machine_rates(replace(TINY, embed_dim=256), (4, 6), 2, 64, CPU, torch.bfloat16)
    assert set(shapes) == {(48, 1024), (2, 64, 16, 24), (2, 2, 24, 128)}
    macs = {"linear": 48 * 256 * 1024, "conv3x3": 2 * 16 * 24 * 9 * 64 * 64, "attention": 2 * 24 * 24 * 256 * 2}
    assert rates == {name: round(2 * each / 1e6, 1) for name, each in macs.items()}


def test_the_parts_of_trained_models(tmp_path: Path) -> None:
    model = detector()
    model.save_pretrained(tmp_path / "balls")
    sievit.save(a_segmenter(), tmp_path / "s.safetensors")
    (row,) = rows_of("heads", checkpoints=(tmp_path / "balls",))
    assert row["tokens"] == 24 and "neck: pyramid" in row["parts"] and "neck: injectors" not in row["parts"]
    before = [dict(vars(owner)) for owner, _, _ in model.timed_parts()]
    with stopwatch(model.timed_parts(), torch.device("cpu")) as spent, torch.inference_mode():
        model([torch.rand(3, 64, 96)])
    assert spent["FPN"] > 0 and [dict(vars(owner)) for owner, _, _ in model.timed_parts()] == before
    refused("computes every token", rows_of, "heads", checkpoints=(tmp_path / "s.safetensors",))
    (row,) = rows_of("heads", checkpoints=(tmp_path / "s.safetensors",), policy="random")
    assert row["parts"]["head 2"]["sparse_gflops"] > 0 and row["parts"]["head 0"]["sparse_gflops"] == 0


# Stopped and resumed.


JOBS = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
EACH = ("dense", "dynamic", "static")


class Killed(BaseException):
    """As a signal is: nothing catches it."""


@dataclass(frozen=True, kw_only=True)
class FakeBench(BlocksBench):
    """A bench whose rows are made up."""

    name = "fake"

    models: tuple[str, ...] = ("a", "b")
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    batches: tuple[int, ...] = (1, 2)

    def networks(self) -> dict[str, str]:
        return {name: name for name in self.models}

    def timed(self, network: str, size: Any, batch: int) -> Any:
        return network, batch

    def table(self, rows: list[dict[str, Any]]) -> Table:
        return Table()


class Fake:
    """Runs it; `measured` holds the rows that it made, in order."""

    def __init__(self, out: Path | None, *, stop_after: int | None = None, skipping: str | None = None) -> None:
        self.out, self.stop_after, self.skipping = out, stop_after, skipping
        self.measured: list[tuple[str, int, str]] = []

    def measure(self, model: str, batch: int, mode: str) -> dict[str, Any]:
        if len(self.measured) == self.stop_after:
            raise Killed
        self.measured.append((model, batch, mode))
        if mode == self.skipping:
            return {"mode": mode, "skipped": "no"}
        figures = dict.fromkeys(("speedup", "predicted", "realised"), 1.0) | {"realised_quartiles": [1.0, 1.0]}
        ms = float(len(self.measured))
        return {"mode": mode, "tokens": 16, "dense_ms": ms, "sparse_ms": ms, **figures}

    def __call__(self, console: Console = QUIET, **changes: Any) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sievit.bench.common.time_modes", self.rows)
            return run(replace(FakeBench(out=self.out, repeats=2), **changes), console)

    def rows(self, timed: tuple[str, int], modes: Sequence[str], *, multiple: int) -> Iterator[dict[str, Any]]:
        assert modes, "there is something to measure"
        for mode in modes:
            yield self.measure(*timed, mode)


def of_file(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "fake.json").read_text())["rows"]


def names(rows: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(row["model"], row["batch"], row["mode"]) for row in rows]


EVERY = [(model, batch, mode) for model, batch in JOBS for mode in EACH]


@pytest.mark.parametrize("done", [0, 1, 4, 6, 11])
def test_a_killed_run_goes_on_where_it_was(done: int, tmp_path: Path) -> None:
    Fake(tmp_path)()
    (tmp_path / "fake.png").unlink()
    first, second = Fake(tmp_path, stop_after=done), Fake(tmp_path)
    with pytest.raises(Killed):
        first()
    assert [path.name for path in tmp_path.iterdir()] == ["fake.json"], "no parts of files"
    assert names(of_file(tmp_path)) == EVERY[:done] == first.measured, "and nothing of the run before"
    before = of_file(tmp_path)
    result = second(resume=True)
    assert second.measured == EVERY[done:], "nothing twice"
    assert result["rows"][:done] == before and names(result["rows"]) == EVERY
    assert of_file(tmp_path) == result["rows"] and (tmp_path / "fake.png").is_file()
    third = Fake(tmp_path)
    assert third(resume=True) == result and third.measured == []


def test_what_is_kept_is_told_and_without_resume_there_is_nothing(tmp_path: Path) -> None:
    Fake(tmp_path)()
    again = Fake(tmp_path)
    again()
    assert again.measured == EVERY and names(of_file(tmp_path)) == EVERY

    with pytest.raises(Killed):
        Fake(tmp_path, stop_after=4)()
    with (tmp_path / "said").open("w") as said:
        Fake(tmp_path)(Console(file=said, width=400), resume=True)
    assert f"rows kept from {tmp_path / 'fake.json'}: 4" in (tmp_path / "said").read_text()


def test_rows_that_were_skipped_are_tried_again_and_others_are_added(tmp_path: Path) -> None:
    Fake(tmp_path, skipping="dynamic")(models=("a",))
    assert [row["mode"] for row in of_file(tmp_path) if "skipped" in row] == ["dynamic"] * 2
    second = Fake(tmp_path)
    rows = second(resume=True, batches=(1,), precision="float32")["rows"]
    assert second.measured == [("a", 1, "dynamic"), *(("b", 1, mode) for mode in EACH)]
    assert [row[:2] for row in names(rows)] == [("a", 1)] * 3 + [("a", 2)] * 2 + [("b", 1)] * 3, "groups stay together"
    third = Fake(tmp_path)
    third(resume=True, batches=(1,), models=("a",), precision="bfloat16")
    assert third.measured == [("a", 1, mode) for mode in EACH], "the precision is a row's own"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"repeats": 3}, "repeats 2, not 3"),
        ({"targets": (0.5,)}, r"targets \[0.7, 0.49, 0.343\], not \[0.5\]"),
        ({"multiple": 16}, "multiple 8, not 16"),
        ({}, r"torch .*, not 9\.9"),
    ],
)
def test_rows_of_other_settings_are_not_mixed_in(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fake(tmp_path)()
    if not changes:
        monkeypatch.setattr(torch, "__version__", "9.9")
    before = (tmp_path / "fake.json").read_bytes()
    refused(rf"fake\.json: its rows have {said}; leave out --resume", Fake(tmp_path), resume=True, **changes)
    assert (tmp_path / "fake.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1'])
def test_what_is_no_file_of_a_bench_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "fake.json").write_text(text)
    refused(r"fake\.json: is not the file of a bench", Fake(tmp_path), resume=True)
    assert (tmp_path / "fake.json").read_text() == text


def test_a_wrong_option_does_not_cost_the_file(tmp_path: Path) -> None:
    Fake(tmp_path)()
    before = (tmp_path / "fake.json").read_bytes()
    wrong: list[dict[str, Any]] = [
        {"repeats": 1},
        {"modes": ("dens",)},
        {"images": tmp_path / "none"},
        {"precision": "float"},
    ]
    for changes in wrong:
        with pytest.raises(ConfigError):
            Fake(tmp_path)(**changes)
    assert (tmp_path / "fake.json").read_bytes() == before
    refused("--out; say which folder", Fake(None), resume=True)


def test_a_bench_loses_no_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mode that is measured stands in the file before the next one begins."""
    monkeypatch.setitem(SIZES, "tiny", ViTConfig(grid=(4, 4), embed_dim=32, depth=6, num_heads=2))
    config = BlocksBench(models=("tiny",), sizes=((64, 64),), batches=(8,), repeats=2, out=tmp_path)
    measure, calls = timing._time_mode, []

    def stopped(timed: Any, mode: RunMode, *args: Any) -> dict[str, Any]:
        calls.append(mode.name)
        if len(calls) == 2:
            raise Killed
        return measure(timed, mode, *args)

    monkeypatch.setattr(timing, "_time_mode", stopped)
    with pytest.raises(Killed):
        bench_blocks(config, QUIET)
    (dense,) = json.loads((tmp_path / "blocks.json").read_text())["rows"]
    rows = bench_blocks(replace(config, resume=True), QUIET)["rows"]
    assert calls == ["dense", "dynamic", "dynamic", "static"]
    assert rows[0] == dense and [row["mode"] for row in rows] == list(EACH) and rows[1]["batch"] == 8
