"""A kind of model and its task as a user would write them, outside of the package: one class for a whole image."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sievit.config import ConfigError, variant
from sievit.data.dataset import ImageDataset
from sievit.data.images import read_image, to_tensor
from sievit.data.truth import Truth
from sievit.measure.flops import traced_macs
from sievit.models.base import Answer, Model, TimedPart, dense_trace, register_model
from sievit.models.inputs import ModelConfig, Size, batched
from sievit.policies import Policy
from sievit.tasks import DataConfig, Metric, Task, Writer, register_task
from sievit.tokens import Trace
from sievit.vit import Execution, Sizes, ViT
from sievit.viz import Picture, fit, to_pil


@variant("tagger")
@dataclass(frozen=True)
class TaggerConfig(ModelConfig):
    """A plain ViT and a linear layer."""

    result: ClassVar[str] = "a class"
    hub_task: ClassVar[str] = "image-classification"
    figures: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy"}


class TaggerNet(nn.Module):
    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        self.vit = ViT(config.vit)
        self.policy = self.vit.build_policy(config.policy)
        self.head = nn.Linear(config.vit.embed_dim, len(config.classes))

    def forward(
        self,
        images: Tensor,
        sizes: Sizes | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution = Execution(),
    ) -> tuple[Tensor, Trace]:
        tokens, trace = self.vit(images, self.policy if policy is None else policy, sizes, execution=execution)
        valid = tokens.valid_or_all()[..., None].to(tokens.x.dtype)  # (b, n, 1)
        return self.head((valid * tokens.patches).sum(1) / valid.sum(1)), trace


@register_model(TaggerConfig)
class Tagger(Model[Tensor]):
    """The class of an image, int64."""

    kind = "tagger"
    config: TaggerConfig

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__()
        self.config = config
        self.net = TaggerNet(config)

    @classmethod
    def from_config(cls, config: TaggerConfig) -> Self:
        return cls(config)

    @property
    def network(self) -> TaggerNet:
        return self.net

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution | None = None,
        teacher: Trace | None = None,
    ) -> Answer[Tensor]:
        given = [(image.shape[1], image.shape[2]) for image in images]
        sizes = given if targets is not None else [self.config.input.test_size(size) for size in given]
        batch = batched(images, sizes, self.config.input, self.device)
        logits, trace = (execution or self.config.execution).run(self.net, batch, sizes, policy=policy)
        size = (batch.shape[2], batch.shape[3])
        if targets is None:
            return Answer.whole(trace, sizes, size, results=list(logits.argmax(1)))
        losses = {"class": F.cross_entropy(logits, torch.stack([target["label"] for target in targets]))}
        return Answer.whole(trace, sizes, size, losses={**losses, **(policy or self.policy).loss(trace)})

    def count(self, answer: Answer[Tensor]) -> dict[str, Tensor]:
        vit, trace = self.config.vit, answer.trace
        parts = {
            "patch_embed": trace.valid.sum(1).double() * 3 * vit.patch_size**2 * vit.embed_dim,
            "blocks": traced_macs(vit, trace),
            "policy": self.policy.cost(trace),
            "head": torch.full((len(trace.valid),), float(self.net.head.weight.numel())).double(),
        }
        return {name: macs / 1e9 for name, macs in parts.items()}

    def dense_answer(self, size: Size) -> Answer[Tensor]:
        stride = self.config.vit.stride
        trace = dense_trace(self.policy, (-(-size[0] // stride), -(-size[1] // stride)), self.config.vit)
        return Answer.whole(trace, [size], size)

    def timed_parts(self) -> list[TimedPart]:
        return [
            (self.vit, "run_blocks", "blocks, gates"),
            (self.net.head, "forward", "head"),
            (self, "forward", "rest"),
        ]

    def counted_parts(self) -> dict[str, tuple[str, ...]]:
        return {"blocks, gates": ("blocks", "policy"), "head": ("head",)}


@variant("tags")
@dataclass(frozen=True, kw_only=True)
class TagsData(DataConfig):
    """Images and a JSON file that gives each one's class by its name."""

    tags: Path


class TaggedImages(ImageDataset):
    def __init__(self, images: Path, tags: Path, classes: tuple[str, ...]) -> None:
        super().__init__(transform=None, seed=0, cache_bytes=0)
        self.root, self.source, self.classes = images, str(tags), classes
        self.tags = sorted(json.loads(tags.read_text()).items())

    def __len__(self) -> int:
        return len(self.tags)

    def path(self, index: int) -> Path:
        return self.root / self.tags[index][0]

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        label = torch.tensor(self.classes.index(self.tags[index][1]))
        return to_tensor(read_image(self.path(index))), {"label": label}


@register_task("tagger")
class Tagging(Task[Tensor]):
    """Accuracy."""

    data_config = TagsData
    shown = ("accuracy",)

    def open(self, images: Path, truth: Truth) -> TaggedImages:
        if truth.annotations is None:
            raise ConfigError("the model is a tagger; give --annotations, a JSON file of classes")
        return TaggedImages(images, truth.annotations, self.config.classes)

    def open_training(self, data: TagsData, root: Path, *, seed: int) -> tuple[TaggedImages, TaggedImages]:
        train, val = (
            TaggedImages(root / images, root / data.tags, self.config.classes)
            for images in (data.train_images, data.val_images)
        )
        return train, val

    def metric(self, data: TaggedImages) -> Metric[Tensor]:
        hits: list[float] = []
        return Metric(
            lambda target, result: hits.append(float(result == target["label"])),
            lambda: {"accuracy": sum(hits) / len(hits)},
            lambda draws: {"accuracy": np.array(hits)[draws].mean(1)},
        )

    def picture(self, image: Picture, result: Tensor, *, min_score: float, box: tuple[int, int]) -> Image.Image:
        return fit(to_pil(image), box)

    def summary(self, result: Tensor, *, min_score: float) -> str:
        return self.config.classes[int(result)]

    def columns(self, result: Tensor | None) -> dict[str, Any]:
        return {"tag": "" if result is None else self.config.classes[int(result)]}

    def writer(self, out: Path, names: Sequence[str], *, ids: Any = None) -> Writer[Tensor]:
        return TagWriter(out, self.config.classes)


class TagWriter(Writer[Tensor]):
    def __init__(self, out: Path, classes: tuple[str, ...]) -> None:
        self.path, self.classes = out / "tags.json", classes

    shared = ("tags.json",)

    def add(self, name: str, size: tuple[int, int], result: Tensor) -> dict[str, Any]:
        return {"tag": self.classes[int(result)]}

    def finish(self, added: Mapping[str, dict[str, Any]]) -> str:
        self.path.write_text(json.dumps({name: line["tag"] for name, line in added.items()}))
        return f"{len(added)} classes: {self.path}"
