"""Servers on free ports over fresh spools, as any test suite would start them."""

import shutil
import threading
import time

import pytest
from helpers import USERS

from lineserver import LineServer
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    """Wrong passwords cost no time here, but for the tests about that."""
    monkeypatch.setattr(LineServer, "login_delay", 0)


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """The programs that tests start need not compile the modules each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("pycache")))
        yield


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
