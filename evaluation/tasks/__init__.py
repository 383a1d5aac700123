"""The tasks, in the order they are run and reported. Adding one: a file with a `Task`, and its name here."""

from evaluation.tasks.ape import APE
from evaluation.tasks.gec import GEC
from evaluation.tasks.general import GENERAL
from evaluation.tasks.humaneval import HUMANEVAL
from evaluation.tasks.if_mt import IF_MT, IFMTBENCH
from evaluation.tasks.ifeval import IFEVAL, IFEVAL_CA, IFEVAL_ES
from evaluation.tasks.m_arenahard import M_ARENAHARD
from evaluation.tasks.maths import GSM8K, MATH, MGSM
from evaluation.tasks.mt_evaluation import MT_EVALUATION
from evaluation.tasks.mt_ranking import MT_RANKING
from evaluation.tasks.ner import NER
from evaluation.tasks.preference import PREFERENCE
from evaluation.tasks.task import Task
from evaluation.tasks.text import TEXT
from evaluation.tasks.translation import TRANSLATION
from evaluation.tasks.verifiable import VERIFIABLE
from evaluation.tasks.wmt24pp import WMT24PP

HELD_OUT = (TEXT, TRANSLATION, GENERAL, PREFERENCE, VERIFIABLE)
BENCHMARKS = (WMT24PP, IF_MT, IFMTBENCH, IFEVAL, IFEVAL_ES, IFEVAL_CA, GSM8K, MATH, MGSM, HUMANEVAL, M_ARENAHARD)
AROUND = (GEC, NER, APE, MT_RANKING, MT_EVALUATION)  # before and after translation
TASKS: dict[str, Task] = {task.name: task for task in (*HELD_OUT, *BENCHMARKS, *AROUND)}
