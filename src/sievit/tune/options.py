"""What can be asked of tuning."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from sievit.config import Config, ConfigError, Count, NonNegative, Positive, Share

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Goal(Config):
    """What is wanted; at most one of them. Without any the model's own setting stays, where it pays.

    Attributes:
        target_ms: milliseconds per image, at most; everything from images in memory to answers on their pixels.
        target_gflops: GFLOPs per image, at most, mean over the images.
        max_drop: points of AP or mIoU, at most, below the dense model; needs annotated images.
    """

    target_ms: Positive | None = None
    target_gflops: Positive | None = None
    max_drop: NonNegative | None = None

    def __post_init__(self) -> None:
        given = {f"--{name.replace('_', '-')}": v for name, v in vars(self).items() if v is not None}
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: give one target at a time")


@dataclass(frozen=True, kw_only=True)
class Tuning(Config):
    """How it is measured.

    Attributes:
        size: height and width that images are cropped and resized to; by default the model's own rule decides.
        batch_size: images at once.
        repeats: timed rounds, in each of which everything that is compared runs once; at least 3.
        num_images: so many images of the folder, evenly spread, are timed and counted.
        modes: `dynamic` chooses by image, `bucketed` too, but computes counts of few sizes, `static` as many tokens in
            every image; by default the first and the last, and on CUDA with --compile all.
        precision: float32, or bfloat16 under autocast; of everything, and of the model that is written.
        compile: the dense model and the modes of few shapes race under torch.compile too, on CUDA with CUDA graphs;
            takes minutes for each.
        quantile: of the shares that the images keep, for static counts; by default their mean.
        multiple: static counts are rounded up to a multiple of it.
        eval_limit: the accuracy is that of the first so many annotated images.
    """

    size: tuple[Count, Count] | None = None
    batch_size: Count = 1
    repeats: Annotated[int, Interval(ge=3, le=10**6)] = 15
    num_images: Count = 16
    modes: tuple[str, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    quantile: Share | None = None
    multiple: Count = 8
    eval_limit: Count | None = None

    def __post_init__(self) -> None:
        if not set(self.modes) <= {"dynamic", "bucketed", "static"}:
            raise ConfigError(f"--modes {' '.join(self.modes)}: are dynamic, bucketed and static")
