"""What runs fastest is what the tuned model remembers and does: mode, back-end, compiled or not, precision."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import sievit.vit.execution
import sievit.vit.loop
from sievit.config import ConfigError
from sievit.data.scenes import generate
from sievit.data.truth import Truth
from sievit.heads import ATMConfig
from sievit.hub.file import read
from sievit.models.build import build, load, save
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter, SegmenterConfig
from sievit.policies import KeepAllConfig, PolicyConfig, RandomConfig, SViTConfig
from sievit.report import evaluate
from sievit.tokens import Prediction, Tokens, Trace
from sievit.tune import Goal, Tuning
from sievit.tune import tune as tune_once
from sievit.tune.workload import Clock, Setup, TimedBlocks
from sievit.vit import ViTConfig
from sievit.vit.execution import Execution, copied
from sievit.vit.executor import execute_run

R = TypeVar("R")
tune = partial(tune_once, force=True)
GATES = SViTConfig(first_block=2, targets=(0.5,))
ALL = ("dynamic", "bucketed", "static")
QUICK = Tuning(repeats=3, num_images=4, multiple=1, batch_size=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root, num_images=4, size=(64, 96), seed=1)
    return root / "images"


def config(policy: PolicyConfig) -> SegmenterConfig:
    return SegmenterConfig(
        vit=ViTConfig(grid=(6, 6), patch_size=8, embed_dim=32, depth=4, num_heads=2),
        policy=policy,
        head=ATMConfig(channels=8, num_heads=2, num_layers=2),
        out_indices=(3,),
        input=InputConfig(min_size=None, size_divisor=8),
        classes=("ground", "thing"),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny segmenter whose gates, of random weights, keep some tokens, and not equally many of each image."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = build(config(GATES))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else None
    save(built, path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tuned.safetensors"


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
    winner: str, model: Path, images: Path, out: Path, compiled: list[str], executed: set[tuple[str, str, torch.dtype]]
):
    tuning = replace(QUICK, modes=ALL, compile="compiled" in winner)
    figures = tune(model, images, out, tuning=tuning, clock=clock_of({winner: 30.0}))
    assert figures["mode"] == winner and figures["speedup"]["median"] == (1 if winner == "dense_compiled" else 2)
    assert figures["tuned"]["ms"] == 15
    ran = {row["mode"] for row in figures["candidates"]}
    assert {"dynamic", "dynamic_batched", "bucketed", "static"} <= ran
    assert ("static_compiled" in ran) == ("bucketed_compiled" in ran) == tuning.compile
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


def test_dense_is_written_where_compiling_gains_more_than_leaving_tokens_out(
    model: Path, images: Path, out: Path, compiled: list[str]
):
    """Every mode is faster than the dense model as it stands, and none than the compiled one."""
    times = {"dynamic": 45.0, "static": 40.0, "static_compiled": 31.0, "dense_compiled": 30.0}
    figures = tune(model, images, out, tuning=replace(QUICK, compile=True), clock=clock_of(times))
    assert figures["mode"] == "dense_compiled" and figures["policy"] == "keep_all"
    assert "compiled it is 2.00 times as fast" in figures["why"]
    assert figures["dense"]["ms"] == 30 and figures["dense_compiled"]["ms"] == figures["tuned"]["ms"] == 15
    assert load(out).config.execution.compiled


def test_nothing_is_compiled_that_is_not_faster_for_it(model: Path, images: Path, out: Path, compiled: list[str]):
    times = {"static": 30.0, "static_compiled": 30.0}
    assert tune(model, images, out, tuning=replace(QUICK, compile=True), clock=clock_of(times))["mode"] == "static"
    dense = tune(
        model, images, out.with_name("dense.safetensors"), tuning=replace(QUICK, compile=True), clock=clock_of({})
    )
    assert dense["mode"] == "dense" and not dense["execution"]["compiled"]


def test_images_alone_have_one_back_end(model: Path, images: Path, out: Path):
    figures = tune(model, images, out, tuning=replace(QUICK, batch_size=1), clock=clock_of({}))
    assert [row["mode"] for row in figures["candidates"]] == ["dynamic", "static"]


def test_precision_is_that_of_the_race_and_of_the_model(
    model: Path, images: Path, out: Path, executed: set[tuple[str, str, torch.dtype]]
):
    tuning = replace(QUICK, precision="bfloat16", modes=("dynamic",))
    seen: list[torch.dtype] = []

    def clock(what: TimedBlocks | Setup, call: Callable[[], R], device: torch.device) -> tuple[float, R]:
        result: Any = call()
        if isinstance(what, TimedBlocks):
            seen.append(result[0].x.dtype)
        return (60.0 if isinstance(what, Setup) and name_of(what) == "dense" else 30.0 - 9 * _pruned(what)), result

    figures = tune(model, images, out, tuning=tuning, clock=clock)
    assert figures["precision"] == figures["execution"]["precision"] == "bfloat16"
    assert {dtype for _, _, dtype in executed} == {torch.bfloat16}
    executed.clear()
    labels = images.parent / "labels"
    evaluate(out, images, truth=Truth(labels=labels), limit=1)
    load(out, policy="keep_all").predict(sorted(images.iterdir())[:1])
    assert {dtype for _, _, dtype in executed} == {torch.bfloat16}, "another policy in the same precision"


def _pruned(what: TimedBlocks | Setup) -> bool:
    return isinstance(what, TimedBlocks) and what.pruned


def test_another_policy_runs_in_the_default_mode(model: Path, tmp_path: Path):
    path = tmp_path / "m.safetensors"
    built = build(replace(config(GATES), execution=Execution(mode="bucketed", compiled=True)))
    save(built, path)
    assert load(path, policy="svit").config.execution == Execution(mode="bucketed", compiled=True)
    assert load(path, policy="keep_all").config.execution == Execution()


def test_losses_do_not_look_at_it(compiled: list[str]):
    built = build(replace(config(GATES), execution=Execution(mode="bucketed", compiled=True, precision="bfloat16")))
    losses = built([torch.rand(3, 64, 96)], [{"labels": torch.zeros(64, 96, dtype=torch.int64)}]).losses
    assert not compiled and all(loss.dtype == torch.float32 for loss in losses.values())


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


def test_what_does_not_go_together(model: Path, images: Path, out: Path, tmp_path: Path):
    compiling = replace(QUICK, compile=True)
    with pytest.raises(ConfigError, match=r"--target-ms with --compile: .*give --target-gflops"):
        tune(model, images, out, goal=Goal(target_ms=1.0), tuning=compiling)
    generate(tmp_path / "mixed", num_images=1, size=(64, 64), seed=1)
    folder = tmp_path / "mixed" / "images"
    (folder / "other.png").write_bytes(sorted(images.iterdir())[0].read_bytes())
    with pytest.raises(ConfigError, match=r"several sizes, each compiled by itself; give --size"):
        tune(model, folder, out, tuning=compiling)
    with pytest.raises(ConfigError, match="--modes packed: are dynamic, bucketed and static"):
        replace(QUICK, modes=("packed",))
    with pytest.raises(ConfigError, match="--precision float16: is float32 or bfloat16"):
        Tuning(precision="float16")  # ty: ignore[invalid-argument-type]
    shares = tmp_path / "random.safetensors"
    save(build(config(RandomConfig(first_block=1, shares=(0.5,)))), shares)
    with pytest.raises(ConfigError, match=r"--modes bucketed: the policy 'random' has dynamic"):
        tune(shares, images, out, tuning=replace(QUICK, modes=("bucketed",)))
    assert not out.exists()


def test_a_compiler_that_fails_is_told_of(model: Path, images: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
    from torch._dynamo.exc import TorchDynamoException

    def call(*args: Any, **options: Any) -> Any:
        raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(sievit.vit.execution, "_compiled", lambda graphs, mode: call)
    with pytest.raises(ConfigError, match=r"cannot be compiled here \(InvalidCxx.*leave out --compile"):
        tune(model, images, out, tuning=replace(QUICK, compile=True), clock=clock_of({}))


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
        built = load(model, policy=replace(GATES, static_shares=(0.5, 0.4)))
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
