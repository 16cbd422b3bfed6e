"""A large job, whole, and killed half-way and resumed: `python tests/hostile/large_job.py`.

2,000 cuttings of photographs, one of them broken. Compares the files byte for byte and says how much memory the process
had while it ran.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from tiny import saved, tiny_detector

SHARED = ("results.jsonl", "results.json", "images.json", "failures.jsonl")
SIZES = ((160, 120), (120, 160), (128, 128), (176, 112), (144, 120))


def cut(photographs: Path, folder: Path, number: int) -> None:
    """So many cuttings of several sizes; of one the end is missing."""
    rng, files = random.Random(0), sorted(photographs.rglob("*.jpg"))
    folder.mkdir()
    for first in range(0, number, 50):
        with Image.open(rng.choice(files)) as stored:
            photograph = stored.convert("RGB")
        photograph.thumbnail((640, 640))
        for index in range(first, min(first + 50, number)):
            w, h = (edge + rng.randrange(8) for edge in rng.choice(SIZES))
            x, y = rng.randrange(photograph.width - w), rng.randrange(photograph.height - h)
            photograph.crop((x, y, x + w, y + h)).save(folder / f"{index:06}.jpg", quality=90)
    broken = folder / f"{number // 3:06}.jpg"
    broken.write_bytes(broken.read_bytes()[:900])


def memory(pid: int) -> int:
    """Megabytes of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS")), 0)


def run(command: list[str], out: Path, number: int, *, kill_at: float = 2.0) -> None:
    """Run it to the end, or until this share of the images is done."""
    began, journal, seen = time.monotonic(), out / "results.jsonl", dict[int, str]()
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL)
    done = 0
    while process.poll() is None:
        time.sleep(0.2)
        done = journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0
        if (size := memory(process.pid)) and done > 0:
            seen.setdefault(done * 10 // number, f"{size} MB at {done}")
        if done > kill_at * number:
            process.send_signal(signal.SIGKILL)
            process.wait()
    took = time.monotonic() - began
    print(f"{out.name}: status {process.returncode}, {took:.0f} s; {', '.join(seen.values())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut(options.photographs, folder / "photos", options.images)
        model = saved(tiny_detector(), folder / "model.safetensors")
        command = [sys.executable, "-m", "sievit", "predict", str(model), str(folder / "photos")]
        command += ["--batch-size", "8", "--pictures", "False"]
        whole, killed = folder / "whole", folder / "killed"
        run(command, whole, options.images)
        run(command, killed, options.images, kill_at=0.5)
        run(command, killed, options.images)
        for file in SHARED:
            same = (whole / file).read_bytes() == (killed / file).read_bytes()
            print(f"{file}: {(whole / file).stat().st_size} bytes, {'the same' if same else 'ANOTHER'}")
        print((whole / "failures.jsonl").read_text(), end="")


if __name__ == "__main__":
    main()
