"""Models as files that run elsewhere (`sievit export`)."""

from sievit.export.command import export
