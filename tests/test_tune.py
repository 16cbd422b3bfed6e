"""Tuning keeps what pays, by a clock that the tests wind themselves, and meets targets or says why it cannot."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from PIL import Image

from sievit import cli
from sievit.config import ConfigError
from sievit.data.scenes import CLASSES, draw, generate
from sievit.data.truth import Truth
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.heads.config import BoxConfig, MaskConfig, RPNConfig
from sievit.models.build import Model, build, load, save
from sievit.models.detector import Detector, DetectorConfig
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.necks.adapter import AdapterConfig
from sievit.policies import (
    AttentionConfig,
    DToPConfig,
    KeepAllConfig,
    Policy,
    PolicyConfig,
    SViT,
    SViTConfig,
    TopNormConfig,
)
from sievit.policies.selection import SharesPolicy
from sievit.report import evaluate
from sievit.tune import Goal, Tuning, table_of
from sievit.tune import tune as tune_once
from sievit.tune.workload import Clock, Setup, TimedBlocks, Workload
from sievit.vit import ViTConfig

R = TypeVar("R")
tune = partial(tune_once, force=True)
NAMES = ("ground", *CLASSES)
DEPTH = 6
GATES = SViTConfig(first_block=2)
EXITS = DToPConfig(thresholds=(0.6,), keep_per_class=2)
QUICK = Tuning(repeats=3, num_images=4, multiple=1)
ONE = replace(QUICK, modes=("dynamic",))


def segmenter(policy: PolicyConfig) -> SegmenterConfig:
    return SegmenterConfig(
        vit=ViTConfig(grid=(6, 6), patch_size=8, embed_dim=32, depth=DEPTH, num_heads=2),
        policy=policy,
        head=ATMConfig(channels=8, num_heads=2, num_layers=2),
        out_indices=(1, 3, 5),
        input=InputConfig(min_size=None, size_divisor=8),
        classes=NAMES,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root, num_images=4, size=(64, 96), seed=1)
    return root / "images"


Saved = Callable[[PolicyConfig], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Writes a tiny segmenter of random weights that tell tokens apart."""
    folder = tmp_path_factory.mktemp("models")

    def write(policy: PolicyConfig) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(segmenter(policy))
        assert isinstance(model, Segmenter)
        with torch.no_grad():
            for parameter in model.vit.blocks.parameters():
                parameter.mul_(4) if parameter.ndim == 2 else None
            for head in model.net.heads:
                for name in ("layers.1.cross_attn.q.weight", "layers.1.cross_attn.k.weight", "class_embed.weight"):
                    head.get_parameter(name).mul_(40)
            if isinstance(model.policy, SViT):
                halve(model, model.policy)
        path = folder / f"{type(policy).__name__}-{hash(policy)}.safetensors"
        save(model, path)
        return path

    return write


def halve(model: Segmenter, policy: SViT) -> None:
    """Set the gates so that about half of the tokens of scenes take part in each block."""
    picture = torch.from_numpy(draw(seed=1, index=0, size=(64, 96))[0]).permute(2, 0, 1)
    for index, gate in enumerate(policy.gates):
        logits = model.eval()([picture]).trace.aux[policy.config.first_block + index]["logits"]
        gate.get_parameter("fc2.bias")[0] -= (logits[..., 0] - logits[..., 1]).median()


def wound(overhead: Mapping[int, float] | float) -> Clock:
    """A block takes 10 ms for all its tokens, 1 for none, and its overhead on top where it leaves any out."""

    def of(index: int, share: float) -> float:
        extra = overhead.get(index, 0.0) if isinstance(overhead, Mapping) else overhead
        return 1 + 9 * share + (extra if share < 1 else 0)

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        result: Any = call()
        if isinstance(what, Setup):
            shares = result.trace.shares().mean(1).tolist()
            return sum(of(i, share) for i, share in enumerate(shares)), result
        kept = [keep.double().mean().item() for keep in result[1].keep]
        return sum(of(i, kept[i]) for i in range(what.start, what.stop)), result

    return clock


def policy_of(path: Path) -> PolicyConfig:
    return load(path).config.policy


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tuned" / "model.safetensors"


def test_blocks_that_lose_are_dense(saved: Saved, images: Path, out: Path):
    figures = tune(saved(GATES), images, out, tuning=ONE, clock=wound({3: 50.0, 4: 50.0}))
    written = policy_of(out)
    assert isinstance(written, SViTConfig)
    assert written.dense_blocks == (3, 4) and written.static_shares is None
    assert figures["tuned"]["keep"][3:5] == [1, 1] and figures["tuned"]["keep"][2] < 1
    assert figures["speedup"]["quartiles"][0] > 1
    blocks = figures["candidates"][0]["blocks"]
    assert [block["blocks"][0] for block in blocks if block["dense"]] == [3, 4]
    assert json.loads(out.with_suffix(".json").read_text()) == figures


@pytest.mark.parametrize("policy", [GATES, EXITS, TopNormConfig(first_block=1), AttentionConfig(first_block=1)])
def test_where_everything_loses_the_model_is_dense(policy: PolicyConfig, saved: Saved, images: Path, out: Path):
    figures = tune(saved(policy), images, out, tuning=QUICK, clock=wound(50.0))
    assert policy_of(out) == KeepAllConfig()
    assert figures["policy"] == "keep_all" and figures["mode"] == "dense" and "slower" in figures["why"]
    assert figures["tuned"] == figures["dense"]
    assert not any(name.startswith("net.policy") for name in load(out).state_dict())


def test_a_policy_that_wins_in_no_race_is_not_written(saved: Saved, images: Path, out: Path):
    """Its blocks are faster, each by itself; the model as a whole is not."""
    fast = wound(0.0)

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        elapsed, result = fast(what, call, device)
        return (elapsed if isinstance(what, TimedBlocks) else 60.0), result

    figures = tune(saved(GATES), images, out, tuning=QUICK, clock=clock)
    assert policy_of(out) == KeepAllConfig() and "noise" in figures["why"]


def test_a_policy_that_was_lucky_is_not_written(saved: Saved, images: Path, out: Path):
    """It wins the race, and not the second one."""
    fast, runs = wound(0.0), []

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        elapsed, result = fast(what, call, device)
        gates = isinstance(what, Setup) and isinstance(what.policy, SViTConfig)
        runs.extend([what] * gates)
        return elapsed + (100 if gates and len(runs) > QUICK.repeats else 0), result

    figures = tune(saved(GATES), images, out, tuning=ONE, clock=clock)
    assert policy_of(out) == KeepAllConfig() and "noise" in figures["why"]
    assert figures["candidates"][0]["speedup"]["quartiles"][0] > 1, "it had won"


def test_a_policy_that_wins_stays_as_it_was(saved: Saved, images: Path, out: Path):
    path = saved(GATES)
    figures = tune(path, images, out, tuning=ONE, clock=wound(0.0))
    assert policy_of(out) == GATES and figures["target"] is None
    tensors = load(path).state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load(out).state_dict().items())


def test_a_head_that_is_not_worth_asking_is_not_asked(saved: Saved, images: Path, out: Path):
    """The first exit costs more than it saves; the second pays."""
    figures = tune(saved(EXITS), images, out, tuning=ONE, clock=wound({2: 30.0}))
    written = policy_of(out)
    assert isinstance(written, DToPConfig)
    assert written.thresholds == (1.0, 0.6, 1.0)
    assert figures["tuned"]["keep"][2:4] == [1, 1] and figures["tuned"]["keep"][4] < 1


@pytest.mark.parametrize(
    "policy",
    [
        GATES,
        replace(GATES, reactivate=False, preserve=False),
        EXITS,
        TopNormConfig(first_block=1),
        AttentionConfig(first_block=1),
    ],
)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_gflops_meet_their_target(policy: PolicyConfig, mode: str, saved: Saved, images: Path, out: Path):
    path = saved(policy)
    if mode == "static" and policy not in (GATES, EXITS):
        with pytest.raises(ConfigError, match=r"--modes static: the policy .* has dynamic"):
            tune(path, images, out, tuning=replace(QUICK, modes=(mode,)), clock=wound(0.0))
        return
    dense = tune(path, images, out, goal=Goal(target_gflops=1e9), tuning=QUICK, clock=wound(0.0))
    assert dense["policy"] == "keep_all" and dense["target"]["met"], "dense meets that"
    target = 0.85 * dense["dense"]["gflops"]
    figures = tune(
        path, images, out, goal=Goal(target_gflops=target), tuning=replace(QUICK, modes=(mode,)), clock=wound(0.0)
    )
    assert figures["mode"] == mode and figures["target"]["met"]
    assert 0.93 * target < figures["tuned"]["gflops"] <= target
    model = load(out)
    pictures = [torch.from_numpy(_pixels(each)) for each in sorted(images.iterdir())]
    kept = [model([picture]).trace.shares().mean(1) for picture in pictures]
    torch.testing.assert_close(
        torch.stack(kept).mean(0).double(), torch.tensor(figures["tuned"]["keep"]).double(), atol=1e-3, rtol=0
    )


def test_a_policy_without_dials_runs_as_it_is_configured(
    saved: Saved, images: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    """As one of a user's package that implements `before_block` alone."""
    for name in ("ranges", "dials", "is_static"):
        monkeypatch.setattr(SharesPolicy, name, getattr(Policy, name))
    policy = TopNormConfig(first_block=1)
    figures = tune(saved(policy), images, out, tuning=QUICK, clock=wound(0.0))
    assert policy_of(out) == policy and figures["mode"] == "dynamic" and figures["candidates"][0]["dials"] == 0
    assert figures["why"].endswith("the policy 'top_norm' has no dial, and ran as it is configured")
    assert tune(saved(policy), images, out, tuning=QUICK, clock=wound(50.0))["policy"] == "keep_all"
    with pytest.raises(ConfigError, match=r"--target-gflops 0.001: the policy 'top_norm' has no dial"):
        tune(saved(policy), images, out, goal=Goal(target_gflops=0.001), tuning=QUICK, clock=wound(0.0))


def _pixels(path: Path) -> Any:
    import numpy as np

    return np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1).copy()


def test_blocks_are_dense_and_the_target_is_met(saved: Saved, images: Path, out: Path):
    """What blocks that lose would have saved is saved by the others."""
    path = saved(GATES)
    plain = tune(path, images, out, tuning=ONE, clock=wound(0.0))
    goal = Goal(target_gflops=plain["tuned"]["gflops"] * 1.02)
    figures = tune(path, images, out, goal=goal, tuning=ONE, clock=wound({3: 50.0}))
    written = policy_of(out)
    assert isinstance(written, SViTConfig)
    assert written.dense_blocks == (3,) and written.threshold != 0
    assert figures["target"]["met"]


@pytest.mark.parametrize("share", [0.93, 0.75, 0.6])
def test_the_budget_is_turned_first(share: float, saved: Saved, images: Path, out: Path):
    """And the threshold where budgets end."""
    config = replace(GATES, budgets=(0.5, 1.3))
    path = saved(config)
    model = load(path)
    assert isinstance(model, Segmenter) and isinstance(model.policy, SViT)
    with torch.no_grad():
        for gate in model.policy.gates:
            towards = gate.get_parameter("fc2.weight")
            gate.get_parameter("budget").copy_(0.5 * (towards[0] - towards[1]))
    save(model, path)
    spent = {budget: evaluate_gflops(model, replace(config, budget=budget), images) for budget in (0.5, 1.3)} | {
        0.0: evaluate_gflops(model, KeepAllConfig(), images)
    }
    assert spent[0.5] < spent[1.3] < spent[0.0]
    targets = {0.93: (spent[1.3] + spent[0.0]) / 2, 0.75: (spent[0.5] + spent[1.3]) / 2, 0.6: 0.9 * spent[0.5]}
    tune(path, images, out, goal=Goal(target_gflops=targets[share]), tuning=ONE, clock=wound(0.0))
    written = policy_of(out)
    assert isinstance(written, SViTConfig)
    if share == 0.75:
        assert written.threshold == 0 and 0.5 < written.budget < 1.3
    elif share == 0.93:
        assert written.threshold < 0 and written.budget == 1.3
    else:
        assert written.threshold > 0 and written.budget == 0.5
    got = evaluate_gflops(load(out), written, images)
    assert 0.95 * targets[share] < got <= targets[share]


def evaluate_gflops(model: Model, config: PolicyConfig, images: Path) -> float:
    """GFLOPs per image, mean."""
    pictures = [[torch.from_numpy(_pixels(path))] for path in sorted(images.iterdir())]
    with torch.inference_mode():
        return Workload(model, pictures).cost(config).gflops


def test_milliseconds_meet_their_target(saved: Saved, images: Path, out: Path):
    figures = tune(saved(GATES), images, out, goal=Goal(target_ms=45.0), tuning=QUICK, clock=wound(1.0))
    assert figures["target"] == {"target_ms": 45.0, "met": True}
    assert 42 < figures["tuned"]["ms"] < 46 and figures["dense"]["ms"] == 60


def test_a_target_out_of_reach_is_an_error(saved: Saved, images: Path, out: Path):
    path = saved(GATES)
    for goal, unit in ((Goal(target_gflops=1e-4), "gflops"), (Goal(target_ms=5.0), "ms")):
        with pytest.raises(ConfigError, match=rf"--target-{unit} .*: out of reach; .* takes .*, the dense one"):
            tune(path, images, out, goal=goal, tuning=QUICK, clock=wound(0.0))
    assert not out.exists() and not out.with_suffix(".json").exists()


def test_a_target_that_would_be_slower_than_dense_is_missed(saved: Saved, images: Path, out: Path):
    path = saved(GATES)
    dense = tune(path, images, out, tuning=QUICK, clock=wound(50.0))["dense"]["gflops"]
    figures = tune(path, images, out, goal=Goal(target_gflops=0.8 * dense), tuning=QUICK, clock=wound(50.0))
    assert policy_of(out) == KeepAllConfig() and not figures["target"]["met"]


@pytest.fixture(scope="module")
def labels(saved: Saved, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the dense model says is the truth: its mIoU is 100 of those classes that there are."""
    folder = tmp_path_factory.mktemp("labels")
    model = load(saved(EXITS), policy="keep_all")
    assert isinstance(model, Segmenter)
    for path in sorted(images.iterdir()):
        said = model.predict([path])[0]
        Image.fromarray(said.numpy().astype("uint8")).save(folder / f"{path.stem}.png")
    return folder


@pytest.mark.parametrize("most", [10.0, 40.0])
def test_accuracy_falls_by_no_more_than_it_may(most: float, saved: Saved, images: Path, labels: Path, out: Path):
    path = saved(replace(EXITS, thresholds=(0.0,)))
    figures = tune(
        path, images, out, goal=Goal(max_drop=most), truth=Truth(labels=labels), tuning=QUICK, clock=wound(0.0)
    )
    assert figures["target"] == {"max_drop": most, "met": True}
    assert figures["policy"] == "dtop", "some tokens may leave"
    before, after = figures["dense"]["miou"], figures["tuned"]["miou"]
    assert 0 <= before - after <= most
    assert sum(figures["tuned"]["keep"]) < DEPTH
    judged = evaluate(out, images, truth=Truth(labels=labels))
    assert 100 * judged["miou"] == pytest.approx(after, abs=1e-2)
    assert judged["gflops"] == pytest.approx(figures["tuned"]["gflops"], abs=1e-3)
    tried = figures["candidates"][0]["tried"]
    assert any(before - step["accuracy"] > most for step in tried), "more would have been too much"


def test_static_counts_win_where_choices_are_dear(saved: Saved, images: Path, out: Path):
    plain = wound(0.0)

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        elapsed, result = plain(what, call, device)
        dear = (
            isinstance(what, Setup) and not isinstance(what.policy, KeepAllConfig) and _mode(what.policy) == "dynamic"
        )
        return elapsed + 3.0 * dear, result

    for policy in (GATES, EXITS):
        figures = tune(saved(policy), images, out, tuning=replace(QUICK, multiple=4), clock=clock)
        assert figures["mode"] == "static" and "times as fast as dynamic" in figures["why"]
        written = policy_of(out)
        assert isinstance(written, SViTConfig | DToPConfig)
        assert _mode(written) == "static" and written.multiple == 4
        dynamic, static = figures["candidates"][:2]
        for one, other in zip(dynamic["keep"], static["keep"], strict=True):
            assert one - 1e-3 <= other <= one + 4 / 96 + 0.01, "the mean, rounded up to a multiple of four"


def test_accuracy_that_may_not_fall_at_all(saved: Saved, images: Path, labels: Path, out: Path):
    path = saved(replace(EXITS, thresholds=(0.0,)))
    figures = tune(path, images, out, goal=Goal(max_drop=0.0), truth=Truth(labels=labels), tuning=ONE, clock=wound(0.0))
    assert policy_of(out) == KeepAllConfig() and "loses more accuracy" in figures["why"]
    assert figures["target"]["met"]


def _mode(config: PolicyConfig) -> str:
    assert isinstance(config, SViTConfig | DToPConfig)
    fixed = config.static_shares if isinstance(config, SViTConfig) else config.static_left
    return "dynamic" if fixed is None else "static"


def test_a_tuned_model_can_be_tuned_again(saved: Saved, images: Path, out: Path):
    """What was switched off on another device is asked again."""
    tune(saved(GATES), images, out, tuning=QUICK, clock=wound({3: 50.0}))
    again = out.with_name("again.safetensors")
    tune(out, images, again, tuning=QUICK, clock=wound({4: 50.0}))
    written = policy_of(again)
    assert isinstance(written, SViTConfig) and written.dense_blocks == (4,)


def a_detector() -> DetectorConfig:
    return DetectorConfig(
        vit=ViTConfig(grid=(4, 4), embed_dim=24, depth=4, num_heads=2),
        neck=AdapterConfig(deform_num_heads=2, conv_inplane=8, num_interactions=2),
        policy=SViTConfig(first_block=1),
        head=MaskRCNNConfig(
            num_classes=len(CLASSES),
            fpn_channels=16,
            rpn=RPNConfig(pre_nms_test=20, post_nms_test=10),
            box=BoxConfig(fc=32, min_score=0.0, max_detections=5),
            mask=MaskConfig(convs=(16,), deconv=16),
        ),
        input=InputConfig(min_size=64, max_size=128),
        classes=CLASSES,
        category_ids=tuple(range(1, len(CLASSES) + 1)),
    )


def test_on_the_command_line(images: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever the clock says: a file that loads, a report, a table, one JSON object; a broken image is told of."""
    model, folder = build(a_detector()), tmp_path / "mine"
    assert isinstance(model, Detector)
    path = tmp_path / "detector.safetensors"
    save(model, path, half=True)
    folder.mkdir()
    for picture in images.iterdir():
        (folder / picture.name).write_bytes(picture.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    annotations = images.parent / "annotations.json"
    command = ["tune", str(path), "--images", str(folder), "--out", str(out), "--repeats", "3", "--size", "64", "64"]
    command += ["--batch-size", "2", "--device", "cpu", "--annotations", str(annotations)]
    assert cli.main(command) == 1, "an image could not be read"
    printed = capsys.readouterr()
    figures = json.loads(printed.out.splitlines()[-1])
    assert "broken.png" in figures["failures"][0] and "broken.png" in printed.err
    assert figures["images"] == 4 and figures["size"] == [64, 64] and figures["batch_size"] == 2
    assert figures["tokens"] == 16 and "mask_ap" in figures["dense"]
    assert "speed-up" in printed.out and json.loads(out.with_suffix(".json").read_text()) == figures
    assert load(out).config.input == model.config.input, "the size was for measuring"
    assert all(row["mode"] in printed.out for row in figures["candidates"])
    assert cli.main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_the_user_has_to_change(saved: Saved, images: Path, out: Path, tmp_path: Path):
    path = saved(GATES)
    with pytest.raises(ConfigError, match="--max-drop needs annotated images"):
        tune(path, images, out, goal=Goal(max_drop=1.0))
    with pytest.raises(ConfigError, match="one target at a time"):
        Goal(target_ms=1.0, target_gflops=1.0)
    with pytest.raises(ConfigError, match="must be positive"):
        Goal(target_ms=0.0)
    with pytest.raises(ConfigError, match="--repeats is at least 3"):
        Tuning(repeats=2)
    with pytest.raises(ConfigError, match="nothing to tune"):
        tune(saved(KeepAllConfig()), images, out)
    with pytest.raises(ConfigError, match="would be lost"):
        tune(path, images, path)
    with pytest.raises(ConfigError, match="is judged by --labels"):
        tune(path, images, out, goal=Goal(max_drop=1.0), truth=Truth(annotations=tmp_path / "a.json"))
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of its 1 images can be read"):
        tune(path, tmp_path, out)
    assert not out.exists()


def test_the_table_says_what_was_chosen(saved: Saved, images: Path, out: Path):
    figures = tune(saved(GATES), images, out, tuning=QUICK, clock=wound({3: 50.0}))
    table = table_of(figures)
    assert list(table.columns[0].cells) == ["dense", "dynamic *", "static"]
    assert list(table.columns[5].cells) == ["", "3", "3"]
