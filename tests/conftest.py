"""Servers on free ports over fresh spools, as any test suite would start them."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conversation import Line, play

from lineserver import LineServer
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store

ROOT = Path(__file__).resolve().parent.parent
USERS = {
    "alice@example.test": "wonderland",
    "bob@example.test": "builder",
    "staff@example.test": ["alice@example.test", "bob@example.test"],
}
FAST = {"first_pause": 0.02, "longest_pause": 0.05, "timeout": 5}


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    """Wrong passwords cost no time here, but for the tests about that."""
    monkeypatch.setattr(LineServer, "login_delay", 0)


@pytest.fixture(autouse=True)
def no_thread_left():
    """Every test ends with the threads that it began with."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while left := [t for t in threading.enumerate() if t not in before and t.is_alive()]:
        assert time.monotonic() < deadline, f"threads are left: {left}"
        left[0].join(0.05)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "spool", USERS, sync=False)


@pytest.fixture
def smtp(store):
    with SMTPServer(("127.0.0.1", 0), store, hostname="mail.example.test") as server:
        yield server


@pytest.fixture
def pop3(store):
    with POP3Server(("127.0.0.1", 0), store, hostname="mail.example.test") as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A self-signed certificate and its key, as paths."""
    if not shutil.which("openssl"):
        pytest.skip("the openssl program makes the certificate, and is not installed")
    import lineserver

    return lineserver.self_signed(tmp_path_factory.mktemp("tls") / "spool", "mail.example.test")


@pytest.fixture
def tls(certificate):
    """The keywords that give a server a certificate."""
    return {"tls_cert": certificate[0], "tls_key": certificate[1], "hostname": "mail.example.test"}


@pytest.fixture
def deliver(store):
    """Put a message straight into a mailbox: deliver(text) or deliver(text, address)."""
    from store import Delivery, Target

    def put(content=b"Subject: hi\r\n\r\nhello\r\n", address="alice@example.test"):
        delivery = Delivery(store, [Target(store.mailbox(address), b"")])
        delivery.write(content)
        return delivery.commit()[0]

    return put


def send(server, content=b"Subject: hi\r\n\r\nhello\r\n", to="alice@example.test", sender="me@client.test"):
    """Send one message over a connection of its own; return the reply to its end."""
    with Line(server.host, server.port) as client:
        client.reply()
        client.ask("EHLO client.test")
        client.ask(f"MAIL FROM:<{sender}>")
        client.ask(f"RCPT TO:<{to}>")
        assert client.ask("DATA").startswith("354")
        client.send(content + b".\r\n")
        return client.reply()


class Program:
    """One of the programs, as a process: its ports by name, its output, its end."""

    def __init__(self, *argv, script="smtpd_simple.py", python=sys.executable, cwd=None, count=1, **options):
        argv = [python, str(ROOT / script), *map(str, argv)]
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, **options
        )
        self.ports, self.lines = {}, []
        for _ in range(count):
            line = self.process.stdout.readline()
            assert " listening on " in line, line + self.process.stderr.read()
            name, _, address = line.strip().partition(" listening on ")
            self.ports[name] = int(address.rpartition(":")[2])
        self.errors = []
        self.reader = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
        self.reader.start()

    host = "127.0.0.1"

    @property
    def port(self):
        return next(iter(self.ports.values()))

    def stop(self, how=signal.SIGTERM):
        """End it by a signal; return the exit status and what was on stderr."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        status = self.process.wait(15)
        self.reader.join(5)
        self.process.stdout.close()
        self.process.stderr.close()
        return status, "".join(self.errors)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.stop()


__all__ = ["FAST", "ROOT", "USERS", "Program", "play", "send"]
