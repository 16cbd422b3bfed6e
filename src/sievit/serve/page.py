"""The page: Gradio's controls, an area for images, and what was found in them."""

import base64
import binascii
import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from sievit.serve.desk import Refused, too_large
from sievit.serve.rest import Service, application
from sievit.serve.result import notice, result_page

HERE = Path(__file__).parent
TRAINED = "as trained"
"""The first choice: the model's own policy at its own setting."""
PICKER = """
<div class="drop" tabindex="0" role="button" aria-label="choose images or a video">
  <b>Drop images or a video here</b><span>or click, or paste one</span>
  <input type="file" accept="image/*,video/*" multiple hidden>
</div>
<div class="more"><button data-folder>a folder</button> · <button data-camera>the camera</button></div>
<video playsinline muted hidden></video>
<div class="thumbs"></div>
"""
PRIVACY = """<p>What you give stays on this machine: it is not stored, and sent to nobody.
<a href="/docs" target="_blank">For programs</a></p>"""
VIDEO = "a video"
"""In the place of an image: the browser asks for a video by itself, at /video."""


def _given(*, turned: bool) -> str:
    """Runs in the browser before each call: the image is kept there, and sent along.

    Args:
        turned: the call is for the slider, which leaves what was trained.
    """
    setting = f"policy === '{TRAINED}' ? null : policy, policy === '{TRAINED}' && !{json.dumps(turned)} ? null : budget"
    return f"(image, policy, budget) => [window.sievit?.given({setting}) ?? '', policy, budget]"


def server(service: Service, *, hosts: list[str] | None, seconds: float, log_level: str = "warning") -> uvicorn.Server:
    """A server of the REST calls and the page; arguments as of `application`."""

    def made() -> FastAPI:  # called where the event loop runs, in which Gradio wants to be built
        return _with_page(application(service, hosts=hosts, seconds=seconds), service)

    config = uvicorn.Config(
        made,
        factory=True,
        log_level=log_level,
        server_header=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    return uvicorn.Server(config)


def _with_page(app: FastAPI, service: Service) -> FastAPI:
    """The application, with the page at /."""
    font = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gr.themes.Default(primary_hue="teal", font=font, font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    return gr.mount_gradio_app(
        app,
        _blocks(service),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=(HERE / "page.css").read_text(encoding="utf-8"),
    )


def _blocks(service: Service) -> gr.Blocks:
    runner = service.runner

    async def show(image: str, policy: str, budget: float, request: gr.Request) -> str:
        setting: dict[str, Any] = {} if policy == TRAINED else {"policy": policy, "budget": budget / 100}
        try:
            with service.desk.place():
                if image == VIDEO:
                    return ""
                if not image:
                    return notice("Give an image first: drop one on the left.")
                content = base64.b64decode(image.partition(",")[2], validate=True)
                address = f"{request.url.scheme}://{request.headers['host']}"
                return await service.desk.serve(
                    lambda: result_page(service.outcome(content, dense=True, **setting), service.name, address, setting)
                )
        except Refused as error:
            return notice(error.message)
        except binascii.Error:
            return notice("this is no image that can be read")

    async def turn(image: str, policy: str, budget: float, request: gr.Request) -> tuple[str, str]:
        """The slider was moved: it sets a dial, and no longer what was trained."""
        policy = runner.own if policy == TRAINED else policy
        return policy, await show(image, policy, budget, request)

    with gr.Blocks(title=f"sievit · {service.name}", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f"<h1>sievit <span>{escape(service.name)}</span></h1>", elem_id="title")
        image = gr.Textbox(visible=False)  # is filled in the browser
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=270):
                picker, policy, budget = _controls(service)
            with gr.Column(scale=4, min_width=320):
                gr.HTML("<div class='film'></div>", elem_id="clip")
                result = gr.HTML(notice("Your image, with every token and with fewer, will be here."), elem_id="result")
        common: dict[str, Any] = {
            "inputs": [image, policy, budget], "api_visibility": "private", "concurrency_limit": None,
            "trigger_mode": "always_last", "show_progress": "minimal", "show_progress_on": result,
        }  # fmt: skip
        picker.picked(show, outputs=result, js=_given(turned=False), **common)
        policy.input(show, outputs=result, js=_given(turned=False), **common)
        budget.release(turn, outputs=[policy, result], js=_given(turned=True), **common)
    blocks.queue(max_size=4 * (service.desk.waiting + 1), api_open=False)
    return blocks


def _controls(service: Service) -> tuple[gr.HTML, gr.Dropdown, gr.Slider]:
    """The area for images, the policy and its budget."""
    runner, too_long = service.runner, too_large(service.video.max_bytes).message
    script = (HERE / "page.js").read_text(encoding="utf-8")
    script = script.replace("@MOST@", str(service.video.max_bytes)).replace("@TOO_LARGE@", too_long)
    script = script.replace("@VIDEO@", VIDEO)
    picker = gr.HTML(html_template=PICKER, js_on_load=script, elem_id="picker")
    shown: dict[str, Any] = {"visible": bool(runner.dialled)}
    policy = gr.Dropdown(
        [TRAINED, *((f"{name}, by budget", name) for name in runner.dialled)],
        value=TRAINED,
        label="Policy",
        info="which tokens are computed",
        filterable=False,
        elem_id="policy",
        **shown,
    )
    budget = gr.Slider(
        2,
        100,
        value=60,
        step=1,
        label="Budget, %",
        info=f"100: every token. Moving it leaves “{TRAINED}”.",
        buttons=[],
        elem_id="budget",
        **shown,
    )
    gr.HTML(PRIVACY, elem_id="privacy")
    return picker, policy, budget
