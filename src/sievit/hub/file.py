"""The one file that holds a model: safetensors, whose metadata holds the configuration.

In a published folder a config.json stands beside it, for people and the hub to read. The file is what counts; a
config.json that differs is an error, so that an edit of it is never lost silently.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sievit.config import ConfigError, from_json, kind_of, to_json
from sievit.files import write_atomically
from sievit.hub.int8 import SCALE, dequantized, pays, quantized
from sievit.models.inputs import ModelConfig
from sievit.policies import PolicyConfig, PolicyOptions, chosen_policy, policy_config
from sievit.text import load_json, parse_json, unreadable
from sievit.vit.execution import Execution

M = TypeVar("M", bound=nn.Module)

FORMAT = "sievit"
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
"""What a published folder holds, beside its README.md."""


def of_policy(name: str) -> bool:
    """Whether the weights of this name are a policy's: that of the network, the attribute of a model that holds one."""
    return name.partition(".")[2].startswith("policy.")


def write(model: nn.Module, config: ModelConfig, path: Path, *, half: bool = False, int8: bool = False) -> None:
    """See `models.build.save`."""
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        reduced = (half or int8) and name in parameters
        if reduced and not tensor.half().isfinite().all():
            raise ConfigError(f"{name} does not fit float16; save the model without half and int8")
        if reduced and int8 and pays(tensor) and not of_policy(name):
            tensor, tensors[name + SCALE] = quantized(tensor)
        elif reduced:
            tensor = tensor.half()
        tensors[name] = tensor
    # one entry, for those of several are written in an order that changes
    write_atomically(path, to_bytes(tensors, {"config": json.dumps({"format": FORMAT, **to_json(config)})}))


def require_free(out: Path, *, force: bool) -> None:
    """Raise if the model file `out` is there already, unless it may be written over.

    Raises:
        ConfigError: it is there, is a folder, or cannot be there, since something above it is no folder.
    """
    if blocked := [path for path in out.parents if path.exists() and not path.is_dir()]:
        raise ConfigError(f"{out}: {blocked[0]} is a file where a folder is needed; give another --out")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; --out is the .safetensors file to write")
    if out.exists() and not force:
        raise ConfigError(f"{out}: is there already; give another --out, or --force to write over it")


def read(path: Path, *, kind: str | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the tensors, as stored (those of 8 bits as float32), of a file that `write` wrote.

    Args:
        kind: of model that it has to be, such as "detector"; None: any.

    Raises:
        ConfigError: no such file, not a sievit model, damaged, of another kind, or beside a config.json that differs.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a .safetensors file or the folder of a training run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise unreadable(path, "a model", error) from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: damaged, cut short, or not a safetensors file ({error}); `sievit convert` takes released files"
        ) from error
    if "config" not in metadata:
        raise ConfigError(f"{path}: a safetensors file, but not one that sievit wrote: it holds no model configuration")
    data = parse_json(metadata["config"], where=f"{path}: model configuration")
    if isinstance(data, dict):
        written = data.pop("format", metadata.get("format"))  # earlier versions had an entry of its own
        if written != FORMAT:
            raise ConfigError(f"{path}: a safetensors file, but not one that sievit wrote: its format is {written!r}")
        data = {"kind": "detector", **data}  # files of the first version are all detectors and have no kind
        if kind is not None and data["kind"] != kind:
            raise ConfigError(f"{path}: holds a {data['kind']}, not a {kind}; sievit.load takes either")
    config = from_json(ModelConfig, data, where=f"{path}: model configuration")
    try:
        tensors = dequantized(tensors)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ConfigError(f"{path}: weights that are NaN or infinite: {listed(wrong)}; the training failed")
    beside = path.with_name(CONFIG_FILE)
    if path.name == MODEL_FILE and beside.is_file():
        _check_same(path, config, beside)
    return config, tensors


def restored(
    build: Callable[[Any], M],
    path: Path,
    *,
    kind: str | None = None,
    policy: str | PolicyOptions | PolicyConfig | None = None,
    compile: bool = True,
) -> M:
    """The model in a file, in evaluation mode, on the CPU.

    Args:
        build: makes a model of random weights from a configuration.
        kind: see `read`.
        policy, compile: see `models.build.load`, as for the errors.
    """
    options = PolicyOptions(policy=policy) if isinstance(policy, str) else policy
    if isinstance(options, PolicyOptions) and options.policy is not None:
        policy_config(options.policy)  # imports the module of a user's policy, which the file may hold
    config, tensors = read(path, kind=kind)
    wanted = chosen_policy(config.policy, options) if isinstance(options, PolicyOptions) else options
    if wanted not in (None, config.policy):
        # the execution was found best for the policy that is replaced
        config = replace(config, policy=wanted, execution=Execution(precision=config.execution.precision))
    if not compile:
        config = replace(config, execution=replace(config.execution, compiled=False))
    with torch.device("meta"):  # no memory is taken before it is known that the weights fit
        expected = build(config).state_dict()
    if policy is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected or not of_policy(name)}
        untrained = [n for n in expected if of_policy(n) and n not in tensors]
        if untrained:
            raise ConfigError(
                f"{path}: has no weights for the policy {kind_of(config.policy)!r} (such as {untrained[0]}); "
                "train it first, starting from this checkpoint"
            )
    require_fit(expected, tensors, error=f"{path}: the weights are of another model")
    model = build(config)
    model.load_state_dict(tensors)
    return model.eval()


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, error: str) -> None:
    """Load all weights of a model.

    Raises:
        ConfigError: names are missing or surplus, or shapes differ; it begins with `error` and lists them.
    """
    require_fit(model.state_dict(), tensors, error=error)
    model.load_state_dict(tensors)


def require_fit(expected: dict[str, Tensor], tensors: dict[str, Tensor], *, error: str) -> None:
    """Raise unless the tensors have the names and shapes of a model's.

    Raises:
        ConfigError: see `load_weights`.
    """
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    missing, surplus = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    found = {"missing": missing, "surplus": surplus, "of another shape": shapes}
    if problems := [f"{what}: {listed(names)}" for what, names in found.items() if names]:
        raise ConfigError(f"{error}; {'; '.join(problems)}")


def listed(names: Iterable[str]) -> str:
    """The first dozen of them in order, for a message."""
    names = sorted(names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _check_same(path: Path, config: ModelConfig, beside: Path) -> None:
    """Raise unless the config.json beside the file holds the same."""
    other = load_json(ModelConfig, beside)
    if other == config:
        return
    found, expected = dict(_leaves(to_json(other))), dict(_leaves(to_json(config)))
    names = [name for name in expected | found if found.get(name) != expected.get(name)]
    differences = [f"{name} is {found.get(name)!r}, not {expected.get(name)!r}" for name in names]
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise ConfigError(
        f"{beside}: is not the configuration of {path.name}, which is what counts: {'; '.join(differences[:3])}{more}; "
        "delete it, or write the folder anew with save_pretrained"
    )


def _leaves(data: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested objects, by their path; lists are values."""
    if not isinstance(data, dict):
        yield name, data
        return
    for key, value in data.items():
        yield from _leaves(value, f"{name}.{key}" if name else key)
