"""What the tests share: accounts, programs as processes, messages sent and fetched, two servers in a row."""

import contextlib
import re
import signal
import smtplib
import subprocess
import sys
import threading
import time
from pathlib import Path

from conversation import Line

from smtpd_simple import Disconnect, SMTPServer

ROOT = Path(__file__).resolve().parent.parent
USERS = {
    "alice@example.test": "wonderland",
    "bob@example.test": "builder",
    "staff@example.test": ["alice@example.test", "bob@example.test"],
}
FAST = {"first_pause": 0.02, "longest_pause": 0.05, "timeout": 5}


def send(
    server,
    content=b"Subject: hi\r\n\r\nhello\r\n",
    to="alice@example.test",
    sender="me@client.test",
):
    """Send one message over a connection of its own; return the reply to its end."""
    with Line(server.host, server.port) as client:
        client.reply()
        client.ask("EHLO client.test")
        client.ask(f"MAIL FROM:<{sender}>")
        client.ask(f"RCPT TO:<{to}>")
        assert client.ask("DATA").startswith("354")
        client.send(content + b".\r\n")
        return client.reply()


def retrieve(pop3, number=1, user="alice@example.test", password="wonderland"):
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask(f"USER {user}")
        assert client.ask(f"PASS {password}").startswith("+OK")
        size = int(client.ask(f"LIST {number}").split()[2])
        assert client.ask(f"RETR {number}") == f"+OK {size} octets"
        lines = []
        while (line := client.file.readline()) != b".\r\n":
            lines.append(line[1:] if line.startswith(b".") else line)
        data = b"".join(lines)
        assert len(data) == size
        return data


def with_empty_line(content):
    """Return CRLF content with the empty line put in that is missing after its header.

    A reference for the server's way, which does it in pieces: by lines, as one would explain it.
    """
    lines, begun = content.split(b"\r\n"), False
    for number, line in enumerate(lines):
        if not line:
            break
        field = re.match(rb"[!-9;-~]+[ \t]*:", line) or (begun and line[:1] in (b" ", b"\t"))
        if not field and not (number == 0 and re.match(b">?From ", line)):
            return b"\r\n".join([*lines[:number], b"", *lines[number:]])
        begun = True
    return content


class Program:
    """One of the programs, as a process: its ports by name, its output, its end."""

    def __init__(
        self, *argv, script="smtpd_simple.py", python=sys.executable, cwd=None, count=1, **options
    ):
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
        self.reader = threading.Thread(
            target=lambda: self.errors.extend(self.process.stderr), daemon=True
        )
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


END_OF_DATA = {  # published variants that some servers take for the end of data
    "LF.LF": b"\n.\n",
    "LF.CRLF": b"\n.\r\n",
    "CRLF.LF": b"\r\n.\n",
    "CR.CR": b"\r.\r",
    "CR.CRLF": b"\r.\r\n",
    "CRLF.CR": b"\r\n.\r",
    "LF.CR": b"\n.\r",
    "CR.LF": b"\r.\n",
    "CRLF.NUL CRLF": b"\r\n.\0\r\n",
    "CRLF NUL.CRLF": b"\r\n\0.\r\n",
    "CRLF NUL.LF": b"\r\n\0.\n",
    "CR NUL LF.CR NUL LF": b"\r\0\n.\r\0\n",
    "CRCRLF.CRCRLF": b"\r\r\n.\r\r\n",
    "CRLF.CRCRLF": b"\r\n.\r\r\n",
}


@contextlib.contextmanager
def pair(stores, relay_options=FAST, b_options=None, **a_options):
    """Two servers: a.example, which sends everything else to b.example."""
    with SMTPServer(("127.0.0.1", 0), stores[1], hostname="b.example", **(b_options or {})) as b:
        route = {"b.example": f"127.0.0.1:{b.port}"}
        options = {"route": route, "relay_options": relay_options, **a_options}
        with SMTPServer(("127.0.0.1", 0), stores[0], hostname="a.example", **options) as a:
            yield a, b


def send_mail(
    server,
    to,
    content="Subject: over there\r\n\r\nhello\r\n",
    login=True,
    mail_options=(),
    rcpt_options=(),
):
    with smtplib.SMTP(server.host, server.port) as client:
        if login:
            client.login("alice", "wonderland")
        return client.sendmail("alice@a.example", to, content, mail_options, rcpt_options)


def empty(store, seconds=10):
    """Wait until nothing is queued any more."""
    deadline = time.monotonic() + seconds
    while waiting := store.queued():
        assert time.monotonic() < deadline, waiting
        store.queue_changed.wait(0.02)
    return True


def until_tried(store, seconds=5):
    """Wait until a message has been tried and waits for the next time; return its recipient's record."""
    deadline = time.monotonic() + seconds
    while not (waiting := store.queued()[0].recipients[0]).attempts:
        assert time.monotonic() < deadline
        store.queue_changed.wait(0.01)
    return waiting


class Intercept:
    """Answers in the server's place: {verb: [reply, reply, ...]}, each once; Disconnect drops the line."""

    def __init__(self, **replies):
        self.replies, self.seen = (
            {verb.replace("DOT", "."): list(r) for verb, r in replies.items()},
            [],
        )

    def __call__(self, session, verb, argument):
        self.seen.append((verb, argument))
        if not self.replies.get(verb):
            return None
        reply = self.replies[verb].pop(0)
        if reply is Disconnect:
            raise Disconnect
        return reply
