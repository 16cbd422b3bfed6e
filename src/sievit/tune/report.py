"""The report of tuning: figures of everything that was compared, and a table."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from sievit import terminal
from sievit.config import kind_of, to_json
from sievit.measure.clock import median_and_p95
from sievit.measure.modes import DENSE, RunMode
from sievit.policies import PolicyConfig
from sievit.tune.candidates import Candidate
from sievit.tune.options import Goal
from sievit.tune.race import Outcome
from sievit.tune.targets import MaxGFLOPs, MaxMilliseconds
from sievit.tune.workload import Workload

DENSE_MODES = ("dense", "dense_compiled")
Accuracy = Callable[[PolicyConfig], dict[str, float]]
"""The accuracy of a policy by the name of its measure; empty where it was not measured."""


def figures_of(workload: Workload, goal: Goal, outcome: Outcome, accuracy: Accuracy) -> dict[str, Any]:
    """What `tune` returns about the policies, see there."""
    chosen, setup = outcome.chosen, outcome.setup

    def row(config: PolicyConfig, times: Sequence[float]) -> dict[str, Any]:
        cost = workload.cost(config)
        return {
            "gflops": round(cost.gflops, 6),
            "keep": [round(share, 4) for share in cost.shares.double().mean(1).tolist()],
            **(median_and_p95("ms", times, digits=3) if times else {}),
            **accuracy(config),
        }

    def candidate_row(candidate: Candidate) -> dict[str, Any]:
        times = candidate.times
        return {
            "mode": candidate.name,
            "execution": to_json(candidate.execution),
            "settings": workload.policy(candidate.config).settings(),
            **row(candidate.config, times.other),
            "speedup": times.ratio.to_json() if times.other else None,
            "dials": len(candidate.variant.dials),
            "blocks": [t.to_json(dense=t.blocks.start in candidate.dense) for t in candidate.timings],
            "tried": list(candidate.found.tried),
            "chosen": candidate is chosen,
        }

    why = outcome.why
    if outcome.candidates and not any(c.variant.dials for c in outcome.candidates):
        why += f"; the policy {kind_of(workload.model.config.policy)!r} has no dial, and ran as it is configured"
    tuned = row(setup.policy, outcome.times.other)
    return {
        "tokens": round(workload.cost(DENSE).tokens),
        "target": _target(goal, tuned),
        "policy": kind_of(setup.policy),
        "mode": RunMode("dense", setup.execution).name if chosen is None else chosen.name,
        "execution": to_json(setup.execution),
        "why": why,
        **{name: row(DENSE, times) for name, times in zip(DENSE_MODES, outcome.times.dense, strict=False)},
        "tuned": tuned,
        "speedup": {**outcome.times.ratio.to_json(), "pairs": len(outcome.times.other)},
        "settings": to_json(setup.policy),
        "candidates": [candidate_row(candidate) for candidate in outcome.candidates],
    }


def _target(goal: Goal, tuned: dict[str, Any]) -> dict[str, Any] | None:
    """The target that was given, and whether it is met."""
    given = {name: value for name, value in vars(goal).items() if value is not None}
    met = True
    if goal.target_gflops is not None:
        met = tuned["gflops"] <= goal.target_gflops * (1 + MaxGFLOPs.tolerance)
    if goal.target_ms is not None:
        met = tuned["ms"] <= goal.target_ms * (1 + 2 * MaxMilliseconds.tolerance)
    return {**given, "met": met} if given else None


def show(figures: dict[str, Any]) -> None:
    """Print the table, and what was written and why."""
    console = terminal.console(stderr=False)
    console.print(table_of(figures))
    written = f"{figures['out']}: {figures['policy']}, {figures['mode']}; {figures['why']}"
    console.print(written, soft_wrap=True)
    if figures["execution"]["compiled"]:
        console.print(
            "it is compiled when it first sees a size; sievit.load(..., compile=False) leaves that out", soft_wrap=True
        )
    if figures["target"] is not None and not figures["target"]["met"]:
        console.print("the target was missed", soft_wrap=True)


def table_of(figures: dict[str, Any]) -> Table:
    """The dense model, every policy that was tried, and which of them was written."""
    size = "own sizes" if figures["size"] is None else "{}x{}".format(*figures["size"])
    title = (
        f"{figures['images']} images, {size}, {figures['tokens']} tokens, batch {figures['batch_size']}, "
        f"{figures['device']}, {figures['precision']}"
    )
    measure = next((name for name in figures["dense"] if name not in ("gflops", "keep", "ms", "ms_p95")), None)
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    headings = ["", "GFLOPs", "ms", "speed-up", "keep", "dense blocks", *([measure] if measure else [])]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    denses = [{"mode": name, **figures[name]} for name in DENSE_MODES if name in figures]
    for row in [*({**row, "chosen": row["mode"] == figures["mode"]} for row in denses), *figures["candidates"]]:
        table.add_row(*_cells(row, measure), style="bold" if row["chosen"] else None)
    return table


def _cells(row: dict[str, Any], measure: str | None) -> list[str]:
    speedup = row.get("speedup")
    low, high = speedup["quartiles"] if speedup else (0, 0)
    dense = [_span(block["blocks"]) for block in row.get("blocks", ()) if block["dense"]]
    cells = [
        f"{row['mode']} *" if row["chosen"] else row["mode"],
        f"{row['gflops']:.2f}",
        f"{row['ms']:.1f}" if "ms" in row else "-",
        f"{speedup['median']:.2f} ({low:.2f} to {high:.2f})" if speedup else "",
        f"{sum(row['keep']) / len(row['keep']):.0%}",
        " ".join(dense),
    ]
    return cells if measure is None else [*cells, f"{row[measure]:.2f}" if measure in row else "-"]


def _span(blocks: list[int]) -> str:
    return str(blocks[0]) if blocks[0] == blocks[1] else f"{blocks[0]}-{blocks[1]}"
