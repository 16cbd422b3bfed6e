"""`sievit demo`."""

from pathlib import Path

from sievit.cli.command import parse, print_json


def demo(args: list[str]) -> int:
    def run(
        *,
        out: Path = Path("out/demo"),
        num_images: int = 32,
        pictures: int = 8,
        data_root: Path | None = None,
        device: str = "auto",
    ) -> int:
        """Dense against sparse on images of nuclei: those of the data set, or the few in examples/.

        Args:
            out: folder for the pictures.
            num_images: at most so many, evenly spread over the validation set.
            pictures: how many images get a picture, per task.
            data_root: folder with nuclei/; default the environment's SIEVIT_DATA, else ../shared/data.
            device: cpu, cuda, cuda:1, or auto.
        """
        from sievit.report import demo

        print_json(demo(out, num_images=num_images, pictures=pictures, data_root=data_root, device=device))
        return 0

    return parse(run, args, "demo")
