"""Clients that are slow, many, loud or ill-meaning: bounded memory, bounded time, and the others are served."""

import contextlib
import errno
import itertools
import os
import re
import resource
import subprocess
import sys
import threading
import time
import types

import pytest
from conversation import Line
from helpers import ROOT, Program, send

from lineserver import Disconnect, FairQueue, LineServer, LoginThrottle, TooManyHashes, printable
from pop3d_simple import POP3Server
from smtpd_simple import SMTPHandler, SMTPServer
from store import Maildrop


def memory_of(pid):
    """Return a process's resident memory in KiB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="there is no /proc here"
)


def peak(pid):
    """Return a process's peak of resident memory in MiB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


@pytest.fixture
def program(tmp_path):
    users = tmp_path / "users.txt"
    users.write_text("alice@example.test:wonderland\n")
    with Program("--port", 0, "--pop3", 0, "--no-sync", cwd=tmp_path, count=2) as program:
        yield program
        assert "Traceback" not in program.stop()[1]


@needs_proc
def test_100_mb_in_and_out_with_little_memory(program):
    block = b"0123456789abcde\r\n" * 61_680
    with Line("127.0.0.1", program.ports["SMTP"], seconds=60) as client:
        client.reply()
        for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
            client.ask(command)
        for _ in range(95):
            client.send(block)
        client.send(".\r\n")
        assert client.reply().startswith("250")
    with Line("127.0.0.1", program.ports["POP3"], seconds=60) as client:
        client.readline(), client.ask("USER alice"), client.ask("PASS wonderland")
        size = int(client.ask("RETR 1").split()[1])
        assert len(client.file.read(size)) == size > 99_000_000
        assert client.readline() == "."
    assert peak(program.process.pid) < 64


@needs_proc
@pytest.mark.parametrize(
    "flood", ["a line without end", "a header line without end", "an answer without end"]
)
def test_10_mb_without_a_newline(program, flood):
    with Line("127.0.0.1", program.ports["SMTP"], seconds=30) as client:
        client.reply()
        client.ask("EHLO x")
        wanted = "500 5.5.2"
        if flood.startswith("a header"):
            for command in ("MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
                client.ask(command)
            client.send("Subject: ")
            wanted = "250 2.0.0"
        elif flood.startswith("an answer"):
            client.ask("AUTH LOGIN")
            wanted = "500 5.5.6"
        for _ in range(10):
            client.send(b"x" * 1_000_000)
        client.send("\r\n.\r\n" if wanted[0] == "2" else "\r\n")
        assert client.reply().startswith(wanted)
        assert client.ask("NOOP").startswith("250")
    assert peak(program.process.pid) < 64


SLOW = {  # what a session has sent and goes on to send: never more than 256 KiB in memory
    "a long header": "DATA\r\n" + ("A: " + "x" * 74 + "\r\n") * 13_000,
    "one endless field": "DATA\r\nA: " + "x" * 1_000_000,
    "a text": "DATA\r\n\r\n" + "x" * 70 + "\r\n" * 400_000,
    "chunks": "BDAT 400000\r\n" + "x" * 400_000 + "BDAT 900000\r\n" + "x" * 600_000,
    "recipients": ("RCPT TO:<alice@example.test> ORCPT=rfc822;" + "z" * 490 + "\r\n") * 900,
}


@needs_proc
@pytest.mark.parametrize("what", SLOW)
def test_memory_of_sessions_that_send_slowly(program, what):
    before, clients = memory_of(program.process.pid), []
    for _ in range(100):
        client = Line("127.0.0.1", program.ports["SMTP"])
        client.send(TO_ALICE + SLOW[what])
        clients.append(client)
    for client in clients:
        while not client.readline().startswith(("354", "250 2.0.0", "452")):
            pass
    assert (memory_of(program.process.pid) - before) / len(clients) < 256
    for client in clients:
        client.close()


def test_thousands_of_noops(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        sender = threading.Thread(target=client.send, args=("NOOP\r\n" * 20_000,))
        sender.start()
        assert all(client.reply() == "250 2.0.0 Ok" for _ in range(20_000))
        sender.join()


@pytest.mark.parametrize("drip", ["EHLO", "DATA", "AUTH"])
def test_a_line_has_a_deadline_not_each_octet(store, drip):
    """A client that sends an octet now and then is shown the door when the line has not come in time."""
    with (
        SMTPServer(("127.0.0.1", 0), store, timeout=0.5) as smtp,
        Line(smtp.host, smtp.port) as client,
    ):
        client.reply()
        if drip != "EHLO":
            for command in (
                ("EHLO x", "AUTH LOGIN")
                if drip == "AUTH"
                else ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA")
            ):
                client.ask(command)
        client.sock.settimeout(0.1)
        answer, deadline = b"", time.monotonic() + 5
        while not answer:
            assert time.monotonic() < deadline
            try:
                client.send("x")
                answer = client.sock.recv(100)
            except TimeoutError:
                pass
        assert answer.startswith(b"421 4.4.2")


TO_ALICE = "EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice@example.test>\r\n"
SILENT_SMTP = {
    "after the greeting": "",
    "in a line": "EHL",
    "after EHLO": "EHLO x\r\n",
    "after MAIL": "EHLO x\r\nMAIL FROM:<>\r\n",
    "after RCPT": TO_ALICE,
    "after DATA": TO_ALICE + "DATA\r\n",
    "in a message": TO_ALICE + "DATA\r\nSubject: x\r\n\r\nha",
    "before the last LF": TO_ALICE + "DATA\r\nSubject: x\r\n\r\n.\r",
    "in a large message": TO_ALICE + "DATA\r\n" + "0123456789abcde\r\n" * 100_000,
    "in a chunk": TO_ALICE + "BDAT 100\r\nSubject: x\r\n",
    "between chunks": TO_ALICE + "BDAT 3\r\nabc",
    "in a login": "EHLO x\r\nAUTH LOGIN\r\n",
}
SILENT_POP3 = {
    "after the greeting": "",
    "after USER": "USER alice\r\n",
    "in a login": "AUTH LOGIN\r\n",
    "with a maildrop": "USER alice\r\nPASS wonderland\r\n",
    "with marks": "USER alice\r\nPASS wonderland\r\nDELE 1\r\n",
}


@pytest.mark.parametrize("step", SILENT_SMTP)
def test_a_client_that_falls_silent(store, step):
    """At whatever step: it hears 421, and nothing of it stays, neither a session nor a file."""
    with SMTPServer(("127.0.0.1", 0), store, timeout=0.15) as smtp:
        with Line(smtp.host, smtp.port) as client:
            client.send(SILENT_SMTP[step])
            assert b"\r\n421 4.4.2 " in client.file.read()
        nothing_of_it_stays(smtp, store)


@pytest.mark.parametrize("step", SILENT_POP3)
def test_a_pop3_client_that_falls_silent(store, deliver, step):
    """The same without a word; the message that it marked is there, and the mailbox is free."""
    deliver(b"Subject: x\r\n\r\n")
    with POP3Server(("127.0.0.1", 0), store, timeout=0.15) as pop3:
        with Line(pop3.host, pop3.port) as client:
            client.send(SILENT_POP3[step])
            assert client.file.read().rsplit(b"\r\n", 2)[-2][:1] == b"+"
        nothing_of_it_stays(pop3, store)
        Maildrop(store, "alice@example.test").close()
    assert len(store.messages("alice@example.test")) == 1


def test_a_client_that_reads_an_octet_now_and_then(monkeypatch):
    """It does not hold the session for ever: what is sent at once has a deadline as a whole, not each octet."""
    sent, seconds = [], itertools.count()
    monkeypatch.setattr("lineserver.clock", lambda: next(seconds))
    session = SMTPHandler.__new__(SMTPHandler)
    session.server = types.SimpleNamespace(timeout=10)
    session.reader = types.SimpleNamespace(seconds=10)
    session.request = types.SimpleNamespace(send=lambda data: sent.append(bytes(data[:1])) or 1)
    for text in (b"quick", b"not so quick"):
        session.pending = [text]
        with pytest.raises(Disconnect) if text == b"not so quick" else contextlib.nullcontext():
            session.flush()
    assert b"".join(sent) == b"quick" + b"not so quic"


def nothing_of_it_stays(server, store):
    deadline = time.monotonic() + 5
    while server.sessions or server.active or server.by_address:
        assert time.monotonic() < deadline
    folder = f"{store.mailbox('alice@example.test')}/tmp"
    assert not os.path.exists(folder) or os.listdir(folder) == []


def test_a_flood_gets_an_answer_and_no_thread(store):
    with SMTPServer(("127.0.0.1", 0), store, max_connections=10, max_per_address=10) as smtp:
        clients = [Line(smtp.host, smtp.port) for _ in range(100)]
        greetings = [client.readline()[:3] for client in clients]
        assert greetings.count("220") == 10
        assert greetings.count("421") == 90
        assert len(smtp.threads) <= 11
        for client in clients:
            client.close()
        nothing_of_it_stays(smtp, store)
        assert send(smtp).startswith("250")


def test_pop3_says_busy_too(store):
    with (
        POP3Server(("127.0.0.1", 0), store, max_connections=1) as pop3,
        Line(pop3.host, pop3.port) as first,
    ):
        first.readline()
        with Line(pop3.host, pop3.port) as second:
            assert second.readline().startswith("-ERR [SYS/TEMP] too many")
            assert second.at_end()


def test_one_address_cannot_take_every_slot(store, monkeypatch):
    """Nine tenths of them, and on loopback all."""
    with SMTPServer(("127.0.0.1", 0), store, max_connections=20) as smtp:
        monkeypatch.setattr("lineserver.is_loopback", lambda host: host == "127.0.0.3")
        clients = [Line(smtp.host, smtp.port, "127.0.0.2") for _ in range(30)]
        assert [client.readline()[:3] for client in clients].count("220") == 18
        others = [Line(smtp.host, smtp.port, "127.0.0.3") for _ in range(3)]
        assert [client.reply()[:3] for client in others] == ["220", "220", "421"]
        clients += others
        for client in clients:
            client.close()


@needs_proc
def test_no_descriptors_left(tmp_path):
    """It turns clients away, does not spin, keeps some to store mail with, and serves again when there are more."""
    users = tmp_path / "users.txt"
    users.write_text("alice@example.test:wonderland\n")

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    with Program("--port", 0, cwd=tmp_path, preexec_fn=few) as program:
        clients = [Line("127.0.0.1", program.port) for _ in range(60)]
        replies = [client.reply()[:3] for client in clients]
        assert replies == ["220"] * replies.count("220") + ["421"] * replies.count("421")
        assert 5 < replies.count("220") < 24
        for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA", "."):
            assert clients[0].ask(command)[:1] in "23"
        with open(f"/proc/{program.process.pid}/stat") as file:
            before = sum(map(int, file.read().rsplit(")")[1].split()[11:13]))
        threading.Event().wait(0.5)
        with open(f"/proc/{program.process.pid}/stat") as file:
            ticks = sum(map(int, file.read().rsplit(")")[1].split()[11:13])) - before
        assert ticks < 0.3 * os.sysconf("SC_CLK_TCK")
        for client in clients:
            client.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError), Line("127.0.0.1", program.port) as client:
                assert client.reply()[:3] in ("220", "421")
                if served := client.ask("NOOP").startswith("250"):
                    break
        status, errors = program.stop()
    assert (served, status, "Traceback" in errors) == (True, 0, False)


def test_no_descriptor_for_the_next_connection(smtp, monkeypatch):
    """Others of the process have taken them all: it waits a moment, says so, and goes on."""
    real, short = smtp.socket, [errno.EMFILE, errno.ENFILE]

    class Listener:
        def accept(self):
            if short:
                raise OSError(short.pop(), "Too many open files")
            return real.accept()

        def __getattr__(self, name):
            return getattr(real, name)

    smtp.socket = Listener()
    for _ in range(3):
        assert send(smtp).startswith("250")
    assert not short


AFAR = "192.0.2.1"  # an address of documentation: nobody's


def test_failed_logins_get_slower_and_are_blocked():
    """By client address and account; a good login, and time, let failures be forgotten."""
    throttle = LoginThrottle()

    def fail(host, account):
        seconds = throttle.begin(host, account)
        return seconds or throttle.delay(host, account, 0.25)

    assert [fail(AFAR, "alice") for _ in range(6)] == [0.25, 0.5, 1, 2, 2, 2]
    assert fail(AFAR, "bob") == fail("192.0.2.2", "alice") == 0.25
    throttle.clear(AFAR, "alice")
    assert [fail(AFAR, "alice") for _ in range(21)][-1] > 100
    assert throttle.begin(AFAR, "bob") == throttle.begin("192.0.2.2", "alice") == 0.0


def test_failures_are_forgotten_one_by_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lineserver.clock", lambda: now[0])
    throttle = LoginThrottle()
    for _ in range(20):
        assert throttle.begin(AFAR, "alice") == 0.0
        now[0] += 10
    assert throttle.begin(AFAR, "alice") == 400
    now[0] += 401
    assert throttle.begin(AFAR, "alice") == 0.0
    assert throttle.begin(AFAR, "alice") > 0


def log_in(pop3, user, password):
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask(f"USER {user}")
        return client.ask(f"PASS {password}")


def test_a_blocked_account_is_refused_whatever_the_password(store, monkeypatch):
    """From that address only, with the time to wait; other accounts are served."""
    monkeypatch.setattr("lineserver.is_loopback", lambda host: False)
    with POP3Server(("127.0.0.1", 0), store) as pop3:
        for _ in range(20):
            assert log_in(pop3, "alice", "wrong").startswith("-ERR [AUTH]")
        assert re.search(r"SYS/TEMP.* wait [56]\d\d seconds", log_in(pop3, "alice", "wonderland"))
        assert log_in(pop3, "bob", "builder").startswith("+OK")


def test_no_lock_out_and_no_delay_on_loopback(store, monkeypatch):
    """A class of thirty behind one address, and test suites, are not slowed down."""
    monkeypatch.setattr(LineServer, "login_delay", 1000)
    with POP3Server(("127.0.0.1", 0), store) as pop3:
        for _ in range(40):
            assert log_in(pop3, "alice", "wrong").startswith("-ERR [AUTH]")
        assert log_in(pop3, "alice", "wonderland").startswith("+OK")


def test_five_failed_logins_end_a_session(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        replies = [client.ask("AUTH PLAIN AHgAeA==")[:3] for _ in range(5)]
        assert replies == ["535"] * 5
        assert client.reply().startswith("421 4.7.0")
        assert client.at_end()


def test_hash_checks_of_one_address_do_not_hold_up_another():
    """One at a time for each address, and a bounded number of them."""
    queue, inside, go_on = FairQueue(2), threading.Semaphore(0), threading.Event()

    def check(host):
        with queue.turn(host):
            inside.release()
            go_on.wait(10)

    crowd = [threading.Thread(target=check, args=(AFAR,)) for _ in range(100)]
    for thread in crowd:
        thread.start()
    assert inside.acquire(timeout=10)
    with pytest.raises(TooManyHashes), queue.turn(AFAR):
        pass
    with queue.turn("192.0.2.2"):
        assert not inside.acquire(blocking=False)  # nobody else of the crowd is let in
    go_on.set()
    for thread in crowd:
        thread.join()
    assert not queue.waiting
    assert not queue.addresses


def test_a_wrong_password_waits(store, monkeypatch):
    waits = []
    monkeypatch.setattr(LineServer, "login_delay", 0.25)
    monkeypatch.setattr("lineserver.is_loopback", lambda host: False)
    with POP3Server(("127.0.0.1", 0), store) as pop3, Line(pop3.host, pop3.port) as client:
        monkeypatch.setattr(pop3.stopping, "wait", waits.append)
        client.readline()
        for _ in range(3):
            client.ask("USER alice")
            client.ask("PASS x")
    assert waits == [0.25, 0.5, 1.0]


NASTY = [
    b"\r",
    b"\n",
    b"\0",
    b"\x1b[2J",
    b"\xff",
    "\u2028".encode(),
    "\u202e".encode(),
    b"\x7f",
    b"\x08",
]


@pytest.mark.parametrize("octets", NASTY, ids=repr)
def test_what_a_client_says_reaches_nothing_raw(store, caplog, octets):
    """Not a header, not a log line, not a file name."""
    caplog.set_level("INFO")
    lines = [
        b"EHLO a" + octets + b"b",
        b"EHLO x",
        b"MAIL FROM:<a" + octets + b"b@c.test> SMTPUTF8",
        b"MAIL FROM:<x@y.test> SMTPUTF8",
    ]
    lines += [
        b"RCPT TO:<alice+" + octets + b"@example.test>",
        b"RCPT TO:<alice@example.test>",
        b"VRFY " + octets,
        b"X" + octets + b"Y",
    ]
    with SMTPServer(("127.0.0.1", 0), store) as smtp, Line(smtp.host, smtp.port) as client:
        client.reply()
        client.send(b"\r\n".join(lines) + b"\r\nDATA\r\nx\r\n.\r\nQUIT\r\n")
        answers = client.file.read()
    with POP3Server(("127.0.0.1", 0), store) as pop3, Line(pop3.host, pop3.port) as client:
        client.send(b"USER " + octets + b"\r\nPASS " + octets + b"\r\nQUIT\r\n")
        answers += client.file.read()
    for record in caplog.records:
        assert record.getMessage().isprintable(), record.getMessage()
    assert octets not in answers.replace(b"\r\n", b"")
    for path in store.paths("alice@example.test"):
        with open(path, "rb") as file:
            assert octets not in file.read().replace(b"\r\n", b"")


def test_a_client_that_does_not_read_holds_up_no_stop(store, deliver):
    deliver(b"Subject: x\r\n\r\n" + b"0123456789abcde\r\n" * 1_000_000)
    with POP3Server(("127.0.0.1", 0), store) as pop3, Line(pop3.host, pop3.port) as client:
        client.send("USER alice\r\nPASS wonderland\r\nRETR 1\r\n")
        client.sock.recv(1)
        while not any(session.maildrop for session in pop3.sessions):
            pass
        pop3.server_close(0.1)
        assert not pop3.sessions
        Maildrop(store, "alice@example.test").close()


def test_printable():
    assert printable("用户 a") == "用户 a"
    assert printable("a\r\n\x1b\u202e\udcff") == "a\\r\\n\\x1b\\u202e\\xff"


def test_the_fuzzer_for_a_moment():
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", "--sessions", "600", "--seed", "1"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_block_counts_at_every_listener(smtp, pop3, monkeypatch):
    monkeypatch.setattr("lineserver.is_loopback", lambda host: False)
    for _ in range(5):
        with Line(smtp.host, smtp.port) as client:
            client.reply()
            client.ask("EHLO x")
            for _ in range(4):
                assert client.ask("AUTH PLAIN AGFsaWNlAHdyb25n")[:3] in ("535", "454")
    assert log_in(pop3, "alice", "wonderland").startswith("-ERR [SYS/TEMP]")
    assert log_in(pop3, "bob", "builder").startswith("+OK")


def test_a_long_first_line_makes_no_session_of_bare_lf(smtp, store):
    """Only a first line that ends in LF alone does: what follows it can't end data with LF.LF."""
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        assert client.ask("x" * 5000).startswith("500")
        client.send(b"EHLO x\n")
        client.reply()
        for command in ("MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
            client.ask(command)
        client.send(b"Subject: x\r\n\r\none\n.\nRSET\r\n.\r\n")
        assert client.reply().startswith("250 2.0.0 Ok: queued")
    assert "RSET" in store.messages("alice@example.test")[0].get_content()


@pytest.mark.parametrize("password", ["my HTTP/ word", "GET / HTTP/1.1"])
def test_a_password_that_looks_like_http(store, pop3, password):
    store.change_account("carol@example.test", password)
    assert log_in(pop3, "carol", password).startswith("+OK")


def test_replies_have_at_most_512_octets(smtp):
    address = "\u0101" * 30 + "@" + ".".join(["\u0101" * 20] * 6) + ".test"
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        for command in ("EHLO x", f"MAIL FROM:<{address}> SMTPUTF8", f"RCPT TO:<{address}>"):
            assert max(map(len, client.ask(command).split("\n"))) <= 510
        client.ask("RSET")
        assert len(client.ask(f"ETRN {address.partition('@')[2]}")) <= 510


@needs_proc
def test_thousands_of_header_lines_need_no_memory(tmp_path):
    """Of 50 sessions at once, whose messages are nothing but header lines."""
    with Program("--port", 0, "--spool", tmp_path / "spool", "--no-sync") as program:
        before = memory_of(program.process.pid)
        clients = []
        for _ in range(50):
            client = Line(program.host, program.port)
            client.reply()
            for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
                client.ask(command)
            client.send(b"a:\r\n" * 30_000)
            clients.append(client)
        for client in clients:
            client.send(b".\r\n")
            assert client.reply().startswith("250")
        assert memory_of(program.process.pid) - before < 20_000
        for client in clients:
            client.close()


@needs_proc
def test_a_list_with_many_members_is_not_kept_for_each_recipient(tmp_path):
    users = tmp_path / "users.txt"
    names = [f"user{n}@example.test" for n in range(500)]
    lines = [f"{name}:x\n" for name in names]
    users.write_text("".join(lines) + f"all@example.test = {', '.join(names)}\n")
    with Program("--port", 0, "--spool", tmp_path / "spool", "--users", users) as program:
        before = memory_of(program.process.pid)
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                client = stack.enter_context(Line(program.host, program.port))
                client.reply()
                client.ask("EHLO x")
                client.ask("MAIL FROM:<>")
                client.send("RCPT TO:<all@example.test>\r\n" * 1000)
                assert [client.reply()[:3] for _ in range(1000)] == ["250"] * 1000
            assert (memory_of(program.process.pid) - before) / 20 < 400
