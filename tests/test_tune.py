"""Tuning keeps what pays, by a clock that the tests wind themselves, meets targets or says why not, and runs so."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from PIL import Image
from torch import Tensor

import sievit.vit.execution
import sievit.vit.loop
from sievit.data.images import read_image, to_tensor
from sievit.data.scenes import draw
from sievit.data.truth import Truth
from sievit.hub.file import read
from sievit.models.build import Model, build, load, save
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
from sievit.tokens import Prediction, Tokens, Trace
from sievit.tune import Goal, Tuning, table_of
from sievit.tune import tune as tune_once
from sievit.tune.workload import Clock, Setup, TimedBlocks, Workload
from sievit.vit.execution import Execution, copied
from sievit.vit.executor import execute_run
from tiny import image_folder, refused, tiny_detector, tiny_segmenter, tiny_vit
from tiny import saved as saved_as

R = TypeVar("R")
tune = partial(tune_once, force=True)
DEPTH = 6
GATES = SViTConfig(first_block=2)
EXITS = DToPConfig(thresholds=(0.6,), keep_per_class=2)
CONTROL = TopNormConfig(first_block=1)
QUICK = Tuning(repeats=3, num_images=4, multiple=1)
ONE = replace(QUICK, modes=("dynamic",))


@pytest.fixture(scope="module")
def images(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(4, (64, 96)) / "images"


Saved = Callable[[PolicyConfig], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Writes a tiny segmenter of random weights that tell tokens apart."""
    folder, vit = tmp_path_factory.mktemp("models"), tiny_vit(grid=(6, 6), patch_size=8, embed_dim=32, depth=DEPTH)

    def write(policy: PolicyConfig) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(tiny_segmenter(vit=vit, policy=policy, out_indices=(1, 3, 5)))
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


Tuned = Callable[..., dict[str, Any]]


@pytest.fixture
def tuned(saved: Saved, images: Path, out: Path) -> Tuned:
    """Tunes a model, or a tiny one with a policy, by a clock, or by one that is wound like this; its figures."""

    def run(
        what: PolicyConfig | Path,
        clock: Clock | Mapping[int, float] | float = 0.0,
        *,
        to: Path = out,
        tuning: Tuning = QUICK,
        **options: Any,
    ) -> dict[str, Any]:
        path = what if isinstance(what, Path) else saved(what)
        by = wound(clock) if isinstance(clock, Mapping | float | int) else clock
        return tune(path, images, to, tuning=tuning, clock=by, **options)

    return run


def test_blocks_that_lose_are_dense(tuned: Tuned, out: Path):
    figures = tuned(GATES, {3: 50.0, 4: 50.0}, tuning=ONE)
    written = policy_of(out)
    assert isinstance(written, SViTConfig)
    assert written.dense_blocks == (3, 4) and written.static_shares is None
    assert figures["tuned"]["keep"][3:5] == [1, 1] and figures["tuned"]["keep"][2] < 1
    assert figures["speedup"]["quartiles"][0] > 1
    blocks = figures["candidates"][0]["blocks"]
    assert [block["blocks"][0] for block in blocks if block["dense"]] == [3, 4]
    assert json.loads(out.with_suffix(".json").read_text()) == figures


@pytest.mark.parametrize("policy", [GATES, EXITS, CONTROL, AttentionConfig(first_block=1)])
def test_where_everything_loses_the_model_is_dense(policy: PolicyConfig, tuned: Tuned, out: Path):
    figures = tuned(policy, 50.0)
    assert policy_of(out) == KeepAllConfig()
    assert figures["policy"] == "keep_all" and figures["mode"] == "dense" and "slower" in figures["why"]
    assert figures["tuned"] == figures["dense"]
    assert not any(name.startswith("net.policy") for name in load(out).state_dict())


def test_a_policy_that_wins_in_no_race_is_not_written(tuned: Tuned, out: Path):
    """Its blocks are faster, each by itself; the model as a whole is not."""
    fast = wound(0.0)

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        elapsed, result = fast(what, call, device)
        return (elapsed if isinstance(what, TimedBlocks) else 60.0), result

    figures = tuned(GATES, clock)
    assert policy_of(out) == KeepAllConfig() and "noise" in figures["why"]


def test_a_policy_that_was_lucky_is_not_written(tuned: Tuned, out: Path):
    """It wins the race, and not the second one."""
    fast, runs = wound(0.0), []

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        elapsed, result = fast(what, call, device)
        gates = isinstance(what, Setup) and isinstance(what.policy, SViTConfig)
        runs.extend([what] * gates)
        return elapsed + (100 if gates and len(runs) > QUICK.repeats else 0), result

    figures = tuned(GATES, clock, tuning=ONE)
    assert policy_of(out) == KeepAllConfig() and "noise" in figures["why"]
    assert figures["candidates"][0]["speedup"]["quartiles"][0] > 1, "it had won"


def test_a_policy_that_wins_stays_as_it_was(saved: Saved, tuned: Tuned, out: Path):
    figures = tuned(GATES, tuning=ONE)
    assert policy_of(out) == GATES and figures["target"] is None
    tensors = load(saved(GATES)).state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load(out).state_dict().items())


def test_a_head_that_is_not_worth_asking_is_not_asked(tuned: Tuned, out: Path):
    """The first exit costs more than it saves; the second pays."""
    figures = tuned(EXITS, {2: 30.0}, tuning=ONE)
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
        CONTROL,
        AttentionConfig(first_block=1),
    ],
)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_gflops_meet_their_target(policy: PolicyConfig, mode: str, tuned: Tuned, images: Path, out: Path):
    tuning = replace(QUICK, modes=(mode,))
    if mode == "static" and policy not in (GATES, EXITS):
        refused(r"--modes static: the policy .* has dynamic", tuned, policy, tuning=tuning)
        return
    dense = tuned(policy, goal=Goal(target_gflops=1e9))
    assert dense["policy"] == "keep_all" and dense["target"]["met"], "dense meets that"
    target = 0.85 * dense["dense"]["gflops"]
    figures = tuned(policy, goal=Goal(target_gflops=target), tuning=tuning)
    assert figures["mode"] == mode and figures["target"]["met"]
    assert 0.93 * target < figures["tuned"]["gflops"] <= target
    model = load(out)
    kept = [model([picture]).trace.shares().mean(1) for picture in pictures(images)]
    torch.testing.assert_close(
        torch.stack(kept).mean(0).double(), torch.tensor(figures["tuned"]["keep"]).double(), atol=1e-3, rtol=0
    )


def test_a_policy_without_dials_runs_as_it_is_configured(tuned: Tuned, out: Path, monkeypatch: pytest.MonkeyPatch):
    """As one of a user's package that implements `before_block` alone."""
    for name in ("ranges", "dials", "is_static"):
        monkeypatch.setattr(SharesPolicy, name, getattr(Policy, name))
    figures = tuned(CONTROL)
    assert policy_of(out) == CONTROL and figures["mode"] == "dynamic" and figures["candidates"][0]["dials"] == 0
    assert figures["why"].endswith("the policy 'top_norm' has no dial, and ran as it is configured")
    assert tuned(CONTROL, 50.0)["policy"] == "keep_all"
    refused(r"--target-gflops 0.001: the policy 'top_norm' has no dial", tuned, CONTROL, goal=Goal(target_gflops=0.001))


def pictures(images: Path) -> list[Tensor]:
    return [to_tensor(read_image(path)) for path in sorted(images.iterdir())]


def test_blocks_are_dense_and_the_target_is_met(tuned: Tuned, out: Path):
    """What blocks that lose would have saved is saved by the others."""
    plain = tuned(GATES, tuning=ONE)
    figures = tuned(GATES, {3: 50.0}, goal=Goal(target_gflops=plain["tuned"]["gflops"] * 1.02), tuning=ONE)
    written = policy_of(out)
    assert isinstance(written, SViTConfig)
    assert written.dense_blocks == (3,) and written.threshold != 0
    assert figures["target"]["met"]


@pytest.mark.parametrize("share", [0.93, 0.75, 0.6])
def test_the_budget_is_turned_first(share: float, saved: Saved, tuned: Tuned, images: Path, out: Path):
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
    tuned(path, goal=Goal(target_gflops=targets[share]), tuning=ONE)
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
    with torch.inference_mode():
        return Workload(model, [[picture] for picture in pictures(images)]).cost(config).gflops


def test_milliseconds_meet_their_target_or_are_out_of_reach(tuned: Tuned, out: Path):
    for goal, unit in ((Goal(target_gflops=1e-4), "gflops"), (Goal(target_ms=5.0), "ms")):
        refused(rf"--target-{unit} .*: out of reach; .* takes .*, the dense one", tuned, GATES, goal=goal)
    assert not out.exists() and not out.with_suffix(".json").exists()

    figures = tuned(GATES, 1.0, goal=Goal(target_ms=45.0))
    assert figures["target"] == {"target_ms": 45.0, "met": True}
    assert 42 < figures["tuned"]["ms"] < 46 and figures["dense"]["ms"] == 60


def test_a_target_that_would_be_slower_than_dense_is_missed(tuned: Tuned, out: Path):
    dense = tuned(GATES, 50.0)["dense"]["gflops"]
    figures = tuned(GATES, 50.0, goal=Goal(target_gflops=0.8 * dense))
    assert policy_of(out) == KeepAllConfig() and not figures["target"]["met"]


@pytest.fixture(scope="module")
def truth(saved: Saved, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """What the dense model says is the truth: its mIoU is 100 of those classes that there are."""
    folder = tmp_path_factory.mktemp("labels")
    model = load(saved(EXITS), policy="keep_all")
    assert isinstance(model, Segmenter)
    for path in sorted(images.iterdir()):
        said = model.predict([path])[0]
        Image.fromarray(said.numpy().astype("uint8")).save(folder / f"{path.stem}.png")
    return Truth(labels=folder)


ALL_LEAVE = replace(EXITS, thresholds=(0.0,))


@pytest.mark.parametrize("most", [10.0, 40.0])
def test_accuracy_falls_by_no_more_than_it_may(most: float, tuned: Tuned, images: Path, truth: Truth, out: Path):
    figures = tuned(ALL_LEAVE, goal=Goal(max_drop=most), truth=truth)
    assert figures["target"] == {"max_drop": most, "met": True}
    assert figures["policy"] == "dtop", "some tokens may leave"
    before, after = figures["dense"]["miou"], figures["tuned"]["miou"]
    assert 0 <= before - after <= most
    assert sum(figures["tuned"]["keep"]) < DEPTH
    judged = evaluate(out, images, truth=truth)
    assert 100 * judged["miou"] == pytest.approx(after, abs=1e-2)
    assert judged["gflops"] == pytest.approx(figures["tuned"]["gflops"], abs=1e-3)
    tried = figures["candidates"][0]["tried"]
    assert any(before - step["accuracy"] > most for step in tried), "more would have been too much"


def test_accuracy_that_may_not_fall_at_all(tuned: Tuned, truth: Truth, out: Path):
    figures = tuned(ALL_LEAVE, goal=Goal(max_drop=0.0), truth=truth, tuning=ONE)
    assert policy_of(out) == KeepAllConfig() and "loses more accuracy" in figures["why"]
    assert figures["target"]["met"]


def test_static_counts_win_where_choices_are_dear(tuned: Tuned, out: Path):
    plain = wound(0.0)

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        elapsed, result = plain(what, call, device)
        dear = isinstance(what, Setup) and isinstance(what.policy, SViTConfig | DToPConfig) and not fixed(what.policy)
        return elapsed + 3.0 * dear, result

    for policy in (GATES, EXITS):
        figures = tuned(policy, clock, tuning=replace(QUICK, multiple=4))
        assert figures["mode"] == "static" and "times as fast as dynamic" in figures["why"]
        written = policy_of(out)
        assert isinstance(written, SViTConfig | DToPConfig)
        assert fixed(written) and written.multiple == 4
        dynamic, static = figures["candidates"][:2]
        for one, other in zip(dynamic["keep"], static["keep"], strict=True):
            assert one - 1e-3 <= other <= one + 4 / 96 + 0.01, "the mean, rounded up to a multiple of four"


def fixed(config: SViTConfig | DToPConfig) -> bool:
    """Whether its counts are static."""
    return (config.static_shares if isinstance(config, SViTConfig) else config.static_left) is not None


def test_a_tuned_model_can_be_tuned_again(tuned: Tuned, out: Path):
    """What was switched off on another device is asked again; and the table says what was chosen."""
    table = table_of(tuned(GATES, {3: 50.0}))
    assert list(table.columns[0].cells) == ["dense", "dynamic *", "static"]
    assert list(table.columns[5].cells) == ["", "3", "3"]
    again = out.with_name("again.safetensors")
    tuned(out, {4: 50.0}, to=again)
    written = policy_of(again)
    assert isinstance(written, SViTConfig) and written.dense_blocks == (4,)


def test_on_the_command_line(images: Path, out: Path, tmp_path: Path, command: Callable[..., Any]):
    """Whatever the clock says: a file that loads, a report, a table, one JSON object; a broken image is told of."""
    neck = AdapterConfig(deform_num_heads=2, conv_inplane=8, num_interactions=2)
    model, folder = build(tiny_detector(neck=neck, policy=SViTConfig(first_block=1))), tmp_path / "mine"
    path = tmp_path / "detector.safetensors"
    save(model, path, half=True)
    folder.mkdir()
    for picture in images.iterdir():
        (folder / picture.name).write_bytes(picture.read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    args = ["tune", path, "--images", folder, "--out", out, "--repeats", 3, "--size", 64, 64, "--batch-size", 2]
    args += ["--device", "cpu", "--annotations", images.parent / "annotations.json"]
    printed = command(*args, status=1)
    figures = printed.figures
    assert "broken.png" in figures["failures"][0] and "broken.png" in printed.err
    assert figures["images"] == 4 and figures["size"] == [64, 64] and figures["batch_size"] == 2
    assert figures["tokens"] == 16 and "mask_ap" in figures["dense"]
    assert "speed-up" in printed.out and json.loads(out.with_suffix(".json").read_text()) == figures
    assert load(out).config.input == model.config.input, "the size was for measuring"
    assert all(row["mode"] in printed.out for row in figures["candidates"])
    assert "is there already" in command(*args, status=2).err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": Goal(max_drop=1.0)}, "--max-drop needs annotated images"),
        ({"what": KeepAllConfig()}, "nothing to tune"),
        ({"to": "SAME"}, "would be lost"),
        ({"goal": Goal(target_ms=1.0), "tuning": replace(QUICK, compile=True)}, r"--compile: .*give --target-gflops"),
        ({"what": CONTROL, "tuning": replace(QUICK, modes=("bucketed",))}, r"--modes bucketed: .* has dynamic"),
        ({"goal": Goal(max_drop=1.0), "truth": Truth(annotations=Path("a.json"))}, "is judged by --labels"),
    ],
)
def test_what_the_user_has_to_change(change: dict[str, Any], message: str, saved: Saved, tuned: Tuned, out: Path):
    change = {"what": GATES, **change, **({"to": saved(GATES)} if "to" in change else {})}
    refused(message, tuned, **change)
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (Goal, {"target_ms": 1.0, "target_gflops": 1.0}, "one target at a time"),
        (Goal, {"target_ms": 0.0}, r"target_ms is 0\.0"),
        (Tuning, {"repeats": 2}, "repeats is 2"),
        (Tuning, {"modes": ("packed",)}, "--modes packed: are dynamic, bucketed and static"),
        (Tuning, {"precision": "float16"}, "precision is .*float32, bfloat16"),
    ],
)
def test_options_that_make_no_sense(config: Callable[..., Any], options: dict[str, Any], message: str):
    refused(message, config, **options)


def test_folders_that_cannot_be_tuned_on(saved: Saved, out: Path, tmp_path: Path):
    (tmp_path / "b.png").write_bytes(b"")
    refused("none of its 1 images can be read", tune, saved(GATES), tmp_path, out)
    mixed, compiling = image_folder(tmp_path / "mixed", (64, 64), (64, 96)), replace(QUICK, compile=True)
    refused(r"several sizes, each compiled by itself; give --size", tune, saved(GATES), mixed, out, tuning=compiling)
    assert not out.exists()


# What runs fastest is what the tuned model remembers and does.


HALF = SViTConfig(first_block=2, targets=(0.5,))
ALL = ("dynamic", "bucketed", "static")
PAIRS = Tuning(repeats=3, num_images=4, multiple=1, batch_size=2)


def config(policy: PolicyConfig, **changes: Any) -> SegmenterConfig:
    vit = tiny_vit(grid=(6, 6), patch_size=8, embed_dim=32)
    return tiny_segmenter(vit=vit, policy=policy, out_indices=(3,), **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny segmenter whose gates, of random weights, keep some tokens, and not equally many of each image."""
    path = saved_as(config(HALF), tmp_path_factory.mktemp("model") / "model.safetensors")
    built = load(path)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else None
    save(built, path)
    return path


@pytest.fixture
def raced(model: Path, images: Path, out: Path) -> Tuned:
    """Tunes the model where everything takes as long as these say; its figures."""

    def run(times: Mapping[str, float] | Clock, **changes: Any) -> dict[str, Any]:
        clock = clock_of(times) if isinstance(times, Mapping) else times
        return tune(model, images, out, tuning=replace(PAIRS, **changes), clock=clock)

    return run


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is compiled; the executor's modes of what would have been."""
    seen: list[str] = []

    def call(network: Any, *args: Any, **options: Any) -> Any:
        seen.append(options["execution"].mode)
        return network(*args, **options)

    monkeypatch.setattr(sievit.vit.execution, "_compiled", lambda graphs, mode: call)
    return seen


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, torch.dtype]]:
    """Mode, attention and type of autocast that blocks were executed with."""
    seen: set[tuple[str, str, torch.dtype]] = set()

    def spy(run: Any, tokens: Tokens, execution: Execution, **options: Any) -> Any:
        mixed = torch.is_autocast_enabled("cpu")
        precision = torch.get_autocast_dtype("cpu") if mixed else torch.float32
        seen.add((execution.mode, execution.attention, precision))
        return execute_run(run, tokens, execution, **options)

    monkeypatch.setattr(sievit.vit.loop, "execute_run", spy)
    return seen


def name_of(setup: Setup) -> str:
    policy, execution = setup.policy, setup.execution
    mode = "dense" if isinstance(policy, KeepAllConfig) else "dynamic"
    if isinstance(policy, SViTConfig) and policy.static_shares is not None:
        mode = "static"
    mode = execution.mode if execution.mode != "auto" else mode
    return mode + "_batched" * (execution.attention == "batched") + "_compiled" * execution.compiled


def clock_of(fast: Mapping[str, float]) -> Clock:
    """Everything takes 60 ms but what is named."""

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        if isinstance(what, TimedBlocks):
            return (1.0 if what.pruned else 2.0), call()
        return fast.get(name_of(what), 60.0), call()

    return clock


@pytest.mark.parametrize(
    "winner",
    ["dynamic", "dynamic_batched", "bucketed", "static", "bucketed_compiled", "static_compiled", "dense_compiled"],
)
def test_the_fastest_is_written_and_is_what_the_model_runs(
    winner: str, raced: Tuned, images: Path, out: Path, compiled: list[str], executed: set[tuple[str, str, torch.dtype]]
):
    compiling = "compiled" in winner
    figures = raced({winner: 30.0}, modes=ALL, compile=compiling)
    assert figures["mode"] == winner and figures["speedup"]["median"] == (1 if winner == "dense_compiled" else 2)
    assert figures["tuned"]["ms"] == 15
    ran = {row["mode"] for row in figures["candidates"]}
    assert {"dynamic", "dynamic_batched", "bucketed", "static"} <= ran
    assert ("static_compiled" in ran) == ("bucketed_compiled" in ran) == compiling
    assert "dynamic_compiled" not in ran, "its shapes are many"
    written = load(out)
    bucketed, padded = "bucketed" in winner, "batched" in winner
    expected = Execution("bucketed" if bucketed else "auto", "batched" if padded else "auto", "compiled" in winner)
    assert written.config.execution == expected
    compiled.clear(), executed.clear()
    written.predict(sorted(images.iterdir())[:2], batch_size=2)
    assert executed == {(expected.mode, expected.attention, torch.float32)}
    assert compiled == [expected.mode] * expected.compiled
    compiled.clear()
    load(out, compile=False).predict(sorted(images.iterdir())[:1])
    assert not compiled


@pytest.mark.usefixtures("compiled")
def test_dense_is_written_where_compiling_gains_more_than_leaving_tokens_out(raced: Tuned, out: Path):
    """Every mode is faster than the dense model as it stands, and none than the compiled one."""
    times = {"dynamic": 45.0, "static": 40.0, "static_compiled": 31.0, "dense_compiled": 30.0}
    figures = raced(times, compile=True)
    assert figures["mode"] == "dense_compiled" and figures["policy"] == "keep_all"
    assert "compiled it is 2.00 times as fast" in figures["why"]
    assert figures["dense"]["ms"] == 30 and figures["dense_compiled"]["ms"] == figures["tuned"]["ms"] == 15
    assert load(out).config.execution.compiled


@pytest.mark.usefixtures("compiled")
def test_nothing_is_compiled_that_is_not_faster_for_it(raced: Tuned):
    assert raced({"static": 30.0, "static_compiled": 30.0}, compile=True)["mode"] == "static"
    dense = raced({}, compile=True)
    assert dense["mode"] == "dense" and not dense["execution"]["compiled"]


def test_images_alone_have_one_back_end(raced: Tuned):
    figures = raced({}, batch_size=1)
    assert [row["mode"] for row in figures["candidates"]] == ["dynamic", "static"]


def test_precision_is_that_of_the_race_and_of_the_model(
    raced: Tuned, images: Path, out: Path, executed: set[tuple[str, str, torch.dtype]]
):
    seen: list[torch.dtype] = []

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        result: Any = call()
        if isinstance(what, TimedBlocks):
            seen.append(result[0].x.dtype)
            return 30.0 - 9 * what.pruned, result
        return (60.0 if name_of(what) == "dense" else 30.0), result

    figures = raced(clock, precision="bfloat16", modes=("dynamic",))
    assert figures["precision"] == figures["execution"]["precision"] == "bfloat16"
    assert {dtype for _, _, dtype in executed} == {torch.bfloat16}
    executed.clear()
    labels = images.parent / "labels"
    evaluate(out, images, truth=Truth(labels=labels), limit=1)
    load(out, policy="keep_all").predict(sorted(images.iterdir())[:1])
    assert {dtype for _, _, dtype in executed} == {torch.bfloat16}, "another policy in the same precision"


def test_another_policy_runs_in_the_default_mode(model: Path, tmp_path: Path):
    path = saved_as(config(HALF, execution=Execution(mode="bucketed", compiled=True)), tmp_path / "m.safetensors")
    assert load(path, policy="svit").config.execution == Execution(mode="bucketed", compiled=True)
    assert load(path, policy="keep_all").config.execution == Execution()


def test_files_from_before_there_was_a_choice(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sievit.hub import file

    whole = file.to_json

    def before(value: Any) -> Any:
        return {name: each for name, each in whole(value).items() if name != "execution"}

    monkeypatch.setattr(file, "to_json", before)
    save(load(model), tmp_path / "old.safetensors")
    monkeypatch.undo()
    assert read(tmp_path / "old.safetensors")[0] == read(model)[0]
    assert load(tmp_path / "old.safetensors").config.execution == Execution()


def test_a_compiler_that_fails_is_told_of(raced: Tuned, monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.exc import TorchDynamoException

    def call(*args: Any, **options: Any) -> Any:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(sievit.vit.execution, "_compiled", lambda graphs, mode: call)
    refused(r"cannot be compiled here \(InvalidCxx.*leave out --compile", raced, {}, compile=True)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_says_the_same(model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """Dynamo's part of it, and the announcement; one graph, for what the two images keep does not count."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    def compiler(call: Any, **options: Any) -> Any:
        return whole(call, backend=backend, dynamic=options["dynamic"])

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", compiler)
    sievit.vit.execution._compiled.cache_clear()
    try:
        built = load(model, policy=replace(HALF, static_shares=(0.5, 0.4)))
        assert isinstance(built, Segmenter)
        for seed in (0, 1):
            images = [torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(seed))]
            expected = built(images)
            with torch.no_grad():
                got = built(images, execution=Execution(compiled=True))
            torch.testing.assert_close(got.trace.shares(), expected.trace.shares())
            assert torch.equal(got.labels[0], expected.labels[0])
    finally:
        sievit.vit.execution._compiled.cache_clear()
    assert len(graphs) == 1
    (told,) = (record.message for record in caplog.records if record.name == "sievit")
    assert "compile=False" in told


def test_what_a_graph_returns_is_copied():
    x = torch.ones(2, 3)
    trace = Trace(grid=(1, 3), valid=x > 0, keep=(x > 0,), aux=({"logits": x},))
    said, (other, copy) = copied(({"0": x}, (Prediction(maps=x[:, None]), trace)))
    x.zero_()
    trace.valid.zero_(), trace.keep[0].zero_()
    assert said["0"].all() and other.maps.all() and other.classes is None
    assert copy.valid.all() and copy.keep[0].all() and copy.aux[0]["logits"].all() and copy.grid == (1, 3)
