"""What only a GPU can show of the modes: the same numbers with graphs, and how often the host waits."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sievit.bench import BlocksBench, bench_blocks
from sievit.bench.blocks import calibrated, frozen
from sievit.bench.common import SIZES, load_pictures
from sievit.bench.modes import MODES, Way
from sievit.measure.meters import counted_syncs, memory
from sievit.policies import Policy
from sievit.vit import Execution, ViT, ViTConfig

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch's, of compiling

SMALL = ViTConfig(grid=(4, 4), embed_dim=128, depth=6, num_heads=2)


@pytest.fixture(scope="module")
def model() -> tuple[ViT, dict[str, Policy], Tensor]:
    """A backbone in bfloat16, its policies by `Way.base`, and pictures."""
    with torch.inference_mode():
        pictures = load_pictures(None, (256, 320), 4).to("cuda", torch.bfloat16)
        vit, (dense, sparse) = calibrated(SMALL, pictures, (0.6, 0.4))
        _, trace = vit(pictures, sparse)
    static = frozen(sparse, [trace], 8)
    return vit, {"dense": dense, "dynamic": sparse, "bucketed": sparse, "static": static}, pictures


@pytest.mark.parametrize("name", MODES)
@torch.inference_mode()
def test_every_mode_gives_the_numbers_of_the_reference(name: str, model: Any) -> None:
    """The first pass, those that are replayed, and other images after them: in bfloat16 within 5e-2."""
    vit, policies, pictures = model
    way = Way.of(name)
    policy = policies[way.base]
    call = way.compiled(lambda images: vit(images, policy, execution=way.execution)[0].x)
    with way.many_shapes():
        for images in (pictures, pictures, pictures, pictures.flip(0), pictures.flip(3)):
            expected = vit(
                images, policy, execution=Execution(mode="padded" if way.base in ("dynamic", "bucketed") else "auto")
            )[0].x
            torch.testing.assert_close(call(images).clone(), expected, atol=5e-2, rtol=5e-2)


@torch.inference_mode()
def test_static_counts_never_wait_and_dynamic_ones_once_a_choice(model: Any) -> None:
    vit, policies, pictures = model
    tokens = vit.embed(pictures)
    counts = {}
    for base in ("dense", "static", "bucketed", "dynamic"):
        call = lambda base=base: vit(pictures, policies[base], execution=Way.of(base).execution)  # noqa: E731
        call()
        with counted_syncs(tokens.x.device) as places:
            call()
        counts[base] = places.total(), dict(places)
    assert counts["dense"][0] == counts["static"][0] == 0, counts
    assert 0 < counts["bucketed"][0] <= 3, counts
    assert 0 < counts["dynamic"][0] <= 3, counts


@torch.inference_mode()
def test_memory_of_the_blocks_falls_with_the_tokens(model: Any) -> None:
    vit, policies, pictures = model
    tokens = vit.embed(pictures)
    held = [
        memory(lambda base=base: vit(pictures, policies[base]), tokens.x.device, list(vit.blocks))
        for base in ("dense", "dynamic")
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
        modes=MODES,
        targets=(0.5,),
    )
    rows = bench_blocks(config, Console(quiet=True))["rows"]
    assert [row["mode"] for row in rows] == list(MODES)
    assert not [row["skipped"] for row in rows if "skipped" in row]
