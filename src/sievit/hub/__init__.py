"""Models in files, in folders and on the Hugging Face Hub."""

from sievit.hub.card import Card
from sievit.hub.fetch import model_file, shipped
from sievit.hub.pretrained import Pretrained

__all__ = ["Card", "Pretrained", "model_file", "shipped"]
