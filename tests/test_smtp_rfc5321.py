"""SMTP by the clauses of RFC 5321: a conversation for each rule."""

import pytest
from conversation import Line, play

from smtpd_simple import MAX_RECIPIENTS, SMTPServer, parse_path

START = "S: 220 mail.example.test ESMTP *\nC: EHLO client.test\nS: 250-*\n...\nS: 250 *\n"
MAIL = START + "C: MAIL FROM:<me@client.test>\nS: 250 2.1.0 *\n"
RCPT = MAIL + "C: RCPT TO:<alice@example.test>\nS: 250 2.1.5 *\n"

SCRIPTS = {
    "3.1 greeting and 4.1.1.10 quit": "S: 220 mail.example.test ESMTP *\nC: QUIT\nS: 221 2.0.0 *\nEOF",
    "3.2 HELO": "S: 220 *\nC: HELO client.test\nS: 250 mail.example.test\nC: MAIL FROM:<a@b.test>\nS: 250 *",
    "3.2 HELO wants a name": "S: 220 *\nC: HELO\nS: 501 *\nC: EHLO\nS: 501 *\nC: NOOP\nS: 250 *",
    "4.1.1.1 address literals": "S: 220 *\nC: EHLO [127.0.0.1]\nS: 250-*\n...\nS: 250 *\nC: HELO [IPv6:::1]\nS: 250 *",
    "4.1.1.1 a name with an 8-bit octet": r"S: 220 *" + '\nX: b"EHLO caf\\xe9\\r\\n"\nS: 501 *\nC: NOOP\nS: 250 *',
    "4.1.4 MAIL before EHLO": "S: 220 *\nC: MAIL FROM:<a@b.test>\nS: 503 5.5.1 *\nC: NOOP\nS: 250 *",
    "4.1.4 commands that need no EHLO": "S: 220 *\nC: NOOP\nS: 250 *\nC: RSET\nS: 250 *\nC: HELP\nS: 214-*\n...\nS: 214 *"
    "\nC: VRFY alice\nS: 250 *",
    "4.1.4 EHLO again resets": RCPT + "C: EHLO client.test\nS: 250-*\n...\nS: 250 *\nC: DATA\nS: 503 5.5.1 *",
    "4.1.1.2 MAIL twice": MAIL + "C: MAIL FROM:<a@b.test>\nS: 503 5.5.1 *",
    "4.1.1.3 RCPT without MAIL": START + "C: RCPT TO:<alice@example.test>\nS: 503 5.5.1 MAIL first",
    "4.1.1.4 DATA without MAIL": START + "C: DATA\nS: 503 5.5.1 MAIL first",
    "4.1.1.4 DATA without RCPT": MAIL + "C: DATA\nS: 503 5.5.1 RCPT first",
    "3.3 DATA after refused recipients only": MAIL
    + "C: RCPT TO:<nobody@example.test>\nS: 550 5.1.1 *\nC: DATA\nS: 554 5.5.1 *",
    "3.3 one transaction after the other": RCPT
    + "C: DATA\nS: 354 *\nC: x\nC: .\nS: 250 2.0.0 Ok: queued as *\nC: DATA\nS: 503 *\nC: MAIL FROM:<>\nS: 250 *",
    "4.1.1.5 RSET": RCPT + "C: RSET\nS: 250 2.0.0 *\nC: DATA\nS: 503 5.5.1 MAIL first\nC: MAIL FROM:<>\nS: 250 *",
    "4.1.1 no argument where none belongs": RCPT
    + "C: DATA now\nS: 501 5.5.4 *\nC: RSET now\nS: 501 5.5.4 *\nC: QUIT now\nS: 501 5.5.4 *\nC: NOOP now\nS: 250 *",
    "2.4 any case, and spaces where people put them": "S: 220 *\nC: eHlO  client.test \nS: 250-*\n...\nS: 250 *\n"
    "C: mAiL  from: <me@client.test> \nS: 250 *\nC: rcpt to:  <ALICE@Example.TEST>\nS: 250 *\nC: daTA \nS: 354 *\nC: .\nS: 250 *",
    "4.2.4 unknown commands": START
    + "C: FOO\nS: 500 5.5.2 *\nC: SEND FROM:<a@b.test>\nS: 50? 5.5.? *\nC:\nS: 500 5.5.2 *",
    "4.5.3.1.4 a command line of 512 octets": START + "C: NOOP " + "x" * 505 + "\nS: 250 *",
    "4.5.3.1.4 a longer line than we take": START + "C: NOOP " + "x" * 100_000 + "\nS: 500 5.5.6 *\nC: NOOP\nS: 250 *",
    "4.1.2 bad paths": START
    + "C: MAIL FROM:me@client.test\nS: 501 5.1.7 *\nC: MAIL FROM:<me@>\nS: 501 5.1.7 *\nC: MAIL FROM:<me\nS: 501 5.1.7 *\n"
    "C: MAIL FROM:<me@client..test>\nS: 501 5.1.7 *\nC: MAIL FROM:<me>\nS: 501 5.1.7 *\nC: MAIL me@client.test\nS: 501 5.5.4 *\n"
    "C: MAIL\nS: 501 5.5.4 *\nC: MAIL TO:<a@b.test>\nS: 501 5.5.4 *\nC: MAIL FROM:<a@b.test>SIZE=1\nS: 501 5.5.4 *",
    "4.1.2 bad recipients": MAIL
    + "C: RCPT TO:<>\nS: 501 5.1.3 *\nC: RCPT TO:<alice@example.test\nS: 501 5.1.3 *\nC: RCPT TO:alice\nS: 501 5.1.3 *\n"
    "C: RCPT TO:<a b@example.test>\nS: 501 5.1.3 *\nC: RCPT FROM:<alice@example.test>\nS: 501 5.5.4 *",
    "4.5.5 the null reverse path": START + "C: MAIL FROM:<>\nS: 250 *\nC: RCPT TO:<bob@example.test>\nS: 250 *",
    "4.5.1 postmaster": MAIL + "C: RCPT TO:<postmaster>\nS: 250 *\nC: RCPT TO:<PostMaster@example.test>\nS: 250 *",
    "C source routes are dropped": MAIL
    + "C: RCPT TO:<@a.test,@b.test:alice@example.test>\nS: 250 2.1.5 *<alice@example.test>*",
    "4.1.2 quoted local parts": MAIL
    + 'C: RCPT TO:<"alice"@example.test>\nS: 250 *\nC: RCPT TO:<"a b"@example.test>\nS: 550 5.1.1 *\n'
    'C: MAIL FROM:<"un>usual \\" one"@client.test>\nS: 503 *',
    "4.1.3 address literals are nobody here": MAIL + "C: RCPT TO:<alice@[127.0.0.1]>\nS: 550 *",
    "3.6 no relaying": MAIL + "C: RCPT TO:<x@elsewhere.test>\nS: 550 5.7.1 *log in*",
    "4.1.1.11 unknown parameter": START + "C: MAIL FROM:<a@b.test> FOO=bar\nS: 555 5.5.4 *\nC: NOOP\nS: 250 *",
    "4.1.1.11 repeated parameter": START + "C: MAIL FROM:<a@b.test> SIZE=1 size=2\nS: 501 5.5.4 *",
    "4.1.1.11 parameters belong to EHLO": "S: 220 *\nC: HELO x\nS: 250 *\nC: MAIL FROM:<a@b.test> SIZE=1\nS: 555 *",
    "4.1.1.6 VRFY": START
    + "C: VRFY alice\nS: 250 2.1.5 <alice@example.test>\nC: VRFY <bob@example.test>\nS: 250 2.1.5 <bob@example.test>\n"
    "C: VRFY staff\nS: 250 2.1.5 <staff@example.test>\nC: VRFY carol\nS: 550 5.1.1 *\nC: VRFY\nS: 501 5.5.4 *",
    "4.1.1.7 EXPN": START
    + "C: EXPN staff\nS: 250-2.1.5 <alice@example.test>\nS: 250 2.1.5 <bob@example.test>\nC: EXPN alice\nS: 550 5.1.1 *",
    "4.1.1.8 HELP": START + "C: HELP\nS: 214-2.0.0 Commands: *\nS: 214-2.0.0 Now: *MAIL*\nS: 214 *\n"
    "C: HELP rcpt\nS: 214-2.0.0 RCPT TO:<*\nS: 214 *\nC: HELP foo\nS: 504 *",
    "HELP says what makes sense now": "S: 220 *\nC: HELP\nS: 214-*\nS: 214-2.0.0 Now: EHLO HELO NOOP QUIT\nS: 214 *\n"
    "C: HELO x\nS: 250 *\nC: MAIL FROM:<>\nS: 250 *\nC: HELP\nS: 214-*\nS: 214-2.0.0 Now: RCPT RSET NOOP QUIT\nS: 214 *",
    "too many errors in a row": START + "C: FOO\nS: 500 *\n" * 20 + "S: 421 4.7.0 *\nEOF",
    "a good command forgives": START + ("C: FOO\nS: 500 *\n" * 19 + "C: NOOP\nS: 250 *\n") * 3,
    "a message with a mailbox twice, by name and by list": RCPT
    + "C: RCPT TO:<staff@example.test>\nS: 250 *\nC: DATA\nS: 354 *\nC: .\nS: 250 *",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rule(smtp, name):
    play(smtp, SCRIPTS[name], name)


PATHS = {  # text: (address, what follows), or None
    "<a@b.test>": ("a@b.test", ""),
    "  <a@b.test> SIZE=1": ("a@b.test", " SIZE=1"),
    "<>": ("", ""),
    "<> SIZE=1": ("", " SIZE=1"),
    "<Postmaster>": ("Postmaster", ""),
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
    f"<{'a' * 64}@{'.'.join(['b' * 63] * 3)}.test>": (f"{'a' * 64}@{'.'.join(['b' * 63] * 3)}.test", ""),
    f"<{'a' * 65}@b.test>": None,
    f"<a@{'.'.join(['b' * 63] * 4)}.test>": None,
    "": None,
    "a@b.test": None,
    "<a@b.test": None,
    "<a@@b.test>": None,
    "<a..b@c.test>": None,
    "<.a@b.test>": None,
    "<a.@b.test>": None,
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
        play(smtp, RCPT.replace("alice@", "staff@") + "C: DATA\nS: 354 *\nC: Subject: x\nC: .\nS: 250 *")
    [message] = store.messages("bob@example.test")
    assert message.keys() == ["Return-Path", "Delivered-To", "Received", "X-Original-To", "Subject"]
    assert message["Return-Path"] == "<me@client.test>"
    assert message["Delivered-To"] == "bob@example.test"
    assert message["X-Original-To"] == "staff@example.test"
    received = message["Received"].split()
    assert received[:6] == ["from", "client.test", "([127.0.0.1])", "by", "mail.example.test", "with"]
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
    assert replies == ["220", "250", "250", "550", "250", "354", "250", "250", "250", "354", "250", "221"]
    assert len(store.messages("alice@example.test")) == len(store.messages("bob@example.test")) == 1


def test_replies_to_a_batch_come_in_one_packet(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        client.send("NOOP\r\n" * 50)
        first = client.sock.recv(100_000)
    assert first == b"250 2.0.0 Ok\r\n" * 50
