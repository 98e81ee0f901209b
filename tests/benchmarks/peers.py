"""The programs that the benchmark drives: started once, idle in a blocking read unless asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from mpi import environment, kill_group, mpiexec  # noqa: E402  (tests/mpi.py)


class Peers:
    """hpcmoe on some ranks, and Hugging Face in one process; a context manager that ends them.

    ranks: a connection per rank, by rank; hf: the other's connection, None without it.
    """

    def __init__(self, weights: Path, ranks: int, context: int, with_hf: bool, threads: int):
        self.folder = tempfile.TemporaryDirectory()
        address = os.path.join(self.folder.name, "line")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(ranks + 1)
        self.listener.settimeout(1.0)
        base = {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        self.started = [subprocess.Popen(
            [*mpiexec(ranks), sys.executable, "-m", "mpi4py", str(HERE / "engine_side.py"), address, str(weights), str(context)],
            env=environment(base), stdin=subprocess.DEVNULL, start_new_session=True)]
        if with_hf:
            env = environment({**base, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
            self.started.append(subprocess.Popen([sys.executable, str(HERE / "hf_side.py"), address, str(weights)], env=env,
                                                 stdin=subprocess.DEVNULL, start_new_session=True))
        named = {}
        for _ in range(ranks + with_hf):
            line = self._accept()
            named[line.recv()] = line
        self.hf = named.pop("hf", None)
        self.ranks = [named[r] for r in range(ranks)]

    def _accept(self) -> Connection:
        while True:
            try:
                peer, _ = self.listener.accept()
            except TimeoutError:
                self._check()
                continue
            peer.setblocking(True)
            return Connection(peer.detach())

    def _check(self) -> None:
        for process in self.started:
            if process.poll() not in (None, 0):
                raise SystemExit(f"benchmark: {' '.join(process.args[:6])} ... ended with status {process.returncode}")

    def ask(self, line, *words):
        """One answer of one peer."""
        line.send(words)
        return self.hear(line)

    def ask_ranks(self, *words) -> list:
        """All ranks at once: their answers by rank."""
        for line in self.ranks:
            line.send(words)
        return self.hear_ranks()

    def hear(self, line):
        try:
            while not line.poll(1.0):
                self._check()
            return line.recv()
        except EOFError:
            raise SystemExit("benchmark: a program under measurement has ended; its message is above") from None

    def hear_ranks(self) -> list:
        return [self.hear(line) for line in self.ranks]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            for line in [*self.ranks, *([self.hf] if self.hf else [])]:
                line.send(("end",))
            for process in self.started:
                process.wait(60)
        for process in self.started:
            if process.poll() is None:
                kill_group(process)
        self.listener.close()
        self.folder.cleanup()
