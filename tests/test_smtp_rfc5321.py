"""SMTP by the clauses of RFC 5321: a conversation for each rule."""

import pytest
from conversation import Line, play, scripts
from helpers import send

from smtpd_simple import MAX_RECIPIENTS, SMTPServer, parse_path

SCRIPTS = scripts("smtp_rfc5321.txt")


@pytest.mark.parametrize("name", SCRIPTS)
def test_rule(smtp, name):
    play(smtp, SCRIPTS[name], name)


PATHS = {  # text: (address, what follows), or None
    "<a@b.test>": ("a@b.test", ""),
    "  <a@b.test> SIZE=1": ("a@b.test", " SIZE=1"),
    "<>": ("", ""),
    "<> SIZE=1": ("", " SIZE=1"),
    "<Postmaster>": ("Postmaster", ""),
    "<postMASTER> X": ("postMASTER", " X"),
    "<bob>": ("bob", ""),
    "<A.b-c+d=e@B.test>": ("A.b-c+d=e@B.test", ""),
    "<@x.test:a@b.test>": ("a@b.test", ""),
    "<@x.test,@y.test:a@b.test>": ("a@b.test", ""),
    '<"a"@b.test>': ("a@b.test", ""),
    '<"a b"@b.test>': ('"a b"@b.test', ""),
    '<"a\\b"@b.test>': ("ab@b.test", ""),
    '<"a>b"@b.test> X': ('"a>b"@b.test', " X"),
    '<"a@x.test"@b.test>': ('"a@x.test"@b.test', ""),
    "<a@[127.0.0.1]>": ("a@[127.0.0.1]", ""),
    "<a@[IPv6:::1]>": ("a@[IPv6:::1]", ""),
    "<用户@例子.example>": ("用户@例子.example", ""),
    "<a@b_c.test>": ("a@b_c.test", ""),
    f"<{'a' * 64}@{'.'.join(['b' * 63] * 3)}.test>": (
        f"{'a' * 64}@{'.'.join(['b' * 63] * 3)}.test",
        "",
    ),
    f"<{'a' * 65}@b.test>": None,
    f"<a@{'.'.join(['b' * 63] * 4)}.test>": None,
    "": None,
    "a@b.test": ("a@b.test", ""),
    " a@b.test SIZE=1": ("a@b.test", " SIZE=1"),
    "a@b.test>": None,
    "a b@c.test": ("a", " b@c.test"),
    "<a@b.test": None,
    "<a@@b.test>": None,
    "<a..b@c.test>": ("a..b@c.test", ""),
    "<.a@b.test>": (".a@b.test", ""),
    "<a.@b.test>": ("a.@b.test", ""),
    "<a@-b.test>": None,
    "<a@b.>": None,
    "<a b@c.test>": None,
    "<a\x00b@c.test>": None,
    "<a\rb@c.test>": None,
    "<a\u2028b@c.test>": None,
    "<a\udc80@c.test>": None,
    '<"a\rb"@c.test>': None,
    "<<a@b.test>>": None,
    "<a@[1.2.3]>": None,
    "<a@[300.2.3.4]>": None,
    "<a@[IPv6:1::2::3]>": None,
    "<a@[IPv6:12345::1]>": None,
    "<@x.test:>": None,
    "<@x.test a@b.test>": None,
}


@pytest.mark.parametrize("text", PATHS, ids=ascii)
def test_parse_path(text):
    if PATHS[text] is None:
        with pytest.raises(ValueError, match="address"):
            parse_path(text)
    else:
        assert parse_path(text) == PATHS[text]


def test_a_thousand_recipients_and_no_more(smtp, store):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO client.test")
        client.ask("MAIL FROM:<>")
        client.send("RCPT TO:<alice@example.test>\r\n" * 10_000)
        replies = [client.reply()[:9] for _ in range(10_000)]
        assert replies == ["250 2.1.5"] * MAX_RECIPIENTS + ["452 4.5.3"] * (10_000 - MAX_RECIPIENTS)
        client.ask("DATA")
        assert client.ask("Subject: x\r\n.").startswith("250")
    assert len(store.messages("alice@example.test")) == 1


def test_trace_fields(store):
    """4.4: Return-Path, Delivered-To, Received; X-Original-To where the address was another."""
    with SMTPServer(("127.0.0.1", 0), store, hostname="mail.example.test") as smtp:
        send(smtp, to="staff@example.test")
    [message] = store.messages("bob@example.test")
    assert message.keys() == ["Return-Path", "Delivered-To", "Received", "X-Original-To", "Subject"]
    assert message["Return-Path"] == "<me@client.test>"
    assert message["Delivered-To"] == "bob@example.test"
    assert message["X-Original-To"] == "staff@example.test"
    received = message["Received"].split()
    assert received[:6] == [
        "from",
        "client.test",
        "([127.0.0.1])",
        "by",
        "mail.example.test",
        "with",
    ]
    assert received[6] == "ESMTP"
    assert received[9:11] == ["for", "<staff@example.test>;"]


def test_fifty_hops(smtp, store):
    """6.3: a message that has come through fifty hosts goes round in circles."""
    hop = "Received: from a by b; Mon, 25 Oct 2004 14:24:27 +0800\r\n"
    for count, wanted in ((49, "250 2.0.0"), (50, "554 5.4.6")):
        with Line(smtp.host, smtp.port) as client:
            client.reply()
            for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
                client.ask(command)
            assert client.ask(hop * count + "\r\nReceived: in the text\r\n.").startswith(wanted)
    assert len(store.messages("alice@example.test")) == 1


def test_pipelined_and_out_of_order(smtp, store):
    """RFC 2920: everything in one packet, the next message behind the dot, an error in the middle."""
    batch = "EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<nobody@example.test>\r\nRCPT TO:<alice@example.test>\r\nDATA\r\n"
    again = "MAIL FROM:<>\r\nRCPT TO:<bob@example.test>\r\nDATA\r\n"
    with Line(smtp.host, smtp.port) as client:
        client.send(batch + "one\r\n.\r\n" + again + "two\r\n.\r\nQUIT\r\n")
        replies = [client.reply()[:3] for _ in range(12)]
        assert client.at_end()
    assert replies == [
        "220",
        "250",
        "250",
        "550",
        "250",
        "354",
        "250",
        "250",
        "250",
        "354",
        "250",
        "221",
    ]
    assert len(store.messages("alice@example.test")) == len(store.messages("bob@example.test")) == 1


def test_replies_to_a_batch_come_in_one_packet(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        client.send("NOOP\r\n" * 50)
        first = client.sock.recv(100_000)
    assert first == b"250 2.0.0 Ok\r\n" * 50


def test_a_forgotten_dot_is_what_the_timeout_speaks_of(store):
    with (
        SMTPServer(("127.0.0.1", 0), store, timeout=0.3) as smtp,
        Line(smtp.host, smtp.port) as client,
    ):
        client.reply()
        for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
            client.ask(command)
        client.send("Subject: x\r\n\r\nhello\r\n")
        assert client.reply() == "421 4.4.2 Timeout: no line with only a dot has ended the message"
