"""SViT: dynamic token selection with preserved and reactivated tokens (WACV 2024, arXiv 2306.07050)."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from sievit.config import ConfigError, Count, Extended, Natural, NonNegative, Positive, Share, variant
from sievit.distributed import from_first, global_sum
from sievit.policies.base import FEWEST, BlockRange, Dial, Notes, Policy, PolicyConfig, register
from sievit.policies.gates import Gate, gumbel_gate, gumbel_noise, straight_through
from sievit.policies.merging import covering, covering_macs
from sievit.policies.selection import PAPER_SCHEDULE, dither, quantile, scaled, select_top, spread, tidy
from sievit.tokens import Tokens, Trace


@variant("svit")
@dataclass(frozen=True)
class SViTConfig(PolicyConfig):
    """SViT's gates and the loss that sets their rate; the defaults are the paper's.

    Attributes:
        first_block: the first gated block; every later one has a gate too.
        targets: share of tokens to keep, spread over the gated blocks.
        loss_weight: weight of the ratio loss.
        per_sample: hold every image to the target (fixed rate) instead of the mean of the batch (dynamic rate).
        temperature: of the Gumbel-softmax in training.
        noise: scale of the Gumbel noise. Gates that are trained briefly stay undecided, and then the arg-max keeps
            another share than the samples did; less noise in training keeps the two together.
        reactivate: a token that was left out may come back in a later block.
        preserve: a token that is left out keeps its features on the canvas; otherwise they become zero.
        sample: draw Gumbel noise at inference too, as the released test scripts do, instead of taking the arg-max.
        dither: a token takes part where the probability that its gate gives it is above a threshold of its own, instead
            of above one half. A gate sees a token by itself: of a plain area the arg-max takes all tokens or none,
            thresholds a share of them. With `grid` they are a fixed pattern over grid and blocks, at inference. With
            `similarity`, in training too and in place of the noise, the higher, the sooner another token can stand for
            this one: gates say how many tokens to compute where, and of those that are alike some are left out.
        per_stage: gates stand where the target changes, and their choice holds up to the next change, instead of a gate
            before each block: with the paper's targets a third of the gates, and of the searches of `propagate`.
        hidden_ratio: hidden width of a gate, relative to the embedding.
        gate_layers: linear layers of a gate, 1 to 3.
        gate_kernel: of a convolution over the grid at the beginning of a gate; 1 for none.
        threshold: a token takes part where its logit is so much above the other one's.
        static_shares: static counts: these shares of an image's tokens, one per block from `first_block` on, those with
            the highest logits, in place of the threshold; no shape depends on what is in the image. At 1 no gate is
            computed.
        multiple: static counts are rounded up to a multiple of it.
        dense_blocks: blocks whose gate is not computed, where leaving tokens out costs more than it saves.
        budgets: one model for a range of budgets: (least, most), factors on the targets. In training each step draws
            one, which is an input of the gates; None: the targets alone.
        budget: the factor at inference, within the range.
    """

    swept: ClassVar = ("threshold", (-0.5, -0.2, 0.0, 0.2, 0.5))

    first_block: Natural = 3
    targets: tuple[Share, ...] = PAPER_SCHEDULE
    loss_weight: NonNegative = 4.0
    per_sample: bool = False
    temperature: Positive = 1.0
    noise: NonNegative = 1.0
    reactivate: bool = True
    preserve: bool = True
    sample: bool = False
    dither: Literal["grid", "similarity"] | None = None
    per_stage: bool = False
    hidden_ratio: Positive = 0.25
    gate_layers: Annotated[int, Interval(ge=1, le=3)] = 2
    gate_kernel: Count = 1
    threshold: Extended = 0.0
    static_shares: tuple[Share, ...] | None = None
    multiple: Count = 1
    dense_blocks: tuple[Natural, ...] = ()
    budgets: tuple[Positive, Positive] | None = None
    budget: Positive = 1.0

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The JSON of versions in which thresholds were a pattern over the grid, or none."""
        return {**data, "dither": "grid" if data["dither"] else None} if isinstance(data.get("dither"), bool) else data


FAR = 0.15
"""Shares of tokens that differ by more are no success of a training."""


@register(SViTConfig)
class SViT(Policy):
    """A two-layer gate per block picks the tokens that the block computes (SViT, sections 3.2 and 3.3).

    Training draws hard Gumbel-softmax samples with straight-through gradients; inference takes the arg-max, and a tie
    leaves the token out. The trace holds `logits` (b, n, 2) and, in training, `gate` (b, n), and with `budgets` at the
    first gated block the factor that was drawn, `budget` (b,). Budgets, thresholds instead of the arg-max (those by
    similarity are `order` (b, n)), and gates per stage are not the paper's.
    """

    gates_in_training = True

    def __init__(self, config: SViTConfig, *, embed_dim: int, depth: int) -> None:
        super().__init__()
        _check(config, gated=depth - config.first_block)
        self.config: SViTConfig = config
        self.depth = depth
        self.targets = spread(config.targets, first_block=config.first_block, depth=depth)
        first = config.first_block
        stages = [i for i in range(first, depth) if not config.per_stage or i == first or self._changes(i)]
        self.runs = [BlockRange(*run) for run in pairwise([*stages, depth])]
        _check_stages(config, self.runs)
        hidden_dim = int(embed_dim * config.hidden_ratio)
        budgets = config.budgets is not None
        self.gates = nn.ModuleList(
            Gate(
                dim=embed_dim,
                hidden_dim=hidden_dim,
                layers=config.gate_layers,
                kernel=config.gate_kernel,
                with_budget=budgets,
            )
            for _ in self.runs
        )

    def decides_at(self, index: int) -> bool:
        return index == 0 or self._gate_at(index) is not None

    def _gate_at(self, index: int) -> nn.Module | None:
        return next((gate for run, gate in zip(self.runs, self.gates, strict=True) if run.start == index), None)

    def _target(self, index: int) -> float:
        return max(self.targets[index - self.config.first_block], FEWEST)

    def _changes(self, index: int) -> bool:
        """Whether a gated block has another target than the one before it."""
        return self.targets[index - self.config.first_block] != self.targets[index - self.config.first_block - 1]

    def _is_dense(self, index: int) -> bool:
        """Whether the gate of a gated block is not computed in inference."""
        shares = self.config.static_shares
        return index in self.config.dense_blocks or (
            shares is not None and shares[index - self.config.first_block] == 1
        )

    def _budget(self, drawn: dict[str, Tensor]) -> Float[Tensor, "b 1 1"] | float:
        """Where the budget, in training the one that was drawn, lies in its range, from -1 to 1: for `Gate`."""
        if self.config.budgets is None:
            return 0.0
        budget = drawn["budget"][:, None, None] if self.training else self.config.budget
        least, most = self.config.budgets
        return (2 * budget - least - most) / (most - least)

    def before_block(self, index: int, tokens: Tokens, trace: Trace) -> tuple[Tokens, Notes]:
        config, judge, last = self.config, self._gate_at(index), trace.last("gate")
        if judge is None and index >= config.first_block:  # the choice stands
            return (tokens if last is None else tokens.select(last.detach() > 0.5, last)), {}
        if judge is None or (not self.training and self._is_dense(index)):
            return tokens.select(None), {}
        aux: Notes = {}
        if self.training and config.budgets is not None and index == config.first_block:
            drawn = torch.empty((), device=tokens.x.device).uniform_(*config.budgets)
            aux["budget"] = from_first(drawn).expand(len(tokens.x))  # the same for every image of every process
        budget = self._budget(aux if index == config.first_block else trace.aux[config.first_block])
        aux["logits"] = judge(tokens, budget).float()  # (b, n, 2)
        if self._orders_at(index):
            aux["order"] = covering(tokens, self._target(index))
            aux["macs"] = covering_macs(tokens, self._target(index))
        elif config.dither == "similarity":
            aux["order"] = trace.aux[-1]["order"]
        final = not config.reactivate and index > config.first_block
        if self.training:
            gate = self._gate(index, aux, tokens.grid)
            if tokens.valid is not None:
                gate = gate * tokens.valid
            if final and last is not None:
                gate = gate * last
            keep, aux["gate"] = gate.detach() > 0.5, gate
        else:
            gate = None
            margin = self._margin(index, aux, tokens.grid)
            if config.static_shares is not None:
                share = config.static_shares[index - config.first_block]
                return select_top(tokens, margin, share, multiple=config.multiple, static=True), aux
            keep = margin > config.threshold
            if final:
                keep = keep & trace.keep[-1]
        if not config.preserve:
            left = keep if gate is None else gate
            tokens = tokens.replace_patches(tokens.patches * left[..., None].to(tokens.x.dtype))
        return tokens.select(keep, gate), aux

    def _gate(self, index: int, aux: Notes, grid: tuple[int, int]) -> Float[Tensor, "b n"]:
        """In training: 0 or 1, with the gradient of a soft choice."""
        config = self.config
        if config.dither == "similarity":
            return straight_through((self._margin(index, aux, grid) / config.temperature).sigmoid())
        return gumbel_gate(aux["logits"], temperature=config.temperature, noise=config.noise)

    def _margin(self, index: int, aux: Notes, grid: tuple[int, int]) -> Float[Tensor, "b n"]:
        """By how much the logit of taking part is above the other one's, with noise or threshold."""
        config, logits = self.config, aux["logits"].float()
        if config.sample:
            logits = logits.log_softmax(-1) + config.noise * gumbel_noise(logits)
        margin = logits[..., 0] - logits[..., 1]
        if config.dither is None:
            return margin
        own = aux["order"] if config.dither == "similarity" else 1 - dither(grid, index, device=logits.device)
        return margin - config.noise * own.clamp(1e-4, 1 - 1e-4).logit()  # logistic, as the noise of two Gumbels is

    def _orders_at(self, index: int) -> bool:
        """Whether a gated block looks for similar tokens: where the target changes, and behind one without a gate."""
        if self.config.dither != "similarity":
            return False
        return index == self.config.first_block or self._changes(index) or self._is_dense(index - 1)

    def begin(self) -> None:
        """Gates that draw: at first they take every token with the probability of its target, whatever it is."""
        noise = self.config.noise
        if not noise or not (self.config.dither or self.config.sample):
            return
        for run, gate in zip(self.runs, self.gates, strict=True):
            assert isinstance(gate, Gate)
            odds = math.log(self._target(run.start) / max(1 - self._target(run.start), FEWEST)) * noise
            nn.init.zeros_(gate.fc2.weight)
            gate.fc2.bias.data.copy_(torch.tensor([odds / 2, -odds / 2]))

    def loss(
        self, trace: Trace, *, teacher: Trace | None = None, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """The ratio loss: squared distance of the kept share from its target, mean over gated blocks, weighted.

        The share is that of the whole batch, over all processes, or of each image with `per_sample`. With `budgets` the
        targets are multiplied by the factor that was drawn, and at most 1.
        """
        gates = [aux["gate"] for aux in trace.aux if "gate" in aux]
        if not gates:
            return {}
        kept = torch.stack([gate.sum(1) for gate in gates])  # (gates, b)
        total = trace.valid.sum(1).to(kept.dtype)  # (b,)
        wanted = kept.new_tensor([self.targets[run.start - self.config.first_block] for run in self.runs])[:, None]
        if self.config.budgets is not None:
            factor = next(aux["budget"] for aux in trace.aux if "budget" in aux)  # (b,)
            wanted = (wanted * factor).clamp(max=1.0)
        if self.config.per_sample:
            images = global_sum(torch.ones_like(total).sum())
            error = global_sum((kept / total - wanted).square().sum(1)) / images
        else:
            error = (global_sum(kept.sum(1)) / global_sum(total.sum()) - wanted[:, 0]).square()
        return {"ratio": self.config.loss_weight * error.mean()}

    def hint(self, kept: Sequence[float]) -> str | None:
        """Gates that keep quite another share than their target's: they closed, or have not learned to leave out."""
        first, factor = self.config.first_block, self.config.budget if self.config.budgets is not None else 1.0
        shares = {index: (kept[index], min(1.0, target * factor)) for index, target in enumerate(self.targets, first)}
        off = [f"{i} ({own:.0%} of {target:.0%})" for i, (own, target) in shares.items() if abs(own - target) > FAR]
        if self.config.dense_blocks or self.is_static or not off:
            return None
        return (
            f"gates are far from the share of tokens that they should keep, in blocks {', '.join(off)}: with too high "
            "a rate they close for good, with too low a rate they stay undecided"
        )

    def macs(self, trace: Trace) -> Float[Tensor, " b"]:
        """A gate computes every grid token: n (c hidden + 2 hidden), and k^2 c of a convolution; and the notes."""
        per_token = sum(p.numel() for p in self.gates.parameters() if p.ndim >= 2) / len(self.gates)
        return super().macs(trace) + sum("logits" in aux for aux in trace.aux) * per_token * trace.valid.sum(1).double()

    def dense_notes(self, index: int, tokens: Tokens) -> Notes:
        gated = self._gate_at(index) is not None and not self._is_dense(index)
        notes: Notes = {"logits": tokens.valid_or_all()} if gated else {}
        if gated and self._orders_at(index):
            notes["macs"] = covering_macs(tokens, self._target(index))
        return notes

    @property
    def is_static(self) -> bool:
        return self.config.static_shares is not None

    def ranges(self) -> list[BlockRange]:
        if not self.config.reactivate:
            return []  # a block for all tokens would bring back those that are gone
        return [run for run in self.runs if not (self.is_static and self._is_dense(run.start))]

    def without(self, starts: Collection[int]) -> PolicyConfig:
        config = self.config
        off = {i for run in self.runs if run.start in starts for i in range(run.start, run.stop)}
        if config.static_shares is None:
            return replace(config, dense_blocks=tuple(sorted({*config.dense_blocks, *off})))
        shares = enumerate(config.static_shares, start=config.first_block)
        return replace(config, static_shares=tuple(1.0 if i in off else share for i, share in shares))

    def dynamic(self) -> PolicyConfig:
        return replace(self.config, static_shares=None, multiple=1, dense_blocks=())

    def dials(self, passes: Callable[[PolicyConfig], Iterable[Trace]]) -> list[Dial]:
        """The threshold of the logits; of gates with budgets the budget, and the threshold beyond its range."""
        config, budgets = self.config, self.config.budgets
        if budgets is None:
            return [self._threshold_dial(config, passes)]
        least, most = budgets

        def budget(position: float) -> PolicyConfig:
            return replace(config, budget=round(most + position * (least - most), 4))

        below = self._threshold_dial(replace(config, budget=most), passes, part="below")
        return [budget, below, self._threshold_dial(replace(config, budget=least), passes, part="above")]

    def made_static(
        self, kept: Sequence[float], *, multiple: int = 1, position: float | None = None
    ) -> PolicyConfig | None:
        if self.config.sample or not self.config.reactivate:
            return None
        starts = [run.start for run in self.runs for _ in range(run.start, run.stop)]
        shares = tuple(min(1.0, max(FEWEST, kept[start])) for start in starts)
        shares = tuple(map(tidy, shares)) if position is None else scaled(shares, position)
        return replace(self.config, static_shares=shares, multiple=multiple, dense_blocks=())

    def _threshold_dial(
        self,
        config: SViTConfig,
        passes: Callable[[PolicyConfig], Iterable[Trace]],
        part: Literal["all", "below", "above"] = "all",
    ) -> Dial:
        """The threshold by the share of all margins that it is above; of a part, from or to its value in `config`."""

        @cache
        def margins() -> Tensor:
            of_passes = [
                self._margin(index, aux, trace.grid)[trace.valid].cpu()
                for trace in passes(replace(config, threshold=-math.inf, sample=False))
                for index, aux in enumerate(trace.aux)
                if "logits" in aux
            ]
            return torch.cat(of_passes)

        def turn(position: float) -> PolicyConfig:
            here = (margins() < config.threshold).double().mean().item()
            low, high = (here if part == "above" else 0.0), (here if part == "below" else 1 - FEWEST)
            if position <= 0 and part != "above":
                return replace(config, threshold=margins().min().item() - 1.0)
            if position == (0 if part == "above" else 1) and part != "all":
                return config
            return replace(config, threshold=quantile(margins(), low + position * max(0.0, high - low)))

        return turn


def _check_stages(config: SViTConfig, runs: Sequence[BlockRange]) -> None:
    """Raise a ConfigError where blocks that one gate decides for are not treated alike."""
    for run in runs:
        blocks = range(run.start, run.stop)
        fixed = config.static_shares and config.static_shares[run.start - config.first_block :][: len(blocks)]
        if len({i in config.dense_blocks for i in blocks}) > 1 or (fixed and len(set(fixed)) > 1):
            raise ConfigError(
                f"svit: per_stage decides once for blocks {run.start} to {run.stop - 1}; give all of them in "
                "dense_blocks or none, and one static share, or set per_stage=False"
            )


def _check(config: SViTConfig, *, gated: int) -> None:
    """Raise a ConfigError about options that do not go together.

    Args:
        gated: number of gated blocks.
    """
    shares = config.static_shares
    if config.dither and (config.sample or config.noise == 0):
        raise ConfigError("svit: dither takes the place of sample, and needs noise above 0, which it stands for")
    if config.propagate and not config.preserve:
        raise ConfigError("svit: preserve=False leaves nothing to add an update to; set propagate=False with it")
    if config.reactivate and not config.preserve:
        raise ConfigError("svit: preserve=False leaves nothing to come back; set reactivate=False with it")
    if config.dense_blocks and not config.reactivate:
        raise ConfigError("svit: dense_blocks bring all tokens back; leave them out, or set reactivate=True")
    if shares is not None and (len(shares) != gated or 0 in shares):
        raise ConfigError(f"svit: static_shares are {gated}, one per gated block, above 0 and up to 1, not {shares}")
    if shares is not None and (config.sample or not config.reactivate):
        raise ConfigError("svit: static_shares go with the arg-max and with reactivation")
    if config.gate_kernel % 2 == 0:
        raise ConfigError(f"svit: gate_kernel is an odd number, not {config.gate_kernel}")
    if config.budgets is not None and config.gate_layers == 1:
        raise ConfigError("svit: budgets move the hidden layer of a gate; set gate_layers=2 or more")
    if config.budgets is None:
        if config.budget != 1:
            raise ConfigError(
                f"svit: budget {config.budget} needs gates that were trained for a range of budgets; train with "
                "budgets, such as (0.5, 1.2), or set threshold, which every gate has"
            )
        return
    least, most = config.budgets
    if least >= most:
        raise ConfigError(f"svit: budgets are two rising factors, such as (0.5, 1.2), not {config.budgets}")
    if not least <= config.budget <= most:
        raise ConfigError(f"svit: budget {config.budget} is not in the range of budgets, {least} to {most}")
