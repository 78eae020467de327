"""Every test runs on one thread, with seeded generators and without a network."""

import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Changes nothing but zigflow.engine.freed_memory's mind: a process of thousands of tests would hold the largest one's.
os.environ.setdefault("MALLOC_PERTURB_", "0")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# The same examples every time, and no deadline: a busy machine is not a failure.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_name_of_a_run(monkeypatch):
    """A sweep's command line names the run for its processes; the next test is another run."""
    monkeypatch.delenv("RUN_ID", raising=False)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise OSError(f"tests do not use the network, asked for {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="session")
def forks():
    """Launches of one or several processes that cost milliseconds; see tests/engine/forks.py."""
    from tests.engine.forks import Server

    server = Server()
    yield server
    server.close()
