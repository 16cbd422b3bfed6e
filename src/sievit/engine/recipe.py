"""A run as a value: the model, its data, and how it is trained."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sievit.config import ConfigError, kind_of, variant
from sievit.data.annotations import load_categories
from sievit.data.coco import CocoDetection
from sievit.data.label_files import read_palette
from sievit.data.labels import LabelDataset
from sievit.data.scenes import generate
from sievit.data.semantic import SemanticAugment, SemanticAugmentConfig
from sievit.data.transforms import Augment, AugmentConfig
from sievit.data.truth import Truth
from sievit.models.detector import DetectorConfig
from sievit.models.inputs import ModelConfig
from sievit.models.segmenter import SegmenterConfig

CACHE = 2**30
"""Bytes of decoded training images that a process keeps."""


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Generated scenes; made when training starts, unless they are there.

    Attributes:
        size: (height, width) in pixels.
        seeds: of the training and of the validation series.
    """

    num_train: int = 2000
    num_val: int = 200
    size: tuple[int, int] = (256, 256)
    seeds: tuple[int, int] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Base of every kind of data; paths are relative to `root`.

    Attributes:
        root: None takes the environment's SIEVIT_DATA, else ../shared/data, as it was when the run was made.
        scenes: generate the data below `root` instead of expecting it there.
    """

    train_images: Path
    val_images: Path
    root: Path | None = None
    scenes: ScenesConfig | None = None


@variant("coco")
@dataclass(frozen=True, kw_only=True)
class CocoData(DataConfig):
    """Boxes and masks in COCO's format.

    Attributes:
        max_detections: per image, in evaluation. COCO's is 100.
        invalid: what to do about annotations that cannot be used.
        skip_empty: leave training images without an object out.
        own_classes: the model gets the classes of `train_annotations`, whatever the recipe says.
    """

    train_annotations: Path
    val_annotations: Path
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    max_detections: int = 100
    invalid: Literal["error", "skip"] = "error"
    skip_empty: bool = False
    own_classes: bool = False


@variant("labels")
@dataclass(frozen=True, kw_only=True)
class LabelsData(DataConfig):
    """Images with a class for every pixel: two folders each, or COCO's panoptic files.

    Attributes:
        train_labels, val_labels: folders of label images; with `panoptic` folders of its PNGs.
        train_names, val_names: files that list the images of the part, by name or as a COCO file; None for all.
        train_panoptic, val_panoptic: COCO's panoptic JSON files; None for folders of labels.
        image_suffix, label_suffix: what the names of a pair have behind what they have in common.
        zero_is_ignored: 0 in the files means that nothing is known, and classes are counted from 1.
        values: value in the files of each class, in the order of the classes; None: the classes themselves.
        palette: file with the colour of each class, for label images in colours, see `data.label_files.read_palette`.
    """

    train_labels: Path
    val_labels: Path
    train_names: Path | None = None
    val_names: Path | None = None
    train_panoptic: Path | None = None
    val_panoptic: Path | None = None
    image_suffix: str | None = None
    label_suffix: str | None = None
    zero_is_ignored: bool = False
    values: tuple[int, ...] | None = None
    palette: Path | None = None
    augment: SemanticAugmentConfig = field(default_factory=SemanticAugmentConfig)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: how many, in place of `epochs`.
        init_from: model whose weights training starts from: a file, the folder of a run, the name of a shipped model,
            or hf:user/name; what the policy lacks there stays new.
        vit_from: pre-trained ViT for the backbone: file of a state dict in timm's naming, or `timm:NAME` for what timm
            downloads under that name.
        freeze: what of the ViT keeps the weights that training starts from: nothing, all of it, or its embedding and
            so many first blocks. Policy, neck and heads are always trained.
        batch_size: images per step, over all processes and accumulated parts.
        accumulate: parts that a step's images are computed in.
        warmup_steps: linear, from `warmup_start` times the rate.
        schedule: of the rate; `step` multiplies it by 0.1 at each of `step_epochs`, `poly` is (1 - progress) ** 0.9
            from the end of the warm-up on.
        clip_norm: largest norm of the gradients.
        ema: decay of the averaged weights that are validated and saved; 0 for none.
        selected_after: steps in which blocks compute every token and mask those that the gates leave out; from then on
            they compute the selected tokens alone, and gates learn from those. None: mask to the end. For policies
            with gates (SViT); others are trained as ever.
        precision: Lightning Fabric's; `loss_scale` is the first factor on the loss with 16-mixed.
        channels_last: memory format of the convolutions.
        val_every: epochs between validations; the last one is always validated.
        val_images: choose the best model by so many images; its final figures are those of all.
        save_every: minutes between saved states; one is saved at the end of each epoch too.
        workers: processes that load images; 0 loads in the training process.
        threads: CPU threads; None leaves torch's choice.
    """

    epochs: int = 36
    steps: int | None = None
    init_from: Path | None = None
    vit_from: Path | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup_steps: int = 500
    warmup_start: float = 0.001
    schedule: Literal["step", "cosine", "poly", "constant"] = "step"
    step_epochs: tuple[int, ...] = (27, 33)
    policy_lr: float = 1.0
    """Factor on the rate of the policy's parameters."""
    head_lr: float = 1.0
    """Factor on the rate of the heads' parameters."""
    layer_decay: float = 1.0
    """Factor on the rate from each block of the ViT to the one before it, as in BEiT's fine-tuning; the embedding
    counts as the first layer, and everything outside the ViT has the full rate."""
    freeze: Literal["none", "vit"] | int = "none"
    decay_norms: bool = False
    """Weight decay on norms, biases and positions too."""
    clip_norm: float | None = None
    ema: float = 0.0
    selected_after: int | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    loss_scale: float = 512.0
    channels_last: bool = True
    seed: int = 0
    val_every: int = 1
    val_images: int | None = None
    save_every: float = 5.0
    log_every: int = 20
    workers: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        ones = ("epochs", "steps", "batch_size", "accumulate", "val_every", "val_images", "log_every", "threads")
        least = dict.fromkeys(ones, 1) | dict.fromkeys(("workers", "warmup_steps", "save_every", "selected_after"), 0)
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"train.{name} is at least {limit}, not {value}")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.batch_size {self.batch_size} does not split into {self.accumulate} parts")
        if self.init_from is not None and self.vit_from is not None:
            raise ConfigError(
                "train.init_from holds the weights of the ViT too; leave out train.vit_from (--train.vit-from None)"
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train.ema is a decay from 0 to below 1, not {self.ema}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"train.layer_decay is a factor above 0 and up to 1, not {self.layer_decay}")
        if isinstance(self.freeze, int) and self.freeze < 1:
            raise ConfigError(f"train.freeze is none, vit, or a number of first blocks from 1 on, not {self.freeze}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run depends on; stored as recipe.json in its folder."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def default_data_root() -> Path:
    """The folder of data sets: the environment's SIEVIT_DATA, else ../shared/data."""
    return Path(os.environ.get("SIEVIT_DATA", "../shared/data"))


def open_data(recipe: Recipe) -> tuple[CocoDetection, CocoDetection] | tuple[LabelDataset, LabelDataset]:
    """The training set, augmented, and the validation set.

    Raises:
        ConfigError: files are missing or malformed, or their classes are not those of the model.
    """
    data, model = recipe.data, recipe.model
    root = data.root if data.root is not None else default_data_root()
    if data.scenes is not None:
        scenes = data.scenes
        for images, number, seed in zip(
            (data.train_images, data.val_images), (scenes.num_train, scenes.num_val), scenes.seeds, strict=True
        ):
            generate((root / images).parent, num_images=number, size=scenes.size, seed=seed)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder of data; give --data-root, or set SIEVIT_DATA")
    if isinstance(data, CocoData) and isinstance(model, DetectorConfig):
        return _open_coco(data, model, root, seed=recipe.train.seed)
    if isinstance(data, LabelsData) and isinstance(model, SegmenterConfig):
        return _open_labels(data, model, root, seed=recipe.train.seed)
    raise ConfigError(f"a {kind_of(model)} cannot be trained on data of the kind {kind_of(data)!r}")


def _open_coco(data: CocoData, model: DetectorConfig, root: Path, *, seed: int) -> tuple[CocoDetection, CocoDetection]:
    train = CocoDetection(
        root / data.train_images,
        root / data.train_annotations,
        transform=Augment(data.augment),
        with_masks=model.head.with_masks,
        invalid=data.invalid,
        skip_empty=data.skip_empty,
        seed=seed,
        cache_bytes=CACHE,
    )
    val = CocoDetection(root / data.val_images, root / data.val_annotations, with_masks=False, invalid=data.invalid)
    for source, path in ((train, data.train_annotations), (val, data.val_annotations)):
        if source.category_ids != model.category_ids:
            raise ConfigError(
                f"{root / path}: its categories {_named(source.classes)} are not the model's "
                f"{_named(model.classes)}; --data.own-classes True takes those of {data.train_annotations.name}"
            )
    return train, val


def _open_labels(
    data: LabelsData, model: SegmenterConfig, root: Path, *, seed: int
) -> tuple[LabelDataset, LabelDataset]:
    opened = []
    for part, augment in (("train", data.augment), ("val", None)):
        images, *paths = (getattr(data, f"{part}_{name}") for name in ("images", "labels", "names", "panoptic"))
        labels, names, panoptic, palette = (None if path is None else root / path for path in (*paths, data.palette))
        truth = Truth(
            labels=labels,
            names=names,
            panoptic=panoptic,
            image_suffix=data.image_suffix,
            label_suffix=data.label_suffix,
            zero_is_ignored=data.zero_is_ignored,
            palette=palette,
        )
        opened.append(
            truth.open_labels(
                root / images,
                model.classes,
                ignore_index=model.ignore_index,
                values=data.values,
                transform=None if augment is None else SemanticAugment(augment, model.ignore_index),
                seed=seed,
                cache_bytes=0 if augment is None else CACHE,
            )
        )
    return opened[0], opened[1]


def _named(classes: tuple[str, ...]) -> str:
    return f"({len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"


def with_own_classes(recipe: Recipe) -> Recipe:
    """The recipe for the classes of its own annotation file, if it wants that (`CocoData.own_classes`).

    Raises:
        ConfigError: the file cannot be read, or names no classes.
    """
    data, model = recipe.data, recipe.model
    if not isinstance(data, CocoData) or not data.own_classes or not isinstance(model, DetectorConfig):
        return recipe
    root = data.root if data.root is not None else default_data_root()
    classes, ids = load_categories(root / data.train_annotations)
    head = replace(model.head, num_classes=len(classes))
    return replace(recipe, model=replace(model, classes=classes, category_ids=ids, head=head))


def with_classes(
    recipe: Recipe, *, num_classes: int | None = None, ignore_index: int | None = None, palette: Path | None = None
) -> Recipe:
    """The recipe of a segmenter for other classes.

    Args:
        num_classes: of the data; None: as many as the palette has.
        ignore_index: label of pixels that nobody has to know.
        palette: file with their colours, and names if it has them; label images may then be in these colours.

    Raises:
        ConfigError: the recipe is a detector's, or the numbers contradict each other.
    """
    model, data = recipe.model, recipe.data
    if not isinstance(model, SegmenterConfig) or not isinstance(data, LabelsData):
        raise ConfigError(
            "num-classes, ignore-index and palette are those of a segmenter; this recipe is a detector's: "
            "--data.own-classes True takes the classes of its annotation file"
        )
    colours, names = model.palette, model.classes
    if palette is not None:
        read = read_palette(palette)
        colours, num_classes = read.colours, len(read.colours) if num_classes is None else num_classes
        names = read.names or names
        data = replace(data, palette=palette.resolve())
    if num_classes is not None and len(names) != num_classes:
        names = tuple(f"class {i}" for i in range(num_classes))
    if len(colours) != len(names):
        if palette is not None:
            raise ConfigError(f"{palette}: has {len(colours)} colours for {len(names)} classes; give one for each")
        colours = ()
    ignored = model.ignore_index if ignore_index is None else ignore_index
    return replace(recipe, data=data, model=replace(model, classes=names, palette=colours, ignore_index=ignored))
