"""Whole networks, dense against their policy: SegViT of random weights with DToP, or trained models.

Random segmenters are timed from normalised images to scores on their pixels; trained models from images in memory to
answers on the pixels of the images, resizing, padding and windows included.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sievit.bench.common import SIZES, ModesBench, Place, check_known, kept, percent, run, table_of
from sievit.bench.modes import Way, calls_of, is_static, no_static, static_config
from sievit.bench.timing import Cost, time_modes
from sievit.config import ConfigError, kind_of
from sievit.heads import ATM, ATMConfig, SemanticHead
from sievit.hub.fetch import HUB
from sievit.measure.clock import Pair
from sievit.models.base import Answer, Model
from sievit.models.build import load
from sievit.models.inputs import InputConfig, Size
from sievit.models.segmenter import Segmentation, Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig, Policy
from sievit.policies.dtop import leave
from sievit.tokens import Prediction, Trace
from sievit.vit import ViTConfig

SEGMENTERS = {
    "vit_b": (ATMConfig(channels=384, num_heads=6), (5, 7, 11)),
    "vit_l": (ATMConfig(channels=512, num_heads=8), (7, 15, 23)),
}
"""The papers' head, and the blocks behind which it stands."""
PAPER_SIZES = ((512, 512), (640, 640))
CLASSES = 150
CALIBRATED = 12
"""Batches at most, or images of a random model, on which thresholds and static counts are set."""


@dataclass(frozen=True, kw_only=True)
class NetworkBench(ModesBench):
    """A whole network, dense against its policy: trained models, or SegViT of random weights with DToP.

    Attributes:
        checkpoints: trained models, detectors or segmenters, each with its own policy; by default none, but `models`.
        policy: takes the place of the checkpoints' own.
        thresholds: of early exits, take the place of the policy of segmenters among the checkpoints.
        models: names of backbones, random weights; with the papers' heads for 150 classes.
        sizes: (height, width) of the images in pixels; by default 512x512 and 640x640, and for checkpoints those that
            the model's own rule makes of the images.
        left: share of tokens that have left a random model after each auxiliary head; the thresholds are set to it on
            the images.
        keep_per_class: DToP's k, for random models.
    """

    checkpoints: tuple[Path, ...] = ()
    policy: str | None = None
    thresholds: tuple[float, ...] | None = None
    models: tuple[str, ...] = ("vit_b",)
    sizes: tuple[tuple[int, int], ...] = ()
    left: tuple[float, ...] = (0.35, 0.55)
    keep_per_class: int = 5


@torch.inference_mode()
def bench_network(config: NetworkBench, console: Console | None = None) -> dict[str, Any]:
    """Run, print a table, and return it as a dict with `rows`.

    Raises:
        ConfigError: an unknown model, a folder without pictures, shares that do not go with the heads, a checkpoint
            that cannot be loaded, or one whose policy computes every token.
    """
    if config.checkpoints:
        return _bench_checkpoints(config, console)
    if config.policy is not None or config.thresholds is not None:
        raise ConfigError("--policy and --thresholds are for trained models; give --checkpoints, or --left instead")
    check_known(config.models, SEGMENTERS)

    def rows_of(
        model: str, size: Size | None, batch: int, place: Place, modes: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        assert size is not None
        pictures = place.pictures(size, batch)
        segmenter = random_segmenter(SIZES[model], *SEGMENTERS[model])
        segmenter.eval().to(pictures)
        policy = calibrated_exits(segmenter, pictures[:CALIBRATED], config.left, config.keep_per_class)
        return time_network(segmenter, policy, pictures.split(batch), replace(config, modes=modes))

    def table(rows: list[dict[str, Any]]) -> Table:
        left = [percent(row["left"]) for row in rows]
        return table_of("network: dense against DToP, heads included", rows, {"left": left})

    return run("network", config, config.models, config.sizes or PAPER_SIZES, config.modes, rows_of, table, console)


def _bench_checkpoints(config: NetworkBench, console: Console | None) -> dict[str, Any]:
    models = {name: opened(path, config.policy, config.thresholds) for name, path in named(config.checkpoints).items()}

    def rows_of(
        name: str, size: Size | None, batch: int, place: Place, modes: tuple[str, ...]
    ) -> Iterator[dict[str, Any]]:
        model = models[name].to(place.device)
        if size is not None:
            model = model.as_given()
        return time_model(model, place.images(size, batch), replace(config, modes=modes), place.dtype)

    def table(rows: list[dict[str, Any]]) -> Table:
        return table_of("network: dense against its policy, everything included", rows, {"keep": kept(rows)})

    return run("network", config, models, config.sizes or (None,), config.modes, rows_of, table, console)


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Checkpoints by the names that rows call them: the file's or folder's, or the whole path where two share one."""
    names: dict[str, Path] = {}
    for path in paths:
        name = str(path) if str(path).startswith(HUB) else path.stem if path.suffix == ".safetensors" else path.name
        names[str(path) if name in names else name] = path
    return names


def opened(path: Path, policy: str | None, thresholds: tuple[float, ...] | None) -> Model:
    """A trained model whose policy leaves tokens out.

    Raises:
        ConfigError: see `sievit.load`; thresholds for another policy than `dtop`; or a policy that computes all tokens.
    """
    if thresholds is not None and policy not in (None, "dtop"):
        raise ConfigError(f"--thresholds are those of the policy 'dtop', not of {policy!r}; leave out --policy")
    model = load(path, policy=policy if thresholds is None else DToPConfig(thresholds=thresholds))
    if isinstance(model.config.policy, KeepAllConfig):
        raise ConfigError(
            f"{path}: its policy computes every token, so that there is nothing to compare; give another one by "
            "--policy, or a segmenter --thresholds"
        )
    return model


def time_model(
    model: Model, batches: Sequence[list[Tensor]], config: ModesBench, dtype: torch.dtype = torch.float32
) -> Iterator[dict[str, Any]]:
    """A trained model with every token computed and with its own policy, alternately on the same images.

    What is compiled in the compiled modes is the network from a batch to its maps or scores; resizing, proposals,
    boxes and masks are as they are.

    Args:
        batches: images (3, h, w) in 0..1; everything from there to the answers on their pixels is timed.
        dtype: of automatic mixed precision, where it is not float32.

    Returns:
        Rows as of `time_modes`, and `kind`, `policy` and `found_figures`. `tokens` are those of
        all windows of an image (mean).
    """
    device = model.device
    own: Any = model.network
    one_size = len({image.shape for images in batches for image in images}) == 1

    def call_of(policy: Policy, way: Way) -> Callable[[list[Tensor]], Answer]:
        if way.how != "eager" and not one_size:
            raise ConfigError("the images are of several sizes, and each would be compiled by itself; give --sizes")
        fast = way.compiled(lambda given: type(own).forward(own, *given[0], **given[1]), autotune=config.autotune)

        def of(images: list[Tensor]) -> Answer:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
                if way.how == "eager":
                    return model(images, policy=policy, execution=way.execution)
                own.__dict__["forward"] = lambda *args, **kwargs: fast((args, kwargs))
                try:
                    return model(images, policy=policy, execution=way.execution)
                finally:
                    del own.__dict__["forward"]

        return of

    def cost(policy: Policy, answer: Answer) -> Cost:
        return Cost.of(answer.trace, model.gflops(answer), policy, images=len(answer.sizes), found=answer.found())

    sparse: Policy = own.policy
    ways: dict[str, Policy | str] = {
        "dense": model.build_policy(KeepAllConfig()),
        "dynamic": sparse,
        "bucketed": sparse,
    }
    ways["static"] = no_static(model.config.policy)
    if not is_static(model.config.policy):
        traces = [model(images).trace for images in batches[:CALIBRATED]]
        static = static_config(sparse, traces, config.multiple)
        if static is not None:
            ways["static"] = model.build_policy(static)
    rows = time_modes(config, ways, call_of, batches, device, cost, list(model.vit.blocks), found_figures)
    return ({**row, "kind": kind_of(model.config), "policy": kind_of(model.config.policy)} for row in rows)


def time_network(
    segmenter: Segmenter, policy: Policy, batches: Sequence[Tensor], config: ModesBench
) -> Iterator[dict[str, Any]]:
    """A whole network without early exits and with those of `policy`, alternately on the same images, by modes.

    Without, only the last head is computed. `predicted_with_heads` is the ratio of multiply-adds to a dense network
    that computes the auxiliary heads too, as the released one does; `left` the share of tokens that are gone after each
    of them.
    """
    net = segmenter.net
    size = (batches[0].shape[2], batches[0].shape[3])

    def cost(policy: Policy, result: tuple[Tensor, Trace]) -> Cost:
        _, trace = result
        gflops, heads = _gflops(segmenter, trace, size), _unasked_heads(segmenter, trace)
        return Cost.of(trace, gflops, policy, left=_left(trace), heads=heads)

    traces = [net(images, policy=policy)[1] for images in batches[:CALIBRATED]]
    static = static_config(policy, traces, config.multiple)
    ways: dict[str, Policy | str] = {"dense": net.build_policy(KeepAllConfig()), "dynamic": policy, "bucketed": policy}
    ways["static"] = "no static counts" if static is None else net.build_policy(static).eval()
    blocks = list(net.vit.blocks)
    call_of = calls_of(net, autotune=config.autotune)
    return time_modes(config, ways, call_of, batches, batches[0].device, cost, blocks, _of_exits)


def _of_exits(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """What is told of early exits beside time and cost."""
    with_heads = [(pair.dense.gflops + pair.dense.more["heads"]) / pair.sparse.gflops for pair in pairs]
    left = zip(*(pair.sparse.more["left"] for pair in pairs), strict=True)
    return {
        "predicted_with_heads": round(statistics.median(with_heads), 3),
        "left": [round(statistics.fmean(shares), 3) for shares in left],
    }


def found_figures(pairs: Sequence[Pair[Cost]]) -> dict[str, Any]:
    """What the cost of the sparse passes depends on beside tokens, per image: detections."""
    images, names = sum(pair.sparse.images for pair in pairs), pairs[0].sparse.more["found"]
    return {name: round(sum(pair.sparse.more["found"][name] for pair in pairs) / images, 1) for name in names}


def random_segmenter(vit: ViTConfig, head: ATMConfig, out_indices: tuple[int, ...]) -> Segmenter:
    """A segmenter of random weights whose heads tell tokens apart.

    Fresh heads grade all tokens and classes nearly alike. These spread as trained ones do: their maps have a standard
    deviation of 3, and few classes are likely to be in the image.
    """
    torch.manual_seed(0)
    classes = tuple(f"class {i}" for i in range(CLASSES))
    config = SegmenterConfig(
        vit=vit, policy=KeepAllConfig(), input=InputConfig(), classes=classes, head=head, out_indices=out_indices
    )
    segmenter = Segmenter.from_config(config)
    for each in segmenter.net.heads:
        assert isinstance(each, ATM)
        looking = each.layers[-1].get_submodule("cross_attn")
        spread = math.sqrt(3 * math.sqrt(head.num_heads))  # of queries and keys, whose product is maps * sqrt(heads)
        for name in ("q.weight", "k.weight"):
            torch.nn.init.normal_(looking.get_parameter(name), std=spread / math.sqrt(head.channels))
        torch.nn.init.normal_(each.class_embed.weight, std=4 / math.sqrt(2 * head.channels))
        with torch.no_grad():
            each.class_embed.bias.copy_(torch.tensor([-3.0, 3.0]))
    return segmenter


def calibrated_exits(segmenter: Segmenter, pictures: Tensor, left: tuple[float, ...], keep_per_class: int) -> Policy:
    """DToP with thresholds such that on these pictures the shares `left` of the tokens are gone after each stage.

    Thresholds are found one after the other, by bisection on the share that really leaves, on average over the
    pictures, each of which the heads judge by itself.

    Raises:
        ConfigError: not one share for each auxiliary head, or shares that fall or do not lie between 0 and 1.
    """
    net, thresholds = segmenter.net, ()
    if len(left) != len(net.out_indices) - 1 or sorted(left) != list(left) or not 0 < left[0] <= left[-1] < 1:
        raise ConfigError(f"left {left}: one rising share between 0 and 1 for each of {len(net.out_indices) - 1} heads")
    for stage, share in enumerate(left):
        rest = (1.0,) * (len(left) - stage - 1)
        policy = net.build_policy(DToPConfig(thresholds=(*thresholds, 0.0, *rest), keep_per_class=keep_per_class))
        traces = [net(picture[None], policy=policy)[1] for picture in pictures]
        said = [trace.predictions[stage] for trace in traces]
        prediction = Prediction(
            torch.cat([each.maps for each in said]),
            torch.cat([each.classes for each in said if each.classes is not None]),
        )
        there = torch.cat([~trace.exited[stage - 1] if stage else trace.valid for trace in traces])
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            leaving = leave(prediction, there, middle, keep_per_class=keep_per_class, grade="max")
            if (leaving | ~there).double().mean().item() > share:
                low = middle
            else:
                high = middle
        thresholds = (*thresholds, high)
    return net.build_policy(DToPConfig(thresholds=thresholds, keep_per_class=keep_per_class))


def _gflops(segmenter: Segmenter, trace: Trace, size: tuple[int, int]) -> Tensor:
    """(b,) GFLOPs of everything in a pass of the network over images of `size`."""
    return segmenter.gflops(Segmentation.whole(trace, [size] * len(trace.valid), size))


def _unasked_heads(segmenter: Segmenter, trace: Trace) -> float:
    """GFLOPs of the auxiliary heads on all tokens of a pass that did without them."""
    heads = [head for head in segmenter.net.heads if isinstance(head, SemanticHead)]
    return sum(head.macs(trace.valid.sum(1), trace.grid).sum().item() for head in heads[:-1]) / 1e9


def _left(trace: Trace) -> list[float]:
    """(stages,) share of the tokens that have left after each auxiliary head; empty without early exits."""
    return [exited.double().mean().item() for exited in trace.exited[:-1]]
