"""One process that scores answers: JSON lines in on stdin, JSON lines out on stdout, until stdin ends.

    {"ready": true}                  once, when requests may come
    <- {"item": {...}, "answer": ""} a request
    {"begun": true}                  its reward is imported: the pool's clock starts
    {"score": 0.5}  or  {"problem": "nan" | "error: ..."}

What a reward prints goes to stderr and what it reads is empty, so that neither can disturb the exchange.
Leaves out: time-outs (`pool.py` kills this process). Started by the pool:  python -m megatron_tower.rewards.worker module:function
"""

import json
import math
import os
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module

from megatron_tower.rewards import Reward
from megatron_tower.runtime.processes import die_with_parent

MEMORY = 4 << 30  # bytes of address space: an answer such as 10^(10^10) must not take the machine's
LONGEST_PROBLEM = 500  # characters of an error's text: it may quote the answer


def main(rewards: str) -> None:
    """Serve requests; `rewards` names the function (`module:function`) that gives the reward of a name."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    module, function = rewards.split(":")
    find = lru_cache(maxsize=None)(getattr(import_module(module), function))

    def say(**words: object) -> None:
        print(json.dumps(words), file=replies, flush=True)

    say(ready=True)
    for line in requests:
        request = json.loads(line)
        say(**outcome(find, request["item"], request["answer"], begun=lambda: say(begun=True)))


def outcome(find: Callable[[str], Reward], item: dict, answer: str, begun: Callable[[], None]) -> dict:
    """The score, or the problem that took its place; `begun` is called between finding the reward and running it."""
    try:
        reward = find(item["reward"])
        begun()
        score = float(reward(item, answer))
    except Exception as error:
        return {"problem": f"error: {type(error).__name__}: {error}"[:LONGEST_PROBLEM]}
    if not math.isfinite(score):
        return {"problem": "nan"}
    if not 0 <= score <= 1:
        return {"problem": f"error: the reward {item['reward']} gave {score}, outside [0, 1]"}
    return {"score": score}


if __name__ == "__main__":
    main(sys.argv[1])
