"""Frames of a video, one after the other, of which each takes over what did not change."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from sievit.models.inputs import as_tensor
from sievit.policies.reuse import Past, Reuse, ReuseConfig, without_values

if TYPE_CHECKING:
    from sievit.models.base import Answer, Model

R = TypeVar("R")


class Stream(Generic[R]):
    """A model over the frames of one video, or of several side by side.

    Attributes:
        past: what the last frames left; None at the start.
    """

    def __init__(self, model: "Model[R]", config: ReuseConfig) -> None:
        """
        Raises:
            ConfigError: the model's policy merges tokens, adds some or decides inside of blocks.
        """
        self.model, self.config = model.at_once(), config
        self.past: Past | None = None
        Reuse(config, self.model.policy, None)

    @torch.no_grad()
    def __call__(self, frames: Sequence[Any]) -> "Answer[R]":
        """The answer for the next frame of each video; always as many videos, in the same order.

        Where the size of the frames changes, and behind a cut, all tokens are computed.

        Args:
            frames: one of each video, as `Model.predict` takes images.

        Raises:
            ConfigError: a frame is no image.
        """
        policy = Reuse(self.config, self.model.policy, self.past)
        execution = replace(self.model.config.execution, mode="auto", compiled=False)
        answer = self.model([as_tensor(frame) for frame in frames], policy=policy, execution=execution)
        self.past = policy.left(answer.trace)
        return replace(answer, trace=without_values(answer.trace))
