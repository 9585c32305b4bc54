"""Prompts with answers. One file per task family, loaded when it is first used."""

import sys
from typing import TYPE_CHECKING

from heads.names import lazily

if TYPE_CHECKING:
    from heads.tasks.arithmetic import arithmetic
    from heads.tasks.base import Item, Task, build
    from heads.tasks.colored_objects import colored_objects
    from heads.tasks.instructions import Instance, Instruction, TaskSet, encode, macro, mixture, score
    from heads.tasks.ioi import ioi
    from heads.tasks.needle import Sample, haystack, needle, needles
    from heads.tasks.words import word_pairs, word_tasks, words

sys.modules[__name__].__class__ = lazily(__name__, __file__)
__all__ = sorted(sys.modules[__name__].HOMES)
