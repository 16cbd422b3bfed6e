"""The page that documents the REST calls, made from their OpenAPI description: one file, no script."""

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .75rem 1rem; border-radius: .5rem; background: #8882; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
"""
FILES = {
    "/picture": ("photo.jpg", "image", " --output picture.png"),
    "/video": ("clip.mp4", "video", " --output found.mp4"),
}
"""What is sent to an address in the examples, and where the answer goes."""


def docs_page(schema: dict[str, Any], address: str) -> str:
    """HTML of an OpenAPI description, with commands for the server at `address`."""
    calls = [(method, path, call) for path, of in schema["paths"].items() for method, call in of.items()]
    body = "".join(_call(method.upper(), path, call, address.rstrip("/")) for method, path, call in calls)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(schema['info']['title'])}: REST</title><style>{STYLE}</style>"
        f"<h1>{escape(schema['info']['title'])}: calls for programs</h1>"
        f"<p><a href='/'>The page</a> · <a href='/openapi.json'>openapi.json</a></p>{body}</html>"
    )


def _call(method: str, path: str, call: dict[str, Any], address: str) -> str:
    words = "".join(f"<p>{_code(part)}</p>" for part in call.get("description", "").split("\n\n"))
    options = [(option["name"], option.get("description", "")) for option in call.get("parameters", ())]
    statuses = [(status, of["description"]) for status, of in call["responses"].items() if status != "200"]
    example = f"curl {address}{path}"
    if method == "POST":
        file, kind, output = FILES.get(path, ("photo.jpg", "image", ""))
        example = f"curl --data-binary @{file} '{address}{path}?budget=0.5'{output}"
        example += f"\ncurl -F {kind}=@{file} '{address}{path}'{output}"
    return (
        f"<h2><code>{method} {escape(path)}</code></h2>{words}<pre>{escape(example)}</pre>"
        + _table("Options, behind the question mark", options)
        + _table("Statuses; every one has a JSON object with <code>error</code>, a sentence", statuses)
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td><code>{escape(name)}</code><td>{escape(words)}" for name, words in rows)
    return f"<p>{title}:</p><table>{lines}</table>" if rows else ""


def _code(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
