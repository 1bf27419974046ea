"""The servers inside another program's tests: what README promises to whoever embeds them."""

import asyncio
import contextlib
import itertools
import mailbox
import os
import poplib
import smtplib
import socket
import subprocess
import sys
import threading

import pytest
from conversation import Line
from helpers import ROOT, USERS, send

from pop3d_simple import POP3Server
from smtpd_simple import Disconnect, SMTPServer
from store import Store, new_id


def send_something_to(address, host, port):
    with smtplib.SMTP(host, port) as client:
        client.sendmail("me@client.test", [address], "Subject: hello\r\n\r\nhello\r\n")


def test_a_connection_that_drops_in_the_middle_of_retr(store, deliver):
    deliver()

    def cut_retr(session, verb, argument):
        if verb == "RETR":
            session.reply("+OK 1000 octets")
            session.write(b"Subject: half a mess")
            session.flush()
            raise Disconnect

    pop3 = POP3Server(("127.0.0.1", 0), store, intercept=cut_retr)
    with pop3, Line(pop3.host, pop3.port) as client:
        client.readline(), client.ask("USER alice"), client.ask("PASS wonderland")
        client.send("RETR 1\r\n")
        assert client.file.read() == b"+OK 1000 octets\r\nSubject: half a mess"


def test_wait_wakes_up_at_once(store, smtp):
    got = []
    waiter = threading.Thread(
        target=lambda: got.extend(store.wait("alice@example.test", count=2, timeout=10))
    )
    waiter.start()
    for n in range(2):
        send(smtp, f"Subject: {n}\r\n\r\n".encode())
    waiter.join()
    assert [message["Subject"] for message in got] == ["0", "1"]


def test_mail_arrives_while_match_looks(store, smtp):
    """`match` may take its time, and even send mail: deliveries do not wait for it."""

    def match(message):
        if message["Subject"] == "hi":
            send(smtp, b"Subject: second\r\n\r\n")
        return message["Subject"] == "second"

    send(smtp)
    [message, *_] = store.wait("alice@example.test", match=match)
    assert message["Subject"] == "second"


def test_what_is_no_file_is_no_message(store, smtp):
    send(smtp)
    os.mkdir(f"{store.mailbox('alice@example.test')}/new/folder")
    os.symlink("nowhere", f"{store.mailbox('alice@example.test')}/cur/link")
    assert len(store.messages("alice@example.test")) == 1
    store.clear()
    assert store.messages("alice@example.test") == []


def test_wait_ends_in_time_while_other_mail_comes(store, monkeypatch, deliver):
    """A mailbox that changes at each look does not keep it from ending."""
    real, clock = store.paths, itertools.count()
    monkeypatch.setattr("store.clock", lambda: float(next(clock)))
    monkeypatch.setattr(store, "paths", lambda address: [*real(address), deliver()])
    with pytest.raises(
        TimeoutError, match=r"waited 9 s for 1 message that matches; there are .* messages: .*'hi'"
    ):
        store.wait("alice@example.test", timeout=9, match=lambda message: False)


def test_a_hook_may_stop_the_server(store):
    """Its own session gets its reply all the same."""
    with SMTPServer(("127.0.0.1", 0), store, on_message=lambda *_: smtp.server_close(0)) as smtp:
        assert send(smtp).startswith("250")


def test_wait_says_what_did_arrive(store, smtp):
    send(smtp)
    with pytest.raises(
        TimeoutError, match=r"alice@example\.test: waited 0.01 s for 1 message that match.*'hi'"
    ):
        store.wait("alice@example.test", timeout=0.01, match=lambda message: False)
    with pytest.raises(TimeoutError, match="nothing"):
        store.wait("bob@example.test", timeout=0.01)


def test_wait_sees_what_another_process_delivers(store, smtp):
    other = Store(store.folder, USERS, sync=False)
    with SMTPServer(("127.0.0.1", 0), other) as server:
        send(server)
        assert store.wait("alice@example.test")


def test_expect_none_and_clear(store, smtp):
    store.expect_none("alice@example.test", 0.01)
    send(smtp), send(smtp, to="bob@example.test")
    with pytest.raises(AssertionError, match="'hi'"):
        store.expect_none("alice@example.test", 1)
    store.clear("alice@example.test")
    assert [len(store.messages(name)) for name in ("alice@example.test", "bob@example.test")] == [
        0,
        1,
    ]
    store.clear()
    assert store.messages("bob@example.test") == []


def test_an_account_for_one_test(store, smtp, pop3):
    with store.account() as (address, password), store.account() as (other, _):
        assert address != other
        send(smtp, to=address)
        [message] = store.wait(address)
        assert message["Delivered-To"] == address
        client = poplib.POP3(pop3.host, pop3.port)
        client.user(address)
        client.pass_(password)
        client.quit()
    with pytest.raises(AssertionError):
        assert send(smtp, to=address)
    assert address not in store.users.accounts.values()


def test_on_message(store):
    seen = []
    with SMTPServer(("127.0.0.1", 0), store, on_message=lambda *args: seen.append(args)) as smtp:
        send(smtp, to="staff@example.test")
    assert len(seen) == 2
    for (envelope, path), name in zip(seen, ("alice", "bob"), strict=True):
        assert (envelope.sender, envelope.recipients) == ("me@client.test", ["staff@example.test"])
        assert f"/{name}@example.test/new/" in path
        with open(path, "rb") as file:
            assert b"Subject: hi" in file.read()


def test_a_hook_that_fails_does_not_lose_mail(store, caplog):
    def broken(envelope, path):
        raise RuntimeError("broken hook")

    with SMTPServer(("127.0.0.1", 0), store, on_message=broken) as smtp:
        assert send(smtp).startswith("250")
    assert "broken hook" in caplog.text
    assert len(store.messages("alice@example.test")) == 1


def test_what_a_session_knows(store):
    seen = {}

    def look(session, verb, argument):
        seen[verb] = (
            session.peer[0],
            session.helo,
            session.user,
            session.tls,
            session.envelope and session.envelope.recipients,
        )

    with (
        SMTPServer(("127.0.0.1", 0), store, intercept=look) as smtp,
        smtplib.SMTP(smtp.host, smtp.port) as client,
    ):
        client.ehlo("client.test")
        client.login("alice", "wonderland")
        client.sendmail("", ["bob@example.test"], "x")
    assert seen["CONNECT"] == ("127.0.0.1", "", None, False, None)
    assert seen["."] == (
        "127.0.0.1",
        "client.test",
        "alice@example.test",
        False,
        ["bob@example.test"],
    )


@pytest.mark.parametrize("verb", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", ".", "QUIT"])
def test_drop_the_line_anywhere(store, verb):
    def drop(session, seen, argument):
        if seen == verb:
            raise Disconnect

    with (
        SMTPServer(("127.0.0.1", 0), store, intercept=drop) as smtp,
        Line(smtp.host, smtp.port) as client,
        contextlib.suppress(ConnectionError),
    ):
        client.send(
            "EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice@example.test>\r\nDATA\r\nx\r\n.\r\nQUIT\r\n"
        )
        client.file.read()
    assert len(store.messages("alice@example.test")) == (1 if verb == "QUIT" else 0)


def test_a_bug_is_421_and_a_traceback_in_the_log(store, caplog):
    def bug(session, verb, argument):
        if verb == "NOOP":
            raise RuntimeError("a bug")

    with SMTPServer(("127.0.0.1", 0), store, intercept=bug) as smtp:
        with Line(smtp.host, smtp.port) as client:
            client.reply()
            assert client.ask("NOOP").startswith("421 4.3.0")
            assert client.at_end()
        assert send(smtp).startswith("250")
    assert "RuntimeError: a bug" in caplog.text


def test_a_failed_start_raises_at_once_and_leaves_nothing(store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for server in (SMTPServer, POP3Server):
            with pytest.raises(OSError, match="in use"):
                server(taken.getsockname(), store)


def test_many_servers_side_by_side(store):
    servers = [SMTPServer(("127.0.0.1", 0), store) for _ in range(10)]
    for server in servers:
        server.start()
    assert len({server.port for server in servers}) == 10
    for server in servers:
        assert send(server).startswith("250")
        server.server_close()


def test_stopping_with_a_session_open_takes_no_time(store):
    """The session hears 421; nobody waits for its client."""
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        client = Line(smtp.host, smtp.port)
        client.reply()
    assert client.readline().startswith("421 4.3.2")
    client.close()


def test_who_serves_in_a_thread_of_his_own(store):
    """As with any server of socketserver: serve_forever() needs no start()."""
    smtp = SMTPServer(("127.0.0.1", 0), store)
    thread = threading.Thread(target=smtp.serve_forever)
    thread.start()
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        assert send(smtp).startswith("250")  # beside a session that goes on
    smtp.shutdown()
    thread.join(10)
    assert not thread.is_alive()


def test_ipv6(store):
    try:
        server = SMTPServer(("::1", 0), store)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server as smtp:
        assert send(smtp).startswith("250")
    [message] = store.messages("alice@example.test")
    assert "([IPv6:::1])" in message["Received"]


def test_inside_asyncio(store):
    async def main():
        with SMTPServer(("127.0.0.1", 0), store) as smtp:
            reader, writer = await asyncio.open_connection(smtp.host, smtp.port)
            assert (await reader.readline()).startswith(b"220")
            writer.close()
            await writer.wait_closed()

    asyncio.run(main())


def test_importing_is_cheap_and_starts_nothing():
    code = "import sys, threading, smtpd_simple, pop3d_simple; print(threading.active_count(), *sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    count, *modules = out.split()
    assert count == "1"
    assert not {"ssl", "email", "smtplib", "hashlib", "argparse", "asyncio", "subprocess"} & set(
        modules
    )


def test_pythons_mailbox_reads_the_spool(store, smtp):
    for n in range(3):
        send(smtp, f"Subject: {n}\r\n\r\nhello\r\n".encode())
    box = mailbox.Maildir(store.mailbox("alice@example.test"), create=False)
    assert sorted(message["Subject"] for message in box) == ["0", "1", "2"]


def test_order_of_arrival_before_the_year_2001(store, deliver, monkeypatch):
    """When seconds since 1970 had a digit less."""
    import store as module

    monkeypatch.setattr(module, "last_time", [0])
    monkeypatch.setattr(module.time, "time_ns", lambda: 946_684_800 * 10**9)
    deliver(b"Subject: first\r\n\r\n")
    monkeypatch.undo()
    deliver(b"Subject: second\r\n\r\n")
    assert [m["subject"] for m in store.messages("alice@example.test")] == ["first", "second"]


def test_queue_ids_are_unique_while_the_clock_stands_still(monkeypatch):
    monkeypatch.setattr("store.time.time_ns", lambda: 1)
    assert len({new_id() for _ in range(10_000)}) == 10_000


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # it is the point
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")
def test_a_forked_child_keeps_no_lock_and_no_connection(store, pop3, deliver):
    deliver()
    asleep, wake = os.pipe()
    pid = 0
    try:
        with Line(pop3.host, pop3.port) as client:
            client.readline()
            client.ask("USER alice")
            assert client.ask("PASS wonderland").startswith("+OK")
            pid = os.fork()
            if not pid:
                os.close(wake)
                os.read(asleep, 1)
                os._exit(0)
            assert client.ask("QUIT").startswith("+OK")
            assert client.file.read() == b""
        with Line(pop3.host, pop3.port) as client:
            client.readline()
            client.ask("USER alice")
            assert client.ask("PASS wonderland").startswith("+OK")
    finally:
        os.close(wake)
        os.close(asleep)
        if pid:
            os.waitpid(pid, 0)


HOSTILE = {
    "comments in comments": b"".join(
        [
            b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n",
            *[b"--b\r\nContent-Type: " + b"(a)" * 3300 + b"\r\n\r\nx\r\n"] * 50,
        ]
    ),
    "many parts in one another": b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(150)
    )
    + b"\r\n" * 1_000_000,
    "a quoted word without end": b'Content-Type: a; b="' + b";" * 1_000_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_waiting_for_a_hostile_message_ends(deliver, store, kind):
    """Parsing each of them in full would take from twenty seconds to hours."""
    deliver(HOSTILE[kind])
    [message] = store.wait("alice@example.test", match=lambda message: True)
    assert message["content-type"]
    assert list(message.walk())


def test_on_message_that_hangs_up_loses_nothing(store):
    """The client gets no 250, and everything that it sent is there all the same."""

    def hang_up(envelope, path):
        raise Disconnect

    with (
        SMTPServer(("127.0.0.1", 0), store, relay="127.0.0.1:1", on_message=hang_up) as smtp,
        smtplib.SMTP(smtp.host, smtp.port) as client,
    ):
        client.login("alice", "wonderland")
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.sendmail("a@b.test", ["bob@example.test", "x@far.test"], "Subject: x\r\n\r\n")
    assert len(store.messages("bob@example.test")) == 1
    [entry] = store.queued()
    assert os.path.exists(f"{store.queue_folder}/{entry.id}")
