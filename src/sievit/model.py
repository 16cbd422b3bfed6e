"""The detector: images in, torchvision's dictionaries out; and the one file that holds a trained one.

Letters: b images, (h, w) an image's pixels, d detections, g objects. Boxes are xyxy pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sievit.config import ConfigError, from_json, kind_of, to_json
from sievit.data.images import read_image, to_rgb, to_tensor
from sievit.files import write_atomically
from sievit.heads.mask_rcnn import MaskRCNN, MaskRCNNConfig
from sievit.heads.masks import paste_masks
from sievit.necks import NeckConfig
from sievit.necks.build import Backbone, build_backbone
from sievit.policies import Policy, PolicyConfig, policy_config
from sievit.tokens import Trace
from sievit.vit import Mode, ViTConfig

Size = tuple[int, int]
FORMAT = "sievit"
POLICY_PREFIX = "backbone.policy."


@dataclass(frozen=True)
class InputConfig:
    """What happens to an image before the network sees it.

    Attributes:
        mean, std: per channel, of RGB in 0..1.
        min_size, max_size: test images are resized, keeping their shape, so that the short edge is `min_size` unless
            the long one would exceed `max_size`. `min_size=None` leaves them as they are.
        size_divisor: a batch is padded to a multiple of it.
        antialias: filter before making images smaller (the SViT release does not).
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    min_size: int | None = 800
    max_size: int = 1333
    size_divisor: int = 32
    antialias: bool = True

    def test_size(self, size: Size) -> Size:
        """(height, width) that the network sees of an image of `size`."""
        if self.min_size is None:
            return size
        scale = min(self.min_size / min(size), self.max_size / max(size))
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


@dataclass(frozen=True)
class ModelConfig:
    """All of a detector; enough to rebuild it.

    Attributes:
        classes: names; label i + 1 is `classes[i]`.
        category_ids: the ids that a COCO file gives these classes.
    """

    vit: ViTConfig
    neck: NeckConfig
    policy: PolicyConfig
    head: MaskRCNNConfig
    input: InputConfig
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.classes) != self.head.num_classes or len(self.category_ids) != self.head.num_classes:
            raise ConfigError(
                f"head.num_classes is {self.head.num_classes}, but there are {len(self.classes)} classes and "
                f"{len(self.category_ids)} category_ids; give one of each per class"
            )


@dataclass(frozen=True)
class Output:
    """What a pass of the detector returns.

    Attributes:
        detections: per image `boxes` (d, 4), `labels` (d,), `scores` (d,) best first, and with a mask branch `masks`
            (d, 1, h, w) bool, all on the pixels of the image that was given; empty when targets were given.
        losses: by name, weighted; empty without targets.
        trace: which tokens took part in which block.
        sizes: per image the (height, width) that the network saw; `image_size`: that of the padded batch.
    """

    detections: list[dict[str, Tensor]]
    losses: dict[str, Tensor]
    trace: Trace
    sizes: list[Size]
    image_size: Size


class Detector(nn.Module):
    """A backbone and Mask R-CNN."""

    def __init__(self, config: ModelConfig, *, backbone: Backbone, head: MaskRCNN) -> None:
        super().__init__()
        self.config = config
        self.backbone: Backbone = backbone
        self.head = head

    @property
    def policy(self) -> Policy:
        """Decides which tokens take part."""
        return self.backbone.policy

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        *,
        policy: Policy | None = None,
        mode: Mode = "auto",
    ) -> Output:
        """Losses when `targets` are given, detections when not.

        Args:
            images: (3, h, w) RGB, float in 0..1 or uint8, of any sizes. With targets they are used at their size,
                without they are resized to the test size.
            targets: per image `boxes` (g, 4), `labels` (g,), and `masks` (g, h, w) for a mask branch.
            policy: takes the place of the model's own.
            mode: the executor's, see `ViT.forward`.
        """
        given = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = given if targets is not None else [self.config.input.test_size(size) for size in given]
        batch = self.batch(images, sizes)
        image_size = (batch.shape[-2], batch.shape[-1])
        features, trace = self.backbone(batch, sizes, policy=policy, mode=mode)
        if targets is not None:
            targets = [{name: x.to(self.device) for name, x in t.items() if isinstance(x, Tensor)} for t in targets]
        detections, losses = self.head(features, image_size, sizes, targets)
        if targets is not None:
            chosen = self.policy if policy is None else policy
            losses = {**losses, **chosen.loss(trace)}
        detections = [self._on_image(d, *pair) for d, *pair in zip(detections, sizes, given, strict=targets is None)]
        return Output(detections=detections, losses=losses, trace=trace, sizes=sizes, image_size=image_size)

    def batch(self, images: list[Tensor], sizes: list[Size]) -> Tensor:
        """(b, 3, H, W): resized to `sizes`, normalised, padded with zeros at the right and the bottom."""
        config = self.config.input
        height, width = (_up(max(edges), config.size_divisor) for edges in zip(*sizes, strict=True))
        mean = torch.tensor(config.mean, device=self.device)[:, None, None]
        std = torch.tensor(config.std, device=self.device)[:, None, None]
        batch = torch.zeros(len(images), 3, height, width, device=self.device)
        for row, image, (h, w) in zip(batch, images, sizes, strict=True):
            image = image.to(self.device)
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
            if image.shape[-2:] != (h, w):
                image = F.interpolate(
                    image[None], (h, w), mode="bilinear", align_corners=False, antialias=config.antialias
                )[0]
            row[:, :h, :w] = (image - mean) / std
        return batch

    def _on_image(self, detection: dict[str, Tensor], size: Size, given: Size) -> dict[str, Tensor]:
        """The detection on the pixels of the image that was given, instead of those that the network saw."""
        ratio = detection["boxes"].new_tensor([given[1] / size[1], given[0] / size[0]] * 2)
        limit = ratio.new_tensor([given[1], given[0]] * 2)
        boxes = (detection["boxes"] * ratio).minimum(limit)
        moved = {**detection, "boxes": boxes}
        if "masks" in detection:
            moved["masks"] = paste_masks(detection["masks"], boxes, given, self.config.head)
        return moved

    @torch.no_grad()
    def predict(
        self, images: Sequence[Any], *, batch_size: int = 1, policy: Policy | None = None
    ) -> list[dict[str, Tensor]]:
        """Detect objects; the model is in evaluation mode meanwhile.

        Args:
            images: paths, PIL images, arrays (h, w, 3) or (h, w) of uint8, tensors (3, h, w) of uint8 or float in 0..1;
                RGB.
            batch_size: images that go through the network together.

        Returns:
            Per image `boxes` (d, 4), `labels` (d,), `scores` (d,), `masks` (d, 1, h, w) bool, on its own pixels.

        Raises:
            ConfigError: not a list of images, or a file that cannot be read.
        """
        if isinstance(images, str | Path | Tensor | np.ndarray) or not isinstance(images, Sequence):
            raise ConfigError(f"predict takes a list of images, not a {type(images).__name__}; write predict([image])")
        training = self.training
        self.eval()
        try:
            detections = []
            for start in range(0, len(images), batch_size):
                tensors = [as_tensor(image) for image in images[start : start + batch_size]]
                detections += self(tensors, policy=policy).detections
        finally:
            self.train(training)
        return detections


def build(config: ModelConfig) -> Detector:
    """The detector that `config` describes, with random weights."""
    backbone = build_backbone(config.neck, config.vit, config.policy)
    return Detector(config, backbone=backbone, head=MaskRCNN(config.head, in_channels=backbone.out_channels))


def as_tensor(image: Any) -> Tensor:
    """An image of any kind that `Detector.predict` takes, as (3, h, w) RGB, float in 0..1 or uint8.

    Raises:
        ConfigError: another type or shape, or a file that cannot be read.
    """
    if isinstance(image, str | Path):
        image = read_image(Path(image))
    if isinstance(image, Image):
        image = to_tensor(to_rgb(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ConfigError(f"an image array must be uint8, not {image.dtype}; floats in 0..1 go in as tensors")
        image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
        if image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(f"an image array must be (h, w, 3) or (h, w), not {image.shape}")
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ConfigError(f"cannot read an image from {type(image).__name__}; give a path, PIL image, array or tensor")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ConfigError(f"an image tensor must be (3, h, w), not {tuple(image.shape)}")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ConfigError(f"an image tensor must be uint8 or float in 0..1, not {image.dtype}")
    return image


def save(model: Detector, path: Path | str, *, half: bool = False) -> None:
    """Write the model and its configuration as one safetensors file, whole or not at all.

    Args:
        half: store parameters as float16; buffers (running statistics) keep their type.

    Raises:
        ConfigError: a parameter is too large for float16.
        OSError: the disk is full or the folder cannot be written; a file that was there is still the old one.
    """
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if half and name in parameters:
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise ConfigError(f"{name} does not fit float16; save the model with half=False")
        tensors[name] = tensor
    metadata = {"format": FORMAT, "config": json.dumps(to_json(model.config))}
    write_atomically(Path(path), to_bytes(tensors, metadata))


def load(path: Path | str, *, policy: str | PolicyConfig | None = None, device: str | torch.device = "cpu") -> Detector:
    """A trained detector, in evaluation mode.

    Args:
        path: a file that `save` wrote, or the folder of a training run (its best model, else its last).
        policy: takes the place of the checkpoint's: a configuration, or a name for the default one of that name (the
            checkpoint's own where it has that name). Weights of the policy that is replaced are left out.

    Raises:
        ConfigError: no such file, not a sievit model, damaged, weights that do not fit, an unknown policy, or one that
            has to be trained and was not.
    """
    path = model_file(Path(path))
    config, tensors = read(path)
    if policy is not None:
        wanted = policy_config(policy) if isinstance(policy, str) else policy
        if not (isinstance(policy, str) and kind_of(config.policy) == policy):
            config = replace(config, policy=wanted)
    model = build(config)
    expected = model.state_dict()
    if policy is not None:
        dropped = {name for name in tensors if name.startswith(POLICY_PREFIX) and name not in expected}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}
        untrained = [n for n in expected if n.startswith(POLICY_PREFIX) and n not in tensors]
        if untrained:
            raise ConfigError(
                f"{path}: has no weights for the policy {kind_of(config.policy)!r} (such as {untrained[0]}); "
                "train it first, starting from this checkpoint"
            )
    _check_fit(path, expected, tensors)
    model.load_state_dict(tensors)
    return model.eval().to(device)


def read(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the tensors, as stored, of a file that `save` wrote.

    Raises:
        ConfigError: no such file, not a sievit model, or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a .safetensors file or the folder of a training run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged, cut short, or not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ConfigError(f"{path}: a safetensors file, but not one that sievit wrote: it holds no model configuration")
    try:
        data = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: its model configuration is not JSON ({error})") from error
    return from_json(ModelConfig, data, where=f"{path}: model configuration"), tensors


def model_file(path: Path) -> Path:
    """The file that holds the model: itself, or the best or last one of a training run's folder."""
    if not path.is_dir():
        return path
    for name in ("best.safetensors", "last.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"{path}: has neither best.safetensors nor last.safetensors; is it the folder of a training run?")


def _check_fit(path: Path, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise unless names and shapes are the same."""
    problems = [f"lacks {name}" for name in expected if name not in tensors]
    problems += [f"has {name}, which the model lacks" for name in tensors if name not in expected]
    problems += [
        f"has {name} of shape {tuple(tensors[name].shape)}, the model's is {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError(f"{path}: the weights are of another model: it {'; it '.join(problems[:3])}{more}")


def _up(x: int, divisor: int) -> int:
    return -(-x // divisor) * divisor
