"""Kills at random moments: `make kills`. A training with workers, one of two processes, and a predict over 200 images.

Each is killed 20 times with SIGKILL and started again each time. Its files are compared with those of a whole run:
models, figures and logs of training without the columns of time, and all files of predict.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from sievit.config import to_json
from sievit.data.scenes import generate
from sievit.data.transforms import AugmentConfig
from sievit.engine.recipe import Recipe, TrainConfig
from sievit.models.build import build, save
from sievit.policies import SViTConfig
from tiny import coco_data, image_folder, tiny_detector

SIEVIT = [sys.executable, "-m", "sievit"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sievit"]
TIMES = {"images_per_s", "s_per_step", "ms_per_image", "ms_per_image_p95"}


def family(pid: int) -> list[int]:
    """A process and all that it has started; torchrun gives its workers sessions of their own."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {}
    for each in pids:
        with contextlib.suppress(OSError):
            parents[each] = int(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def start(command: Sequence[str]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def run_killed(first: Sequence[str], again: Sequence[str], out: Path, longest: float, rng: random.Random) -> int:
    """Run to the end, killed at random moments; how many kills there were."""
    kills = 0
    while True:
        command = again if out.exists() and any(out.glob("re*")) else first  # recipe.json, or results.jsonl
        process = start(command)
        try:
            process.wait(rng.uniform(0, longest))
        except subprocess.TimeoutExpired:
            for each in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0, f"{' '.join(command)}: status {process.returncode}"
            return kills


def contents(out: Path) -> dict[str, object]:
    """The files, without what depends on time and what is only for going on."""
    found: dict[str, object] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name not in ("state.pt", ".lock")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
        elif name == "metrics.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in TIMES}
        else:
            found[name] = path.read_bytes()
    return found


def compare(title: str, first: list[str], again: list[str], folder: Path, *, kills: int, rng: random.Random) -> None:
    """Rounds with kills until there were so many; OUT in the commands is the folder of a round."""

    def at(command: list[str], out: Path) -> list[str]:
        return [str(out) if part == "OUT" else part for part in command]

    began, done, rounds, other = time.monotonic(), 0, 0, set[str]()
    assert start(at(first, folder / "whole")).wait() == 0, f"{title}: failed without a kill"
    longest, whole = time.monotonic() - began, contents(folder / "whole")
    while done < kills:
        out = folder / f"round{rounds}"
        done += run_killed(at(first, out), at(again, out), out, longest, rng)
        found = contents(out)
        other |= {name for name in {*whole, *found} if whole.get(name) != found.get(name)}
        rounds += 1
    said = f"{title}: {done} kills in {rounds} runs of {longest:.0f} s each"
    print(f"{said}, {len(whole)} files, different: {sorted(other) or 'none'}", flush=True)
    assert not other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="what the title of a job holds")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, count in (("train", 12), ("val", 3)):
            generate(folder / "scenes" / part, num_images=count, size=(64, 64), seed=count)
        data = coco_data(folder / "scenes", augment=AugmentConfig(crop=(64, 64), rot90=True))
        settings = TrainConfig(steps=options.steps, batch_size=4, workers=2, ema=0.9, save_every=0.01, log_every=2)
        recipe = Recipe(model=tiny_detector(policy=SViTConfig(first_block=1)), data=data, train=settings)
        (folder / "mine.json").write_text(json.dumps(to_json(recipe)))
        save(build(recipe.model), folder / "model.safetensors")
        images = image_folder(folder / "images", *[(40 + i % 50, 60) for i in range(200)])
        train = ["train", str(folder / "mine.json"), "--out", "OUT"]
        predict = [*SIEVIT, "predict", str(folder / "model.safetensors"), str(images), "--out", "OUT"]
        jobs = {
            "training with two workers": ([*SIEVIT, *train], [*SIEVIT, "train", "--resume", "OUT"]),
            "training of two processes": ([*TWO, *train], [*TWO, "train", "--resume", "OUT"]),
            "predict over 200 images": (predict, predict),
        }
        for title, (first, again) in jobs.items():
            if options.only not in title:
                continue
            compare(title, first, again, folder / title, kills=options.kills, rng=random.Random(options.seed))


if __name__ == "__main__":
    main()
