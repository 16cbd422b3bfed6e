"""Exported files as models: the network runs in the file's own runtime, everything around it as ever."""

from dataclasses import replace
from pathlib import Path

import torch

from sievit.config import ConfigError, from_json
from sievit.models.base import Model, model_class
from sievit.models.inputs import ModelConfig
from sievit.models.programs import Fixed
from sievit.models.runtimes import runtime
from sievit.vit.execution import Execution


def load_exported(path: Path) -> Model:
    """The model of an exported file, in evaluation mode; it has no weights of its own, and cannot be trained."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    opened = runtime(path)
    config = from_json(ModelConfig, opened.known["config"], where=str(path))
    config = replace(config, execution=Execution())
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    model.network.policy = Fixed(model.policy)
    assert model.program is not None, "it was exported"
    model.program.replace(model, opened)
    return model
