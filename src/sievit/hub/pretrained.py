"""Whole models in folders and on the hub, by huggingface_hub's mixin."""

from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from torch import nn

from sievit.config import ConfigError, to_json
from sievit.files import write_atomically, write_json
from sievit.hub.card import Card, model_card
from sievit.hub.fetch import HubOptions, fetched, model_file, shipped
from sievit.hub.file import CONFIG_FILE, MODEL_FILE, restored, write
from sievit.policies import PolicyConfig, PolicyOptions

README = "README.md"


class Pretrained(nn.Module, ModelHubMixin):
    """Base of whole models: `save_pretrained`, `from_pretrained`, `push_to_hub`.

    A folder holds model.safetensors (as `sievit.save` writes it), config.json (the same configuration, for readers) and
    README.md (the model card). The configuration inside model.safetensors counts; a config.json that differs is an
    error.
    """

    kind: ClassVar[str]
    """Of model, as in the configuration's JSON."""
    config: Any

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The model that `config` describes, with random weights."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        policy: str | PolicyOptions | PolicyConfig | None = None,
        device: str | torch.device = "cpu",
        compile: bool = True,
        **hub: Unpack[HubOptions],
    ) -> Self:
        """A trained model, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder (of `save_pretrained`, or of a training run), a model file, or the
                name of a shipped model, else the id of a model on the hub, user/name (or hf:user/name@revision).
            policy, compile: see `sievit.load`.
            hub: see `HubOptions`.

        Raises:
            ConfigError: nothing there, not on the hub, no model of this class, damaged, weights that do not fit, a
                config.json that differs, an unknown policy or one that was not trained.
            TypeError: another argument.
        """
        for argument in hub.keys() - HubOptions.__annotations__.keys():
            raise TypeError(f"from_pretrained takes no argument {argument!r}")
        name = str(pretrained_model_name_or_path)
        if Path(name).exists() or name in shipped():
            if hub.get("revision") is not None:
                raise ConfigError(f"{name}: is here and has no revisions; leave revision={hub['revision']!r} out")
            path = model_file(name)
        else:
            path = fetched(name, **hub)
        return restored(cls.from_config, path, kind=cls.kind, policy=policy, compile=compile).to(device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        card: Card | None = None,
        half: bool = False,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the model, its configuration and its card into a folder.

        Args:
            card: without it a README.md that is there already stays.
            half: store parameters as float16.
            config: the mixin's; not used, for the model has its configuration.
            push_to_hub, repo_id: push too, see `push_to_hub`, which further arguments go to.

        Returns:
            The address of the commit if it was pushed.

        Raises:
            ConfigError: a parameter is too large for float16, or figures of another kind of model.
            OSError: the disk is full or the folder cannot be written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        given = model_card_kwargs or {}
        card = given.get("card") if card is None else card
        half = given.get("half", half)
        if card is not None or not (folder / README).exists():
            text = str(self.generate_model_card(card=card, repo_id=given.get("repo_id", repo_id)))
            write_atomically(folder / README, text.encode())
        (folder / CONFIG_FILE).unlink(missing_ok=True)  # so that it never stands beside a model that it is not of
        write(self, self.config, folder / MODEL_FILE, half=half)
        write_json(folder / CONFIG_FILE, to_json(self.config))
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, card=card, half=half, **push_to_hub_kwargs)

    def push_to_hub(
        self, repo_id: str, *, card: Card | None = None, half: bool = False, token: str | None = None, **kwargs: Any
    ) -> str:
        """Put the model, its configuration and its card on the hub, as one commit.

        Args:
            repo_id: user/name; made where it is not there yet.
            card, half: see `save_pretrained`. Without a card that of a repository which has one stays.
            kwargs: commit_message, private, branch, create_pr, ... as huggingface_hub's.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: see `save_pretrained`. huggingface_hub's errors for what the hub refuses.
        """
        if card is None and HfApi(token=token).file_exists(repo_id, README, revision=kwargs.get("branch")):
            ignored = kwargs.get("ignore_patterns") or []
            kwargs["ignore_patterns"] = [README, *([ignored] if isinstance(ignored, str) else ignored)]
        given = {"card": card, "half": half, "repo_id": repo_id}
        return super().push_to_hub(repo_id, token=token, model_card_kwargs=given, **kwargs)

    def generate_model_card(self, card: Card | None = None, repo_id: str | None = None) -> ModelCard:
        """The model card, as `save_pretrained` writes it."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        return model_card(self.config, Card() if card is None else card, parameters=parameters, repo_id=repo_id)
