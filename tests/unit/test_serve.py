"""slurm/serve.sbatch with a program that stands in for vLLM: when the address is there, and that nothing outlives the job."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY

VLLM = """
import http.server, os, sys
words, asked = sys.argv[1:], 0
os.chdir(os.path.dirname(os.path.dirname(sys.argv[0])))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        open("asked", "w").write(f"{asked} {os.path.exists('serve/m.url')}")
        self.send_response(200 if asked > 2 and self.path == "/health" else 503)
        self.end_headers()
        self.wfile.write(" ".join(words).encode())
    def log_message(self, *_): ...
open("pid", "w").write(str(os.getpid()))
if "--fail" in words: sys.exit("no such model")
http.server.HTTPServer((words[words.index("--host") + 1], int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


def stand_in(folder: Path) -> str:
    """A PATH with a vllm first, which leaves notes in `folder` and knows its serve/m.url."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}{VLLM}")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return stand_in(tmp_path)


def serve(folder: Path, path: str, *words: str) -> subprocess.Popen:
    env = os.environ | {"PATH": path, "SLURM_SUBMIT_DIR": str(folder), "PYTHON": sys.executable}
    command = ["bash", str(REPOSITORY / "slurm" / "serve.sbatch"), *words]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_the_address_is_there_while_the_server_is_ready(tmp_path: Path, path: str) -> None:
    file = tmp_path / "serve" / "m.url"
    file.parent.mkdir()
    file.write_text("http://left.by.another:1/v1\n")
    job = serve(tmp_path, path, "/models/m", "serve/m.url", "--tensor-parallel-size", "2")
    try:
        until = time.monotonic() + 60
        while not (file.exists() and "another" not in file.read_text()) and job.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        port = file.read_text().strip().removesuffix("/v1").rpartition(":")[2]
        assert (tmp_path / "asked").read_text() == "3 False", "the address was there before the server was ready"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/health") as answer:
            assert answer.read().decode() == f"serve /models/m --host 0.0.0.0 --port {port} --tensor-parallel-size 2"
    finally:
        job.send_signal(signal.SIGTERM)
        code = job.wait(60)
        job.stderr.close()
    assert code == 143 and not file.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_server_that_does_not_start_ends_the_job(tmp_path: Path, path: str) -> None:
    _, said = (job := serve(tmp_path, path, "/models/m", "serve/m.url", "--fail")).communicate(timeout=60)
    assert job.returncode == 1 and "error: vllm ended before it was ready" in said and not (tmp_path / "serve" / "m.url").exists()
    bare = ":".join(one for one in path.split(":")[1:] if not Path(one, "vllm").exists())
    _, said = (job := serve(tmp_path, bare, "/models/m", "serve/m.url")).communicate(timeout=60)
    assert job.returncode == 2 and "there is no vllm on the PATH" in said
