"""A model on a page of this machine, and behind a REST call."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from sievit import terminal
from sievit.config import ConfigError, Natural, Positive
from sievit.devices import device_name, pick_device
from sievit.models.build import load
from sievit.models.runtimes import SUFFIXES
from sievit.policies import PolicyOptions
from sievit.serve.film import VideoLimits

__all__ = ["serve"]

Port = Annotated[int, Interval(ge=0, le=65535)]
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "FASTAPI_OTEL_AUTO_CONFIGURE": "false",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(2**31),
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",
}
"""Nobody elsewhere is told anything, and Gradio counts less for itself."""


def serve(
    model: Path,
    /,
    *,
    host: str = "127.0.0.1",
    port: Port = 7860,
    policy: PolicyOptions = PolicyOptions(),  # noqa: B008
    max_megabytes: Positive = 20,
    max_megapixels: Positive = 16,
    video: VideoLimits = VideoLimits(),  # noqa: B008
    waiting: Natural = 8,
    timeout: Positive = 30,
    device: str = "auto",
) -> int:
    """Try a model on a page in your browser, dense against sparse, and ask it from programs by REST.

    Images and videos stay in the memory of this process: nothing is written to the disk, and nothing is sent anywhere
    else. One is computed at a time; Ctrl-C ends it. What programs send and get is at /docs.

    Args:
        model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
        host: address to listen at; with 127.0.0.1 only this machine gets there, with 0.0.0.0 its network does.
        port: of the address; 0 takes one that is free.
        policy: another policy.
        max_megabytes: of an image file.
        max_megapixels: of an image, or a frame; larger ones are refused before they are decoded.
        video: how much of a video is taken.
        waiting: so many requests may wait while one is computed; others are told to come back.
        timeout: seconds that a file may take to arrive, and a request to get its turn.
        device: cpu, cuda, cuda:1, or auto.
    """
    os.environ.update(QUIET)
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"sievit serve needs gradio ({error}): pip install 'sievit[serve]'") from error
    from sievit.serve.desk import Desk
    from sievit.serve.page import server
    from sievit.serve.rest import Service
    from sievit.serve.runner import Runner

    local, console = _is_local(host), terminal.console()
    with _listening(host, port) as listening:  # before the model is loaded, which takes longer
        where = pick_device(device)
        runner = Runner(load(model, policy=policy, device=where), fixed=model.suffix in SUFFIXES)
        runner.warm_up()
        limits = {"max_bytes": int(max_megabytes * 1e6), "max_pixels": int(max_megapixels * 1e6)}
        service = Service(name=model.name, runner=runner, desk=Desk(waiting, timeout), video=video, **limits)
        shown = f"[{host}]" if ":" in host else host
        console.print(f"{model.name} on {device_name(where)}: http://{shown}:{listening.getsockname()[1]}/")
        console.print("for programs: POST /predict, explained at /docs. Ctrl-C ends it.")
        if not local:
            console.print(f"warning: listening at {host}: whoever reaches this machine by network can use it")
        hosts = ["localhost", "127.0.0.1", host] if local else None
        server(service, hosts=hosts, seconds=timeout).run(sockets=[listening])
    return 0


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """
    Raises:
        ConfigError: the address is not to be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); --port 0 takes a free one"
        ) from error
