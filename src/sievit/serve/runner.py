"""A model with its policies: an image and a setting in, what was found and what it took out."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image
from torch import Tensor

from sievit.config import ConfigError, kind_of, nearest, to_json
from sievit.data.images import to_tensor
from sievit.engine.evaluate import timed
from sievit.models.base import Answer, Model
from sievit.policies import KeepAllConfig, Policy, PolicyConfig, policies
from sievit.report.figures import answer_figure, answer_note
from sievit.tasks import Task, task_of
from sievit.tokens import Trace
from sievit.vit import Execution


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over one image."""

    model: Model
    answer: Answer
    ms: float

    @property
    def gflops(self) -> float:
        return self.model.gflops(self.answer).item()

    @property
    def keep(self) -> list[float]:
        """The share of the image's tokens that each block computed."""
        return [round(share, 4) for share in self.answer.shares()[0].tolist()]

    def cost(self) -> dict[str, Any]:
        return {
            "gflops": round(self.gflops, 6),
            "ms": round(self.ms, 2),
            "tokens": [round(count) for count in self.answer.tokens()[0].tolist()],
            "keep": self.keep,
        }


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found in an image, by the setting that was asked for and, where wanted, with every token."""

    task: Task
    image: Image.Image
    pruned: Pass
    dense: Pass | None
    budget: float | None

    @property
    def policy(self) -> PolicyConfig:
        return self.pruned.model.config.policy

    @property
    def policy_name(self) -> str:
        return kind_of(self.policy) or type(self.policy).__name__

    def to_json(self) -> dict[str, Any]:
        """See docs/serve.md."""
        dense = {} if self.dense is None else {"dense": self.dense.cost()}
        return {
            "width": self.image.width,
            "height": self.image.height,
            "policy": to_json(self.policy),
            "budget": self.budget,
            **self.task.to_json(self.pruned.answer.results[0]),
            **self.pruned.cost(),
            **dense,
        }

    def figure(self) -> Image.Image:
        """Everything in one picture, as `sievit demo` draws it."""
        passes = {"dense": self.dense, self.policy_name: self.pruned}
        shown = {
            title: (f"{answer_note(self.task, one.model, one.answer)} · {one.ms:.0f} ms", one.answer.results[0])
            for title, one in passes.items()
            if one is not None
        }
        return answer_figure(self.task, self.image, shown, self.pruned.answer)


class Runner:
    """Runs a model with the policies that go with it. Not to be called by two threads at once.

    Args:
        model: in evaluation mode.
        fixed: it runs with its own policy alone, as an exported file does.

    Attributes:
        policies: names of the policies that `run` takes: the model's own, and those that need no training.
        dialled: those of them that take a budget.
    """

    def __init__(self, model: Model, *, fixed: bool = False) -> None:
        self.model, self.task, self.fixed = model, task_of(model.config), fixed
        self.own = kind_of(model.config.policy) or type(model.config.policy).__name__
        others = {} if fixed else policies()
        self.policies = (self.own, *(name for name, cls in others.items() if name != self.own and self._goes(cls)))
        self.dialled = () if fixed else tuple(name for name in self.policies if self._policy(name).dials(lambda _: ()))
        self._with = lru_cache(maxsize=8)(self._changed)

    def _goes(self, config: type[PolicyConfig]) -> bool:
        """Whether a policy goes with the model as it is, without weights of its own."""
        try:
            return not any(True for _ in self.model.new_policy(config()).parameters())
        except ConfigError:
            return False

    def _policy(self, name: str) -> Policy:
        return self.model.new_policy(self._config(name))

    def _config(self, name: str) -> PolicyConfig:
        return self.model.config.policy if name == self.own else policies()[name]()

    def _changed(self, policy: PolicyConfig) -> Model:
        precision = self.model.config.execution.precision
        return self.model.with_config(policy=policy, execution=Execution(precision=precision))

    def run(
        self, image: Image.Image, *, policy: str | None = None, budget: float | None = None, dense: bool = False
    ) -> Outcome:
        """
        Args:
            policy: one of `policies`; None for the model's own.
            budget: how far the dial of the policy is turned, from 1, every token, to 0, hardly any; on this image
                alone. None for the setting of the model, or the default of another policy.
            dense: also with every token.

        Raises:
            ConfigError: the policy is none of these, has no dial, or does not go with the model.
        """
        tensor = to_tensor(image)
        model = self.chosen(image, policy, budget)
        passes = {"pruned": model} | ({"dense": self._with(KeepAllConfig())} if dense and not self.fixed else {})
        done = {}
        for name, one in passes.items():
            answer, ms = timed(one, [tensor])
            done[name] = Pass(one, answer, ms)
        return Outcome(self.task, image, done["pruned"], done.get("dense"), budget)

    def chosen(self, image: Image.Image, policy: str | None, budget: float | None) -> Model:
        """The model with a policy, whose dial is turned on this image; arguments and errors as of `run`."""
        name = policy or self.own
        if name not in self.policies:
            raise ConfigError(f"policy {name!r} does not go with this model{nearest(name, self.policies)}")
        if budget is None and name == self.own:
            return self.model
        config = self._config(name)
        if budget is None:
            return self._with(config)
        if name not in self.dialled:
            raise ConfigError(f"the policy {name!r} takes no budget here; leave it out")
        config = self._with(config).policy.dynamic()
        dial, *_ = self._with(config).policy.dials(lambda other: self._traces(other, to_tensor(image)))
        return self._with(dial(1 - budget))

    def _traces(self, config: PolicyConfig, image: Tensor) -> Iterable[Trace]:
        yield timed(self._with(config), [image])[0].trace

    def warm_up(self) -> float:
        """Run once on a grey image; the seconds that it took."""
        start = time.perf_counter()
        self.run(Image.new("RGB", (256, 256), "grey"), dense=True)
        return time.perf_counter() - start
