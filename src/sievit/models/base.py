"""What every kind of model is: images of any sizes in, an answer out.

A new kind is one file: a configuration, registered by name with `variant`, and a model, registered for it with
`register_model`. Everything else (training, evaluation, tuning, benches, cards) goes through `Model` and through the
task of the same name.

Letters: b images, r rows of a trace (images, or windows of images), n grid tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from sievit.config import ConfigError, Count, check_range, kind_of
from sievit.hub import Pretrained
from sievit.models.inputs import ModelConfig, Size, Window, in_batches
from sievit.models.programs import Program
from sievit.models.stream import Stream
from sievit.policies import Policy, PolicyConfig
from sievit.policies.reuse import ReuseConfig
from sievit.tokens import Tokens, Trace
from sievit.vit import ViT, ViTConfig
from sievit.vit.execution import Execution

R = TypeVar("R")
TimedPart = tuple[object, str, str]
"""Owner and name of a method, and what the part of the model that it computes is called."""


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[R]):
    """What a pass of a model returns.

    Attributes:
        results: per image, on the pixels of the image that was given; empty when targets were given.
        losses: by name, weighted; empty without targets.
        trace: which tokens took part in which block; its rows are the windows of all images, one after the other.
        owner: the image of each row. windows: where each row lies in its image, in pixels as the network saw them.
        sizes: per image (height, width) that the network saw.
        image_size: (height, width) of the canvas that every row was padded to.
    """

    results: list[R]
    losses: dict[str, Tensor]
    trace: Trace
    owner: tuple[int, ...]
    windows: tuple[Window, ...]
    sizes: list[Size]
    image_size: Size

    @classmethod
    def whole(
        cls, trace: Trace, sizes: list[Size], image_size: Size, *, results: Sequence[R] = (), losses: Any = None
    ) -> Self:
        """An answer of which each image was one row."""
        return cls(
            results=list(results),
            losses=losses or {},
            trace=trace,
            owner=tuple(range(len(sizes))),
            windows=tuple((0, 0, *size) for size in sizes),
            sizes=sizes,
            image_size=image_size,
        )

    def per_image(self, values: Tensor) -> Tensor:
        """(b, ...) float64: the sums of values (r, ...) over the rows of each image."""
        sums = torch.zeros(len(self.sizes), *values.shape[1:], dtype=torch.float64, device=values.device)
        return sums.index_add(0, torch.tensor(self.owner, device=values.device), values.double())

    def tokens(self) -> Tensor:
        """(b, depth) float64: tokens that each block computed, over all rows of an image, prefix included."""
        return self.per_image(self.trace.counts().T)

    def shares(self) -> Tensor:
        """(b, depth) float64: the share of an image's tokens that took part in each block."""
        return self._of_valid(torch.stack([keep.sum(1) for keep in self.trace.keep], dim=1))

    def reported(self, policy: Policy) -> dict[str, Tensor]:
        """(b, k) float64 each: the figures of `policy.report`, as shares of an image's tokens."""
        return {name: self._of_valid(counts) for name, counts in policy.report(self.trace).items()}

    def _of_valid(self, counts: Tensor) -> Tensor:
        """(b, k) float64: numbers of tokens (r, k), as shares of an image's tokens."""
        return self.per_image(counts) / self.per_image(self.trace.valid.sum(1)).clamp(min=1)[:, None]

    def on_image(self, index: int, values: Tensor) -> Tensor:
        """(..., h, w) on the pixels of image `index` as the network saw it: the values (r, ..., n) of the tokens that
        stand there, the largest ones where windows overlap."""
        patch = self.image_size[0] // self.trace.grid[0]
        values = values.cpu()
        out = values.new_zeros(*values.shape[1:-1], *self.sizes[index])
        for image, (y, x, h, w), of_row in zip(self.owner, self.windows, values, strict=True):
            if image == index:
                pixels = of_row.unflatten(-1, self.trace.grid)[..., : -(-h // patch), : -(-w // patch)]
                pixels = pixels.repeat_interleave(patch, -2).repeat_interleave(patch, -1)[..., :h, :w]
                there = out[..., y : y + h, x : x + w]
                there.copy_(there.maximum(pixels))
        return out

    def computed(self, index: int) -> Tensor:
        """(depth, h, w) bool on the pixels of image `index` as the network saw it: which blocks computed them."""
        return self.on_image(index, torch.stack(self.trace.keep, dim=1))

    def found(self) -> dict[str, int]:
        """What else the cost of a pass depends on, such as detections: how many there are in all images, by name."""
        return {}

    def exit_stages(self, index: int) -> Tensor:
        """(h, w) int64 on the pixels of image `index` as the network saw it: the stage at which the token there left,
        and the number of stages where it never did; the later one where windows overlap."""
        stages = torch.zeros(self.trace.valid.shape, dtype=torch.int64, device=self.trace.valid.device)
        for exited in self.trace.exited:
            stages += ~exited
        return self.on_image(index, stages)


class Model(Pretrained, ABC, Generic[R]):
    """Base of every kind of model; `R` is what it answers for an image."""

    optional: ClassVar[tuple[str, ...]] = ()
    """How the names of weights begin that only some models of the kind have, such as those of a mask branch."""
    program: ClassVar[type[Program] | None] = None
    """What is exported of such models; None where that cannot be done."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """From a batch of normalised images to maps or scores, with a `vit` and a `policy`; what is compiled."""

    @property
    def policy(self) -> Policy:
        """Decides which tokens take part."""
        policy = self.network.policy
        assert isinstance(policy, Policy)
        return policy

    @property
    def vit(self) -> ViT:
        """The plain ViT inside."""
        vit = self.network.vit
        assert isinstance(vit, ViT)
        return vit

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def build_policy(self, config: PolicyConfig) -> Policy:
        """Another policy for this model, with the weights of `self.policy` where that is of the same class."""
        policy = self.new_policy(config)
        if type(config) is type(self.config.policy):
            policy.load_state_dict(self.policy.state_dict())
        return policy.eval().to(self.device)

    def new_policy(self, config: PolicyConfig) -> Policy:
        """Another policy for this model, with random weights."""
        return self.vit.build_policy(config)

    @abstractmethod
    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        *,
        policy: Policy | None = None,
        execution: Execution | None = None,
        teacher: Trace | None = None,
    ) -> Answer[R]:
        """Losses when `targets` are given, results when not.

        Args:
            images: (3, h, w) RGB, float in 0..1 or uint8, of any sizes. With targets they are used at their size,
                without they are resized to the test size.
            targets: per image what the kind of model learns from, by name.
            policy: another one than `self.policy`.
            execution: how the pass is run; by default results as the configuration states, losses as `Execution()`.
            teacher: the trace of the dense model, for losses of policies that compare with it.
        """

    @torch.no_grad()
    def predict(self, images: Sequence[Any], *, batch_size: int = 1, policy: Policy | None = None) -> list[R]:
        """The result of each image, on its own pixels; the model is in evaluation mode meanwhile.

        Args:
            images: paths, PIL images, arrays (h, w, 3) or (h, w) of uint8, tensors (3, h, w) of uint8 or float in 0..1;
                RGB.
            batch_size: images that go through the network together.

        Raises:
            ConfigError: not a list of images, a file that cannot be read, values that are no image's, or a batch size
                or policy that is none.
        """
        check_range(Count, batch_size, "batch_size")
        if not isinstance(policy, Policy | None):
            raise ConfigError(
                f"policy is a Policy, not {policy!r}; a name goes into sievit.load(..., policy={policy!r})"
            )
        training = self.training
        self.eval()
        try:
            results = []
            for tensors in in_batches(images, batch_size):
                results += self(tensors, policy=policy).results
        finally:
            self.train(training)
        return results

    def to_supervision(self, result: R) -> Any:
        """The result of an image as a `supervision.Detections`, for its annotators and trackers.

        Raises:
            ConfigError: supervision is not installed, or there is no such form of the results of this kind of model.
        """
        raise ConfigError(f"the results of a {kind_of(self.config)} have no boxes or masks for supervision")

    def stream(self, reuse: ReuseConfig | None = None) -> Stream[R]:
        """Runs over the frames of a video, and computes only the tokens that changed; the model has to be in evaluation
        mode, as `load` returns it.

        Raises:
            ConfigError: the policy does more than select tokens, or is in an exported file.
        """
        return Stream(self, ReuseConfig() if reuse is None else reuse)

    def at_once(self) -> Self:
        """The same model, of which one pass of the network takes all parts of an image."""
        return self

    @abstractmethod
    def count(self, answer: Answer[R]) -> dict[str, Tensor]:
        """(b,) GFLOPs for each image of `answer`, a pass of evaluation, by part of the model.

        One GFLOP is 1e9 multiply-adds. Every image is counted as if it were alone: the padding of a batch costs it
        nothing, unless the model computes it too. The parts `patch_embed`, `blocks` and `policy` are in all models.
        """

    def gflops(self, answer: Answer[R]) -> Tensor:
        """(b,) GFLOPs of the whole model for each image of `answer`, a pass of evaluation."""
        return torch.stack(list(self.count(answer).values())).sum(0)

    def published_gflops(self, answer: Answer[R]) -> Tensor | None:
        """(b,) GFLOPs by the rule behind published figures, where it is another one; None where it is not."""
        return None

    def spent(self, answer: Answer[R]) -> dict[str, Tensor]:
        """What each image of `answer`, a pass of evaluation, took.

        Returns:
            `gflops` (b,), with everything that is computed; `keep` and `tokens` (b, depth), share and number of the
            tokens that each block computed; and by name what the policy reports, (b, k) shares.
        """
        figures = {"gflops": self.gflops(answer), "keep": answer.shares(), "tokens": answer.tokens()}
        return {**figures, **answer.reported(self.policy)}

    @abstractmethod
    def dense_answer(self, size: Size) -> Answer[R]:
        """What a pass over one image of `size` would return if no token was left out, as far as cost is concerned."""

    @abstractmethod
    def timed_parts(self) -> list[TimedPart]:
        """The methods to time for the time of each part, in the order of a table; where one calls another, the inner
        one counts. Parts of a part are called `part: its name`."""

    @abstractmethod
    def counted_parts(self) -> dict[str, tuple[str, ...]]:
        """The parts of `count` that are computed in a timed part, by its name."""

    def with_config(self, **changes: Any) -> Self:
        """The same weights, not copied, with other fields of the configuration, in evaluation mode.

        Raises:
            ConfigError: the new configuration needs weights that this model has not.
        """
        config = replace(self.config, **changes)
        with torch.device("meta"):
            same = type(self).from_config(config)
        tensors = self.state_dict()
        if missing := [name for name in same.state_dict() if name not in tensors]:
            raise ConfigError(f"the model has no weights for {missing[0]}, and for {len(missing) - 1} more; train it")
        same.load_state_dict({name: tensors[name] for name in same.state_dict()}, assign=True)
        return same.eval()

    def as_given(self) -> Self:
        """The same model, which takes images at the size that they have."""
        return self.with_config(input=replace(self.config.input, min_size=None))


M = TypeVar("M", bound=type[Model])
_MODELS: dict[type[ModelConfig], type[Model]] = {}


def register_model(config_class: type[ModelConfig]) -> Callable[[M], M]:
    """Class decorator: `build` makes this model from a `config_class`."""

    def mark(cls: M) -> M:
        _MODELS[config_class] = cls
        return cls

    return mark


def model_class(config: ModelConfig) -> type[Model]:
    """The class of the models that `config` describes.

    Raises:
        ConfigError: there is none.
    """
    if type(config) not in _MODELS:
        raise ConfigError(f"no model is registered for {type(config).__name__}")
    return _MODELS[type(config)]


def dense_trace(policy: Policy, grid: tuple[int, int], vit: ViTConfig, *, valid: Tensor | None = None) -> Trace:
    """The trace of one image of which every token takes part in every block; `valid`, of the shape `grid`, are those
    that stand on it, None for all of them."""
    num_prefix, depth = vit.num_prefix, vit.depth
    tokens = num_prefix + grid[0] * grid[1]
    real = None if valid is None else valid.reshape(1, -1)
    canvas = Tokens(torch.zeros(1, 1, 1).expand(1, tokens, 1), grid, num_prefix, valid=real)
    notes, valid = tuple(policy.dense_notes(index, canvas) for index in range(depth + 1)), canvas.valid_or_all()
    return Trace(grid, valid, (valid,) * depth, (valid,) * depth, ((num_prefix, num_prefix),) * depth, notes)
