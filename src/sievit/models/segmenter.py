"""The segmenter: images in, a label for every pixel out.

Letters: b images or windows, (h, w) pixels of one, n grid tokens, k classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sievit.config import Byte, ConfigError, Count, Label, Natural, NonNegative, variant
from sievit.heads.semantic import SemanticHead, SemanticHeadConfig, build_head, extents, repeat_edges, resize
from sievit.measure.flops import traced_macs
from sievit.measure.published import head_tokens, published_macs
from sievit.models.base import Answer, Model, TimedPart, dense_trace, register_model
from sievit.models.found import labels_to_supervision
from sievit.models.inputs import ModelConfig, Size, batched, normalised, padded_size, windows_over
from sievit.models.programs import SegmenterProgram
from sievit.policies import Policy, PolicyConfig
from sievit.policies.base import Head
from sievit.tokens import Prediction, Tokens, Trace
from sievit.vit import Execution, Sizes, ViT, ViTConfig


@variant("segmenter")
@dataclass(frozen=True)
class SegmenterConfig(ModelConfig):
    """All of a segmenter; enough to rebuild it.

    Attributes:
        head: of every stage.
        out_indices: 0-based blocks behind which heads stand; the last one is the last block, the others are auxiliary.
        aux_weight: of the losses of auxiliary heads.
        crop, stride: (height, width) of the sliding window of inference and of its steps, in pixels of the resized
            image; None: the whole image at once.
        windows_at_once: how many windows go through the network together.
        ignore_index: the label of pixels about which nothing is known.
        palette: RGB of each class, for pictures and label files; empty for a default one.
    """

    head: SemanticHeadConfig
    out_indices: tuple[Natural, ...]
    aux_weight: NonNegative = 1.0
    crop: tuple[Count, Count] | None = None
    stride: tuple[Count, Count] | None = None
    windows_at_once: Count = 8
    ignore_index: Label = 255
    palette: tuple[tuple[Byte, Byte, Byte], ...] = ()

    result: ClassVar[str] = "a class for every pixel"
    hub_task: ClassVar[str] = "image-segmentation"
    figures: ClassVar[Mapping[str, str]] = {
        "miou": "mean IoU",
        "pixel_accuracy": "pixel accuracy",
        "mean_accuracy": "mean accuracy",
    }

    @property
    def hub_tags(self) -> tuple[str, ...]:
        return ("semantic-segmentation",)

    def __post_init__(self) -> None:
        places, depth = self.out_indices, self.vit.depth
        if not places or list(places) != sorted(set(places)) or places[0] < 0 or places[-1] != depth - 1:
            raise ConfigError(f"out_indices {places}: rising blocks, the last of them {depth - 1}, the last block")
        if (self.crop is None) != (self.stride is None):
            raise ConfigError("crop and stride of the sliding window go together; give both or neither")
        if self.crop and self.stride and (self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]):
            raise ConfigError(f"a stride of {self.stride} leaves gaps between windows of {self.crop}")
        if 0 <= self.ignore_index < len(self.classes):
            raise ConfigError(f"ignore_index {self.ignore_index} is one of the {len(self.classes)} classes")
        if self.palette and len(self.palette) != len(self.classes):
            raise ConfigError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")

    @property
    def has_exits(self) -> bool:
        return len(self.out_indices) > 1

    def with_depth(self, depth: int) -> Self:
        """With as many heads, as near to the blocks of theirs as there is room."""
        room = range(depth - len(self.out_indices), depth)
        indices = tuple(min(pair) for pair in zip(self.out_indices, room, strict=True))
        return replace(self, vit=replace(self.vit, depth=depth), out_indices=(*indices[:-1], depth - 1))

    @property
    def default_size(self) -> Size:
        """(height, width) of the window that the segmenter was trained on."""
        return self.crop or (self.vit.grid[0] * self.vit.stride, self.vit.grid[1] * self.vit.stride)


@dataclass(frozen=True, kw_only=True)
class Segmentation(Answer[Tensor]):
    """What a pass of the segmenter returns; `results` are `labels`."""

    @property
    def labels(self) -> list[Tensor]:
        """Per image (h, w) int64, on the pixels of the image that was given; empty when targets were given."""
        return self.results


class SegmentationNet(nn.Module):
    """A plain ViT with a semantic head behind some of its blocks, the last one's giving the answer."""

    def __init__(
        self, *, vit: ViT, policy: PolicyConfig, heads: Sequence[SemanticHead], out_indices: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.vit = vit
        self.heads = nn.ModuleList(heads)
        self.out_indices = out_indices
        behind: dict[int, Head] = dict(zip(out_indices, heads, strict=True))
        if vit.config.final_norm:
            behind[out_indices[-1]] = partial(_after_norm, vit.norm, heads[-1])
        self._behind = behind
        self.policy = self.build_policy(policy)

    def build_policy(self, config: PolicyConfig) -> Policy:
        """A policy for this network, which may run its heads."""
        return self.vit.build_policy(config, heads=self._behind)

    def forward(
        self,
        images: Tensor,
        sizes: Sizes | Tensor | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
        head_size: Size | None = None,
    ) -> tuple[Tensor, Trace]:
        """Normalised images (b, 3, H, W) to logits (b, k, H, W) and the trace.

        Attention-to-mask heads give scores of 0..1 instead of logits, as SegViT does.

        Args:
            images: of any shape; they are padded with zeros at the right and the bottom to whole patches.
            sizes: (height, width) of each image inside the padded batch; None: they fill it.
            policy: another one than `self.policy`.
            head_size: the predictions are first resized to this size, as the released DToP heads do, which take that
                of the training images for any input.
        """
        predictions, trace = self.predictions(images, sizes, policy=policy, execution=execution)
        canvas = padded_size(images.shape[2:], self.vit.config.stride)
        logits = upsampled(predictions[self.out_indices[-1]], trace.grid, canvas, via=head_size)
        return logits[..., : images.shape[2], : images.shape[3]], trace

    def predictions(
        self,
        images: Tensor,
        sizes: Sizes | Tensor | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
    ) -> tuple[dict[int, Prediction], Trace]:
        """Predictions of the heads, by the block that they stand behind: in training all of them, else those that ran;
        the last one's is the answer. Padding has the predictions of the edge of the image."""
        policy = self.policy if policy is None else policy
        height, width = padded_size(images.shape[2:], self.vit.config.stride)
        images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))
        tokens = self.vit.embed(images, sizes)
        trace = Trace.start(tokens)
        if "heads" in policy.needs:
            tokens, trace = self.vit.run_blocks(tokens, policy, trace, execution=execution)
            pairs = zip(trace.head_blocks, trace.predictions, strict=True)
            return {block: _filled(prediction, tokens) for block, prediction in pairs}, trace
        predictions, start = {}, 0
        for block, head in self._behind.items() if self.training else list(self._behind.items())[-1:]:
            tokens, trace = self.vit.run_blocks(tokens, policy, trace, start=start, stop=block + 1, execution=execution)
            predictions[block] = _filled(head(tokens, tokens.valid, None), tokens)
            start = block + 1
        return predictions, trace


def _filled(prediction: Prediction, tokens: Tokens) -> Prediction:
    """The same with the edge of each image repeated over the padding behind it."""
    if tokens.valid is None:
        return prediction
    rows, columns = extents(tokens.valid, tokens.grid)
    maps = repeat_edges(prediction.maps.unflatten(2, tokens.grid), rows, columns).flatten(2)
    fine = prediction.fine
    if fine is not None:
        scale = fine.shape[2] // tokens.grid[0]
        fine = repeat_edges(fine, rows * scale, columns * scale)
    return replace(prediction, maps=maps, fine=fine)


def _after_norm(
    norm: nn.Module, head: SemanticHead, tokens: Tokens, part: Tensor | None, previous: Prediction | None
) -> Prediction:
    """The last head of a backbone that ends with a norm."""
    return head(replace(tokens, x=norm(tokens.x)), part, previous)


def upsampled(prediction: Prediction, grid: tuple[int, int], size: Size, *, via: Size | None = None) -> Tensor:
    """(b, k, *size): logits or scores of the tokens of `grid`, resized bilinearly, first to `via` where it is given."""
    if prediction.fine is not None:
        maps = prediction.fine
    else:
        maps = (prediction.maps if prediction.classes is None else prediction.scores()).unflatten(2, grid)
    maps = maps.contiguous()  # those of packed tokens lie token by token, which takes ten times as long to resize
    return resize(maps if via is None else resize(maps, via), size)


@register_model(SegmenterConfig)
class Segmenter(Model[Tensor]):
    """A network, the windows over images before it, and labels of their pixels after it."""

    kind = "segmenter"
    program = SegmenterProgram
    config: SegmenterConfig

    def __init__(self, config: SegmenterConfig, net: SegmentationNet) -> None:
        super().__init__()
        self.config = config
        self.net = net

    @classmethod
    def from_config(cls, config: SegmenterConfig) -> Self:
        """The segmenter that `config` describes, with random weights."""
        net = build_net(config.vit, config.policy, config.head, config.out_indices, len(config.classes))
        return cls(config, net)

    @property
    def network(self) -> SegmentationNet:
        return self.net

    def new_policy(self, config: PolicyConfig) -> Policy:
        return self.net.build_policy(config)

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution | None = None,
        teacher: Trace | None = None,
    ) -> Segmentation:
        """See `Model.forward`. Losses are of all heads in training, else of those that ran.

        Args:
            images: where there is a crop, they are looked at window by window without targets.
            targets: per image `labels` (h, w) int64, the size of the image.
        """
        if targets is not None:
            output = self._losses(images, [target["labels"] for target in targets], policy, execution or Execution())
            chosen = self.policy if policy is None else policy
            more = chosen.loss(output.trace, teacher=teacher, targets=targets)
            return replace(output, losses={**output.losses, **more})
        scores, output = self._score(images, policy, self.config.execution if execution is None else execution)
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        # max, for argmax over the classes takes several times as long on a CPU
        labels = [resize(each[None], size)[0].max(0).indices for each, size in zip(scores, given, strict=True)]
        return replace(output, results=labels)

    def _losses(
        self, images: list[Tensor], labels: list[Tensor], policy: Policy | None, execution: Execution
    ) -> Segmentation:
        config = self.config
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch = batched(images, sizes, replace(config.input, size_divisor=config.vit.stride), self.device)
        size = (batch.shape[2], batch.shape[3])
        truth = torch.full((len(images), *size), config.ignore_index, dtype=torch.int64, device=self.device)
        for i, (each, (h, w)) in enumerate(zip(labels, sizes, strict=True)):
            if each.shape != (h, w):
                raise ConfigError(f"image {i} is {h}x{w} pixels, its labels are {tuple(each.shape)}")
            truth[i, :h, :w] = each.to(self.device)
        predictions, trace = self.net.predictions(batch, sizes, policy=policy, execution=execution)
        losses = {}
        for stage, (block, head) in enumerate(zip(self.net.out_indices, self.net.heads, strict=True)):
            if block not in predictions:
                continue
            last = stage + 1 == len(self.net.heads)
            assert isinstance(head, SemanticHead)
            for name, loss in head.losses(predictions[block], trace.grid, truth, config.ignore_index).items():
                losses[name if last else f"aux_{stage}_{name}"] = loss if last else config.aux_weight * loss
        return Segmentation.whole(trace, sizes, size, losses=losses)

    def scores(self, images: list[Tensor], *, policy: Policy | None = None) -> list[Tensor]:
        """Per image (k, h, w), on its pixels as the network sees them: what the labels are the largest of.

        Where windows overlap it is their mean. Arguments as of `forward`.
        """
        return self._score(images, policy, self.config.execution)[0]

    def _score(
        self, images: list[Tensor], policy: Policy | None, execution: Execution
    ) -> tuple[list[Tensor], Segmentation]:
        """The scores of all images, and the answer without its results."""
        config = self.config
        resized = [config.input.test_size((image.shape[-2], image.shape[-1])) for image in images]
        inputs = [normalised(i, size, config.input, self.device) for i, size in zip(images, resized, strict=True)]
        placed = [
            (i, window) for i, size in enumerate(resized) for window in windows_over(size, config.crop, config.stride)
        ]
        size = padded_size([max(window[axis] for _, window in placed) for axis in (2, 3)], config.vit.stride)
        sums = [torch.zeros(len(config.classes), *each, device=self.device) for each in resized]
        counts = [torch.zeros(each, device=self.device) for each in resized]
        traces = []
        for start in range(0, len(placed), config.windows_at_once):
            part = placed[start : start + config.windows_at_once]
            batch = torch.zeros(len(part), 3, *size, device=self.device)
            for row, (i, (y, x, h, w)) in zip(batch, part, strict=True):
                row[:, :h, :w] = inputs[i][:, y : y + h, x : x + w]
            sizes = [window[2:] for _, window in part]
            with execution.autocast(self.device):
                logits, trace = execution.run(self.net, batch, sizes, policy=policy)
            traces.append(trace)
            for scores, (i, (y, x, h, w)) in zip(logits, part, strict=True):
                sums[i][:, y : y + h, x : x + w] += scores[:, :h, :w]
                counts[i][y : y + h, x : x + w] += 1
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        owner, windows = zip(*placed, strict=True)
        return means, Segmentation(
            results=[],
            losses={},
            trace=Trace.join(traces),
            owner=owner,
            windows=windows,
            sizes=resized,
            image_size=size,
        )

    def to_supervision(self, result: Tensor) -> Any:
        return labels_to_supervision(result, self.config.classes)

    def at_once(self) -> Self:
        return self if self.config.crop is None else self.with_config(windows_at_once=10**6)

    def count(self, answer: Answer[Tensor]) -> dict[str, Tensor]:
        """See `Model.count`; further parts are `heads.0`, ... and `upsampling`: bilinear resizing of the last
        predictions, to windows and to the given images, at four per value that comes out, as DToP counts it."""
        trace, vit, classes = answer.trace, self.vit.config, len(self.config.classes)
        rows, columns = extents(trace.valid, trace.grid)
        last = self.net.heads[-1]
        resized = 0 if last.scale == vit.stride else 4 * classes * vit.stride**2
        parts = {
            "patch_embed": trace.valid.sum(1).double() * 3 * vit.patch_size**2 * vit.embed_dim,
            "blocks": traced_macs(vit, trace),
            "policy": self.policy.cost(trace),
            **{f"heads.{i}": macs for i, macs in enumerate(self._heads_macs(trace))},
            "upsampling": (resized * rows * columns).double(),
        }
        of_images = {name: answer.per_image(macs) for name, macs in parts.items()}
        for i, (labels, seen) in enumerate(zip(answer.results, answer.sizes, strict=False)):
            if tuple(labels.shape) != tuple(seen):
                of_images["upsampling"][i] += 4 * classes * labels.numel()
        return {name: macs / 1e9 for name, macs in of_images.items()}

    def _heads_macs(self, trace: Trace) -> list[Tensor]:
        """Per stage (r,) multiply-adds of its head, on the grid of each row; zero where it did not run."""
        blocks = trace.head_blocks if trace.exited else self.net.out_indices[-1:]
        grids = list(zip(*(edge.tolist() for edge in extents(trace.valid, trace.grid)), strict=True))
        found = []
        for block, head in zip(self.net.out_indices, self.net.heads, strict=True):
            assert isinstance(head, SemanticHead)
            tokens = head_tokens(trace, block)
            macs = torch.zeros(len(grids), dtype=torch.float64, device=tokens.device)
            for grid in set(grids) if block in blocks else ():
                rows = torch.tensor([i for i, each in enumerate(grids) if each == grid], device=tokens.device)
                macs[rows] = head.macs(tokens[rows], grid).double()
            found.append(macs)
        return found

    def published_gflops(self, answer: Answer[Tensor]) -> Tensor:
        """See `measure.published`; all windows of each image."""
        config = self.config
        macs = published_macs(config.vit, config.head, len(config.classes), config.out_indices, answer.trace)
        return answer.per_image(macs) / 1e9

    def dense_answer(self, size: Size) -> Segmentation:
        vit, canvas = self.vit.config, padded_size(size, self.vit.config.stride)
        trace = dense_trace(self.policy, (canvas[0] // vit.stride, canvas[1] // vit.stride), vit)
        return Segmentation.whole(trace, [size], canvas)

    def timed_parts(self) -> list[TimedPart]:
        parts: list[TimedPart] = [
            (self.vit, "embed", "patch embedding"),
            (self.vit, "run_blocks", "blocks, gates"),
            *((head, "forward", f"head {i}") for i, head in enumerate(self.net.heads)),
            (self.net, "forward", "up-sampling"),
            (self, "forward", "rest"),
        ]
        return parts

    def counted_parts(self) -> dict[str, tuple[str, ...]]:
        heads = {f"head {i}": (f"heads.{i}",) for i in range(len(self.net.heads))}
        first = {"patch embedding": ("patch_embed",), "blocks, gates": ("blocks", "policy")}
        return {**first, **heads, "up-sampling": ("upsampling",)}


def build_net(
    vit: ViTConfig, policy: PolicyConfig, head: SemanticHeadConfig, out_indices: tuple[int, ...], num_classes: int
) -> SegmentationNet:
    """The network that the configurations describe, with random weights."""
    heads = [build_head(head, embed_dim=vit.embed_dim, num_classes=num_classes) for _ in out_indices]
    return SegmentationNet(vit=ViT(vit), policy=policy, heads=heads, out_indices=out_indices)
