"""Prompts with answers. One file per task family."""

from heads.tasks.base import Item, Task, build
from heads.tasks.facts import facts
from heads.tasks.needle import Sample, haystack, needle, needles

__all__ = ["Item", "Sample", "Task", "build", "facts", "haystack", "needle", "needles"]
