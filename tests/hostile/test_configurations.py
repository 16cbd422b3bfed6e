"""Every number of a configuration has a range, and nothing but a clear error comes of what is outside of it."""

import dataclasses
import importlib
import inspect
import json
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sievit
from hostile.mutate import mutate, spoilt
from sievit import cli
from sievit.cli.command import parse
from sievit.config import Config, ConfigError, Count, Positive, Share, from_json, to_json
from sievit.engine.recipe import Recipe
from sievit.models.build import build, load, save
from sievit.models.inputs import ModelConfig
from sievit.policies import DToPConfig, SViTConfig
from sievit.recipes import recipe, recipes
from sievit.text import load_json
from tiny import tiny_detector, tiny_segmenter

for module in pkgutil.walk_packages(sievit.__path__, "sievit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)


def configurations(base: type = Config) -> Iterator[type]:
    for cls in base.__subclasses__():
        if cls.__module__.startswith("sievit."):
            yield from [cls] if dataclasses.is_dataclass(cls) else []
            yield from configurations(cls)


def numbers(hint: Any) -> Iterator[Any]:
    """The annotations of int and float inside an annotation, with their limits."""
    inner = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if inner in (int, float):
        yield hint
    elif typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType, tuple, list, dict):
        for argument in typing.get_args(hint):
            yield from numbers(argument)


def fields_of(cls: type) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):  # ty: ignore[invalid-argument-type]
        yield field.name, hints[field.name]


ALL = sorted(set(configurations()), key=lambda cls: f"{cls.__module__}.{cls.__name__}")
COMMANDS = [c for c in cli.COMMANDS.values() if not c.raw]


def function_of(command: Any) -> Any:
    module, _, name = command.function.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_number_of_a_configuration_has_a_range(cls: type):
    for name, hint in fields_of(cls):
        for number in numbers(hint):
            assert typing.get_origin(number) is typing.Annotated, f"{cls.__name__}.{name}: {number} has no range"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.function)
def test_every_number_of_a_command_has_a_range(command: Any):
    hints = typing.get_type_hints(function_of(command), include_extras=True)
    for name in inspect.signature(function_of(command)).parameters:
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            assert issubclass(hint, Config), f"{name} of {command.function} is no Config"
        for number in numbers(hint):
            assert typing.get_origin(number) is typing.Annotated, f"{command.function} {name}: {number} has no range"


def test_whatever_is_stored_as_json_is_a_configuration():
    def classes(value: Any) -> Iterator[type]:
        if dataclasses.is_dataclass(value):
            yield type(value)
            for field in dataclasses.fields(value):
                yield from classes(getattr(value, field.name))

    for name in recipes():
        assert all(issubclass(cls, Config) for cls in classes(recipe(name)))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, "1", True, 10**400], ids=lambda value: str(value)[:5])
def test_what_is_no_finite_number_is_refused_everywhere(wrong: Any):
    """In every number of a whole recipe, one after the other."""
    document = to_json(recipe("coco_svit_adapter_s"))
    tried = 0
    for holder in _holders(document):
        for key, value in holder.items():
            extended = key == "threshold" and wrong in (math.inf, -math.inf)  # SViT's may leave out all tokens, or none
            if isinstance(value, int | float) and not isinstance(value, bool) and not extended:
                holder[key] = wrong
                with pytest.raises(ConfigError, match=key):
                    from_json(Recipe, document)
                holder[key] = value
                tried += 1
    assert tried > 80


def _holders(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
        for value in document.values():
            yield from _holders(value)


def status(args: list[str]) -> int:
    """Of the command line, whether it returns or leaves."""
    try:
        return cli.main(args)
    except SystemExit as stop:
        return int(stop.code or 0)


NONSENSE = {
    "--train.clip-norm": "-1",
    "--train.lr": "nan",
    "--train.seed": "-1",
    "--train.save-every": "nan",
    "--train.step-epochs": "-3",
    "--model.vit.drop-path-rate": "2",
    "--model.vit.num-heads": "0",
    "--model.vit.depth": "0",
    "--model.vit.mlp-ratio": "nan",
    "--model.input.size-divisor": "-32",
    "--model.head.box.max-detections": "0",
    "--data.max-detections": "-1",
    "--model.policy.targets": "2",
}


@pytest.mark.parametrize(("option", "value"), NONSENSE.items())
def test_nonsense_is_refused_as_an_option_and_leaves_no_folder(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert status(["train", "nuclei_svit", option, value, "--out", str(tmp_path / "run")]) == 2
    assert "it has to be" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["eval", "MODEL", "--images", "IMAGES", "--batch-size", "0"],
        ["sweep", "MODEL", "--images", "IMAGES", "--out", "OUT", "--batch-size", "0"],
        ["flops", "nuclei_svit", "--size", "0", "0"],
        ["predict", "MODEL", "IMAGES", "--out", "OUT", "--score-threshold", "nan"],
        ["data", "scenes", "--out", "OUT", "--size", "0", "0"],
        ["init", "nuclei_svit", "--out", "OUT", "--seed", "-1"],
        *(["predict", "MODEL", "IMAGES", "--out", "OUT", "--device", d] for d in ("meta", "mps", "cpu:7", "no", "")),
    ],
    ids=" ".join,
)
def test_nonsense_of_a_command_is_refused(
    args: list[str], tmp_path: Path, data_of: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    assert status([data_of.get(arg, arg) if arg != "OUT" else str(tmp_path / "out") for arg in args]) == 2
    assert "error" in capsys.readouterr().err.lower()
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def data_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    save(build(tiny_detector()), folder / "model.safetensors")
    return {"MODEL": str(folder / "model.safetensors"), "IMAGES": str(folder / "images")}


def test_a_damaged_recipe_file_is_an_error_that_names_it(tmp_path: Path):
    path, whole = tmp_path / "mine.json", json.dumps(to_json(recipe("nuclei_svit"))).encode()
    damaged = [b"", b"{", b"[" * 100_000, whole.decode().encode("utf-16"), b"\xff" + whole, b'{"model": {"kind": []}}']
    for content in [*damaged, b"[]", b"1", whole.replace(b'"detector"', b'["detector"]')]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"mine\.json"):
            load_json(Recipe, path)
    path.write_bytes(b"\xef\xbb\xbf" + whole)
    assert load_json(Recipe, path) == recipe("nuclei_svit")


DOCUMENTS = [to_json(recipe(name)) for name in ("nuclei_svit", "ade20k_segvit_b_dtop", "coco_dinov3_s_svit")]
MODELS = [to_json(tiny_detector(policy=SViTConfig())), to_json(tiny_segmenter(policy=DToPConfig()))]
QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(st.sampled_from(DOCUMENTS), st.randoms(use_true_random=True))
def test_a_recipe_of_any_content_is_read_or_refused(document: Any, random: Random):
    try:
        found = from_json(Recipe, mutate(document, random))
    except ConfigError:
        return
    assert from_json(Recipe, json.loads(json.dumps(to_json(found)))) == found


@QUICK
@given(st.sampled_from(MODELS), st.randoms(use_true_random=True))
def test_the_metadata_of_a_checkpoint_of_any_content_is_read_or_refused(document: Any, random: Random):
    """And a model that it describes has a size that its weights tell, before any memory is taken."""
    try:
        found = from_json(ModelConfig, mutate(document, random))
        with torch.device("meta"):
            build(found)
    except ConfigError:
        return


@QUICK
@given(st.sampled_from(DOCUMENTS), st.randoms(use_true_random=True))
def test_a_recipe_file_of_any_bytes_is_read_or_refused(tmp_path_factory: Any, document: Any, random: Random):
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    path.write_bytes(spoilt(document, random))
    try:
        load_json(Recipe, path)
    except ConfigError as error:
        said = str(error)
    else:
        said = str(path)
    assert "recipe.json" in said


def command(
    *,
    count: Count = 1,
    share: Share | None = None,
    size: tuple[Count, Count] | None = None,
    values: tuple[Positive, ...] = (),
    config: SViTConfig = SViTConfig(),  # noqa: B008
) -> dict[str, Any]:
    """Takes options of every kind.

    Args:
        count, share, size, values: numbers.
        config: more of them.
    """
    return {"count": count, "share": share, "size": size, "values": values, "config": config}


WORDS = st.sampled_from(["-1", "0", "1", "7", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "None", "", "x", "True"])
NAMES = st.sampled_from(["count", "share", "size", "values", "targets", "noise", "threshold", "first-block", "budgets"])


@QUICK
@given(st.lists(st.tuples(NAMES, st.lists(WORDS, max_size=3)), max_size=2))
def test_option_values_are_in_their_ranges_or_refused(capsys: Any, options: list[tuple[str, list[str]]]):
    args = [word for name, words in options for word in (f"--{name}", *words)]
    try:
        found = parse(command, args, "command")
    except (SystemExit, ConfigError):
        return
    config = found["config"]
    assert 1 <= found["count"] < 2**31 and (found["share"] is None or 0 <= found["share"] <= 1)
    assert all(0 < value < math.inf for value in found["values"]) and all(0 <= share <= 1 for share in config.targets)
    assert config.noise >= 0 and config.first_block >= 0 and not math.isnan(config.threshold)


def test_a_model_that_its_weights_do_not_fit_takes_no_memory(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    save(build(tiny_detector()), tmp_path / "small.safetensors")
    config = to_json(tiny_detector())
    config["vit"] |= {"embed_dim": 2**16, "num_heads": 2**10, "depth": 200}
    tensors = load_file(tmp_path / "small.safetensors")
    metadata = {"config": json.dumps({"format": "sievit", **config})}
    save_file(tensors, tmp_path / "large.safetensors", metadata)
    with pytest.raises(ConfigError, match="the weights are of another model"):
        load(tmp_path / "large.safetensors")


def test_the_imports_of_this_file_have_found_the_whole_package():
    assert len(ALL) > 45, sys.modules.keys()
