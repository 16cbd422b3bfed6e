"""What a task is: how its data is opened, and how results of a model are evaluated, shown and written.

A new task is one file: the configuration of its training data, and a `Task` that is registered for a kind of model.
"""

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from sievit.config import Config, ConfigError, kind_of
from sievit.data.dataset import ImageDataset
from sievit.data.truth import Truth
from sievit.models.inputs import ModelConfig
from sievit.viz import Colour, Picture

CACHE = 2**30
"""Bytes of decoded training images that a process keeps."""
R = TypeVar("R")
"""The result of a model for one image."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Base of the training data of every task; paths are relative to `root`.

    Attributes:
        root: None takes the environment's SIEVIT_DATA, else ../shared/data, as it was when the run was made.
    """

    train_images: Path
    val_images: Path
    root: Path | None = None

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The JSON of versions that could generate the data when training started."""
        return {name: value for name, value in data.items() if name != "scenes"}


@dataclass(frozen=True)
class Metric(Generic[R]):
    """The accuracy of results.

    Attributes:
        update: takes the target and the result of an image.
        compute: the figures by name, 0..1, of all processes; with several all of them have to call it.
        resampled: the figures of `Task.shown`, each (draws,), for draws (draws, images) of the images that `update`
            was called for, as 0-based numbers; an image may be drawn several times. Of this process alone; two
            metrics that were updated with the same images in the same order number them alike.
        parts: the same for parts of the truth: by kind of part ("class", "size") and name of the part (draws,) values
            of the figure that models are compared by, NaN where there is nothing to judge.
    """

    update: Callable[[dict[str, Any], R], None]
    compute: Callable[[], dict[str, Any]]
    resampled: Callable[[np.ndarray], dict[str, np.ndarray]]
    parts: Callable[[np.ndarray], dict[str, dict[str, np.ndarray]]] = lambda draws: {}


@dataclass(frozen=True)
class Region:
    """A part of an image of which is asked how many of its tokens are computed.

    Attributes:
        label: its class, an index into the model's classes.
        pixels: (h, w) bool, on the pixels of the image.
        area: in pixels, where it is an object.
    """

    label: int
    pixels: Tensor
    area: float | None = None


class Writer(ABC, Generic[R]):
    """Writes the results of images into a folder; nothing before `add`."""

    shared: tuple[str, ...] = ()
    """The files that `finish` writes, below the folder."""

    def files(self, name: str) -> tuple[str, ...]:
        """The files that `add` writes for an image, below the folder; no other image has one of them."""
        return ()

    @abstractmethod
    def add(self, name: str, size: tuple[int, int], result: R) -> dict[str, Any]:
        """Write `files` of an image of (height, width) pixels; `name` is its path below the folder of images.

        Returns:
            What `finish` needs of it, as values for JSON; it is kept in the folder from now on.
        """

    @abstractmethod
    def finish(self, added: Mapping[str, dict[str, Any]]) -> str:
        """Write `shared` from what `add` returned, by image; a sentence on what was written where."""


class Task(ABC, Generic[R]):
    """What can be done with the results of one kind of model, whose configuration it is made for."""

    data_config: ClassVar[type[DataConfig]]
    """Of the data that such models are trained on."""
    shown: ClassVar[tuple[str, ...]]
    """The figures that are printed; the first that there is, is the one that models are compared by."""
    has_scores: ClassVar[bool] = False
    """Whether a result holds things with scores, of which pictures show the best."""
    agreed: ClassVar[tuple[float, str]] = (0.9999, "results")
    """The share of an exported file's results (`agreement`) that have to be the model's, and what they are called."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def remarks(self, train: Any) -> list[str]:
        """What whoever trains on this data set should know beforehand, a sentence each."""
        return []

    @abstractmethod
    def open(self, images: Path, truth: Truth) -> ImageDataset:
        """The images of a folder with their annotations, to evaluate the model on.

        Raises:
            ConfigError: options of another task, or data that cannot be read or is of other classes.
        """

    @abstractmethod
    def open_training(self, data: Any, root: Path, *, seed: int) -> tuple[ImageDataset, ImageDataset]:
        """The training set, augmented, and the validation set; `data` is of the class `data_config`.

        Raises:
            ConfigError: files are missing or malformed, or their classes are not those of the model.
        """

    def classes_of(self, data: Any, root: Path) -> ModelConfig:
        """The configuration of the model with the classes of its data, where `data` has that option on."""
        return self.config

    def with_classes(
        self, data: Any, num_classes: int | None, ignore_index: int | None, palette: Path | None
    ) -> tuple[ModelConfig, DataConfig]:
        """The configurations of model and data for other classes; see `engine.recipe.with_classes`.

        Raises:
            ConfigError: the numbers contradict each other, or the task takes no such options.
        """
        raise ConfigError(f"a {kind_of(self.config)} takes no number of classes, ignored label or palette")

    @abstractmethod
    def metric(self, data: Any) -> Metric[R]:
        """The metric for a data set of `open` or `open_training`."""

    def headline(self, figures: Mapping[str, Any]) -> str:
        """The name of the figure that models are compared by."""
        return next(name for name in self.shown if name in figures)

    def accuracies(self, figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """The rows of a table: what a figure is called, and its value, 0..1."""
        for name in self.shown:
            if name in figures:
                yield self.config.figures[name], figures[name]

    @abstractmethod
    def picture(self, image: Picture, result: R, *, min_score: float, box: tuple[int, int]) -> Image.Image:
        """The image with the result drawn on it, scaled to fit `box` (width, height).

        Args:
            min_score: of what is drawn, where results have scores.
        """

    def legend(self, results: Sequence[R]) -> list[tuple[str, Colour | None]]:
        """What the colours of the pictures of one image mean; empty where names are written in them."""
        return []

    def as_result(self, target: dict[str, Any]) -> R | None:
        """The target of an image in the form of a result, for a picture; None for no such picture."""
        return None

    def regions(self, target: dict[str, Any], size: tuple[int, int]) -> list[Region]:
        """What the target says of the parts of its image of `size` (height, width); empty where it says nothing."""
        return []

    def only_in(self, result: R, other: R, *, min_score: float) -> R | None:
        """What of a result is not in another one of the same image, for a picture; None where that has no meaning."""
        return None

    def disagreement(self, result: R, other: R, *, min_score: float) -> float | None:
        """How much two results of one image differ, 0..1: the share of the pixels, or of the objects that one of them
        alone has; None where that has no meaning."""
        return None

    def agreement(self, result: R, other: R) -> tuple[int, int]:
        """How many parts of two results of one image are the same but for rounding, and how many there are."""
        return int(result == other), 1

    def summary(self, result: R, *, min_score: float) -> str:
        """A few words on a result; empty for none."""
        return ""

    def to_json(self, result: R) -> dict[str, Any]:
        """`columns` as values that `json.dumps` takes: arrays as lists, bytes in base64."""
        found = dict[str, Any]()
        for name, value in self.columns(result).items():
            value = value.tolist() if isinstance(value, np.ndarray) else value
            found[name] = base64.b64encode(value).decode() if isinstance(value, bytes) else value
        return found

    def categories(self) -> list[dict[str, Any]]:
        """The classes of `annotations`, as COCO's files have them."""
        return [{"id": i, "name": name} for i, name in enumerate(self.config.classes)]

    def annotations(self, result: R) -> list[dict[str, Any]]:
        """A result as annotations in COCO's format, without ids; empty where it cannot be said in it."""
        return []

    @abstractmethod
    def columns(self, result: R | None) -> dict[str, Any]:
        """A result as plain values by name, for a row of a table: arrays, text, bytes; None stands for no result, of
        which the values are empty."""

    @abstractmethod
    def writer(self, out: Path, names: Sequence[str], *, ids: Path | Mapping[str, int] | None = None) -> Writer[R]:
        """Writes the results of the images `names` to the folder `out`.

        Args:
            ids: COCO file with the ids of the images, for results in COCO's format; or the ids by image, which are
                left aside where there are no such results.

        Raises:
            ConfigError: `ids` lacks an image, or the task writes no such results.
        """


T = TypeVar("T", bound=type[Task])
_TASKS: dict[str, type[Task]] = {}


def register_task(kind: str) -> Callable[[T], T]:
    """Class decorator: `task_of` gives this task to models of the kind."""

    def mark(cls: T) -> T:
        _TASKS[kind] = cls
        return cls

    return mark


def task_of(config: ModelConfig) -> Task:
    """The task of the models that `config` describes."""
    return _TASKS[kind_of(config) or ""](config)
