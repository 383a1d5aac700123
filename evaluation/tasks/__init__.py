"""The tasks, in the order they are run and reported. Adding one: a file with a `Task`, and its name here."""

from evaluation.tasks.general import GENERAL
from evaluation.tasks.preference import PREFERENCE
from evaluation.tasks.task import Task
from evaluation.tasks.text import TEXT
from evaluation.tasks.translation import TRANSLATION
from evaluation.tasks.verifiable import VERIFIABLE

TASKS: dict[str, Task] = {task.name: task for task in (TEXT, TRANSLATION, GENERAL, PREFERENCE, VERIFIABLE)}
