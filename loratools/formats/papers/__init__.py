"""Checkpoints of published systems, as their authors' code saves them: one file per system. docs/papers.md"""

from loratools.formats.papers.format import Papers

__all__ = ["Papers"]
