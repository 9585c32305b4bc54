"""Prompts with answers. One file per task family."""

from heads.tasks.facts import facts
from heads.tasks.needle import Sample, haystack, needle, needles

__all__ = ["Sample", "facts", "haystack", "needle", "needles"]
