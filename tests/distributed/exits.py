"""Ranks that end as they are told, for test_local.py: `python -m tests.distributed.exits CODE_OF_RANK_0 CODE_OF_RANK_1`.

A code ends the rank with it, `killed` by a signal, `waits` never; `says` prints what the rank sees of its place, and ends well.
"""

import os
import signal
import sys
import time


def main() -> None:
    rank = int(os.environ["RANK"])
    order = sys.argv[1 + rank]
    if order == "says":
        print({k: os.environ[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}, flush=True)
    elif order == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order == "waits":
        time.sleep(600)
    else:
        print(f"rank {rank} ends with {order}", flush=True)
        sys.exit(int(order))


if __name__ == "__main__":
    main()
