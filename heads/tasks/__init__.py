"""Prompts with answers. One file per task family."""

from heads.tasks.base import Item, Task, build
from heads.tasks.colored_objects import colored_objects
from heads.tasks.facts import facts
from heads.tasks.ioi import ioi
from heads.tasks.needle import Sample, haystack, needle, needles

__all__ = ["Item", "Sample", "Task", "build", "colored_objects", "facts", "haystack", "ioi", "needle", "needles"]
