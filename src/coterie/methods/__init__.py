"""Published methods: one file each, registered under its name with its citation and parameters."""

from .registry import Method, Mixture, get, known
from .smile import smile

__all__ = ["Method", "Mixture", "get", "known", "smile"]
