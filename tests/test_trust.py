"""A test server is trusted blindly: never a false green, never a hang, a mistake is an error at once."""

import gc
import os
import poplib
import re
import smtplib
import socket
import subprocess
import sys
import time

import pytest
from conversation import Line
from helpers import ROOT, USERS, send

from pop3d_simple import POP3Server
from relay_simple import Relay
from smtpd_simple import Disconnect, SMTPServer
from store import Store

ALICE = "alice@example.test"


def put(store, content, name=None):
    """Write a file into alice's mailbox, as another program would."""
    folder = store.mailbox(ALICE)
    store.make_folder(folder)
    path = f"{folder}/new/{name or time.time_ns()}"
    with open(path, "wb") as file:
        file.write(content)
    return path


# ---- addresses


@pytest.fixture
def catch_all(tmp_path):
    return Store(tmp_path / "spool", {**USERS, "*@caught.test": ALICE}, sync=False)


REACHES_ALICE = [
    ALICE,
    "Alice@Example.TEST",
    "alice",
    "alice+tag@example.test",
    "staff@example.test",
    "anything@caught.test",
    "postmaster",
]


@pytest.mark.parametrize("address", REACHES_ALICE)
def test_addresses_are_resolved_as_rcpt_does(catch_all, address):
    put(catch_all, b"Subject: hi\r\n\r\n")
    assert [m["Subject"] for m in catch_all.messages(address)] == ["hi"]
    assert len(catch_all.wait(address, timeout=0)) == 1
    with pytest.raises(AssertionError, match="'hi'"):
        catch_all.expect_none(address, 0)
    catch_all.clear(address)
    catch_all.expect_none(ALICE, 0)


@pytest.mark.parametrize(
    "address", ["alcie@example.test", "nobody@example.test", "alice@else.test", ""]
)
def test_an_address_that_reaches_nobody_is_an_error(store, address):
    """Or a typo would make expect_none() pass."""
    calls = (
        store.messages,
        store.wait,
        store.clear,
        store.paths,
        lambda address: store.expect_none(address, 0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"reaches no mailbox.*alice@example\.test, bob@"):
            call(address)


def test_the_nearest_account_is_named(store):
    with pytest.raises(ValueError, match=r"did you mean alice@example\.test\?"):
        store.messages("alcie@example.test")
    with pytest.raises(TypeError, match="None is not an address"):
        store.messages(None)


# ---- time


def frozen(kind):
    """Return what freezes the clock, by one of the two usual packages."""
    module = pytest.importorskip(kind)
    if kind == "freezegun":
        return module.freeze_time("2024-01-01")
    return module.travel("2024-01-01", tick=False)


@pytest.mark.parametrize("kind", ["freezegun", "time_machine"])
def test_waits_end_while_the_clock_is_frozen(store, smtp, kind):
    with frozen(kind):
        store.expect_none(ALICE, 0.05)
        with pytest.raises(TimeoutError, match=r"waited 0\.05 s for 1 message; there is nothing"):
            store.wait(ALICE, timeout=0.05)
        for n in range(12):
            assert send(smtp, b"Subject: %d\r\n\r\n" % n).startswith("250")
        found = store.wait(ALICE, count=12)
    assert [message["Subject"] for message in found] == [str(n) for n in range(12)]


@pytest.mark.parametrize("kind", ["freezegun", "time_machine"])
def test_a_session_outlives_a_clock_that_jumps(smtp, kind):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        with frozen(kind):
            assert client.ask("NOOP").startswith("250")
        assert client.ask("NOOP").startswith("250")


def test_a_clock_that_goes_back_keeps_the_order(store, smtp, monkeypatch):
    """In order of arrival, whatever the time was."""
    real, offsets = time.time_ns, iter([0, -3600, 0, -7200, 10**6, -(10**6)])
    for n, offset in enumerate(offsets):
        monkeypatch.setattr(time, "time_ns", lambda offset=offset: real() + offset * 10**9)
        send(smtp, b"Subject: %d\r\n\r\n" % n)
    assert [m["Subject"] for m in store.messages(ALICE)] == [str(n) for n in range(6)]


def test_waiting_for_more_than_there_is_in_a_large_mailbox(store):
    """No message is parsed in vain, and the text of the error is short."""
    for n in range(2000):
        put(store, b"Subject: %d\r\n\r\n" % n, f"17000{n:05}.M1P1Q1.h,S=15,W=15")
    with pytest.raises(TimeoutError) as error:
        store.wait(ALICE, count=3000, timeout=0.2)
    assert str(error.value) == (
        f"{ALICE}: waited 0.2 s for 3000 messages; there are 2000 messages: "
        "..., '1995', '1996', '1997', '1998', '1999'"
    )
    [message] = store.wait(ALICE, match=lambda message: message["Subject"] == "1999")
    assert message["Subject"] == "1999"


def test_mistakes_in_a_wait(store):
    with pytest.raises(ValueError, match="count: 0"):
        store.wait(ALICE, count=0)


# ---- bad messages

BAD = {
    "an endless subject": b"Subject: " + b"=?utf-8?q?x?=\r\n " * 20_000 + b"\r\n\r\nx\r\n",
    "a megabyte of one field": b"Subject: " + b"x" * 1_000_000 + b"\r\n\r\nx\r\n",
    "a surrogate in an encoded word": b"Subject: =?raw_unicode_escape?q?=5Cud800?=\r\n\r\nx\r\n",
    "a boundary in idna": b"Content-Type: multipart/mixed; boundary*=idna''a..b\r\n\r\n--a\r\nx\r\n",
    "nested too deep": b"Content-Type: message/rfc822\r\n\r\n" * 1200 + b"x\r\n",
    "octets": bytes(range(256)) * 10,
    "an address without an end": b"From: a@[\r\nTo: <\r\nDate: never\r\n\r\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_message_harms_no_other(store, kind):
    """One EmailMessage for each file, in order, parsed as far as it goes; limits of time are kept."""
    put(store, b"Subject: first\r\n\r\n", "1700000001.M1P1.h")
    put(store, BAD[kind], "1700000002.M1P1.h")
    put(store, b"Subject: last\r\n\r\n", "1700000003.M1P1.h")
    found = store.messages(ALICE)
    assert [found[0]["Subject"], found[2]["Subject"]] == ["first", "last"]
    assert len(found) == 3
    for _, value in found[1].items():
        str(value)
    with pytest.raises(TimeoutError, match="there are 3 messages"):
        store.wait(ALICE, count=9, timeout=0.01)
    with pytest.raises(TimeoutError):
        store.wait(ALICE, timeout=0.01, match=lambda message: message["Subject"] == "other")
    assert len(store.wait(ALICE, match=lambda message: message["Subject"] == "last")) == 1


def test_a_message_that_cannot_be_read_is_a_message(store, monkeypatch):
    put(store, b"Subject: good\r\n\r\n", "1700000001.M1P1.h")
    path, real = put(store, b"Subject: x\r\n\r\n", "1700000002.M1P1.h"), open

    def unreadable(file, *args, **options):
        if file == path:
            raise PermissionError(13, "Permission denied", file)
        return real(file, *args, **options)

    monkeypatch.setattr("builtins.open", unreadable)
    good, bad = store.messages(ALICE)
    assert good["Subject"] == "good"
    assert isinstance(bad.defects[0], PermissionError)


# ---- hooks


class Cancelled(BaseException):
    """Like pytest.fail(), sys.exit() and Ctrl-C, which are not Exceptions either."""


FAULTS = [
    ValueError("of the hook"),
    OSError(5, "of the hook"),
    SystemExit(1),
    Cancelled("of the hook"),
]
STEPS = ["CONNECT", "EHLO", "MAIL", "DATA", ".", "USER", "PASS", "RETR", "QUIT"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("step", STEPS)
def test_a_hook_that_raises_ends_its_session_only(store, caplog, step, fault):
    """No lock, thread, count or file is left; the cause is in the log; the server lives."""
    failing = [True]

    def hook(session, verb, argument):
        if verb == step and failing:
            failing.pop()
            raise fault

    put(store, b"Subject: x\r\n\r\n")
    smtp = SMTPServer(("127.0.0.1", 0), store, intercept=hook)
    pop3 = POP3Server(("127.0.0.1", 0), store, intercept=hook)
    dialogues = {
        smtp: "EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice>\r\nDATA\r\n.\r\nQUIT\r\n",
        pop3: "USER alice\r\nPASS wonderland\r\nRETR 1\r\nQUIT\r\n",
    }
    with smtp, pop3:
        for server, text in dialogues.items():
            for _ in range(2):
                with Line(server.host, server.port) as client:
                    client.send(text)
                    client.file.read()
            deadline = time.monotonic() + 5
            while server.sessions or server.active or server.by_address:
                assert time.monotonic() < deadline
    assert not failing
    assert type(fault).__name__ in caplog.text
    assert os.listdir(f"{store.mailbox(ALICE)}/tmp") == []


@pytest.mark.parametrize("reply", ["no", "", 5, "25 x", b"250 x", "999 x"])
def test_what_a_hook_returns_is_checked(store, caplog, reply):
    smtp = SMTPServer(("127.0.0.1", 0), store, intercept=lambda *_: reply)
    with smtp, Line(smtp.host, smtp.port) as client:
        assert client.reply().startswith("421 4.3.0")
        assert client.at_end()
    assert "Error: " in caplog.text


def test_the_hooks_own_steps_cannot_be_typed(store):
    seen = []

    def hook(session, verb, argument):
        seen.append(verb)

    smtp = SMTPServer(("127.0.0.1", 0), store, intercept=hook)
    with smtp, Line(smtp.host, smtp.port) as client:
        client.reply()
        assert client.ask("CONNECT").startswith("500")
        assert client.ask(".").startswith("500")
        client.ask("NOOP")
    assert seen == ["CONNECT", "NOOP"]


def test_on_message_sees_every_file_while_it_is_there(tmp_path):
    """Once for each mailbox and once for the queue, before the relay can take the file."""
    a = Store(tmp_path / "a", {"alice@a.example": "x", "anna@a.example": "x"}, sync=False)
    b = Store(tmp_path / "b", {"bob@b.example": "x"}, sync=False)
    seen = []

    def hook(envelope, path):
        b.expect_none("bob@b.example", 0.1)
        seen.append((os.path.basename(os.path.dirname(path)), os.path.exists(path)))

    with SMTPServer(("127.0.0.1", 0), b) as next_host:
        options = {"relay": f"127.0.0.1:{next_host.port}", "on_message": hook}
        with SMTPServer(("127.0.0.1", 0), a, **options) as smtp:
            with smtplib.SMTP(smtp.host, smtp.port) as client:
                client.login("alice", "x")
                to = ["alice@a.example", "anna@a.example", "bob@b.example"]
                client.sendmail("alice@a.example", to, "Subject: x\r\n\r\n")
            b.wait("bob@b.example")
    assert seen == [("new", True), ("new", True), ("queue", True)]


def test_on_message_may_drop_the_connection(store):
    """The mail is stored, and its sender does not know."""

    def drop(envelope, path):
        raise Disconnect

    with SMTPServer(("127.0.0.1", 0), store, on_message=drop) as smtp:
        with pytest.raises(ConnectionError):
            send(smtp)
        assert len(store.wait(ALICE)) == 1


# ---- start and stop


def test_start_and_stop(store):
    smtp = SMTPServer(("127.0.0.1", 0), store)
    smtp.start()
    smtp.start()
    assert send(smtp).startswith("250")
    smtp.stop()
    smtp.stop()
    with pytest.raises(RuntimeError, match="was stopped"):
        smtp.start()
    with pytest.raises(RuntimeError, match="was stopped"), smtp:
        pass
    with pytest.raises(OSError, match="refused"):
        Line(smtp.host, smtp.port)


def test_stop_without_start(store):
    SMTPServer(("127.0.0.1", 0), store).stop()
    with SMTPServer(("127.0.0.1", 0), store):
        pass


@pytest.mark.parametrize("where", ["intercept", "on_message"])
def test_stop_from_a_hook(store, where):
    """The session that calls it gets its reply all the same, and later ones are not served."""
    hook = {where: lambda *_: smtp.stop(0) if len(_) == 2 or _[1] == "." else None}
    smtp = SMTPServer(("127.0.0.1", 0), store, **hook)
    with smtp:
        assert send(smtp).startswith("250")
        with (
            pytest.raises(OSError, match=r"refused|reset|hung up"),
            Line(smtp.host, smtp.port) as client,
        ):
            client.reply()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")
def test_stop_in_a_forked_child_leaves_the_parent_alone(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        pid = os.fork()
        if pid == 0:
            smtp.stop()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert client.ask("NOOP").startswith("250")
        assert send(smtp).startswith("250")


SCRIPT = """
import atexit, signal, smtplib, sys, tempfile
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store

store = Store(tempfile.mkdtemp(), {"alice@example.test": "x"}, sync=False)
smtp = SMTPServer(("127.0.0.1", 0), store)
smtp.start()
if "atexit" in sys.argv:
    atexit.register(smtp.stop)
if "signal" in sys.argv:
    signal.signal(signal.SIGALRM, lambda *_: smtp.stop())
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    smtp.stopping.wait(10)
    smtp.stop()
if "with" in sys.argv:
    smtp.stop()
    with SMTPServer(("127.0.0.1", 0), store) as smtp, POP3Server(("127.0.0.1", 0), store):
        with smtplib.SMTP(smtp.host, smtp.port) as client:
            client.sendmail("", ["alice@example.test"], "Subject: x\\r\\n\\r\\n")
        assert store.wait("alice@example.test")
"""


@pytest.mark.parametrize("how", ["atexit", "with", "signal"])
def test_no_warning_and_nothing_left(tmp_path, how):
    """Of files, sockets and threads, as `-W error -X dev` would show."""
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", SCRIPT, how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_port_in_use_names_the_address(store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for server in (SMTPServer, POP3Server):
            with pytest.raises(OSError, match=rf"in use: '127\.0\.0\.1:{port}'"):
                server(("127.0.0.1", port), store)


def test_sessions_leave_no_cycles(store, smtp, pop3):
    """Memory is freed when a session ends, not when the garbage collector comes by."""

    def cut_off():
        with Line(smtp.host, smtp.port) as client:
            client.send("EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<alice>\r\nDATA\r\nSubject: x\r\n")
            for _ in range(4):
                client.reply()

    def wait_for_the_end():
        while smtp.active or pop3.active:
            pass

    def alive():
        kinds = ("SMTPHandler", "Content", "Envelope", "Delivery", "LineReader")
        return sum(type(thing).__name__ in kinds for thing in gc.get_objects())

    send(smtp), cut_off(), wait_for_the_end()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for _ in range(5):
            send(smtp), cut_off()
        wait_for_the_end()
        deadline = time.monotonic() + 5
        while alive() > before:
            assert time.monotonic() < deadline
    finally:
        gc.enable()


# ---- mistakes in arguments

FREE = ("127.0.0.1", 0)
MISTAKES = {
    "address": [
        ("127.0.0.1:0",),
        (("127.0.0.1", "0"),),
        (("127.0.0.1",),),
        (("127.0.0.1", 70_000),),
    ],
    "store": [(FREE, "spool"), (FREE, None)],
    "timeout": [0, -1, "5", float("nan")],
    "size_limit": [0, "10M", 1.5],
    "max_connections": [0, "many", True],
    "max_per_address": [0, "all"],
    "intercept": ["hook", 5],
    "on_message": ["hook"],
    "hostname": ["a b", "", 5],
    "require_auth": ["yes"],
    "auth": [None],
    "any_login": [1],
    "catch_all": ["nobody@example.test"],
    "route": ["b.example=127.0.0.1", {"b.example": "x:y"}, ["b.example"]],
    "relay": [("127.0.0.1", 25), "x:99999"],
    "relay_options": [[1]],
    "trace": ["yes"],
    "TLS": [{"tls_key": "key.pem"}, {"require_tls": True}, {"implicit_tls": True}],
    "tls_cert": [5],
}


@pytest.mark.parametrize("keyword", MISTAKES)
def test_a_wrong_value_is_an_error_that_names_the_keyword(store, keyword):
    for value in MISTAKES[keyword]:
        if keyword in ("address", "store"):
            args, options = (*value, store)[:2], {}
        else:
            args = FREE, store
            options = value if keyword == "TLS" else {keyword: value}
        with pytest.raises((TypeError, ValueError), match=rf"^{keyword}\b"):
            SMTPServer(*args, **options)


def test_options_that_exclude_each_other(store):
    relay = Relay(store, "x")
    for options, said in (
        ({"relay": relay, "route": {"c.test": "127.0.0.1"}}, "route"),
        ({"any_login": True, "relay": "127.0.0.1"}, "any_login"),
        ({"auth": False, "require_auth": True}, "auth"),
    ):
        with pytest.raises(ValueError, match=rf"^{said}\b"):
            SMTPServer(FREE, store, **options)


STORES = {
    "folder": [(None, {}), (5, {})],
    "users": [("spool", None), ("spool", ["a@b.test"]), ("spool", {"alice": "x"})],
    "users: a@b.test": [("spool", {"a@b.test": ""})],
    "users: the value of a@b.test": [("spool", {"a@b.test": None}), ("spool", {"a@b.test": b"x"})],
}


@pytest.mark.parametrize("keyword", STORES)
def test_a_store_with_a_wrong_value(tmp_path, monkeypatch, keyword):
    monkeypatch.chdir(tmp_path)
    for args in STORES[keyword]:
        with pytest.raises((TypeError, ValueError), match=f"^{keyword}"):
            Store(*args)


# ---- logins


def test_a_server_without_auth(store):
    with SMTPServer(FREE, store, auth=False) as smtp, smtplib.SMTP(smtp.host, smtp.port) as client:
        client.ehlo()
        assert not client.has_extn("auth")
        assert client.docmd("AUTH LOGIN")[0] == 502
        assert b"AUTH" not in client.docmd("HELP")[1]


@pytest.mark.parametrize("method", ["auth_plain", "auth_login", "auth_cram_md5"])
def test_any_login(store, method):
    """For programs whose credentials belong to another server; POP3 is not affected."""
    with SMTPServer(FREE, store, any_login=True) as smtp, POP3Server(FREE, store) as pop3:
        with smtplib.SMTP(smtp.host, smtp.port) as client:
            client.ehlo()
            client.user, client.password = "apikey", "SG.secret"
            mechanism = method.removeprefix("auth_").replace("_", "-").upper()
            assert client.auth(mechanism, getattr(client, method))[0] == 235
            client.sendmail("me@client.test", [ALICE], "Subject: x\r\n\r\n")
        client = poplib.POP3(pop3.host, pop3.port)
        client.user("apikey")
        with pytest.raises(poplib.error_proto, match="AUTH"):
            client.pass_("SG.secret")
        client.close()


@pytest.mark.parametrize("target", [True, "bob@example.test"])
def test_catch_all(store, target):
    with SMTPServer(FREE, store, catch_all=target) as smtp:
        assert send(smtp, to="customer@anywhere.test").startswith("250")
    [message] = store.messages("customer@anywhere.test")
    assert message["X-Original-To"] == "customer@anywhere.test"
    assert message["Delivered-To"] == (ALICE if target is True else target)


def test_help_of_the_classes_reads_well():
    import pydoc

    for server in (SMTPServer, POP3Server):
        text = pydoc.render_doc(server, renderer=pydoc.plaintext)
        for keyword in (
            "timeout: float | None = None",
            "intercept: ",
            "tls_self_signed: bool = False",
        ):
            assert keyword in re.sub(r"\s+", " ", text)
