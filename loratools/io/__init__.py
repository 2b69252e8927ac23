"""Bytes on disk: containers, never keys."""
