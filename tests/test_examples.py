"""The two sessions that every reader types first, line for line, and APOP after them."""

import hashlib

from conversation import Line, play, scripts

from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store

USERS = {
    "test1@example.com": "1982214",
    "test2@example.com": "hunter2",
    "costa@example.net": "1982214",
}

SCRIPTS = scripts("examples.txt")


def test_the_example_sessions(tmp_path):
    store = Store(tmp_path, USERS)
    with SMTPServer(("127.0.0.1", 0), store) as smtp, POP3Server(("127.0.0.1", 0), store) as pop3:
        play(smtp, SCRIPTS["smtp"], "smtp")
        play(smtp, SCRIPTS["smtp"], "smtp, again")
        play(pop3, SCRIPTS["pop3"], "pop3")
        play(pop3, SCRIPTS["pop3 again"], "pop3 again")


def test_apop(tmp_path):
    store = Store(tmp_path, USERS)
    with POP3Server(("127.0.0.1", 0), store) as pop3, Line(pop3.host, pop3.port) as client:
        timestamp = client.readline()
        timestamp = timestamp[timestamp.index("<") :]
        digest = hashlib.md5((timestamp + "hunter2").encode()).hexdigest()
        assert client.ask(f"apop test2@example.com {digest}").startswith("+OK 0 messages")
