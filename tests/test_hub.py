"""Models in folders and on the hub: what is written, what is read back, what the card says. No network."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import save_file

import sievit
from sievit import Card
from sievit.config import ConfigError
from sievit.engine.initial import start_from
from sievit.hub import model_file, shipped
from sievit.hub.card import read_figures
from sievit.hub.file import read
from sievit.models.detector import Detector
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import Segmenter
from sievit.policies import DToPConfig, SViTConfig
from tiny import assert_same_weights, refused, tiny_detector, tiny_head, tiny_segmenter, tiny_vit

VIT = tiny_vit(grid=(6, 6))
INPUT = InputConfig(min_size=96, max_size=160)
DETECTOR = tiny_detector(
    vit=VIT,
    policy=SViTConfig(first_block=1, targets=(0.7, 0.5, 0.3)),
    head=tiny_head(box={"min_score": 0.1}),
    input=INPUT,
    classes=("ball", "box"),
    category_ids=(1, 4),
)
EXITS = DToPConfig(thresholds=(0.9,), keep_per_class=1)
SEGMENTER = tiny_segmenter(vit=VIT, policy=EXITS, input=INPUT, classes=("sky", "sea"), out_indices=(1, 3))
FIGURES = {
    "box_ap": 0.41234,
    "mask_ap": 0.37,
    "gflops": 12.3,
    "gflops_std": 0.4,
    "ms_per_image": 45.6,
    "ms_per_image_p95": 50.1,
    "keep": [1.0, 0.7, 0.5, 0.3],
    "images": 24,
    "policy": "svit",
    "device": "a CPU",
}
SAID = Card(
    license="cc-by-nc-4.0",
    datasets=("user/balls", "boxes of the cellar"),
    figures=FIGURES,
    evaluated_on="balls, val",
    notes="Made on a Sunday.",
)


@pytest.fixture
def detector() -> Detector:
    return sievit.build(DETECTOR).eval()


@pytest.fixture
def segmenter() -> Segmenter:
    return sievit.build(SEGMENTER).eval()


def in_cache(cache: Path, repo_id: str, model: Detector | Segmenter, revision: str = "main") -> None:
    """Put a model where huggingface_hub would after fetching it."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    commit = f"{len(revision):040x}"
    model.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("config", [DETECTOR, SEGMENTER])
def test_a_folder_holds_the_model(config, tmp_path) -> None:
    model = sievit.build(config).eval()
    assert model.save_pretrained(tmp_path / "a/b") is None
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    images = [torch.rand(3, 70, 90)]
    for again in (type(model).from_pretrained(tmp_path / "a/b"), sievit.load(tmp_path / "a/b")):
        assert again.config == model.config
        assert not again.training
        assert_same_weights(again, model)
        for one, other in zip(again.predict(images), model.predict(images), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    sievit.save(model, tmp_path / "alone.safetensors")
    assert read(tmp_path / "alone.safetensors")[0] == read(tmp_path / "a/b/model.safetensors")[0]
    assert_same_weights(sievit.load(tmp_path / "alone.safetensors"), model)


def test_config_json_is_readable_and_optional(detector, tmp_path) -> None:
    detector.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["vit"]["embed_dim"] == 16 and len(text.splitlines()) > 20
    (tmp_path / "config.json").write_text(json.dumps(json.loads(text), sort_keys=True))  # the same, written otherwise
    assert Detector.from_pretrained(tmp_path).config == DETECTOR
    (tmp_path / "config.json").unlink()
    assert Detector.from_pretrained(tmp_path).config == DETECTOR


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_config_json_that_differs_is_an_error(detector, tmp_path, command) -> None:
    detector.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    edited(config, classes=["ball", "cube"], input={"min_size": 64, "max_size": 160})
    message = r"config\.json: .*what counts: .*input\.min_size is 64, not 96.*classes is \['ball', 'cube'\]"
    for load in (Detector.from_pretrained, sievit.load):
        refused(message, load, tmp_path)
    assert "min_size is 64, not 96" in command("flops", tmp_path, status=2).err
    edited(config, nonsense=1)
    refused(r"config\.json: unknown field 'nonsense'", sievit.load, tmp_path)
    config.write_text("{")
    refused(r"config\.json: cannot be read as JSON", sievit.load, tmp_path)
    detector.save_pretrained(tmp_path)
    assert sievit.load(tmp_path).config == DETECTOR


def test_a_published_folder_goes_before_a_run_s(detector, tmp_path) -> None:
    sievit.save(sievit.build(DETECTOR), tmp_path / "best.safetensors")
    assert model_file(tmp_path).name == "best.safetensors"
    name = "backbone.vit.pos_embed"
    assert not torch.equal(Detector.from_pretrained(tmp_path).state_dict()[name], detector.state_dict()[name])
    detector.save_pretrained(tmp_path)
    assert_same_weights(Detector.from_pretrained(tmp_path), detector)
    assert_same_weights(Detector.from_pretrained(tmp_path / "model.safetensors"), detector)


def test_each_class_takes_its_own_and_nothing_else(detector, segmenter, tmp_path) -> None:
    detector.save_pretrained(tmp_path / "d")
    segmenter.save_pretrained(tmp_path / "s")
    refused(r"holds a detector, not a segmenter; sievit\.load takes either", Segmenter.from_pretrained, tmp_path / "d")
    refused("holds a segmenter, not a detector", Detector.from_pretrained, tmp_path / "s")

    refused(r"has neither model\.safetensors", Detector.from_pretrained, tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for load in (Detector.from_pretrained, sievit.load):
        refused("not one that sievit wrote", load, tmp_path)


def test_from_the_hub_s_cache(detector, segmenter, tmp_path, monkeypatch) -> None:
    other = sievit.build(DETECTOR).eval()
    in_cache(tmp_path, "user/balls", detector)
    in_cache(tmp_path, "user/balls", other, "v1")
    here: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    assert_same_weights(Detector.from_pretrained("user/balls", **here), detector)
    assert_same_weights(Detector.from_pretrained("user/balls", revision="v1", **here), other)
    assert not list(Detector.from_pretrained("user/balls", policy="keep_all", **here).policy.parameters())
    refused("holds a detector", Segmenter.from_pretrained, "user/balls", **here)
    with pytest.raises(ConfigError, match="hf:user/balls@v2: not in the local cache, and local_files_only is set"):
        Detector.from_pretrained("user/balls", revision="v2", **here)


def test_what_the_hub_is_asked(detector, tmp_path, monkeypatch, command) -> None:
    """Every option reaches huggingface_hub, and hf: is understood wherever a path is."""
    asked: list[tuple[str, dict]] = []
    detector.save_pretrained(tmp_path)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr("sievit.hub.fetch.snapshot_download", snapshot_download)
    options: dict[str, Any] = {
        "revision": "v1",
        "token": "secret",
        "cache_dir": "x",
        "local_files_only": True,
        "force_download": True,
    }
    Detector.from_pretrained("user/balls", **options)
    repo_id, given = asked.pop()
    assert repo_id == "user/balls" and options.items() <= given.items()
    assert given["allow_patterns"] == ["model.safetensors", "config.json"]
    assert_same_weights(sievit.load("hf:user/balls@v2"), detector)
    assert_same_weights(Detector.from_pretrained("hf:user/balls@v2"), detector)
    assert command("flops", "hf:user/balls@v2").figures["policy"] == "svit"
    assert {(repo_id, given["revision"]) for repo_id, given in asked} == {("user/balls", "v2")}
    (tmp_path / "model.safetensors").unlink()
    refused(r"hf:user/balls: has no model\.safetensors; is it a model of sievit", sievit.load, "hf:user/balls")


def test_shipped_models_are_found_by_name(detector, tmp_path, monkeypatch, command) -> None:
    """By every command and function that takes a model; a file or folder of that name goes first."""
    (tmp_path / "models").mkdir()
    sievit.save(detector, tmp_path / "models/balls.safetensors")
    monkeypatch.chdir(tmp_path)
    assert {"balls", "facade_svit", "facade_setr_dtop", "nuclei_svit"} <= shipped().keys()
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path / "models"))
    assert shipped().keys() == {"balls"}
    for load in (sievit.load, Detector.from_pretrained):
        assert_same_weights(load("balls"), detector)
    assert start_from(sievit.build(DETECTOR), Path("balls")) == ()
    command("flops", "balls")
    refused(r"ball: no such file or folder, and no model .* did you mean 'balls'\?", sievit.load, "ball")
    printed = command("train", "nuclei_vit", "--train.init-from", "bals", "--out", "run", status=2)
    assert "did you mean 'balls'?" in printed.err
    assert not (tmp_path / "run").exists()
    other = sievit.build(DETECTOR)
    other.save_pretrained("balls")
    assert_same_weights(sievit.load("balls"), other)
    monkeypatch.setenv("SIEVIT_MODELS", str(tmp_path / "gone"))
    refused(r"and no model in models/ has that name$", sievit.load, "nuclei_vit")


def test_names_and_options_that_there_cannot_be(tmp_path) -> None:
    with pytest.raises(TypeError, match="no argument 'polciy'"):
        Detector.from_pretrained(tmp_path, polciy="svit")
    refused("'a/b/c' is neither a folder here nor the id of a model on the hub", Detector.from_pretrained, "a/b/c")
    refused("has no revisions", Detector.from_pretrained, tmp_path, revision="v1")


def header(path: Path) -> dict:
    """The YAML between the first two lines of dashes."""
    _, text, _ = path.read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_a_card_says_what_it_was_told(detector, tmp_path) -> None:
    detector.save_pretrained(tmp_path, card=SAID)
    data = header(tmp_path / "README.md")
    assert data["library_name"] == "sievit"
    assert data["license"] == "cc-by-nc-4.0"
    assert data["pipeline_tag"] == "object-detection"
    assert data["datasets"] == ["user/balls"], "the hub takes names of its own kind only"
    assert {"sievit", "svit", "instance-segmentation"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "balls, val"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"box_ap": 0.41234, "mask_ap": 0.37}
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.license == "cc-by-nc-4.0" and len(loaded.data.eval_results) == 2
    parameters = sum(p.numel() for p in detector.parameters()) / 1e6
    for words in (
        "boxes of the cellar",
        "| box AP | 41.23 % |",
        "12.30 (± 0.40 over images)",
        "45.6, 95th percentile 50.1 on a CPU",
        "1.00 0.70 0.50 0.30",
        "| `targets` | 0.7, 0.5, 0.3 |",
        "4 blocks, 16 channels, 2 heads",
        f"{parameters:.2f} M",
        "Classes: ball, box",
        "## Licence\n\ncc-by-nc-4.0",
        "Made on a Sunday.",
    ):
        assert words in loaded.text


def test_a_card_invents_nothing(segmenter, tmp_path) -> None:
    segmenter.save_pretrained(tmp_path)
    data = header(tmp_path / "README.md")
    assert data["license"] == "unknown"
    assert data["pipeline_tag"] == "image-segmentation"
    assert not {"datasets", "model-index", "base_model", "license_name"} & data.keys()
    text = (tmp_path / "README.md").read_text()
    assert "| `thresholds` | 0.9 |" in text and "| `keep_per_class` | 1 |" in text
    for words in ("the terms under which", "## Data\n\nUnknown.", "None are given"):
        assert words in text


def test_the_three_lines_of_a_card_work(segmenter, tmp_path, monkeypatch) -> None:
    segmenter.save_pretrained(tmp_path / "FOLDER")
    text = (tmp_path / "FOLDER/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('"image.jpg"', "image")
    monkeypatch.chdir(tmp_path)
    done: dict[str, Any] = {"image": torch.rand(3, 60, 80)}
    exec(code, done)
    assert done["answers"][0].shape == (60, 80)


def test_a_card_written_by_hand_stays_unless_another_is_given(detector, tmp_path) -> None:
    (tmp_path / "README.md").write_text("by hand")
    detector.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "by hand"
    detector.save_pretrained(tmp_path, card=SAID)
    assert header(tmp_path / "README.md")["license"] == "cc-by-nc-4.0"

    detector.save_pretrained(tmp_path, card=Card(license="dinov3", license_link="https://example.org/l"))
    data = header(tmp_path / "README.md")
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "dinov3", "https://example.org/l")


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"miou": 0.5}, r"none of a detector \(box_ap"),
        ({**FIGURES, "policy": "keep_all"}, "of the policy 'keep_all', and the model's is 'svit'"),
    ],
)
def test_figures_of_another_model(figures, message, detector, tmp_path) -> None:
    refused(message, detector.save_pretrained, tmp_path, card=replace(SAID, figures=figures))
    assert not list(tmp_path.iterdir())


def test_figures_are_the_last_line(tmp_path) -> None:
    path = tmp_path / "eval.txt"
    path.write_text("a table\n\n" + json.dumps(FIGURES) + "\n\n")
    assert read_figures(path) == FIGURES
    for text, message in (("", "last line"), ("[1]\n", "not the object"), ('{"a": 1}\nthe end', "last line")):
        path.write_text(text)
        refused(rf"eval\.txt: .*{message}", read_figures, path)
    refused(r"absent\.txt: cannot be read .*sievit eval MODEL", read_figures, tmp_path / "absent.txt")


class Hub:
    """Stands where huggingface_hub talks to the hub, and remembers what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, has_card: bool = False) -> None:
        self.files: dict[str, bytes] = {}
        self.options: dict[str, Any] = {}
        self.created: list[tuple[str, Any]] = []
        hub = self

        class Repo:
            def __init__(self, repo_id: str) -> None:
                self.repo_id = repo_id

        def create_repo(api: HfApi, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> Repo:
            assert exist_ok
            hub.created.append((repo_id, private))
            return Repo(repo_id)

        def upload_folder(api: HfApi, *, folder_path: Path, **options: Any) -> str:
            hub.options = {**options, "token": api.token}
            hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return f"https://hub/{options['repo_id']}/commit/1"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: has_card)


def test_what_is_pushed_also_by_saving(detector, tmp_path, monkeypatch) -> None:
    hub = Hub(monkeypatch)
    url = detector.push_to_hub(
        "user/balls", card=SAID, private=True, token="secret", branch="next", commit_message="so"
    )
    assert url == "https://hub/user/balls/commit/1"
    assert hub.created == [("user/balls", True)]
    assert hub.options["repo_id"] == "user/balls" and hub.options["token"] == "secret"
    assert hub.options["revision"] == "next" and hub.options["commit_message"] == "so"
    assert hub.files.keys() == {"model.safetensors", "config.json", "README.md"}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert_same_weights(Detector.from_pretrained(tmp_path), detector)
    text = (tmp_path / "README.md").read_text()
    assert header(tmp_path / "README.md")["license"] == "cc-by-nc-4.0"
    assert 'sievit.load("hf:user/balls")' in text and "\n# balls\n" in text

    hub = Hub(monkeypatch)
    assert detector.save_pretrained(tmp_path / "balls", card=SAID, push_to_hub=True, repo_id="user/b", half=True)
    assert hub.created == [("user/b", None)]
    assert len(hub.files["model.safetensors"]) == (tmp_path / "balls/model.safetensors").stat().st_size
    assert b"cc-by-nc-4.0" in hub.files["README.md"]


@pytest.mark.parametrize(("card", "ignored"), [(None, ["README.md", "*.log"]), (SAID, "*.log")])
def test_a_card_on_the_hub_stays_unless_there_is_another(card, ignored, detector, monkeypatch) -> None:
    hub = Hub(monkeypatch, has_card=True)
    detector.push_to_hub("user/balls", card=card, ignore_patterns="*.log")
    assert hub.options["ignore_patterns"] == ignored


def test_the_command(segmenter, tmp_path, monkeypatch, command) -> None:
    hub = Hub(monkeypatch)
    sievit.save(segmenter, tmp_path / "m.safetensors")
    (tmp_path / "eval.json").write_text(json.dumps({"miou": 0.5, "policy": "dtop"}))
    (tmp_path / "notes.md").write_text("Made on a Sunday.")
    args = ["card", tmp_path / "m.safetensors", "--out", tmp_path / "out", "--license", "mit"]
    args += ["--datasets", "user/sea", "lake", "--figures", tmp_path / "eval.json", "--evaluated-on", "sea, val"]
    args += ["--notes", tmp_path / "notes.md", "--set", "thresholds=0.8"]
    line = command(*args, "--half", True).figures
    assert line["files"] == ["README.md", "config.json", "model.safetensors"] and line["url"] is None
    assert not hub.created
    data = header(tmp_path / "out/README.md")
    assert data["license"] == "mit" and data["datasets"] == ["user/sea", "lake"]
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == "sea, val"
    assert "Made on a Sunday." in (tmp_path / "out/README.md").read_text()
    assert sievit.load(tmp_path / "out").config.policy == DToPConfig(thresholds=(0.8,), keep_per_class=1)
    assert command(*args, "--push", "user/sea").figures["url"] == "https://hub/user/sea/commit/1"
    assert hub.files["README.md"] == (tmp_path / "out/README.md").read_bytes()


def test_the_command_says_what_is_wrong(tmp_path, command) -> None:
    printed = command("card", tmp_path / "absent", "--out", tmp_path / "out", "--notes", "no.md", status=2)
    assert "--notes no.md" in printed.err
    assert not (tmp_path / "out").exists()
