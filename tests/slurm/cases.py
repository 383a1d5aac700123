"""Ranks that only end in a certain way: python -m megatron_tower.job tests.slurm.cases cluster=local_slurm --end crash"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--end", required=True)
    asked = parser.parse_args()
    node = os.environ["SLURMD_NODENAME"]
    print(f"rank on {node} port {os.environ['MASTER_PORT']} address {os.environ['MASTER_ADDR']}", flush=True)
    if asked.end == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        time.sleep(300)
    if asked.end == "first-node-fails" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        (Path(os.environ["MEGATRON_TOWER_JOB"]) / "failed_nodes.json").write_text(json.dumps({node: "has no GPU"}))
        sys.exit(3)
    sys.exit({"well": 0, "crash": 1, "bad-input": 2, "first-node-fails": 0}[asked.end])


if __name__ == "__main__":
    main()
