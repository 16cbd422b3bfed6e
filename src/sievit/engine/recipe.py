"""A run as a value: the model, its data, and how it is trained."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from sievit.config import Config, ConfigError, Count, Natural, NonNegative, Positive, Rate, Seed, Share, kind_of
from sievit.data.dataset import ImageDataset
from sievit.models.inputs import ModelConfig
from sievit.tasks import DataConfig, Task, task_of

Frozen = Literal["none", "vit", "model"] | Count


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How a model is trained.

    Attributes:
        steps: how many, in place of `epochs`.
        init_from: model whose weights training starts from: a file, the folder of a run, the name of a shipped model,
            or hf:user/name; what the policy lacks there stays new.
        vit_from: pre-trained ViT for the backbone: file of a state dict in timm's naming, or `timm:NAME` for what timm
            downloads under that name.
        freeze: what keeps the weights that training starts from: `none`; a number, the ViT's embedding and so many
            first blocks; `vit`, all of it; `model`, everything but the policy, which learns alone in a trained model.
        batch_size: images per step, over all processes and accumulated parts.
        accumulate: parts that a step's images are computed in.
        warmup_steps: linear, from `warmup_start` times the rate.
        schedule: of the rate; `step` multiplies it by 0.1 at each of `step_epochs`, `poly` is (1 - progress) ** 0.9
            from the end of the warm-up on.
        clip_norm: largest norm of the gradients.
        ema: decay of the averaged weights that are validated and saved; 0 for none.
        distill: weight of a loss that holds the features after the last block to those of the dense model that training
            starts from: 1 - cosine, mean over the tokens that have not left. Any policy can be trained with it.
        selected_after: steps in which blocks compute every token and mask those that the gates leave out; from then on
            they compute the selected tokens alone, and gates learn from those. None: mask to the end. For policies
            with gates (SViT); others are trained as ever.
        precision: Lightning Fabric's; `loss_scale` is the first factor on the loss with 16-mixed.
        channels_last: memory format of the convolutions.
        val_every: epochs between validations; the last one is always validated.
        val_images: choose the best model by so many images; its final figures are those of all. At 0 nothing is
            validated, and the last model is kept.
        save_every: minutes between saved states; one is saved at the end of each epoch too.
        workers: processes that load images; 0 loads in the training process.
        threads: CPU threads; None leaves torch's choice.
    """

    epochs: Count = 36
    steps: Count | None = None
    init_from: Path | None = None
    vit_from: Path | None = None
    batch_size: Count = 16
    accumulate: Count = 1
    lr: NonNegative = 1e-4
    weight_decay: NonNegative = 0.05
    warmup_steps: Natural = 500
    warmup_start: Share = 0.001
    schedule: Literal["step", "cosine", "poly", "constant"] = "step"
    step_epochs: tuple[Natural, ...] = (27, 33)
    policy_lr: NonNegative = 1.0
    """Factor on the rate of the policy's parameters."""
    head_lr: NonNegative = 1.0
    """Factor on the rate of the heads' parameters."""
    layer_decay: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Factor on the rate from each block of the ViT to the one before it, as in BEiT's fine-tuning; the embedding
    counts as the first layer, and everything outside the ViT has the full rate."""
    freeze: Frozen = "none"
    decay_norms: bool = False
    """Weight decay on norms, biases and positions too."""
    clip_norm: Positive | None = None
    ema: Rate = 0.0
    distill: NonNegative = 0.0
    selected_after: Natural | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    loss_scale: Positive = 512.0
    channels_last: bool = True
    seed: Seed = 0
    val_every: Count = 1
    val_images: Natural | None = None
    save_every: NonNegative = 5.0
    log_every: Count = 20
    workers: Natural = 1
    threads: Count | None = None

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.batch_size {self.batch_size} does not split into {self.accumulate} parts")
        if self.init_from is not None and self.vit_from is not None:
            raise ConfigError(
                "train.init_from holds the weights of the ViT too; leave out train.vit_from (--train.vit-from None)"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Everything that a run depends on; stored as recipe.json in its folder."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def default_data_root() -> Path:
    """The folder of data sets: the environment's SIEVIT_DATA, else ../shared/data."""
    return Path(os.environ.get("SIEVIT_DATA", "../shared/data"))


def open_data(recipe: Recipe) -> tuple[ImageDataset, ImageDataset]:
    """The training set, augmented, and the validation set.

    Raises:
        ConfigError: files are missing or malformed, or their classes are not those of the model.
    """
    root, task = _root(recipe.data), task_for(recipe)
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder of data; give --data-root, or set SIEVIT_DATA")
    return task.open_training(recipe.data, root, seed=recipe.train.seed)


def task_for(recipe: Recipe) -> Task:
    """The task of the recipe's model.

    Raises:
        ConfigError: the recipe's data is that of another task.
    """
    task = task_of(recipe.model)
    if not isinstance(recipe.data, task.data_config):
        raise ConfigError(f"a {kind_of(recipe.model)} cannot be trained on data of the kind {kind_of(recipe.data)!r}")
    return task


def with_own_classes(recipe: Recipe) -> Recipe:
    """The recipe with the classes of its data, where that option is on (`CocoData.own_classes`).

    Raises:
        ConfigError: the file cannot be read, or names no classes.
    """
    return replace(recipe, model=task_for(recipe).classes_of(recipe.data, _root(recipe.data)))


def with_classes(
    recipe: Recipe, *, num_classes: int | None = None, ignore_index: int | None = None, palette: Path | None = None
) -> Recipe:
    """The recipe of a segmenter for other classes.

    Args:
        num_classes: of the data; None: as many as the palette has.
        ignore_index: label of pixels of which nothing is known.
        palette: file with their colours, and names if it has them; label images may then be in these colours.

    Raises:
        ConfigError: the recipe is a detector's, or the numbers contradict each other.
    """
    model, data = task_for(recipe).with_classes(recipe.data, num_classes, ignore_index, palette)
    return replace(recipe, model=model, data=data)


def _root(data: DataConfig) -> Path:
    return data.root if data.root is not None else default_data_root()
