# SPDX-License-Identifier: Apache-2.0
"""The engines that compare.py runs: in a process of their own that waits for its turn, or as llama.cpp's programs."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_workloads import WORKLOADS, Workload, prompts_of

FOLDER = Path(__file__).resolve().parent
SLOTS = 64  # requests at a time


class EngineError(Exception):
    """An engine that failed, or took too long."""


@dataclass
class Run:
    """value: the workload's figure. seconds: wall time of the measured part. cpu_s: the engine's CPU time."""

    value: float
    seconds: float
    cpu_s: float
    peak_bytes: int
    more: dict[str, float] = field(default_factory=dict)


def figure(w: Workload, seconds: float, first: float) -> float:
    """first: the seconds of an equal load of prompts with one token each, for `decode`."""
    if w.figure == "decode":
        return w.num * (w.num_output - 1) / max(seconds - first, 1e-9)
    return w.num * w.length / seconds if w.figure == "prefill" else seconds


class WorkerEngine:
    """fastserve, transformers, openvino or vllm, by engine_worker.py in the Python where it is installed."""

    def __init__(self, name: str, kind: str, model: str, python: str, threads: int, log: Path) -> None:
        self.name, self.kind, self.model, self.log = name, kind, model, log
        worker = str(FOLDER / "engine_worker.py")
        self.command = [python, worker, kind, model, "--threads", str(threads)]
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if python != sys.executable:
            self.environment.pop("PYTHONPATH", None)
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def open(self, limit_s: float) -> None:
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("ab"),
            env=self.environment, start_new_session=True,
        )  # fmt: skip
        self._unread = b""
        self._read(limit_s)

    def run(self, name: str, turn: int, ids: list[int], limit_s: float) -> Run:
        w = WORKLOADS[name]
        self.open(600)
        opened = self._cpu_seconds()
        self._wake(name, turn, ids, limit_s)
        first = 0.0
        if w.figure == "decode":
            first = self._generate(prompts_of(name, turn, ids, other=True), 1, limit_s)["seconds"]
        before = self._cpu_seconds()
        answer = self._generate(prompts_of(name, turn, ids), w.num_output, limit_s)
        seconds = float(answer["seconds"])
        end = self._cpu_seconds()
        more = {"first_s": first, "all_cpu_s": end - opened}
        return Run(figure(w, seconds, first), seconds, end - before, answer["peak_bytes"], more)

    def _wake(self, name: str, turn: int, ids: list[int], limit_s: float) -> None:
        """Not measured: a few tokens for other prompts. An engine that has waited for its turn has nothing left in the
        caches, and its first run takes longer; llama-batched-bench warms up by itself."""
        awake = "batch8" if WORKLOADS[name].figure == "total" else name
        prompts = prompts_of(awake, turn + 7, ids, other=True)
        self._generate(prompts, min(4, WORKLOADS[awake].num_output), limit_s)

    def startup(self, limit_s: float) -> Run:
        """A new process, from its start to the first token of its first request."""
        self.close()
        begin = time.perf_counter()
        self.open(limit_s)
        loaded = time.perf_counter() - begin
        answer = self._generate([list(range(100, 116))], 1, limit_s)
        seconds = time.perf_counter() - begin
        spent = self._cpu_seconds()
        self.close()
        return Run(seconds, seconds, spent, answer["peak_bytes"], {"loaded_s": loaded})

    def close(self) -> None:
        if self._process is not None:
            end_process(self._process)
            self._process = None

    def _generate(self, prompts: list[list[int]], num_output: int, limit_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        work = json.dumps({"prompts": prompts, "num_output": num_output}) + "\n"
        self._process.stdin.write(work.encode())
        self._process.stdin.flush()
        answer = self._read(limit_s)
        if "error" in answer or answer["counts"] != [num_output] * len(prompts):
            raise EngineError(str(answer.get("error") or f"made {answer['counts']} tokens"))
        return answer

    def _read(self, limit_s: float) -> dict[str, Any]:
        """A line of JSON; the process is ended if it takes longer than limit_s."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                part = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
                if not part:
                    self.close()
                    why = f"the process ended; its log is {self.log}" if ready else f"took more than {limit_s:.0f} s"
                    raise EngineError(why)
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return dict(json.loads(line))

    def _cpu_seconds(self) -> float:
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class LlamaEngine:
    """llama.cpp: llama-batched-bench, a process for each run; llama-server where requests share a prefix, and for the
    start to the first token. llama-batched-bench computes on random tokens, which take as long as text."""

    kind = "llamacpp"

    def __init__(self, name: str, model: str, programs: Path, threads: int, log: Path) -> None:
        self.name, self.model, self.programs, self.threads, self.log = name, model, programs, threads, log
        self.command = [str(programs / "llama-batched-bench"), "-m", model, "-t", str(threads)]
        self._server: LlamaServer | None = None

    def open(self, limit_s: float) -> None:
        """Nothing waits between runs."""

    def run(self, name: str, turn: int, ids: list[int], limit_s: float) -> Run:
        w = WORKLOADS[name]
        if w.num_shared:
            if not w.warm or self._server is None:
                self.close()
                self._server = LlamaServer(self.programs, self.model, self.threads, self.log)
            try:
                seconds = self._server.generate(prompts_of(name, turn, ids), w.num_output, limit_s)
            except (OSError, EngineError, http.client.HTTPException) as error:
                self.close()
                raise EngineError(f"llama-server: {error}") from None
            run = Run(seconds, seconds, self._server.cpu_seconds(), self._server.peak_bytes())
            if w.warm:
                self.close()
            return run
        size = w.num * (w.length + w.num_output) + 64
        command = [
            *self.command, "-c", str(size), "-npp", str(w.length), "-ntg", str(w.num_output), "-npl", str(w.num),
            "--output-format", "jsonl",
        ]  # fmt: skip
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
            timer = _Limit(process, limit_s)
            assert process.stdout is not None
            printed = process.stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if timer.stop():
                raise EngineError(f"took more than {limit_s:.0f} s")
        rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        if process.returncode != 0 or not rows:
            raise EngineError(f"llama-batched-bench failed; its log is {self.log}")
        row = rows[-1]
        seconds = row["t_pp"] if w.figure == "prefill" else row["t"]
        value = {"decode": row["speed_tg"], "prefill": row["speed_pp"], "total": row["t"]}[w.figure]
        cpu = usage.ru_utime + usage.ru_stime
        return Run(value, seconds, cpu, usage.ru_maxrss * 1024, {"prompts_s": row["t_pp"]})

    def startup(self, limit_s: float) -> Run:
        begin = time.perf_counter()
        server = LlamaServer(self.programs, self.model, self.threads, self.log)
        loaded = time.perf_counter() - begin
        try:
            server.generate([list(range(100, 116))], 1, limit_s)
            seconds = time.perf_counter() - begin
            return Run(seconds, seconds, server.cpu_seconds(), server.peak_bytes(), {"loaded_s": loaded})
        finally:
            server.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class LlamaServer:
    """llama-server on a free port of this machine; ready when this returns."""

    def __init__(self, programs: Path, model: str, threads: int, log: Path) -> None:
        self.port = free_port()
        command = llama_server_command(programs, model, threads, self.port)
        self._process = subprocess.Popen(
            command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
        )
        wait_ready(self.port, self._process, 120)

    def generate(self, prompts: list[list[int]], num_output: int, limit_s: float) -> float:
        """Seconds of all requests, sent at once."""

        def one(prompt: list[int]) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=limit_s)
            body = {
                "prompt": prompt, "n_predict": num_output, "ignore_eos": True, "temperature": 0, "cache_prompt": True,
            }  # fmt: skip
            connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            connection.close()
            if answer.status != 200 or content["tokens_predicted"] != num_output:
                raise EngineError(f"HTTP {answer.status}, {str(content)[:200]}")

        begin = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(one, prompts))
        return time.perf_counter() - begin

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self) -> int:
        return peak_bytes(self._process.pid)

    def close(self) -> None:
        end_process(self._process)


def llama_server_command(programs: Path, model: str, threads: int, port: int) -> list[str]:
    return [
        str(programs / "llama-server"), "-m", model, "-t", str(threads), "-np", str(SLOTS), "-c", str(SLOTS * 1280),
        "--kv-unified", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_ready(port: int, process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Until the server on this port says it is healthy."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineError(f"the server ended with status {process.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.05)
    end_process(process)
    raise EngineError(f"the server was not ready after {limit_s:.0f} s")


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class _Limit:
    """Kills a process that runs longer than limit_s."""

    def __init__(self, process: subprocess.Popen[bytes], limit_s: float) -> None:
        from threading import Timer

        self._hit = False

        def kill() -> None:
            self._hit = True
            os.killpg(process.pid, signal.SIGKILL)

        self._timer = Timer(limit_s, kill)
        self._timer.start()

    def stop(self) -> bool:
        """True if the limit was hit."""
        self._timer.cancel()
        return self._hit


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Asks, waits, kills; the whole group, for engines with processes of their own."""
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
