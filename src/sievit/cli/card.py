"""`sievit card`."""

from pathlib import Path
from typing import Annotated

from sievit.cli.command import parse, print_json
from sievit.config import ConfigError


def card(args: list[str]) -> int:
    from tyro.conf import arg

    def run(
        model: Annotated[Path, arg(metavar="MODEL")],
        /,
        *,
        out: Path,
        license: str = "unknown",
        license_link: str | None = None,
        datasets: tuple[str, ...] = (),
        figures: Path | None = None,
        evaluated_on: str | None = None,
        name: str | None = None,
        base_model: str | None = None,
        notes: Path | None = None,
        policy: str | None = None,
        thresholds: tuple[float, ...] | None = None,
        half: bool = False,
        push: str | None = None,
        private: bool = False,
    ) -> int:
        """Write a model and its card into a folder, ready for the Hugging Face Hub; with --push put it there.

        The folder holds model.safetensors, config.json and README.md; every command takes it as MODEL, and from the hub
        as hf:USER/NAME. The last line of the output is one JSON object.

        Args:
            model: checkpoint, folder of a training run, name of a shipped model, or hf:user/name.
            out: folder to write.
            license: of the weights, as the hub writes them: apache-2.0, cc-by-nc-4.0, ...
            license_link: address of its text, for a licence that the hub does not know.
            datasets: what the model was trained on.
            figures: file whose last line is what `sievit eval` printed of the model.
            evaluated_on: the data set of the figures.
            name: title of the card.
            base_model: the hub's id of the model that this one was made from.
            notes: text file that is added to the card.
            policy: takes the place of the model's own, for good.
            thresholds: of the early exits of a segmenter, takes the place of its policy, for good.
            half: store the parameters as float16.
            push: user/name on the hub, made where it is not there yet.
            private: make it for one's own eyes.
        """
        from sievit.hub.card import Card, read_figures
        from sievit.report import open_model

        try:
            text = "" if notes is None else notes.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--notes {notes}: cannot be read as text ({error})") from error
        said = Card(
            license=license,
            license_link=license_link,
            datasets=datasets,
            figures={} if figures is None else read_figures(figures),
            evaluated_on=evaluated_on,
            name=name,
            base_model=base_model,
            notes=text,
        )
        opened = open_model(model, policy=policy, thresholds=thresholds, device="cpu")
        opened.save_pretrained(out, card=said, half=half, repo_id=push)
        url = None if push is None else opened.push_to_hub(push, card=said, half=half, private=private or None)
        print_json({"folder": str(out), "files": sorted(p.name for p in out.iterdir()), "license": license, "url": url})
        return 0

    return parse(run, args, "card")
