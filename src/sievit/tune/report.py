"""What tuning found, for people."""

from typing import Any

from rich.box import SIMPLE
from rich.table import Table


def table_of(figures: dict[str, Any]) -> Table:
    """The dense model, every policy that was tried, and which of them was written."""
    size = "own sizes" if figures["size"] is None else "{}x{}".format(*figures["size"])
    title = (
        f"{figures['images']} images, {size}, {figures['tokens']} tokens, batch {figures['batch_size']}, "
        f"{figures['device']}, {figures['precision']}"
    )
    measure = next((name for name in ("miou", "mask_ap", "box_ap") if name in figures["dense"]), None)
    table = Table(title=title, title_justify="left", box=SIMPLE, collapse_padding=True)
    headings = ["", "GFLOPs", "ms", "speed-up", "keep", "dense blocks", *([measure] if measure else [])]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    denses = [{"mode": name, **figures[name]} for name in ("dense", "dense_compiled") if name in figures]
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
