"""Prompts with answers. One file per task family."""

from heads.tasks.arithmetic import arithmetic
from heads.tasks.base import Item, Task, build
from heads.tasks.colored_objects import colored_objects
from heads.tasks.facts import facts
from heads.tasks.ioi import ioi
from heads.tasks.needle import Sample, haystack, needle, needles
from heads.tasks.succession import TokenList, succession, succession_lists
from heads.tasks.words import word_pairs, word_tasks, words

__all__ = ["Item", "Sample", "Task", "TokenList", "arithmetic", "build", "colored_objects", "facts", "haystack", "ioi",
           "needle", "needles", "succession", "succession_lists", "word_pairs", "word_tasks",
           "words"]  # fmt: skip
