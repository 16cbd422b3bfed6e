"""`sievit show`, and `sievit report`, whose pages are opened in a browser: what they hold, and that everybody can use
them."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sievit.engine.bootstrap import differences
from sievit.engine.checkpoint import CsvLog, RunFolder
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.files import write_json
from sievit.policies import DToPConfig, RandomConfig
from sievit.report.figures import came_back
from sievit.report.page import section, table, write_page
from sievit.tasks import task_of
from sievit.tasks.metrics import CocoMetric, SegmentationMetric
from sievit.tasks.segmentation import LabelsData
from tiny import saved, tiny_detector, tiny_segmenter

Command = Callable[..., Any]
CLASSES = tiny_segmenter().classes


@pytest.fixture(scope="module")
def data(scenes_of: Callable[..., Path]) -> Path:
    return scenes_of(3, (48, 64))


def training(folder: Path, data: Path) -> RunFolder:
    """The folder of a training of two logged steps and two validations."""
    labels = LabelsData(
        train_images=Path("images"), train_labels=Path("labels"), val_images=Path("images"), val_labels=Path("labels")
    )
    run = RunFolder(folder)
    run.start(Recipe(model=tiny_segmenter(), data=labels, train=TrainConfig(init_from=data / "secret" / "a.pt")))
    log, validations = CsvLog(run.log_file, step=0), CsvLog(run.val_file, step=0)
    for step in (20, 40):
        log.write({"step": step, "epoch": 0, "pixel": 1.0, "keep_0": 1, "keep_1": 0.5, "loss": 60 / step})
        figures = {"miou": step / 100, "pixel_accuracy": 0.5, "gflops": 1.5, "ms_per_image": 3.0}
        validations.write({"epoch": 0, "step": step, **figures})
    last = {"gflops_min": 1.0, "gflops_max": 2.0, "keep": [1.0, 0.5], "iou": [0.5] * len(CLASSES), "images": 3}
    write_json(run.metrics_file, {"step": 40, **figures, **last})
    return run


def ablation(folder: Path, data: Path) -> Path:
    """The folder of a comparison of four variants, of which one was trained here."""
    training(folder / "trainings" / "dense-0", data)
    rows = []
    for name, cost, score in (("dense", 4.0, 0.5), ("exits", 3.0, 0.48), ("exits_0.8", 2.0, 0.45), ("half", 2.5, 0.4)):
        apart = None if name == "dense" else [score - 0.5, score - 0.53, score - 0.47]
        costs = {"gflops": cost, "keep": [1.0, cost / 4], "ms": 10 * cost, "speedup": 4 / cost, "realised": 1.0}
        measures = {"miou": score, "miou_spread": None, "miou_difference": apart}
        rows.append({"variant": name, "curve": name.split("_")[0], "seeds": [0], **measures, **costs})
        (folder / "figures").mkdir(exist_ok=True)
        write_json(folder / "figures" / f"{name}-0.json", {"figures": {"iou": [score] * len(CLASSES)}})
    fog = {"curve": "exits", "miou": 0.3, "miou_difference": [-0.1, -0.2, 0.0], "gflops": 3.5}
    of_one = {"corruption": ["fog", 3], "seeds": [0], "miou_spread": None, "keep": [1.0, 0.9]}
    content = {"measures": ["miou"], "variants": [*rows, {"variant": "exits_fog_3", **fog, **of_one}]}
    content["severities"] = [fog | {"severity": 3, "corruptions": 1}]
    write_json(folder / "ablation.json", content)
    return folder


@pytest.fixture(scope="module")
def home(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of docs/report.md name, all of it tiny."""
    root = tmp_path_factory.mktemp("home")
    facade = root / "examples" / "facade"
    for name in ("images", "labels"):
        shutil.copytree(data / name, facade / name / "val")
    shutil.copy(next((data / "images").iterdir()), facade / "IMG_0808_scaled_0.jpg")
    (facade / "annotations").mkdir()
    shutil.copy(data / "annotations.json", facade / "annotations" / "instances_val.json")
    training(root / "runs" / "facade_setr", data)
    ablation(root / "runs" / "methods", data)
    (root / "models").mkdir()
    saved(tiny_detector(policy=RandomConfig(first_block=1, shares=(0.5,))), root / "models" / "facade_svit.safetensors")
    saved(tiny_segmenter(policy=DToPConfig(thresholds=(0.2,))), root / "models" / "facade_setr_dtop.safetensors")
    return root


@pytest.fixture(scope="module")
def pages(home: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The reports that the commands of docs/report.md write: each file, and the document in it."""
    from sievit import cli

    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found, few = {}, partial(differences, draws=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("SIEVIT_MODELS", str(home / "models"))
        patch.setattr("sievit.engine.evaluate.differences", few)
        patch.setattr("sievit.report.of_model.PART_DRAWS", 20)
        for line in lines:
            args = shlex.split(line)[1:]
            if args[0] == "show":  # the picture of the page is one of many, the others have other names here
                args[2] = "examples/facade/IMG_0808_scaled_0.jpg"
            assert cli.main(args) == 0, line
            out = home / args[-1]
            if args[0] == "report":
                content = re.search(r'id="data">(.*?)</script>', out.read_text(encoding="utf-8"))
                assert content is not None
                found[out.stem] = out, json.loads(content[1])
    with Image.open(home / "shown.png") as picture:
        assert picture.width == 1640
    return found


def parts(document: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {part.get("title"): part for each in document["sections"] for part in each["parts"] if part["kind"] == kind}


def test_a_report_holds_the_figures(pages: dict[str, tuple[Path, dict[str, Any]]]):
    run, comparison, detector, segmenter = (document for _, document in pages.values())
    assert [point["y"] for point in parts(run, "chart")["Losses and rates"]["choices"][0]["series"][0]["points"]] == [
        3.0,
        1.5,
    ]
    options = dict(parts(run, "table")["All options"]["rows"])
    assert options["train.init_from"] == "…/a.pt", "a report says nothing of the machine's folders"
    assert [head["name"] for head in parts(comparison, "table")["All variants"]["columns"]][:3] == [
        "variant",
        "mean IoU in %",
        "to dense",
    ], "columns without a value are left out"
    assert len(parts(comparison, "chart")["Accuracy against ms"]["choices"][0]["series"]) == 3
    for document, kinds, number in ((detector, {"size", "class"}, 3), (segmenter, {"class"}, 3)):
        judged = [title for title in parts(document, "table") if re.match(r"(mask AP|IoU) by", title)]
        assert {title.split()[-3] for title in judged} == kinds
        pictures = parts(document, "picture")
        assert len(pictures) == number and {len(part["blocks"]) for part in pictures.values()} == {4}
    left = parts(segmenter, "table")["Where tokens left, in %"]
    assert all(sum(row[1:]) == pytest.approx(1, abs=1e-3) for row in left["rows"])


CONTRAST = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((value, i) => a * value + (1 - a) * under[i]);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const own = node => channels(getComputedStyle(node).backgroundColor);
  const behind = node => node ? over(own(node), behind(node.parentElement)) : [255, 255, 255];
  const wrong = [];
  let seen = 0;
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!text || !node.getClientRects().length || node.closest("script, .tip")) continue;
    if (!node.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const style = getComputedStyle(node), ground = behind(node), back = light(ground);
    const front = light(over(channels(node instanceof SVGElement ? style.fill : style.color), ground));
    const ratio = (Math.max(front, back) + .05) / (Math.min(front, back) + .05);
    seen++;
    if (ratio < 4.5) wrong.push(`${node.tagName} ${node.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return [seen, wrong];
}"""


DRAWN = "document.querySelectorAll('.plot svg').length === document.querySelectorAll('.plot').length"
PICTURES = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth * i.alt.length)))"
UNNAMED = """[...document.querySelectorAll('input, select, button, svg[role]')]
  .filter(node => !(node.labels?.length || node.ariaLabel || node.textContent.trim())).length"""
NAMES = "rows => rows.map(row => row.cells[0].textContent)"
VEILED = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, i) => i % 4 === 3 && value).length / (canvas.width * canvas.height);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


def test_everybody_can_use_the_pages(browser: Any, pages: dict[str, tuple[Path, dict[str, Any]]]):
    """Both colour schemes, a phone, and the keyboard; nothing is loaded, and nothing goes wrong."""
    view = browser.new_page(viewport={"width": 1200, "height": 900})
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    for name, (path, document) in pages.items():
        view.set_viewport_size({"width": 1200, "height": 900})
        view.goto(path.as_uri())
        while not view.evaluate(DRAWN):  # the page's own rules forbid what `wait_for_function` repeats
            view.wait_for_timeout(50)
        images = view.evaluate(PICTURES)
        assert len(images) == sum(len(part["layers"]) for part in parts(document, "picture").values()), name
        assert all(images), f"{name}: every picture is there and is described"
        assert view.evaluate(UNNAMED) == 0, name
        for scheme in ("light", "dark"):
            view.emulate_media(color_scheme=scheme)
            seen, wrong = view.evaluate(CONTRAST)
            assert seen > 30 and not wrong, (name, scheme, wrong)
        view.set_viewport_size({"width": 360, "height": 740})
        assert view.evaluate("document.documentElement.scrollWidth") <= 360, name
    assert not said
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    view.close()


def test_the_keyboard_sorts_selects_filters_and_slides(browser: Any, pages: dict[str, tuple[Path, dict[str, Any]]]):
    view = browser.new_page(viewport={"width": 1200, "height": 900})
    view.goto(pages["methods"][0].as_uri())
    rows = view.locator("section[aria-label='All variants'] tbody tr")
    view.get_by_label("All variants").get_by_role("button", name="GFLOPs", exact=True).focus()
    view.keyboard.press("Enter")
    assert rows.evaluate_all(NAMES) == ["dense", "exits_fog_3", "exits", "half", "exits_0.8"]
    view.keyboard.press("Space")
    assert rows.evaluate_all(NAMES) == ["exits_0.8", "half", "exits", "exits_fog_3", "dense"]
    assert view.locator("th[aria-sort=ascending]").inner_text().startswith("GFLOPs")
    first = view.locator("svg[aria-label^='Accuracy against GFLOPs'] .point").first
    first.focus()
    view.keyboard.press("ArrowRight")
    said = view.evaluate("document.activeElement.getAttribute('aria-label')")
    assert said == "exits_0.8: GFLOPs per image 2.0, mean IoU in % 45.0 (42.0 to 48.0)"
    assert view.locator(".tip:visible").inner_text().startswith("exits_0.8")
    view.keyboard.press("Enter")
    assert view.locator("tr.on").evaluate_all(NAMES) == ["exits_0.8"]
    assert view.locator(".point.on").count() == 2, "marked in both charts"

    view.goto(pages["training"][0].as_uri())
    view.get_by_role("searchbox", name="Filter: All options").fill("train. init")
    assert view.locator("section[aria-label='All options'] tbody tr").count() == 1

    view.goto(pages["detector"][0].as_uri())
    slider = view.get_by_role("slider").first
    slider.focus()
    view.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "all of the picture"
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "block 1: 50 % of the tokens computed"
    assert view.locator("canvas").first.evaluate(VEILED) == pytest.approx(0.5, abs=0.05)
    chosen = view.get_by_role("radio", name="only dense").first
    chosen.focus()
    view.keyboard.press("Space")
    assert chosen.is_checked()
    assert view.locator(".view").first.locator("img:visible").get_attribute("alt").startswith("What only the dense")
    view.close()


def test_a_report_needs_something_to_report_on(home: Path, tmp_path: Path, command: Command):
    model = home / "models" / "facade_svit.safetensors"
    assert "give the --images" in command("report", model, status=2).err
    assert "neither of a training" in command("report", tmp_path, status=2).err
    (tmp_path / "ablation.json").write_text('{"measures": [], "variants": []}')
    assert "no variant yet" in command("report", tmp_path, status=2).err
    (tmp_path / "ablation.json").write_text('{"variants": 3}')
    assert "damaged" in command("report", tmp_path, status=2).err
    (tmp_path / "recipe.json").write_text("{}")
    assert "ends in .html" in command("report", tmp_path, "--out", tmp_path / "a.pdf", status=2).err


def test_nothing_in_the_data_ends_the_script(tmp_path: Path):
    row = ["</script><b>", "a & b"]
    write_page(tmp_path / "a.html", "t", "", [section("s", [table("x", [{"name": "a"}, {"name": "b"}], [row])])])
    text = (tmp_path / "a.html").read_text()
    assert text.count("</script>") == 2
    content = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert content["sections"][0]["parts"][0]["rows"] == [row]


def test_show_draws_one_picture(home: Path, tmp_path: Path, command: Command):
    detector, segmenter = (home / "models" / f"facade_{name}.safetensors" for name in ("svit", "setr_dtop"))
    image = home / "examples" / "facade" / "images" / "val" / "000000.png"
    for model in (detector, segmenter):
        figures = command("show", model, image, "--out", tmp_path / "a.png").figures
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width == 1640
        assert len(figures["keep"]) == 4 and figures["keep"][0] == 1 > figures["keep"][3]
        assert figures["gflops"]["pruned"] > 0 and 0 <= figures["differs"] <= 1
    assert sum(figures["left_at"]) > 0 and figures["returned"] == 0
    assert "is the image itself" in command("show", detector, image, "--out", image, status=2).err
    assert "ends in .png" in command("show", detector, image, "--out", tmp_path / "a.jpg", status=2).err


def test_returns_and_differences_are_counted():
    keep = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    assert came_back(keep).tolist() == [[True, False, False], [False, True, False]]
    labels = task_of(tiny_segmenter())
    one, other = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 1, 2]])
    assert labels.disagreement(one, other, min_score=0.5) == 0.25
    alone = labels.only_in(one, other, min_score=0.5)
    assert alone is not None and alone.tolist() == [[-1, -1, 2, -1]]
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1, 2]), "scores": torch.tensor([0.9, 0.9, 0.2])}
    moved = {**found, "boxes": boxes + torch.tensor([1.0, 0, 1, 0]), "labels": torch.tensor([1, 2, 2])}
    task = task_of(tiny_detector())
    alone = task.only_in(found, moved, min_score=0.5)
    assert alone is not None and alone["boxes"].tolist() == [[20, 20, 30, 30]]
    assert task.disagreement(found, moved, min_score=0.5) == 0.5


def test_parts_of_the_truth_are_judged_as_a_whole_data_set_is(data: Path):
    draws = np.array([[0, 1, 2], [0, 0, 1]])
    metric = SegmentationMetric(3)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        metric.update(*(torch.randint(2, (8, 8), generator=generator) for _ in range(2)))
    by_class = metric.by_class(draws)
    assert by_class[:2, 0].tolist() == pytest.approx(metric.compute()["iou"][:2])
    assert np.isnan(by_class[2]).all()
    assert by_class[:2].mean(0) == pytest.approx(metric.resampled(draws)["miou"])

    boxes = CocoMetric(data / "annotations.json", with_masks=False)
    for image in boxes.annotations.as_coco["images"]:
        mine = [a for a in boxes.annotations.as_coco["annotations"] if a["image_id"] == image["id"]]
        corners = torch.tensor([a["bbox"] for a in mine]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = torch.tensor([boxes.annotations.category_ids.index(a["category_id"]) + 1 for a in mine])
        right = {"boxes": corners[:1], "labels": labels[:1], "scores": torch.ones(len(mine[:1]))}
        boxes.update(image["id"], right)
    found = boxes.parts(draws)
    known = [values[0] for values in found["class"].values() if not np.isnan(values[0])]
    assert np.mean(known) == pytest.approx(boxes.compute()["box_ap"])
    small = boxes.compute()["box_ap_small"]
    assert found["size"]["small"][0] == pytest.approx(small) if small >= 0 else np.isnan(found["size"]["small"][0])
