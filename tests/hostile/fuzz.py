"""Hostile files and options through the whole command line: `make fuzz MINUTES=20 SEED=1`, and briefly in `make test`.

Each case runs in a process of its own. It fails on a traceback, a crash, an exit status that is not documented
(docs/reliability.md), more than 10 seconds of computing or more than 4 GB. What failed is kept in a folder.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hostile.mutate import hostile, mutate
from sievit import cli
from sievit.config import to_json
from sievit.data.scenes import generate
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.models.build import build, save
from sievit.policies import DToPConfig, SViTConfig
from sievit.tasks.detection import CocoData
from tiny import random_pixels, tiny_detector, tiny_segmenter, write_image

STATUSES = {0, 1, 2, 130}
TRACEBACK = 99
SECONDS, MEGABYTES, WALL = 10, 4096, 120
OPTIONS = {
    "eval": (
        "--annotations",
        "--batch-size",
        "--limit",
        "--device",
        "--policy",
        "--set",
        "--max-detections",
        "--names",
    ),
    "predict": ("--score-threshold", "--ids", "--device", "--policy", "--set", "--out"),
    "flops": ("--size", "--images", "--batch-size", "--limit", "--device"),
    "sweep": ("--values", "--field", "--limit", "--batch-size", "--timed-images"),
    "tune": ("--size", "--batch-size", "--repeats", "--num-images", "--modes", "--target-gflops", "--multiple"),
}
TRAIN = ("lr", "steps", "seed", "clip-norm", "step-epochs", "batch-size", "save-every", "ema", "freeze", "warmup-start")
MODEL = ("vit.depth", "vit.num-heads", "vit.mlp-ratio", "vit.drop-path-rate", "input.std", "input.size-divisor")
VALUES = (
    "-1",
    "0",
    "nan",
    "inf",
    "1e400",
    "9" * 30,
    "",
    "x",
    "None",
    "True",
    "[1,2]",
    "0.5",
    "2",
    "\udcff",
    "-0",
    "..",
)


@dataclass(frozen=True)
class Base:
    """The files that cases start from."""

    folder: Path
    images: Path
    annotations: Path
    models: tuple[Path, ...]
    recipe: Path
    run: Path


def make_base(folder: Path) -> Base:
    """Tiny data, a detector and a segmenter of random weights, a recipe and a run that was stopped."""
    torch.manual_seed(0)
    for part in ("train", "val"):
        generate(folder / part, num_images=3, size=(64, 64), seed=len(part))
    for i, suffix in enumerate((".jpg", ".tif", ".gif", ".bmp", ".webp", ".pgm")):
        pixels = random_pixels(i, 20, 30) if suffix == ".pgm" else random_pixels(i, 20, 30, 3)
        write_image(folder / "kinds" / f"{i}{suffix}", pixels)
    models = folder / "detector.safetensors", folder / "segmenter.safetensors"
    save(build(tiny_detector(policy=SViTConfig(first_block=1))), models[0])
    save(build(tiny_segmenter(policy=DToPConfig())), models[1])
    data = CocoData(
        root=folder,
        train_images=Path("train/images"),
        train_annotations=Path("train/annotations.json"),
        val_images=Path("val/images"),
        val_annotations=Path("val/annotations.json"),
    )
    train = TrainConfig(steps=2, batch_size=1, workers=0, warmup_steps=0)
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(to_json(Recipe(model=tiny_detector(), data=data, train=train))))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["train", str(recipe), "--out", str(folder / "run")]) == 0
    return Base(folder, folder / "val/images", folder / "val/annotations.json", models, recipe, folder / "run")


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, put in or taken out, or the end cut off."""
    for _ in range(rng.randint(1, 6)):
        place, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 50))
        new = rng.choice((b"", rng.randbytes(length), bytes([data[place] ^ 1 << rng.randrange(8)])))
        data = data[:place] + new + data[place + rng.choice((0, len(new), length)) :] or b"0"
    return data[: rng.randrange(len(data))] if rng.random() < 0.1 else data


def _annotations(base: Base, work: Path, rng: random.Random) -> list[str]:
    path = work / "annotations.json"
    path.write_text(json.dumps(mutate(json.loads(base.annotations.read_text()), rng)), errors="surrogatepass")
    if rng.random() < 0.2:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    if rng.random() < 0.2:
        return ["predict", str(base.models[0]), str(base.images), "--out", str(work / "out"), "--ids", str(path)]
    return ["eval", str(base.models[0]), "--images", str(base.images), "--annotations", str(path)]


def _metadata(base: Base, work: Path, rng: random.Random) -> list[str]:
    model, path = rng.choice(base.models), work / "model.safetensors"
    with safe_open(model, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    save_file(load_file(model), path, {"config": json.dumps(mutate(config, rng))})
    return ["predict", str(path), str(base.images), "--out", str(work / "out")]


def _checkpoint(base: Base, work: Path, rng: random.Random) -> list[str]:
    path = work / "model.safetensors"
    path.write_bytes(mutate_bytes(rng.choice(base.models).read_bytes(), rng))
    return ["flops", str(path)] if rng.random() < 0.3 else ["predict", str(path), str(base.images), "--out", "out"]


def _recipe(base: Base, work: Path, rng: random.Random) -> list[str]:
    path, data = work / "recipe.json", json.loads(base.recipe.read_text())
    data["train"] = mutate(data["train"], rng) if rng.random() < 0.5 else data["train"]
    data = data if rng.random() < 0.5 else mutate(data, rng)
    path.write_text(json.dumps(data), errors="surrogatepass")
    if rng.random() < 0.1:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    # what takes long because it was asked for is no failure
    short = ("--train.steps", "1", "--train.batch-size", "1", "--train.accumulate", "1", "--train.workers", "0")
    return ["train", str(path), *short, "--out", str(work / "run")]


def _state(base: Base, work: Path, rng: random.Random) -> list[str]:
    shutil.copytree(base.run, work / "run")
    path = work / "run" / rng.choice(("state.pt", "state.pt", "recipe.json", "run.json", "log.csv", "metrics.json"))
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return ["train", "--resume", str(work / "run")]


def _options(base: Base, work: Path, rng: random.Random) -> list[str]:
    command = rng.choice((*OPTIONS, "train"))
    value = rng.choice((*VALUES, json.dumps(hostile(rng))[:1000])).replace("\0", "")
    if command == "train":
        option = rng.choice((*(f"--train.{n}" for n in TRAIN), *(f"--model.{n}" for n in MODEL)))
        return ["train", str(base.recipe), "--out", str(work / "run"), option, value]
    model, images = str(rng.choice(base.models)), str(base.images)
    start = {
        "eval": ["eval", model, "--images", images],
        "predict": ["predict", model, images, "--out", str(work / "out")],
        "flops": ["flops", model],
        "sweep": [
            "sweep",
            model,
            "--images",
            images,
            "--annotations",
            str(base.annotations),
            "--out",
            str(work / "out"),
        ],
        "tune": ["tune", model, images, str(work / "tuned.safetensors"), "--repeats", "3", "--num-images", "1"],
    }[command]
    return [*start, rng.choice(OPTIONS[command]), value]


def _image(base: Base, work: Path, rng: random.Random) -> list[str]:
    source = rng.choice(sorted((base.folder / "kinds").iterdir()))
    data = source.read_bytes()
    head = mutate_bytes(data[:200], rng) if rng.random() < 0.7 else data[:200]
    (work / "images").mkdir()
    (work / "images" / source.name).write_bytes(head + data[200:] if rng.random() < 0.8 else mutate_bytes(data, rng))
    return ["predict", str(rng.choice(base.models)), str(work / "images"), "--out", str(work / "out")]


KINDS: dict[str, Callable[[Base, Path, random.Random], list[str]]] = {
    "annotations": _annotations,
    "metadata": _metadata,
    "checkpoint": _checkpoint,
    "recipe": _recipe,
    "state": _state,
    "options": _options,
    "image": _image,
}


def run_case(args: list[str], folder: Path) -> tuple[str, str | None]:
    """Run a command in a process of its own; how it ended, and what is wrong with that."""
    log = folder / "log.txt"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(args, log)
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > WALL:
            os.kill(child, 9)
        time.sleep(0.005)
    megabytes = used.ru_maxrss / 1024
    if os.WIFSIGNALED(status):
        return "killed", f"killed by signal {os.WTERMSIG(status)} after {time.monotonic() - started:.0f} s"
    ended = f"status {os.WEXITSTATUS(status)}"
    if os.WEXITSTATUS(status) not in STATUSES:
        return ended, f"{ended}: {log.read_text(errors='replace').strip().splitlines()[-1:]}"
    return ended, f"{megabytes:.0f} MB" if megabytes > MEGABYTES else None


def _child(args: list[str], log: Path) -> None:
    """Never returns."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(log.parent)
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime) + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        status = cli.main(args)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = TRACEBACK
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def cases(seed: int) -> Iterator[tuple[str, random.Random]]:
    """Without end; a case depends on the seed and its number alone."""
    names = list(KINDS)
    for number in range(10**9):
        yield names[number % len(names)], random.Random(f"{seed} {number}")


Ends = dict[str, Counter[str]]
"""By kind of case, how often a command ended how."""


def run(seed: int, *, seconds: float = math.inf, count: int | None = None, kept: Path) -> tuple[Ends, list[str]]:
    """Cases until the time or the number is reached.

    Returns:
        How they ended, and the failures, whose files are in `kept`.
    """
    tried: Ends = {kind: Counter() for kind in KINDS}
    end, failures = time.monotonic() + seconds, list[str]()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        said = time.monotonic()
        for number, (kind, rng) in enumerate(cases(seed)):
            if time.monotonic() >= end or number == count:
                break
            work = Path(folder) / "case"
            work.mkdir()
            args = KINDS[kind](base, work, rng)
            ended, wrong = run_case(args, work)
            tried[kind][ended] += 1
            if wrong:
                failures.append(f"{kind} {number}: {wrong}: sievit {' '.join(args)}")
                print(failures[-1].encode(errors="backslashreplace").decode(), flush=True)
                shutil.copytree(work, kept / f"{seed}-{number}", dirs_exist_ok=True)
            shutil.rmtree(work)
            if time.monotonic() - said > 30:
                print(f"{number + 1} cases, {len(failures)} failures", flush=True)
                said = time.monotonic()
    return tried, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--kept", type=Path, default=Path("out/fuzz"))
    options = parser.parse_args()
    tried, failures = run(options.seed, seconds=60 * options.minutes, count=options.cases, kept=options.kept)
    for kind, ends in tried.items():
        print(f"{kind}: {dict(sorted(ends.items()))}")
    print(f"seed {options.seed}: {sum(sum(e.values()) for e in tried.values())} cases, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
