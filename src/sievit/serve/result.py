"""What the page shows of an outcome: HTML that holds its pictures."""

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any
from urllib.parse import urlencode

from PIL import Image

from sievit import viz
from sievit.report.figures import exits_of
from sievit.report.page import data_uri
from sievit.serve.runner import Outcome, Pass

BOX = (900, 900)
"""(width, height) that pictures fit into, in pixels."""
SCORE = 0.5
"""Of objects that are drawn."""


def notice(words: str) -> str:
    """A sentence in the place of a result."""
    return f"<div class='notice'>{escape(words)}</div>"


def result_page(outcome: Outcome, name: str, address: str, setting: Mapping[str, Any]) -> str:
    """HTML of an outcome.

    Args:
        name: of the model.
        address: of the server, as the browser calls it.
        setting: the options that the outcome was asked for with.
    """
    pruned, dense, task = outcome.pruned, outcome.dense, outcome.task
    passes = {"every token": dense, _title(outcome): pruned}
    pictures = [
        _picture(title, task.summary(one.answer.results[0], min_score=SCORE), _drawn(outcome, one))
        for title, one in passes.items()
        if one is not None
    ]
    legend = task.legend([one.answer.results[0] for one in passes.values() if one is not None])
    exits = exits_of(pruned.answer)
    if exits is None:
        keep = pruned.answer.computed(0)
        tokens = _picture(
            "blocks per token",
            "dark: few blocks, bright: all",
            viz.heat_map(outcome.image, keep.float().mean(0), box=BOX),
        )
        left = ""
    else:
        tokens = _picture(
            "where tokens left", "dark: early, bright: never", viz.exit_map(outcome.image, exits, box=BOX)
        )
        left = _legend(viz.exits_legend(exits))
    return (
        f"<section class='figures'>{_figures(pruned, dense)}</section>"
        f"<section class='pictures'>{''.join(pictures)}{tokens}</section>"
        f"{_legend(legend)}{left}"
        f"<section class='blocks'><h3>Tokens computed, by block</h3>{_bars(pruned.keep)}</section>"
        f"{_downloads(outcome, name, address, setting)}"
    )


def _title(outcome: Outcome) -> str:
    """The policy, and the setting that its dial turns."""
    swept = outcome.policy.swept
    return (
        f"{outcome.policy_name}, {swept[0]} {_short(getattr(outcome.policy, swept[0]))}"
        if swept
        else outcome.policy_name
    )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(dict.fromkeys(map(_short, value)))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _drawn(outcome: Outcome, one: Pass) -> Image.Image:
    return outcome.task.picture(outcome.image, one.answer.results[0], min_score=SCORE, box=BOX)


def _picture(title: str, note: str, picture: Image.Image) -> str:
    source, alt = data_uri(picture, quality=88), escape(title, quote=True)
    return (
        f"<figure><img src='{source}' alt='{alt}' width={picture.width} height={picture.height}>"
        f"<figcaption><b>{escape(title)}</b> {escape(note)}</figcaption></figure>"
    )


def _figures(pruned: Pass, dense: Pass | None) -> str:
    share = sum(pruned.keep) / len(pruned.keep)
    tokens = _figure("tokens computed", f"{share:.0%}", "of all, over all blocks", share)
    if dense is None:
        return tokens + _figure("GFLOPs", f"{pruned.gflops:.1f}", "") + _figure("ms", f"{pruned.ms:.0f}", "")
    gflops, ms = pruned.gflops / dense.gflops, pruned.ms / dense.ms
    return (
        _figure("GFLOPs", f"{pruned.gflops:.1f}", f"{dense.gflops:.1f} with every token: {gflops - 1:+.0%}", gflops)
        + _figure(
            "milliseconds", f"{pruned.ms:.0f}", f"{dense.ms:.0f} with every token: {1 / ms:.2f} times as fast", ms
        )
        + tokens
    )


def _figure(name: str, value: str, note: str, share: float | None = None) -> str:
    bar = "" if share is None else f"<i><i style='width:{min(share, 1):.1%}'></i></i>"
    return f"<div><span>{name}</span><strong>{value}</strong>{bar}<small>{note}</small></div>"


def _legend(entries: Iterable[tuple[str, viz.Colour | None]]) -> str:
    parts = []
    for name, colour in entries:
        square = f"<i style='background:rgb{colour}'></i>" if colour else ""
        parts.append(f"<span>{square}{escape(name)}</span>")
    return f"<div class='legend'>{''.join(parts)}</div>" if parts else ""


def _bars(keep: list[float]) -> str:
    bars = "".join(
        f"<div title='block {block}: {share:.0%}'><b>{share:.0%}</b><i style='--share:{share:.3f}'></i>"
        f"<span>{block}</span></div>"
        for block, share in enumerate(keep)
    )
    return f"<div class='bars'>{bars}</div>"


def _downloads(outcome: Outcome, name: str, address: str, setting: Mapping[str, Any]) -> str:
    content = json.dumps({"model": name, **outcome.to_json()})
    source = "data:application/json;base64," + base64.b64encode(content.encode()).decode()
    query = escape("?" + urlencode({**setting, "dense": "true"}), quote=True)
    return (
        "<section class='downloads'>"
        f"<a class='button' download='result.json' href='{source}'>Results, JSON</a>"
        f"<button class='button' data-picture='/picture{query}'>Picture, PNG</button>"
        f"<code>curl --data-binary @photo.jpg '{escape(address)}/predict{query}'</code>"
        "</section>"
    )
