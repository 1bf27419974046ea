"""From one server to the next: routes, the queue, retries, ETRN, loops (RFC 5321, 1985)."""

import errno
import gc
import json
import os
import signal
import smtplib
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from conversation import Line, play
from helpers import END_OF_DATA, FAST, ROOT, Intercept, Program, empty, pair, send_mail, until_tried

from lineserver import LineReader
from relay_simple import Outcome, Relay, read_reply
from smtpd_simple import Disconnect, SMTPServer
from store import QueuedRecipient, Store

PLAIN = "AGFsaWNlQGEuZXhhbXBsZQB3b25kZXJsYW5k"  # alice@a.example, wonderland


@pytest.fixture
def stores(tmp_path):
    a = Store(tmp_path / "a", {"alice@a.example": "wonderland", "anna@a.example": "x"}, sync=False)
    b = Store(tmp_path / "b", {"bob@b.example": "builder", "bill@b.example": "x"}, sync=False)
    return a, b


def test_one_hop(stores):
    content = b"Subject: \xe9\r\n\r\n.dot\r\n..\r\n8 bit \xff\r\nlong" + b"x" * 2000 + b"\r\n"
    with pair(stores) as (a, _):
        send_mail(a, ["bob@b.example", "bill@b.example", "anna@a.example"], content)
        [message] = stores[1].wait("bob@b.example")
        stores[1].wait("bill@b.example")
        assert empty(stores[0])
    assert len(message.get_all("Received")) == 2
    [path] = stores[1].paths("bob@b.example")
    with open(path, "rb") as file:
        assert file.read().endswith(content)
    assert len(stores[0].messages("anna@a.example")) == 1
    assert sorted(os.listdir(stores[0].queue_folder)) == ["lock", "tmp"]


def test_large_message_streams_through(stores):
    content = b"Subject: large\r\n\r\n" + b"0123456789abcde\r\n" * 200_000
    with pair(stores) as (a, _):
        send_mail(a, ["bob@b.example"], content)
        stores[1].wait("bob@b.example", timeout=10)
    [path] = stores[1].paths("bob@b.example")
    with open(path, "rb") as file:
        assert file.read().endswith(content)


def test_one_data_is_one_message_at_the_next_host_too(stores):
    """Every variant of an end of data that is none: nothing behind it becomes a command there."""
    inside = b"MAIL FROM:<evil@x.test>\r\nRCPT TO:<bill@b.example>\r\nDATA\r\nSubject: smuggled\r\n\r\nx\r\n"
    content = b"Subject: outer\r\n\r\n" + b"".join(
        b"x" + end + inside for end in END_OF_DATA.values()
    )
    hook = Intercept()
    with pair(stores, b_options={"intercept": hook}) as (a, _), Line(a.host, a.port) as client:
        client.reply()
        for command in (
            "EHLO x",
            f"AUTH PLAIN {PLAIN}",
            "MAIL FROM:<>",
            "RCPT TO:<bob@b.example>",
            "DATA",
        ):
            client.ask(command)
        client.send(content + b".\r\n")
        assert client.reply().startswith("250")
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert [verb for verb, _ in hook.seen] == [
        "CONNECT",
        "EHLO",
        "MAIL",
        "RCPT",
        "DATA",
        ".",
        "QUIT",
    ]
    assert stores[1].messages("bill@b.example") == []
    with open(stores[1].paths("bob@b.example")[0], "rb") as file:
        assert file.read().count(b"Subject: smuggled") == len(END_OF_DATA)


WHO_MAY = {
    "not logged in": (False, "bob@b.example", "550 5.7.1 *log in*"),
    "logged in, with a route": (True, "bob@b.example", "250 2.1.5 *"),
    "logged in, without a route": (True, "x@c.example", "550 5.7.1 *no route*"),
    "a subdomain has no route": (True, "x@sub.b.example", "550 5.7.1 *no route*"),
    "nobody of ours": (True, "nobody@a.example", "550 5.1.1 *"),
    "percent hack": (False, "bob%b.example@a.example", "550 5.1.1 *"),
    "bang path": (False, "b.example!bob@a.example", "550 5.1.1 *"),
    "an address in quotes": (False, '"bob@b.example"@a.example', "550 5.1.1 *"),
    "a source route": (False, "@a.example:bob@b.example", "550 5.7.1 *"),
    "an address literal": (False, "bob@[127.0.0.1]", "550 5.7.1 *"),
}


@pytest.mark.parametrize("case", WHO_MAY)
def test_who_may_send_where(stores, case):
    login, to, wanted = WHO_MAY[case]
    script = (
        "S: 220 *\nC: EHLO x\nS: 250-*\n...\nS: 250 *\n"
        + f"C: AUTH PLAIN {PLAIN}\nS: 235 *\n" * login
    )
    with pair(stores) as (a, _):
        play(
            a,
            f"{script}C: MAIL FROM:<alice@a.example>\nS: 250 *\nC: RCPT TO:<{to}>\nS: {wanted}",
            case,
        )


def test_the_more_exact_route_wins():
    relay = Relay(None, "x", "default.test:2525", {"B.example": "b.test", "c.example": "[::1]:26"})
    assert relay.routing.next_host("b.EXAMPLE") == ("b.test", 25)
    assert relay.routing.next_host("c.example") == ("::1", 26)
    assert relay.routing.next_host("sub.b.example") == ("default.test", 2525)


@pytest.mark.parametrize("bad", ["", "x:", "x:y", "x:0", "x:70000", "[::1", "[::1]25", ":25"])
def test_bad_routes(stores, bad):
    with pytest.raises(ValueError, match=r"HOST|route"):
        SMTPServer(("127.0.0.1", 0), stores[0], route=[f"b.example={bad}"])


def test_a_catch_all_gives_way_to_a_route(tmp_path):
    store = Store(tmp_path, {"alice@a.example": "wonderland", "*": "alice@a.example"})
    with SMTPServer(
        ("127.0.0.1", 0), store, route=["b.example=127.0.0.1:1"], relay_options={"first_pause": 60}
    ) as a:
        send_mail(a, ["x@b.example", "x@c.example"])
    assert len(store.messages("alice@a.example")) == len(store.queued()) == 1


@pytest.mark.parametrize("verb", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "DOT"])
@pytest.mark.parametrize("what", ["451 4.3.0 not now", "421 4.3.2 going down", Disconnect])
def test_a_next_host_that_fails_twice_and_then_accepts(stores, verb, what):
    """At every step of the dialogue: the message waits, is tried again, and arrives once."""
    hook = Intercept(**{verb: [what, what]})
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example"])
        stores[1].wait("bob@b.example", timeout=10)
        assert empty(stores[0])
    assert len(stores[1].messages("bob@b.example")) == 1
    assert not any(hook.replies.values())


def test_a_next_host_that_is_down_comes_up(stores, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = {"route": [f"b.example=127.0.0.1:{port}"], "relay_options": FAST}
    with SMTPServer(("127.0.0.1", 0), stores[0], **options) as a:
        send_mail(a, ["bob@b.example"])
        assert "refused" in until_tried(stores[0]).diagnostic
        with SMTPServer(("127.0.0.1", port), stores[1]):
            stores[1].wait("bob@b.example")
            assert empty(stores[0])


def test_a_host_that_is_down_holds_up_no_other(stores):
    """The one that does not answer is tried in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as silent, pair(stores) as (a, b):
        routes = {
            "b.example": f"127.0.0.1:{b.port}",
            "c.example": f"127.0.0.1:{silent.getsockname()[1]}",
        }
        options = {"route": routes, "relay_options": {**FAST, "timeout": 1}}
        with SMTPServer(("127.0.0.1", 0), a.store, **options) as other:
            a.relay.stop()
            for _ in range(3):
                send_mail(other, ["x@c.example"])
            send_mail(other, ["bob@b.example"])
            stores[1].wait("bob@b.example", timeout=5)


def test_one_recipient_is_accepted_and_another_refused(stores):
    """The one is served, the other comes back as a report; neither is sent again."""
    with pair(stores) as (a, _):
        send_mail(a, ["bob@b.example", "nobody@b.example"])
        stores[1].wait("bob@b.example")
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    status = report.get_payload(1).get_payload()
    assert [part["Final-Recipient"] for part in status[1:]] == ["rfc822;nobody@b.example"]
    assert status[1]["Status"] == "5.1.1"
    assert len(stores[1].messages("bob@b.example")) == 1


def test_one_recipient_waits_and_another_is_never_sent_to_again(stores):
    hook = Intercept()
    count = []

    def later(session, verb, argument):
        hook(session, verb, argument)
        if verb == "RCPT" and "bill" in argument and len(count) < 2:
            count.append(1)
            return "450 4.2.1 later"
        return None

    with pair(stores, b_options={"intercept": later}) as (a, _):
        send_mail(a, ["bob@b.example", "bill@b.example"])
        stores[1].wait("bill@b.example")
        assert empty(stores[0])
    assert [len(stores[1].messages(f"{name}@b.example")) for name in ("bob", "bill")] == [1, 1]
    assert [argument for verb, argument in hook.seen if verb == "RCPT" and "bob" in argument] == [
        "TO:<bob@b.example>"
    ]


def test_one_transaction_for_the_recipients_of_one_host(stores):
    hook = Intercept()
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example", "bill@b.example"])
        stores[1].wait("bill@b.example")
        assert empty(stores[0])
    assert [verb for verb, _ in hook.seen].count("MAIL") == 1


def test_recipients_that_wait_together_are_tried_together(stores):
    """However often: a message for many at one host goes there once."""
    names = [f"user{n}" for n in range(100)]
    store = Store(
        f"{stores[1].folder}2",
        dict.fromkeys((f"{name}@b.example" for name in names), "x"),
        sync=False,
    )
    hook = Intercept(RCPT=["450 4.2.1 later"] * 200)
    pauses = {**FAST, "first_pause": 0.3, "longest_pause": 0.3}
    with pair((stores[0], store), pauses, {"intercept": hook}) as (a, _):
        send_mail(a, [f"{name}@b.example" for name in names])
        until_tried(stores[0])
        assert len({round(r.next_try, 1) for r in stores[0].queued()[0].recipients}) == 1
        store.wait("user99@b.example")
        assert empty(stores[0])
    assert [verb for verb, _ in hook.seen if verb in ("MAIL", "DATA")] == [
        "MAIL",
        "MAIL",
        "MAIL",
        "DATA",
    ]


def report_at_the_end(stores, **replies):
    """Send to a host that never takes the message; return the report that comes in the end, and its fields on bob."""
    with pair(stores, {**FAST, "lifetime": 0.3}, {"intercept": Intercept(**replies)}) as (a, _):
        send_mail(a, ["bob@b.example"])
        [report] = stores[0].wait("alice@a.example", timeout=10)
        assert empty(stores[0])
    return report, report.get_payload(1).get_payload()[1]


def test_it_gives_up_at_the_end(stores):
    _, status = report_at_the_end(stores, RCPT=["450 4.2.1 mailbox busy"] * 1000)
    assert status["Action"] == "failed"
    assert "mailbox busy" in status["Diagnostic-Code"]
    assert stores[1].messages("bob@b.example") == []


def test_pauses_grow():
    relay = Relay(None, "x", "y", first_pause=60, longest_pause=4 * 3600)
    recipient, pauses = QueuedRecipient("x@y"), []
    for _ in range(10):
        outcome = Outcome("delayed", "4.0.0", "later")
        relay.record_outcome(recipient, outcome, ("y", 25), age=0)
        pauses.append(relay.pause_after(recipient, age=0) / 60)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 240, 240]


def test_extensions_are_passed_on_as_offered(stores):
    hook = Intercept()
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(
            a,
            ["bob@b.example"],
            "Subject: x\r\n\r\n",
            True,
            ["BODY=8BITMIME", "RET=HDRS", "ENVID=e1"],
            ["NOTIFY=FAILURE"],
        )
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    [path] = stores[1].paths("bob@b.example")
    with open(path, "rb") as file:
        size = (
            len(
                file.read()
                .partition(b"Delivered-To: bob@b.example\r\n")[2]
                .partition(b"\r\nReceived: ")[2]
            )
            + 10
        )
    said = dict(hook.seen)
    assert said["MAIL"] == f"FROM:<alice@a.example> SIZE={size} BODY=8BITMIME RET=HDRS ENVID=e1"
    assert said["RCPT"] == "TO:<bob@b.example> NOTIFY=FAILURE"


def test_a_host_without_extensions_gets_none(stores):
    hook = Intercept(EHLO=["500 5.5.1 what?"])
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(
            a,
            ["bob@b.example"],
            b"Subject: \xff\r\n\r\n",
            True,
            ["BODY=8BITMIME"],
            ["NOTIFY=FAILURE"],
        )
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert ("MAIL", "FROM:<alice@a.example>") in hook.seen
    assert ("RCPT", "TO:<bob@b.example>") in hook.seen


SMTPUTF8 = {  # sender, recipients, Subject: which fail at a host that does not offer it, with which status
    ("alice@a.example", "bob@b.example", "x"): {},
    ("alice@a.example", "bob@b.example", "é"): {"rfc822;bob@b.example": "5.6.9"},
    ("alicé@a.example", "bob@b.example", "x"): {"rfc822;bob@b.example": "5.6.7"},
    ("alice@a.example", "bob@b.example bøb@b.example", "x"): {"utf-8;b\\x{F8}b@b.example": "5.6.7"},
}


@pytest.mark.parametrize("mail", SMTPUTF8, ids=ascii)
@pytest.mark.parametrize("offered", [True, False])
def test_smtputf8_goes_only_where_it_is_offered(tmp_path, offered, mail):
    """What does not need it goes without; what does comes back with the reason."""
    a = Store(tmp_path / "a", {"alice@a.example": "wonderland", "alicé@a.example": "x"}, sync=False)
    b = Store(tmp_path / "b", {"bob@b.example": "x", "bøb@b.example": "x"}, sync=False)
    sender, recipients, subject = mail
    hook = Intercept()

    def plain(session, verb, argument):
        hook(session, verb, argument)
        if verb != "EHLO" or offered:
            return None
        session.helo = argument
        return "250 plain.example"

    with (
        pair((a, b), b_options={"intercept": plain}) as (server, _),
        Line(server.host, server.port) as client,
    ):
        client.reply()
        client.ask("EHLO x")
        client.ask(f"AUTH PLAIN {PLAIN}")
        client.ask(f"MAIL FROM:<{sender}> SMTPUTF8")
        for recipient in recipients.split():
            assert client.ask(f"RCPT TO:<{recipient}>").startswith("250")
        client.ask("DATA")
        client.send(f"Subject: {subject}\r\n\r\nx\r\n.\r\n".encode())
        assert client.reply().startswith("250")
        assert empty(a)
    failed = {} if offered else SMTPUTF8[mail]
    reported = {}
    for report in a.messages(sender):
        for about in report.get_payload(1).get_payload()[1:]:
            reported[about["Final-Recipient"]] = about["Status"]
    assert reported == failed
    assert sum(len(b.messages(name)) for name in b.users.accounts.values()) == len(
        recipients.split()
    ) - len(failed)
    assert all(
        ("SMTPUTF8" in argument) is offered for verb, argument in hook.seen if verb == "MAIL"
    )


def test_what_a_host_says_out_of_step_is_no_diagnostic(stores):
    """250 to DATA: nothing has been sent that could have been taken, and no reply is made up for the report."""
    report, about = report_at_the_end(stores, DATA=["250 2.0.0 what"] * 1000)
    assert (about["Status"], about["Diagnostic-Code"]) == ("5.4.7", None)
    assert "answered DATA with 250 2.0.0 what" in report.get_payload(0).get_content()
    assert stores[1].messages("bob@b.example") == []


def test_tls_when_the_next_host_offers_it(stores, certificate):
    tls = {"tls_cert": certificate[0], "tls_key": certificate[1]}
    with pair(stores, b_options=tls) as (a, _):
        send_mail(a, ["bob@b.example"])
        [message] = stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert "with ESMTPS id" in " ".join(message["Received"].split())


def test_in_clear_when_its_tls_is_broken(stores, certificate):
    """Better in clear than not at all: nobody has asked for TLS."""
    hook = Intercept(STARTTLS=["220 2.0.0 go", "220 2.0.0 go"])
    tls = {"tls_cert": certificate[0], "tls_key": certificate[1], "intercept": hook}
    with pair(stores, b_options=tls) as (a, _):
        send_mail(a, ["bob@b.example"])
        [message] = stores[1].wait("bob@b.example", timeout=10)
        assert empty(stores[0])
    assert "with ESMTP id" in " ".join(message["Received"].split())


def test_in_clear_when_it_refuses_tls_for_now(stores, certificate):
    hook = Intercept(STARTTLS=["454 4.7.0 not now"])
    tls = {"tls_cert": certificate[0], "tls_key": certificate[1], "intercept": hook}
    with pair(stores, b_options=tls) as (a, _):
        send_mail(a, ["bob@b.example"])
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert [verb for verb, _ in hook.seen].count("CONNECT") == 1


def test_ehlo_that_is_refused_for_now_is_not_helo(stores, certificate):
    """4yz means later, also behind STARTTLS: extensions must not be lost, nor mail returned."""
    hook = Intercept(EHLO=["421 4.3.2 later", None, "451 4.3.0 later"])
    tls = {"tls_cert": certificate[0], "tls_key": certificate[1], "intercept": hook}
    with pair(stores, b_options=tls) as (a, _):
        send_mail(a, ["bob@b.example"], mail_options=["ENVID=e1"])
        [message] = stores[1].wait("bob@b.example", timeout=10)
        assert empty(stores[0])
    assert "HELO" not in [verb for verb, _ in hook.seen]
    assert "ENVID=e1" in dict(hook.seen)["MAIL"]
    assert "with ESMTPS id" in " ".join(message["Received"].split())
    assert stores[0].messages("alice@a.example") == []


def test_in_clear_when_the_handshake_is_cut(stores, certificate):
    """220, and then the line is dropped without TLS having said a word."""

    def cut(session, verb, argument):
        if verb == "STARTTLS":
            session.reply("220 2.0.0 go")
            session.flush()
            session.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise Disconnect

    tls = {"tls_cert": certificate[0], "tls_key": certificate[1], "intercept": cut}
    with pair(stores, b_options=tls) as (a, _):
        send_mail(a, ["bob@b.example"])
        stores[1].wait("bob@b.example", timeout=10)
        assert empty(stores[0])


def hang_up_in_the_middle(listener):
    """Be a host that says 552 in the middle of a message and closes on what still comes."""
    with listener.accept()[0] as sock, sock.makefile("rb") as lines:
        sock.sendall(b"220 b.example\r\n")
        for line in lines:
            if line.startswith(b"DATA"):
                sock.sendall(b"354 go\r\n")
                lines.read(100_000)
                sock.sendall(b"552 5.3.4 too much\r\n")
                return
            sock.sendall(b"250 ok\r\n")


def test_a_refusal_before_the_message_has_ended_is_heard(stores):
    """It is not sent the same again for five days."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = threading.Thread(target=hang_up_in_the_middle, args=(listener,))
        host.start()
        options = {
            "hostname": "a.example",
            "relay": f"127.0.0.1:{listener.getsockname()[1]}",
            "relay_options": FAST,
        }
        with SMTPServer(("127.0.0.1", 0), stores[0], **options) as a:
            send_mail(
                a, ["bob@b.example"], b"Subject: big\r\n\r\n" + b"0123456789abcde\r\n" * 1_000_000
            )
            [report] = stores[0].wait("alice@a.example", timeout=10)
            assert empty(stores[0])
        host.join()
    assert (
        report.get_payload(1)
        .get_payload()[1]["Diagnostic-Code"]
        .startswith("smtp; 552 5.3.4 too much")
    )


def test_a_host_that_wants_no_mail_says_so_in_the_report(stores):
    """554 instead of a greeting: tried until the end, and then the report has what it said."""
    _, about = report_at_the_end(stores, CONNECT=["554 5.7.1 no mail here"] * 1000)
    assert (about["Status"], about["Diagnostic-Code"]) == ("5.4.7", "smtp; 554 5.7.1 no mail here")


def test_an_address_given_twice_is_sent_to_once(stores):
    hook = Intercept()
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example", "bob@b.example"])
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert [verb for verb, _ in hook.seen].count("RCPT") == 1


def test_vrfy_of_an_address_elsewhere(stores):
    """252 where a route leads (RFC 5321 3.5.3), 550 where none does."""
    with pair(stores) as (a, _), Line(a.host, a.port) as client:
        client.reply()
        assert client.ask("VRFY bob@b.example").startswith("252")
        assert client.ask("VRFY bob@c.example").startswith("550")
        assert client.ask("VRFY nobody@a.example").startswith("550")


REPLIES = {
    b"250 2.1.0 ok\r\n": (250, b"2.1.0 ok"),
    b"250-one\r\n250-two\r\n250 three\r\n": (250, b"one\ntwo\nthree"),
    b"250\r\n": (250, b""),
    b"250-one\n250 two\n": (250, b"one\ntwo"),
    b"": ConnectionError,
    b"250-one\r\n": ConnectionError,
    b"hello\r\n": ConnectionError,
    b"700 what\r\n": ConnectionError,
    b"250-" + b"x" * 5000 + b"\r\n250 ok\r\n": ConnectionError,
    b"250-for ever\r\n" * 1000: ConnectionError,
}


@pytest.mark.parametrize("said", REPLIES, ids=lambda said: repr(said[:20]))
def test_a_next_hosts_reply_has_an_end(said):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        reader = LineReader(ours, lambda: None)
        if isinstance(REPLIES[said], tuple):
            assert read_reply(reader, 5) == REPLIES[said]
        else:
            with pytest.raises(REPLIES[said]):
                read_reply(reader, 5)


def test_a_next_hosts_reply_has_a_deadline():
    """For all of it: one that says a word now and then does not hold the relay."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = LineReader(ours, lambda: None)
        done = threading.Event()

        def dawdle():
            while not done.wait(0.1):
                theirs.sendall(b"2")

        thread = threading.Thread(target=dawdle)
        thread.start()
        try:
            with pytest.raises(TimeoutError):
                read_reply(reader, 0.3)
        finally:
            done.set()
            thread.join()


OUTCOMES = {
    (250, b"2.0.0 Ok"): ("relayed", "2.0.0"),
    (250, b"Ok"): ("relayed", "2.0.0"),
    (451, b"4.3.0 later"): ("delayed", "4.3.0"),
    (550, b"5.1.1 nobody"): ("failed", "5.1.1"),
    (550, b"2.1.0 says one thing and means another"): ("failed", "5.0.0"),
    (354, b"what?"): ("delayed", "4.0.0"),
}


@pytest.mark.parametrize("reply", OUTCOMES)
def test_outcomes(reply):
    outcome = Outcome.from_reply(*reply)
    assert (outcome.action, outcome.status) == OUTCOMES[reply]


def test_a_route_that_leads_back_to_ourselves(stores):
    """It ends here (nobody logs in on the way back) and comes back as a report."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with SMTPServer(
        ("127.0.0.1", port), stores[0], relay=f"127.0.0.1:{port}", relay_options=FAST
    ) as a:
        send_mail(a, ["x@nowhere.example"])
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    assert report.get_payload(1).get_payload()[1]["Status"] == "5.7.1"


def test_three_servers_are_a_small_internet(stores, tmp_path):
    """alice@a writes to b, which sends on to c, which does not know the name: b reports to alice at a."""
    c_store = Store(tmp_path / "c", {"carol@c.example": "x"}, sync=False)
    with SMTPServer(("127.0.0.1", 0), c_store, hostname="c.example") as c, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        a_port = taken.getsockname()[1]
        taken.close()
        routes = {"c.example": f"127.0.0.1:{c.port}", "a.example": f"127.0.0.1:{a_port}"}
        b_options = {"hostname": "b.example", "route": routes, "relay_options": FAST}
        with (
            SMTPServer(("127.0.0.1", 0), stores[1], **b_options) as b,
            SMTPServer(("127.0.0.1", a_port), stores[0], hostname="a.example"),
            smtplib.SMTP(b.host, b.port) as client,
        ):
            client.login("bob", "builder")
            client.sendmail(
                "alice@a.example", ["nobody@c.example", "carol@c.example"], "Subject: hi\r\n\r\n"
            )
            c_store.wait("carol@c.example")
            [report] = stores[0].wait("alice@a.example")
            assert empty(stores[1])
    assert report["Return-Path"] == "<>"
    assert "b.example" in report["From"]


# ---- ETRN


def test_etrn(stores, monkeypatch):
    """250 for all, 251 nothing waiting, 253 with a count, 459 without a route (RFC 1985 5.3)."""
    monkeypatch.setattr("relay_simple.ETRN_PAUSE", 0.0)
    hook = Intercept(RCPT=["450 4.2.1 later"])
    slow = {**FAST, "first_pause": 3600, "longest_pause": 3600}
    with pair(stores, slow, {"intercept": hook}) as (a, _), Line(a.host, a.port) as client:
        client.reply()
        client.ask("EHLO x")
        assert client.ask("ETRN b.example").startswith("251 2.0.0")
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
        assert client.ask("ETRN c.example").startswith("459 4.7.1")
        assert client.ask("ETRN @example").startswith("253 2.0.0 1 ")
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
        assert client.ask("ETRN #").startswith("251 ")
        hook.replies["RCPT"].append("450 4.2.1 later")
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
        assert client.ask("ETRN #").startswith("250 ")
        stores[1].wait("bob@b.example", count=2)


def test_etrn_says_when_it_cannot(stores, monkeypatch):
    with pair(stores) as (a, _), Line(a.host, a.port) as client:
        client.reply()

        def fail():
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(a.store, "queue_names", fail)
        assert client.ask("ETRN b.example").startswith("458 4.3.0")
        monkeypatch.undo()


def test_no_request_to_start_is_lost(stores):
    """Not even one that is made while the worker looks for such requests."""
    wanted, seen = [f"{n}.example" for n in range(500)], []
    thread = threading.Thread(target=lambda: [stores[0].ask_for_start(node) for node in wanted])
    thread.start()
    while thread.is_alive():
        seen += stores[0].take_start_requests()
    assert sorted(seen + stores[0].take_start_requests()) == sorted(wanted)


# ---- the queue on disk


def test_accepted_whole_or_not_at_all(stores, monkeypatch):
    """A disk that is full when the envelope is written: nobody gets the message."""
    real = os.write

    def write(fd, data):
        if bytes(data).startswith(b'{"id"'):
            raise OSError(28, "No space left on device")
        return real(fd, data)

    with pair(stores) as (a, _):
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(smtplib.SMTPDataError) as error:
            send_mail(a, ["anna@a.example", "bob@b.example"])
        monkeypatch.undo()
    assert error.value.smtp_code == 452
    assert stores[0].messages("anna@a.example") == stores[0].queued() == []
    assert os.listdir(f"{stores[0].queue_folder}/tmp") == []


def test_the_queue_survives_a_kill(tmp_path):
    """A process that is killed with a full queue: after a restart everything arrives, once."""
    users = tmp_path / "users.txt"
    users.write_text("alice@a.example:wonderland\n")
    b_store = Store(tmp_path / "b", {"bob@b.example": "x"}, sync=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    argv = [
        "--port",
        0,
        "--users",
        users,
        "--spool",
        tmp_path / "a",
        "--route",
        f"b.example=127.0.0.1:{port}",
    ]
    with Program(*argv) as program:
        for n in range(20):
            send_mail(program, ["bob@b.example"], f"Subject: {n}\r\n\r\n")
        program.stop(signal.SIGKILL)
    out = subprocess.run(
        [sys.executable, ROOT / "store.py", "queue", "--users", users, "--spool", tmp_path / "a"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.count("from <alice@a.example>\tto bob@b.example") == 20
    for path in (tmp_path / "a" / "queue").glob("*.json"):
        entry = json.loads(path.read_text())
        entry["recipients"][0]["next_try"] = 0
        path.write_text(json.dumps(entry))
    with SMTPServer(("127.0.0.1", port), b_store), Program(*argv) as program:
        found = b_store.wait("bob@b.example", count=20, timeout=15)
        assert sorted(int(message["Subject"]) for message in found) == list(range(20))
        assert empty(Store(tmp_path / "a", users))
        assert program.stop()[0] == 0
    assert len(b_store.messages("bob@b.example")) == 20


def test_a_shortage_behind_the_250_sends_nothing_twice(stores, monkeypatch):
    """The next host has taken it, and just then no file can be opened."""
    real, failed = stores[0].entry, []

    def envelope(name):
        ours = threading.current_thread() is threading.main_thread()
        if stores[1].paths("bob@b.example") and not failed and not ours:
            failed.append(name)
            raise OSError(errno.EMFILE, "too many open files")
        return real(name)

    monkeypatch.setattr(stores[0], "entry", envelope)
    with pair(stores) as (a, _):
        send_mail(a, ["bob@b.example"])
        assert empty(stores[0])
        send_mail(a, ["bob@b.example"])
        assert empty(stores[0])
    assert failed
    assert len(stores[1].messages("bob@b.example")) == 2


def test_the_reply_to_a_message_may_take_its_time(stores):
    """RFC 5321 4.5.3.2.6: longer than other replies, for who does not wait gets a duplicate made."""

    def scan(session, verb, argument):
        if verb == ".":
            session.server.stopping.wait(0.5)

    with pair(stores, {**FAST, "timeout": 0.2}, {"intercept": scan}) as (a, _):
        send_mail(a, ["bob@b.example"])
        assert empty(stores[0])
    assert len(stores[1].messages("bob@b.example")) == 1


def test_who_asks_often_does_not_make_us_knock_as_often(stores, monkeypatch):
    monkeypatch.setattr("relay_simple.ETRN_PAUSE", 1000)
    hook = Intercept(RCPT=["450 4.2.1 busy"] * 1000)
    with (
        pair(stores, {"first_pause": 1000}, {"intercept": hook}) as (a, _),
        Line(a.host, a.port) as client,
    ):
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
        client.reply()
        for _ in range(20):
            assert client.ask("ETRN b.example").startswith("253 2.0.0 1 message waiting")
        send_mail(a, ["bill@b.example"])  # tried, so those requests have been seen before
        deadline = time.monotonic() + 5
        while not all(entry.recipients[0].attempts for entry in stores[0].queued()):
            assert time.monotonic() < deadline
        assert [verb for verb, _ in hook.seen].count("CONNECT") == 2


def test_a_message_whose_text_is_gone_comes_to_an_end(stores):
    hook = Intercept(RCPT=["450 4.2.1 later"])
    with pair(stores, {"first_pause": 1000}, {"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
        [entry] = stores[0].queued()
        os.unlink(f"{stores[0].queue_folder}/{entry.id}")
    entry.recipients[0].next_try = 0.0
    stores[0].save_entry(entry)
    with pair(stores, {**FAST, "lifetime": 0}):
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    assert report.get_payload(1).get_payload()[1]["Action"] == "failed"


def test_a_disk_that_fails_behind_the_250_keeps_no_connection(stores, monkeypatch):
    def dequeue(name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(stores[0], "dequeue", dequeue)
    with pair(stores) as (a, b):
        send_mail(a, ["bob@b.example"])
        stores[1].wait("bob@b.example")
        deadline = time.monotonic() + 5
        while a.relay.clients or b.sessions:
            assert time.monotonic() < deadline
    assert len(stores[1].messages("bob@b.example")) == 1


def test_a_relay_that_is_stopped_sends_no_more(stores):
    """A thread that still waits for a next host's greeting is cut short."""
    stopped = threading.Event()

    def late(session, verb, argument):
        if verb == "CONNECT":
            stopped.wait(10)

    hook = Intercept()
    with (
        SMTPServer(
            ("127.0.0.1", 0), stores[1], intercept=lambda *said: late(*said) or hook(*said)
        ) as b,
        SMTPServer(("127.0.0.1", 0), stores[0], relay=f"127.0.0.1:{b.port}") as a,
    ):
        send_mail(a, ["bob@b.example"])
        while not a.relay.active:
            pass
        a.relay.stop(0)
        assert not a.relay.active
        stopped.set()
    assert "MAIL" not in [verb for verb, _ in hook.seen]


def test_the_end_of_a_message_is_not_held_back(stores):
    """A small packet behind a large one waits 40 ms for an acknowledgement, unless the socket says otherwise."""
    with pair(stores) as (a, b):
        client = a.relay.connect(("127.0.0.1", b.port))
        assert client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        a.relay.leave(client)


def test_a_stop_waits_for_what_is_just_starting(stores, monkeypatch):
    """The worker is in the middle of its round when the stop comes; nothing goes on behind it."""
    send_what_is_due, serve_host = Relay.send_what_is_due, Relay.serve_host

    def late(relay):
        relay.stopping.wait()
        return send_what_is_due(relay)

    def slow(*args):
        threading.Event().wait(0.2)
        serve_host(*args)

    with SMTPServer(
        ("127.0.0.1", 0), stores[0], relay="127.0.0.1:1", relay_options={"first_pause": 0.001}
    ) as a:
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
    monkeypatch.setattr(Relay, "send_what_is_due", late)
    monkeypatch.setattr(Relay, "serve_host", slow)
    relay = Relay(stores[0], "a.example", "127.0.0.1:1")
    relay.start()
    while not relay.entries:
        stores[0].queue_changed.wait(0.01)
    relay.stop()
    assert [thread for thread in threading.enumerate() if thread.name == "relay"] == []


def test_a_shared_relay_outlives_one_of_its_servers(stores):
    with SMTPServer(("127.0.0.1", 0), stores[1]) as b:
        relay = Relay(stores[0], "a.example", f"127.0.0.1:{b.port}", **FAST)
        with SMTPServer(("127.0.0.1", 0), stores[0], relay=relay) as first:
            with SMTPServer(("127.0.0.1", 0), stores[0], relay=relay):
                pass
            send_mail(first, ["bob@b.example"])
            stores[1].wait("bob@b.example")
        relay.stop()


def test_one_process_works_on_the_queue(stores):
    with pair(stores) as (a, _):
        send_mail(a, ["bob@b.example"])
        stores[1].wait("bob@b.example")
        assert stores[0].lock_queue() is None
    fd = stores[0].lock_queue()
    assert fd is not None
    os.close(fd)


RECIPIENT = {"address": "x@b.example", "notify": None, "orcpt": None, "attempts": 0}
RECIPIENT |= {"next_try": 0.0, "diagnostic": "", "warned": False}
ENTRY = {"id": "AAAA", "sender": "", "parameters": {}, "recipients": [RECIPIENT]}
DAMAGED = {  # what is in the file: what the log says about it
    "cut off": ("{", "property name"),
    "a list": ([], "TypeError"),
    "another's id": (ENTRY | {"id": "BBBB"}, "not those of this message"),
    "no sender": ({k: ENTRY[k] for k in ENTRY if k != "sender"}, "KeyError: 'sender'"),
    "no recipients": (ENTRY | {"recipients": 1}, "TypeError"),
    "a recipient that is a number": (ENTRY | {"recipients": [1]}, "TypeError"),
    "a recipient without an address": (ENTRY | {"recipients": [{}]}, "KeyError: 'address'"),
    "a command in an address": (
        ENTRY | {"recipients": [RECIPIENT | {"address": "x@b.example>\r\nQUIT"}]},
        "address is 'x@b.example>",
    ),
    "a command in a sender": (ENTRY | {"sender": "x>\r\nQUIT"}, "not those of this message"),
    "a number for NOTIFY": (ENTRY | {"recipients": [RECIPIENT | {"notify": 1}]}, "notify is 1"),
    "a text for a time": (
        ENTRY | {"recipients": [RECIPIENT | {"next_try": "x"}]},
        "next_try is 'x'",
    ),
    "a number for a flag": (ENTRY | {"recipients": [RECIPIENT | {"warned": 2}]}, "warned is 2"),
    "nested too deep": ("[" * 100_000, "RecursionError"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_entry_stops_no_other(stores, caplog, kind):
    content, fault = DAMAGED[kind]
    with open(f"{stores[0].queue_folder}/AAAA.json", "w") as file:
        file.write(content if isinstance(content, str) else json.dumps(content))
    with open(f"{stores[0].queue_folder}/1.start", "wb") as file:
        file.write(b"\xff")
    with pair(stores) as (a, _):
        for n in range(1, 4):
            send_mail(a, ["bob@b.example"])
            stores[1].wait("bob@b.example", n)
    [line] = [
        record.getMessage() for record in caplog.records if "AAAA.json" in record.getMessage()
    ]
    assert "not an entry" in line
    assert fault in line


def test_a_good_entry_is_none_of_the_damaged(stores):
    """Or each row above could be refused for another reason than its name says."""
    with open(f"{stores[0].queue_folder}/AAAA.json", "w") as file:
        json.dump(ENTRY, file)
    [entry] = stores[0].queued()
    assert (entry.id, entry.recipients[0].address) == ("AAAA", "x@b.example")


ODD = {
    "a folder": os.mkdir,
    "a FIFO": os.mkfifo,
    "a link to itself": lambda path: os.symlink(os.path.basename(path), path),
}


@pytest.mark.parametrize("name", ["AA.json", "1.start"])
@pytest.mark.parametrize("kind", ODD)
def test_an_entry_that_is_not_a_file_stops_no_other(stores, caplog, kind, name):
    """It holds no thread, and is logged once."""
    ODD[kind](f"{stores[0].queue_folder}/{name}")
    with pair(stores) as (a, _):
        for n in range(1, 4):
            send_mail(a, ["bob@b.example"])
            stores[1].wait("bob@b.example", n)
    assert sum(name[:2] in record.getMessage() for record in caplog.records) <= 1
    assert "Traceback" not in caplog.text


def test_mail_that_has_lost_its_route_comes_back_in_the_end(stores):
    options = {"hostname": "a.example", "relay_options": {"first_pause": 60}}
    with SMTPServer(("127.0.0.1", 0), stores[0], route=["b.example=127.0.0.1:1"], **options) as a:
        send_mail(a, ["bob@b.example"])
    [entry] = stores[0].queued()
    entry.recipients[0].next_try = 0.0
    stores[0].save_entry(entry)
    options["relay_options"] = {"lifetime": 0}
    with SMTPServer(("127.0.0.1", 0), stores[0], **options):
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    assert report.get_payload(1).get_payload()[1]["Status"] == "5.4.7"
    assert "no route" in report.as_string()


def test_a_message_taken_out_of_the_queue_while_it_is_tried(stores, caplog):
    """`Store.clear` between two tests, or an operator's rm: no traceback, and it does not come back."""

    def take_away(session, verb, argument):
        if verb == "MAIL":
            stores[0].clear()
            return "451 4.3.0 later"
        return None

    with pair(stores, b_options={"intercept": take_away}) as (a, _):
        for _ in range(3):
            send_mail(a, ["bob@b.example"])
        assert empty(stores[0])
    assert "Traceback" not in caplog.text


# ---- clocks, codes and replies


@pytest.mark.parametrize("years", [3, -50])
def test_a_clock_that_was_wrong_neither_strands_nor_bounces_mail(stores, monkeypatch, years):
    """It is set after the first try: ETRN starts the mail, and one more failure is not the last."""
    real, hook = time.time, Intercept(RCPT=["450 4.2.1 later"] * 2)
    slow = {"first_pause": 3600, "longest_pause": 3600, "timeout": 5}
    monkeypatch.setattr("relay_simple.ETRN_PAUSE", 0.0)
    with pair(stores, slow, {"intercept": hook}) as (a, _), Line(a.host, a.port) as client:
        client.reply()
        client.ask("EHLO x")
        monkeypatch.setattr(time, "time", lambda: real() + years * 365 * 86400)
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
        monkeypatch.setattr(time, "time", real)
        assert client.ask("ETRN b.example").startswith("253 ")
        deadline = time.monotonic() + 5
        while stores[0].queued()[0].recipients[0].attempts < 2:
            assert time.monotonic() < deadline
        assert client.ask("ETRN b.example").startswith("253 ")
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert stores[0].messages("alice@a.example") == []


@pytest.mark.parametrize("years", [0, 3, -50])
def test_a_restart_with_another_clock(stores, monkeypatch, years):
    """What was put off until the year 2029 is tried after the longest pause, and not given up."""
    real = time.time
    options = {"hostname": "a.example", "relay": "127.0.0.1:1", "relay_options": FAST}
    monkeypatch.setattr(time, "time", lambda: real() + years * 365 * 86400)
    with SMTPServer(("127.0.0.1", 0), stores[0], **options) as a:
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
    monkeypatch.setattr(time, "time", real)
    with SMTPServer(("127.0.0.1", 0), stores[1], hostname="b.example") as b:
        options["relay"] = f"127.0.0.1:{b.port}"
        with SMTPServer(("127.0.0.1", 0), stores[0], **options):
            stores[1].wait("bob@b.example")
            assert empty(stores[0])
    assert stores[0].messages("alice@a.example") == []


def test_replies_that_arrive_together_are_read_one_after_the_other():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"354 go\r\n552-5.3.4 too\r\n552 much\r\n")
        theirs.shutdown(socket.SHUT_WR)
        reader = LineReader(ours, lambda: None)
        assert read_reply(reader, 5) == (354, b"go")
        assert read_reply(reader, 5) == (552, b"5.3.4 too\nmuch")
        with pytest.raises(ConnectionError):
            read_reply(reader, 5)


TOO_MANY = {  # a reply to RCPT: whether it is tried again
    "552 too many recipients": True,
    "552 5.5.3 too many recipients": True,
    "552 5.2.2 mailbox full": False,
    "552 5.3.4 too large": False,
    "452 4.2.2 mailbox full": True,
    "550 5.5.3 no": False,
}


@pytest.mark.parametrize("reply", TOO_MANY)
def test_552_is_temporary_only_when_it_means_too_many_recipients(stores, reply):
    hook = Intercept(RCPT=[reply])
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example"])
        assert empty(stores[0])
    assert len(stores[1].messages("bob@b.example")) == TOO_MANY[reply]
    assert len(stores[0].messages("alice@a.example")) == (not TOO_MANY[reply])


def test_two_recipients_that_fail_differently_have_their_own_reasons(stores):
    hook = Intercept(RCPT=["550 5.2.1 mailbox disabled", "553 5.1.3 bad address"])
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example", "bill@b.example"])
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    _, one, other = report.get_payload(1).get_payload()
    for fields, address, code in ((one, "bob", "550 5.2.1"), (other, "bill", "553 5.1.3")):
        assert fields["Final-Recipient"] == f"rfc822;{address}@b.example"
        assert fields["Status"] == code[4:]
        assert fields["Diagnostic-Code"].startswith(f"smtp; {code}")


def test_a_stop_is_no_attempt(stores):
    """The connection is cut by our own stop: nothing is counted, nothing put off."""
    stopping = threading.Event()

    def hang(session, verb, argument):
        if verb == "MAIL":
            stopping.set()
            session.server.stopping.wait(10)

    with SMTPServer(("127.0.0.1", 0), stores[1], intercept=hang) as b:
        with SMTPServer(("127.0.0.1", 0), stores[0], relay=f"127.0.0.1:{b.port}") as a:
            send_mail(a, ["bob@b.example"])
            assert stopping.wait(10)
            a.relay.stop(0)
        b.begin_stop()
    [entry] = stores[0].queued()
    assert (entry.recipients[0].attempts, entry.recipients[0].action) == (0, "")


def test_a_host_that_hangs_up_leaves_no_socket(stores, recwarn):
    with socket.create_server(("127.0.0.1", 0)) as rude:
        stop = threading.Event()

        def hang_up():
            while not stop.is_set():
                rude.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        route = {"b.example": f"127.0.0.1:{rude.getsockname()[1]}"}
        options = {"route": route, "relay_options": FAST}
        with SMTPServer(("127.0.0.1", 0), stores[0], **options) as a:
            send_mail(a, ["bob@b.example"])
            until_tried(stores[0])
            stop.set()
            socket.create_connection(rude.getsockname()).close()
        thread.join(5)
    gc.collect()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


ETRN = {  # a node: the code of the reply, with mail waiting for b.example and a route to it alone
    "b.example": "253",
    "B.EXAMPLE": "253",
    "@b.example": "253",
    "@example": "253",
    "#": "250",
    "c.example": "459",
    "#some-queue": "459",
    "": "501",
    "a b": "501",
    "@": "501",
    "b..example": "501",
}


@pytest.mark.parametrize("node", ETRN)
def test_replies_to_etrn(stores, node):
    slow = {"first_pause": 3600, "longest_pause": 3600}
    with pair(stores, slow, {"intercept": Intercept(RCPT=["450 4.2.1 later"] * 9)}) as (a, _):
        send_mail(a, ["bob@b.example"])
        until_tried(stores[0])
        with Line(a.host, a.port) as client:
            client.reply()
            client.ask("EHLO x")
            assert client.ask(f"ETRN {node}")[:3] == ETRN[node]


def test_routes_and_etrn_know_a_domain_however_it_is_written(tmp_path):
    a = Store(tmp_path / "a", {"alice@a.example": "wonderland"}, sync=False)
    options = {"route": {"bücher.example": "127.0.0.1:1"}, "relay_options": {"first_pause": 60}}
    with SMTPServer(("127.0.0.1", 0), a, **options) as smtp:
        send_mail(smtp, ["x@xn--bcher-kva.example"])
        until_tried(a)
        with Line(smtp.host, smtp.port) as client:
            client.reply()
            client.ask("EHLO x")
            assert client.ask("ETRN BÜCHER.example").startswith("253 ")
            assert client.ask("ETRN xn--bcher-kva.example").startswith("253 ")


class DiskFull:
    """Stands for a function that finds the disk full some times, and works then."""

    def __init__(self, real, times):
        self.real, self.times = real, times

    def __call__(self, *args):
        if self.times:
            self.times -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(*args)


def test_a_message_that_cannot_be_reported_stays_queued(stores, monkeypatch):
    """A full disk at the moment of the report: it is written when there is room."""
    with pair(stores) as (a, _):
        inject = DiskFull(a.relay.inject, 2)
        monkeypatch.setattr(a.relay, "inject", inject)
        send_mail(a, ["nobody@b.example"])
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    assert report.get_payload(1).get_payload()[1]["Status"] == "5.1.1"
    assert inject.times == 0


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 64 + ".test", "b\u00fccher..x", "a b", "a\0b"])
def test_a_name_that_no_host_can_have_is_no_route(stores, host):
    with pytest.raises(ValueError, match="route far"):
        SMTPServer(("127.0.0.1", 0), stores[0], route={"far.test": f"{host}:25"})


def test_a_next_host_is_named_in_ascii():
    relay = Relay(None, "x", "b\u00fccher.test:25")
    assert relay.routing.next_host("far.test") == ("xn--bcher-kva.test", 25)


@pytest.mark.parametrize("method", ["save_entry", "dequeue"])
def test_a_success_is_reported_when_there_is_room_again(stores, monkeypatch, method):
    """One recipient is served, and neither the report nor the entry can be written just then."""
    options = {"intercept": hide_dsn}
    with pair(stores, b_options=options) as (a, _):
        inject, write = DiskFull(a.relay.inject, 2), DiskFull(getattr(stores[0], method), 1)
        monkeypatch.setattr(a.relay, "inject", inject)
        monkeypatch.setattr(stores[0], method, write)
        send_mail(a, ["bob@b.example"], rcpt_options=["NOTIFY=SUCCESS"])
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    assert report.get_payload(1).get_payload()[1]["Action"] == "relayed"
    assert len(stores[1].messages("bob@b.example")) == 1
    assert inject.times == write.times == 0


def hide_dsn(session, verb, argument):
    """Refuse EHLO, as a host without DSN, whose success the relay has to report itself."""
    return "500 what?" if verb == "EHLO" else None


def test_a_message_that_cannot_be_read_is_not_the_hosts_fault(stores):
    hook = Intercept()
    send_to_queue(stores[0])
    [entry] = stores[0].queued()
    path = f"{stores[0].queue_folder}/{entry.id}"
    os.unlink(path)
    os.mkdir(path)
    with pair(stores, {"first_pause": 1000}, {"intercept": hook}):
        until_tried(stores[0])
    [recipient] = stores[0].queued()[0].recipients
    assert recipient.status == "4.3.0"
    assert str(stores[0].folder) not in recipient.diagnostic
    assert hook.seen == []


def send_to_queue(store):
    """Put a message for bob@b.example into a queue that nobody works on."""
    with SMTPServer(("127.0.0.1", 0), store, relay="127.0.0.1:1", timeout=5) as a:
        a.relay.begin_stop()
        send_mail(a, ["bob@b.example"])


def test_a_stop_lets_a_transaction_end(stores):
    """It has as long as a session has: who cuts it sends the message twice."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(session, verb, argument):
        if verb == ".":
            begun.set()
            go_on.wait(10)

    with pair(stores, {**FAST, "timeout": 20}, {"intercept": slow}) as (a, _):
        send_mail(a, ["bob@b.example"])
        assert begun.wait(10)
        stopper = threading.Thread(target=a.stop)
        stopper.start()
        stopper.join(2.2)
        assert stopper.is_alive()
        go_on.set()
        stopper.join()
    assert len(stores[1].messages("bob@b.example")) == 1
    assert stores[0].queued() == []
