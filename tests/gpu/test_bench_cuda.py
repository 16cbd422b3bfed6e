"""What only a GPU can show of the modes: the same numbers with graphs, and how often the host waits."""

from typing import Any

import pytest
import torch
from rich.console import Console

from sievit.bench import BlocksBench, bench_blocks
from sievit.bench.blocks import timed_blocks
from sievit.bench.common import load_images, normalised
from sievit.bench.random_models import SIZES, random_vit
from sievit.bench.timing import Timed, many_shapes
from sievit.measure.meters import counted_syncs, memory
from sievit.measure.modes import DENSE, MODES, RunMode
from sievit.policies import Policy, PolicyOptions
from sievit.vit import Execution, ViTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's, of compiling

TIMED = [name for name in MODES if name not in ("dynamic_compiled", "dynamic_graphs")]
"""Each number of tokens would be compiled by itself in the others."""
SMALL = ViTConfig(grid=(4, 4), embed_dim=128, depth=6, num_heads=2)


@pytest.fixture(scope="module")
def model() -> tuple[Timed, dict[str, Policy]]:
    """The blocks of a backbone in bfloat16, and its policies by `RunMode.counts`."""
    with torch.inference_mode():
        images = normalised(load_images(None, (256, 320), 4)).to("cuda", torch.bfloat16)
        timed = timed_blocks(*random_vit(SMALL, images, PolicyOptions(), (0.6, 0.4)), [images])
        static = timed.static_policy(8)
        assert static is not None
        return timed, {"dense": timed.build_policy(DENSE), "dynamic": timed.policy, "static": static}


@pytest.mark.parametrize("name", TIMED)
@torch.inference_mode()
def test_every_mode_gives_the_numbers_of_the_reference(name: str, model: Any) -> None:
    """The first pass, those that are replayed, and other images after them: in bfloat16 within 5e-2."""
    (timed, policies), mode = model, RunMode.of(name)
    policy, (x,) = policies[mode.counts], timed.inputs
    call, reference = timed.call(policy, mode), Execution(mode="padded" if mode.counts == "dynamic" else "auto")
    with many_shapes(mode):
        for given in (x, x, x, x.flip(0), x.flip(1)):
            expected, _ = timed.network(given, policy=policy, execution=reference)
            torch.testing.assert_close(call(given)[0].clone(), expected, atol=5e-2, rtol=5e-2)


@torch.inference_mode()
def test_static_counts_never_wait_and_dynamic_ones_once_a_choice(model: Any) -> None:
    timed, policies = model
    counts = {}
    for name in ("dense", "static", "bucketed", "dynamic"):
        call, (x,) = timed.call(policies[RunMode.of(name).counts], RunMode.of(name)), timed.inputs
        call(x)
        with counted_syncs(timed.device) as places:
            call(x)
        counts[name] = places.total(), dict(places)
    assert counts["dense"][0] == counts["static"][0] == 0, counts
    assert 0 < counts["bucketed"][0] <= 3, counts
    assert 0 < counts["dynamic"][0] <= 3, counts


@torch.inference_mode()
def test_memory_of_the_blocks_falls_with_the_tokens(model: Any) -> None:
    timed, policies = model
    held = [
        memory(
            lambda name=name: timed.call(policies[name], RunMode.of(name))(timed.inputs[0]), timed.device, timed.blocks
        )
        for name in ("dense", "dynamic")
    ]
    for i in (3, 4, 5):
        assert 0 < held[1].blocks[i] < held[0].blocks[i], held


def test_rows_of_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "small", SMALL)
    config = BlocksBench(
        models=("small",),
        sizes=((256, 320),),
        batches=(4,),
        repeats=3,
        device="cuda",
        precision="bfloat16",
        modes=tuple(TIMED),
        targets=(0.5,),
    )
    rows = bench_blocks(config, Console(quiet=True))["rows"]
    assert [row["mode"] for row in rows] == TIMED
    assert not [row["skipped"] for row in rows if "skipped" in row]
