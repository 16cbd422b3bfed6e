"""The modes in which a model is timed, of benches and of tuning: which tokens are computed, and how."""

from dataclasses import dataclass
from typing import Literal

from sievit.config import ConfigError, nearest
from sievit.policies import KeepAllConfig
from sievit.vit.execution import Execution

Counts = Literal["dense", "dynamic", "static"]
DENSE = KeepAllConfig()
"""The policy of the dense model, with which all others are compared."""


@dataclass(frozen=True)
class RunMode:
    """A mode; docs/speed.md lists them.

    Attributes:
        counts: `dense`: every token; `dynamic`: as many in each image as its policy chooses; `static`: equally many in
            every image.
        execution: how they are computed.
        graphs: compiled with CUDA graphs wherever it runs.
    """

    counts: Counts
    execution: Execution = Execution()
    graphs: bool = False

    @property
    def base(self) -> str:
        """The first part of its name: the counts, or `bucketed`: dynamic counts, rounded up to a few sizes."""
        return "bucketed" if self.execution.mode == "bucketed" else self.counts

    @property
    def name(self) -> str:
        compiled = "_graphs" if self.graphs else "_compiled" if self.execution.compiled else ""
        return self.base + ("_batched" if self.execution.attention == "batched" else "") + compiled

    @staticmethod
    def of(name: str) -> "RunMode":
        """The mode called `name`.

        Raises:
            ConfigError: an unknown mode; the nearest name is given.
        """
        if name not in MODES:
            raise ConfigError(f"unknown mode {name!r}{nearest(name, MODES)}")
        return MODES[name]


def _all() -> list[RunMode]:
    modes = []
    for counts in ("dense", "dynamic", "static"):
        for how in ("auto", "bucketed") if counts == "dynamic" else ("auto",):
            modes += [
                RunMode(counts, Execution(mode=how)),
                RunMode(counts, Execution(mode=how, compiled=True)),
                RunMode(counts, Execution(mode=how, compiled=True), graphs=True),
            ]
    return [*modes, RunMode("dynamic", Execution(attention="batched"))]


MODES = {mode.name: mode for mode in _all()}
"""Every mode by its name."""
