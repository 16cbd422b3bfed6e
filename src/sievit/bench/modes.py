"""The ways to compute a pass: dense or with a policy, as it stands, with few shapes or none that depend on the image,
and as it stands, compiled, or compiled with CUDA graphs."""

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sievit.config import ConfigError, kind_of, nearest
from sievit.policies import DToPConfig, Policy, PolicyConfig, SViTConfig
from sievit.policies.dtop import DToP
from sievit.policies.svit import SViT
from sievit.tokens import Trace
from sievit.vit import Execution
from sievit.vit.execution import MANY_SHAPES

T = TypeVar("T")
R = TypeVar("R")

MODES = ("dense", "dense_compiled", "dense_graphs", "dynamic", "bucketed", "bucketed_compiled", "bucketed_graphs")
MODES += ("static", "static_compiled", "static_graphs")
USUAL = ("dense", "dynamic", "static")


@dataclass(frozen=True)
class Way:
    """One mode, taken apart.

    Attributes:
        name: one of `MODES`.
        base: `dense` computes every token, `dynamic` what the policy chooses in each image, `bucketed` the same choice
            with counts of a few sizes, `static` as many tokens in every image.
        how: `eager`; `compiled`, by torch.compile; `graphs`, by torch.compile with CUDA graphs.
    """

    name: str
    base: str
    how: str

    @staticmethod
    def of(name: str) -> "Way":
        """The way called `name`.

        Raises:
            ConfigError: an unknown mode; the nearest name is given.
        """
        if name not in MODES:
            raise ConfigError(f"unknown mode {name!r}{nearest(name, MODES)}; there are {', '.join(MODES)}")
        base, _, how = name.partition("_")
        return Way(name, base, how or "eager")

    @property
    def execution(self) -> Execution:
        """How the executor runs it."""
        return Execution(mode="bucketed" if self.base == "bucketed" else "auto")

    @property
    def one_graph(self) -> bool:
        """Whether no shape, branch or count depends on what is in the images."""
        return self.base in ("dense", "static")

    def compiled(self, call: Callable[[T], R], *, autotune: bool = False, whole: bool = True) -> Callable[[T], R]:
        """The call, compiled if that is the way; with the first input of each shape it compiles, which takes long.

        Args:
            autotune: graphs are those of `max-autotune`, which tries many kernels for each product.
            whole: insist on one graph, where the way has no more.
        """
        if self.how == "eager":
            return call
        torch.compiler.reset()  # what was compiled for earlier rows would count as recompilation
        torch._logging.set_logs(dynamo=logging.ERROR)  # breaks are what the bucketed mode is made of
        mode = None if self.how == "compiled" else "max-autotune" if autotune else "reduce-overhead"
        fast = torch.compile(call, fullgraph=whole and self.one_graph, dynamic=False, mode=mode)

        def run(x: T) -> R:
            torch.compiler.cudagraph_mark_step_begin()
            return fast(x)

        return run

    @contextlib.contextmanager
    def many_shapes(self) -> Generator[None]:
        """While it lasts torch.compile does not give up because of how many sizes there are."""
        if self.how == "eager":
            yield
            return
        from torch._dynamo import config

        with config.patch(MANY_SHAPES):
            yield


def calls_of(network: Callable[..., Any], *, autotune: bool) -> Callable[[Policy, Way], Callable[[Tensor], Any]]:
    """For `time_modes`: of a network that takes images, a policy and a mode, what is timed."""

    def call_of(policy: Policy, way: Way) -> Callable[[Tensor], Any]:
        def run(images: Tensor) -> Any:
            return network(images, policy=policy, execution=way.execution)

        return way.compiled(run, autotune=autotune)

    return call_of


def reason(error: Exception) -> str:
    """What a row says that could not be timed: the kind of error and the first two lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def static_config(policy: Policy, traces: Sequence[Trace], multiple: int) -> PolicyConfig | None:
    """The configuration of the same policy with static counts: on average as many tokens as it kept in these passes.

    None for a policy that has no such mode.

    Args:
        multiple: counts are rounded up to a multiple of it.
    """
    if isinstance(policy, SViT):
        kept = torch.cat([trace.shares() for trace in traces], 1).double().mean(1)
        shares = tuple(min(1.0, max(share, 1e-3)) for share in kept[policy.config.first_block :].tolist())
        return replace(policy.config, static_shares=shares, multiple=multiple)
    if isinstance(policy, DToP) and not policy.config.preserve:
        left = torch.stack([_left(trace, policy) for trace in traces]).mean(0)
        shares = tuple(min(share, 0.999) for share in left.cummax(0).values.tolist())
        return replace(policy.config, static_left=shares, multiple=multiple)
    return None


def no_static(config: PolicyConfig) -> str:
    """Why there is no static mode."""
    if isinstance(config, DToPConfig):
        return "dtop with preserve has no static counts"
    return f"the policy {kind_of(config)!r} has no static counts"


def is_static(config: PolicyConfig) -> bool:
    """Whether a policy's counts are static already."""
    return (isinstance(config, SViTConfig) and config.static_shares is not None) or (
        isinstance(config, DToPConfig) and config.static_left is not None
    )


def _left(trace: Trace, policy: DToP) -> Tensor:
    """(stages,) share of an image's tokens that are gone after each auxiliary head, mean over the images."""
    counts = [(gone & trace.valid).sum(1) / trace.valid.sum(1).clamp(min=1) for gone in trace.exited]
    return torch.stack(counts)[: len(policy.heads) - 1].double().mean(1)
