"""Tiny models and data for all tests. Every function takes the fields of the configuration that it returns."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sievit.config import ConfigError
from sievit.data.scenes import CLASSES
from sievit.heads import ATMConfig, MaskRCNNConfig
from sievit.heads.config import BoxConfig, MaskConfig, RPNConfig
from sievit.models.build import build, save
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import InputConfig, ModelConfig
from sievit.models.segmenter import SegmenterConfig
from sievit.necks.pyramid import PyramidConfig
from sievit.policies import KeepAllConfig, Policy
from sievit.tasks.detection import CocoData
from sievit.tokens import Trace
from sievit.vit import ViT, ViTConfig

M = TypeVar("M", bound=nn.Module)


def tiny_vit(**changes: Any) -> ViTConfig:
    return replace(ViTConfig(grid=(4, 4), embed_dim=16, depth=4, num_heads=2), **changes)


def tiny_head(**changes: Any) -> MaskRCNNConfig:
    """Mask R-CNN of the classes of generated scenes, which finds at most five objects; a stage's changes are a dict."""
    head = MaskRCNNConfig(
        num_classes=len(CLASSES),
        fpn_channels=8,
        rpn=RPNConfig(post_nms_train=50, post_nms_test=20),
        box=BoxConfig(fc=16, batch_size=16, min_score=0.0, max_detections=5),
        mask=MaskConfig(convs=(8,), deconv=8),
    )
    staged = {k: replace(getattr(head, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(head, **staged)


def tiny_detector(**changes: Any) -> DetectorConfig:
    """With a head for `classes`; `category_ids` are counted from 1 unless they are given."""
    classes = changes.setdefault("classes", CLASSES)
    changes.setdefault("category_ids", tuple(range(1, len(classes) + 1)))
    changes["head"] = replace(changes.get("head", tiny_head()), num_classes=len(classes))
    fields: dict[str, Any] = {
        "vit": tiny_vit(),
        "policy": KeepAllConfig(),
        "neck": PyramidConfig(out_channels=8),
        "input": InputConfig(min_size=64, max_size=128),
    }
    return DetectorConfig(**{**fields, **changes})


def tiny_segmenter(**changes: Any) -> SegmenterConfig:
    fields: dict[str, Any] = {
        "vit": tiny_vit(patch_size=8),
        "policy": KeepAllConfig(),
        "head": ATMConfig(channels=8, num_heads=2, num_layers=2),
        "out_indices": (1, 2, 3),
        "input": InputConfig(min_size=None, max_size=128, size_divisor=8),
        "classes": ("ground", *CLASSES),
    }
    return SegmenterConfig(**{**fields, **changes})


def saved(config: ModelConfig, path: Path, *, seed: int = 0) -> Path:
    """A file of a model with the random weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        save(build(config), path)
    return path


def on_meta(config: Any) -> Any:
    """A model whose weights have shapes and no values."""
    with torch.device("meta"):
        return build(config)


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def dense(vit: ViT) -> Policy:
    return vit.build_policy(KeepAllConfig())


def each_block(vit: ViT, images: Tensor) -> Iterator[Tensor]:
    """All tokens after the embedding, after every block, and after the last norm."""
    tokens = vit.embed(images)
    trace = Trace.start(tokens)
    yield tokens.x
    for index in range(vit.config.depth):
        tokens, trace = vit.run_blocks(tokens, dense(vit), trace, start=index, stop=index + 1)
        yield tokens.x
    yield vit.norm(tokens.x)


def scattered(module: M, std: float | Callable[[str], float]) -> M:
    """The module in inference, with random weights, of a deviation by their name, and running statistics."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=std if isinstance(std, int | float) else std(name))
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return module.eval()


def attributes(*modules: nn.Module) -> list[tuple[str, int]]:
    """What stands on modules and on their parts, to see that a pass writes nothing there."""
    named = [(f"{i}.{name}", part) for i, module in enumerate(modules) for name, part in module.named_modules()]
    return [(f"{name}.{key}", id(value)) for name, part in named for key, value in vars(part).items()]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_gradient(name: str, own: Tensor | None, expected: Tensor, scale: float | None = None) -> None:
    """Equal within 1e-3 of the largest entry; of tensors that hold only round-off within 1e-3 of `scale`, or 1e-7."""
    assert own is not None, name
    scale = float(expected.abs().max()) if scale is None else scale
    assert float((own.view_as(expected) - expected).abs().max()) <= 1e-3 * scale + 1e-7, name


def released_names(keys: Iterable[str], rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, str]:
    """Released name to ours, by renaming a state dict whose values say which key they came from."""
    keys = list(keys)
    renamed = rename({key: torch.tensor(i) for i, key in enumerate(keys)})
    return {keys[int(value)]: name for name, value in renamed.items()}


def without_dropout(net: M) -> M:
    """In training mode, with nothing left to chance."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0
    return net.train()


def coco_data(root: Path, train: str = "train", val: str = "val", **changes: Any) -> CocoData:
    """The scenes in two folders of a root."""
    folders: dict[str, Any] = {"train_images": Path(train, "images"), "val_images": Path(val, "images")}
    folders |= {"train_annotations": Path(train, "annotations.json"), "val_annotations": Path(val, "annotations.json")}
    return CocoData(**folders, root=root, **changes)


@contextmanager
def stopping_at(step: int, act: Callable[[], object]) -> Generator[None]:
    """Has `act` called when so many steps of a training are done."""
    from sievit.engine import train as engine

    original = engine._Run._step

    def patched(self: Any, parts: tuple) -> dict[str, float]:
        figures = original(self, parts)
        if self.step + 1 == step:
            act()
        return figures

    with mock.patch.object(engine._Run, "_step", patched):
        yield


def killed_at(step: int, recipe: Any, out: Path) -> None:
    """A training whose process ends without a word when the step is done."""
    from sievit.engine.train import train

    def die() -> None:
        raise SystemExit

    with stopping_at(step, die), pytest.raises(SystemExit):
        train(recipe, out=out)
    torch.rand(7)  # whatever the process did in between


def refused(words: str, call: Callable[..., object], *args: Any, **options: Any) -> None:
    """The call raises a ConfigError that says this."""
    with pytest.raises(ConfigError, match=words):
        call(*args, **options)


def random_images(*sizes: tuple[int, int]) -> list[Tensor]:
    """(3, h, w) float in 0..1 for each (h, w)."""
    return [torch.rand(3, *size) for size in sizes]


def random_pixels(seed: int, *shape: int) -> np.ndarray:
    """uint8."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def image_folder(folder: Path, *sizes: tuple[int, int]) -> Path:
    """A folder of noise: 0.png, 1.png, ... of these (height, width)."""
    for i, size in enumerate(sizes):
        write_image(folder / f"{i}.png", random_pixels(i, *size, 3))
    return folder


def run_two_processes(file: str, folder: Path) -> None:
    """Run a test file as torchrun does, with `folder` as its only argument."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, file, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class Seen:
    """The projections of a block, as they are given."""

    def __init__(self, *, attention: Tensor | None = None, keys: Tensor | None = None, norms: Tensor | None = None):
        self.given = {"attention": attention, "keys": keys, "norms": norms}

    def _of(self, name: str) -> Tensor:
        value = self.given[name]
        assert value is not None, name
        return value

    def attention(self) -> Tensor:
        return self._of("attention")

    def keys(self) -> Tensor:
        return self._of("keys")

    def value_norms(self) -> Tensor:
        return self._of("norms")
