"""How a trained model is run when it answers: what `sievit tune` finds for a device, and a checkpoint remembers."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sievit.config import ConfigError

MANY_SHAPES: dict[str, Any] = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
"""Of torch.compile: in the bucketed mode every block is compiled for every bucket it is given."""


@dataclass(frozen=True)
class Execution:
    """How a model is run when it answers; training does not look at it.

    Attributes:
        mode, backend: the executor's, see `sievit.vit.execute`.
        compiled: the network, from a batch to its maps or scores, runs under torch.compile, on CUDA with CUDA graphs.
            It is compiled at the first batch of each size, up to torch's limit of recompilations; the sizes behind
            that run as they stand.
        precision: bfloat16 runs under autocast, with weights of 32 bits.
    """

    mode: Literal["auto", "bucketed"] = "auto"
    backend: Literal["auto", "padded"] = "auto"
    compiled: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a pass runs in; with float32 whatever is around it counts."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def run(self, network: nn.Module, images: Tensor, *args: Any, mode: str = "auto", **options: Any) -> Any:
        """`network(images, ...)`, with this back-end, and in this mode unless another one is given.

        Raises:
            ConfigError: the compiler fails, or there is none.
        """
        options |= {"mode": self.mode if mode == "auto" else mode, "backend": self.backend}
        if not self.compiled:
            return network(images, *args, **options)
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        graphs = images.is_cuda
        try:
            with config.patch(MANY_SHAPES) if self.mode == "bucketed" else nullcontext():
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                answer = _compiled(graphs, self.mode)(network, images, *args, **options)
        except TorchDynamoException as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise ConfigError(
                f"the network cannot be compiled here ({reason}); leave out --compile, load it with compile=False, or "
                "set TORCH_COMPILE_DISABLE=1"
            ) from error
        return copied(answer) if graphs else answer


def copied(value: Any) -> Any:
    """Tensors in dicts, tuples and dataclasses, copied: what a CUDA graph returns lies where the next pass writes."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(copied(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: copied(getattr(value, field.name)) for field in fields(value)})
    return value


@cache
def _compiled(graphs: bool, mode: str) -> Callable[..., Any]:
    """Calls a network, compiled; torch keeps what it compiled for each network and size."""
    logging.getLogger("sievit").warning(
        "the network is compiled at the first batch of each size, which may take minutes; "
        "load it with compile=False, or set TORCH_COMPILE_DISABLE=1, to run it as it stands"
    )
    if mode == "bucketed":
        torch._logging.set_logs(dynamo=logging.ERROR)  # breaks are what this mode is made of
    return torch.compile(_call, dynamic=False, mode="reduce-overhead" if graphs else None)


def _call(network: nn.Module, *args: Any, **options: Any) -> Any:
    return network(*args, **options)
