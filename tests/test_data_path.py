"""From the socket to the file and back: dots, line ends, end of data, in pieces of every size (RFC 5321 4.5.2)."""

import io
import itertools
import os
import re

import pytest
from conversation import Line
from helpers import END_OF_DATA, retrieve, send, with_empty_line

import smtpd_simple
from lineserver import dot_stuff, dot_unstuff
from pop3d_simple import top
from store import Delivery, HeaderScan, LineEnds, Target, to_crlf

HEADERS = {  # what is sent: what is stored
    b"": b"",
    b"\r\n": b"\r\n",
    b"Hello Alice,\r\nmy first mail.\r\n": b"\r\nHello Alice,\r\nmy first mail.\r\n",
    b"Subject: x\r\nHello Alice,\r\n": b"Subject: x\r\n\r\nHello Alice,\r\n",
    b"Subject: x\r\n\r\nno: field\r\ntext\r\n": b"Subject: x\r\n\r\nno: field\r\ntext\r\n",
    b"Subject: x\r\n y\r\n\tz\r\n\r\ntext\r\n": b"Subject: x\r\n y\r\n\tz\r\n\r\ntext\r\n",
    b"Subject : x\r\n\r\n": b"Subject : x\r\n\r\n",
    b" x\r\nA: b\r\n": b"\r\n x\r\nA: b\r\n",
    b"From me Mon\r\nA: b\r\n\r\nx": b"From me Mon\r\nA: b\r\n\r\nx",
    b"A: b\r\nFrom me Mon\r\n": b"A: b\r\n\r\nFrom me Mon\r\n",
    b"Fro\r\n": b"\r\nFro\r\n",
    b"From": b"\r\nFrom",
    b"no end": b"\r\nno end",
    b"A: no end": b"A: no end",
    b"A: b\r\nno end": b"A: b\r\n\r\nno end",
    b"A: b\r\nSubj:\r\n": b"A: b\r\nSubj:\r\n",
    b"A: b\r\n: c\r\n": b"A: b\r\n\r\n: c\r\n",
    b"a" * 2000 + b": b\r\n": b"\r\n" + b"a" * 2000 + b": b\r\n",
    "Gr\u00fc\u00dfe: x\r\n".encode(): b"\r\n" + "Gr\u00fc\u00dfe: x\r\n".encode(),
    b"http://x.test/\r\n": b"http://x.test/\r\n",
}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize("data", HEADERS, ids=lambda data: ascii(data[:30]))
def test_the_empty_line_that_is_missing(data, size):
    """Before the first line that is neither a field nor a continuation, wherever blocks end."""
    scan = HeaderScan()
    assert b"".join(map(scan.feed, pieces(data, size))) + scan.end() == HEADERS[data]


def test_every_short_header_in_every_cut():
    parts = [b"A: b\r\n", b" c\r\n", b"text\r\n", b"\r\n", b"From x\r\n", b"\tx"]
    for chosen in itertools.product(parts, repeat=4):
        data = b"".join(chosen)
        for size in (0, 1, 3):
            scan = HeaderScan()
            got = b"".join(map(scan.feed, pieces(data, size))) + scan.end()
            assert got == with_empty_line(data), (data, size)


def test_hops_are_counted_in_the_header_only():
    hop = b"Received: from a by b\r\n"
    text = hop * 3 + b"received :x\r\n\tReceived: y\r\nX-Received: z\r\n\r\n" + hop * 5
    for size in (0, 1, 7):
        scan = HeaderScan()
        for block in pieces(text, size):
            scan.feed(block)
        assert scan.hops == 4, size


def pieces(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)] if size else [data]


def read_data(data, size):
    """Run what follows DATA through dot_unstuff() in pieces; return content and rest, or None if it did not end."""
    rest, out = b"\r\n", b""
    blocks = iter(pieces(data, size))
    for block in blocks:
        content, rest, ended = dot_unstuff(rest + block)
        out += content
        if ended:
            return out[2:], rest + b"".join(blocks)
    return None


UNSTUFF = {  # what follows DATA: (content, what is left), or None: it has not ended
    b".\r\n": (b"", b""),
    b"a\r\n.\r\n": (b"a\r\n", b""),
    b"a\r\n.\r\nQUIT\r\n": (b"a\r\n", b"QUIT\r\n"),
    b"..\r\n.\r\n": (b".\r\n", b""),
    b"...\r\n.\r\n": (b"..\r\n", b""),
    b".a\r\n.\r\n": (b"a\r\n", b""),
    b"a\r\n..b\r\n...\r\n.\r\n": (b"a\r\n.b\r\n..\r\n", b""),
    b"\r\n\r\n.\r\n": (b"\r\n\r\n", b""),
    b"\r\n.\r\n.\r\n": (b"\r\n", b".\r\n"),
    b"a.b\r\nc.\r\n.\r\n": (b"a.b\r\nc.\r\n", b""),
    b"\0\xff\r\n.\r\n": (b"\0\xff\r\n", b""),
    b"a\n.\nb\r\n.\r\n": (b"a\n.\nb\r\n", b""),
    b"a\n.\r\nb\r\n.\r\n": (b"a\n.\r\nb\r\n", b""),
    b"a\r\n.\nb\r\n.\r\n": (b"a\r\n\nb\r\n", b""),
    b"a\r.\rb\r\n.\r\n": (b"a\r.\rb\r\n", b""),
    b"a\r\n.\rb\r\n.\r\n": (b"a\r\n\rb\r\n", b""),
    b"a\r.\r\nb\r\n.\r\n": (b"a\r.\r\nb\r\n", b""),
    b"a\r\n\0.\r\nb\r\n.\r\n": (b"a\r\n\0.\r\nb\r\n", b""),
    b"a\r\n.\0\r\nb\r\n.\r\n": (b"a\r\n\0\r\nb\r\n", b""),
    b"a\r\r\n.\r\n": (b"a\r\r\n", b""),
    b"a\r\n.": None,
    b"a\r\n.\r": None,
    b"a\r\n.\n": None,
    b"a\n.\n": None,
}


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("data", UNSTUFF, ids=repr)
def test_unstuff(data, size):
    assert read_data(data, size) == UNSTUFF[data]


def test_unstuff_every_short_text_in_every_cut():
    """All texts of five parts of dot, CR, LF, a: the same content whole and octet by octet."""
    for parts in itertools.product([b".", b"\r", b"\n", b"\r\n", b"a"], repeat=5):
        data = b"".join(parts) + b"\r\n.\r\n"
        assert read_data(data, 0) == read_data(data, 1) == read_data(data, 3), data


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(
    ("data", "wanted", "bare"),
    [
        (b"a\r\nb\r\n", b"a\r\nb\r\n", 0),
        (b"a\nb\n", b"a\r\nb\r\n", 2),
        (b"a\rb\r", b"a\r\nb\r\n", 2),
        (b"a\r\r\n\n\r", b"a\r\n\r\n\r\n", 3),
        (b"a\r\r\r\nb\r\rc\r\n", b"a\r\nb\r\n\r\nc\r\n", 4),
        (b"", b"", 0),
    ],
)
def test_line_ends(data, wanted, bare, size):
    line_ends = LineEnds()
    assert b"".join(map(line_ends.feed, pieces(data, size))) + line_ends.end() == wanted
    assert line_ends.bare == bare


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        (b"", b""),
        (b"a\r\nb\r\n", b"a\r\nb\r\n"),
        (b"a\nb\n", b"a\r\nb\r\n"),
        (b"a\nb", b"a\r\nb\r\n"),
        (b"a\r\n\nb\rc\r\n", b"a\r\n\r\nb\r\nc\r\n"),
        (b"a\r\r\nb\r\r", b"a\r\nb\r\n\r\n"),
        (b"a\r", b"a\r\n"),
    ],
)
def test_wire(file, wanted, size):
    assert b"".join(to_crlf(io.BytesIO(file).read, size)) == wanted


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b".\r\n..\r\na.\r\n", b"..\r\n...\r\na.\r\n"),
        (b"a\r\n.b\r\n", b"a\r\n..b\r\n"),
        (b"a\r.b\r\n", b"a\r.b\r\n"),
        (b"\r\n", b"\r\n"),
    ],
)
def test_stuff(text, wanted, size):
    assert b"".join(dot_stuff(pieces(text, size))) == wanted


def blocks_of(text, size):
    """Cut a text into pieces none of which ends between CR and LF, as to_crlf() gives them."""
    return re.findall(rb"(?s:.{1,%d})(?:(?<=\r)\n)?" % size, text) if size else [text]


TOP = b"A: 1\r\nB: 2\r\n\r\none\r\ntwo\r\n\r\nfour\r\n"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    ("text", "count", "wanted"),
    [
        (TOP, 0, b"A: 1\r\nB: 2\r\n\r\n"),
        (TOP, 1, b"A: 1\r\nB: 2\r\n\r\none\r\n"),
        (TOP, 3, b"A: 1\r\nB: 2\r\n\r\none\r\ntwo\r\n\r\n"),
        (TOP, 4, TOP),
        (TOP, 99, TOP),
        (b"A: 1\r\n", 5, b"A: 1\r\n"),
        (b"\r\nno header\r\nb\r\n", 1, b"\r\nno header\r\n"),
        (b"", 1, b""),
    ],
)
def test_top(text, count, wanted, size):
    assert b"".join(top(blocks_of(text, size), count)) == wanted


MESSAGES = {
    "empty": b"",
    "one empty line": b"\r\n",
    "no header": b"\r\nbody only\r\n",
    "no body": b"Subject: x\r\n",
    "not a message": b"just a line\r\n",
    "dots": b"Subject: .\r\n\r\n.\r\n..\r\n.a\r\n...\r\n",
    "8 bit and NUL": bytes(range(33, 256)) + b"\0\0\r\n",
    "a line of a megabyte": b"Subject: x\r\n\r\n" + b"x" * 1_000_000 + b"\r\n",
    "long lines of dots": b"\r\n".join([b"." * 997] * 50) + b"\r\n",
    "empty lines": b"\r\n" * 1000,
    "From_ lines": b"Subject: x\r\n\r\nFrom here\r\n>From there\r\n",
    "streams to disk": b"Subject: x\r\n\r\n" + b"0123456789abcde\r\n" * 200_000,
}


@pytest.mark.parametrize("name", MESSAGES)
def test_octets_in_and_out(smtp, pop3, store, name):
    """What DATA brings is in the file behind our fields, and RETR gives it back, with the size that LIST said."""
    content = MESSAGES[name]
    stuffed = b"".join(dot_stuff([content]))
    assert send(smtp, stuffed).startswith("250 2.0.0")
    [path] = store.paths("alice@example.test")
    with open(path, "rb") as file:
        data = file.read()
    assert data.endswith(content)
    head = data[: len(data) - len(content)].split(b"\r\n")
    names = [line.partition(b":")[0] for line in head if line[:1] != b"\t"]
    missing = [b""] if name in ("not a message", "long lines of dots") else []
    assert names == [b"Return-Path", b"Delivered-To", b"Received", *missing, b""]
    assert retrieve(pop3) == data


def test_data_at_every_packet_boundary(smtp, store):
    """One dialogue, cut in two at each octet of the message and of its end."""
    text = b"Subject: x\r\n\r\n.\r\n..\r\n\r\n.x\r\n"
    stuffed = b"".join(dot_stuff([text])) + b".\r\nNOOP\r\n"
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO client.test")
        for cut in range(1, len(stuffed)):
            client.ask("MAIL FROM:<>")
            client.ask("RCPT TO:<alice@example.test>")
            client.ask("DATA")
            client.send(stuffed[:cut])
            client.send(stuffed[cut:])
            assert client.reply().startswith("250 2.0.0 Ok: queued"), cut
            assert client.reply() == "250 2.0.0 Ok", cut
    for path in store.paths("alice@example.test"):
        with open(path, "rb") as file:
            assert file.read().endswith(text)


def test_bare_line_ends_become_crlf(smtp, store):
    assert send(smtp, b"Subject: x\n\nbare\rcr\r\n").startswith("250")
    [path] = store.paths("alice@example.test")
    with open(path, "rb") as file:
        assert file.read().endswith(b"Subject: x\r\n\r\nbare\r\ncr\r\n")


@pytest.mark.parametrize("name", END_OF_DATA)
def test_one_data_is_one_message(smtp, store, name):
    """Nothing but CRLF.CRLF ends data: what follows another dot is text, not commands (SMTP smuggling)."""
    inside = b"MAIL FROM:<evil@x.test>\r\nRCPT TO:<bob@example.test>\r\nDATA\r\nSubject: smuggled\r\n\r\nx\r\n"
    assert send(smtp, b"Subject: outer\r\n\r\nx" + END_OF_DATA[name] + inside).startswith("250")
    assert len(store.messages("alice@example.test")) == 1
    assert store.messages("bob@example.test") == []
    [path] = store.paths("alice@example.test")
    with open(path, "rb") as file:
        content = file.read()
    assert b"MAIL FROM:<evil" in content
    assert content.count(b"\n") == content.count(b"\r") == content.count(b"\r\n")


def test_a_delivery_holds_little_in_memory(store):
    """Whatever the size of the pieces: what has arrived is in a file, but for a small buffer."""
    for size in (2, 1000, 300_000):
        delivery = Delivery(store, [Target(store.mailbox("alice@example.test"), b"")])
        for _ in range(600_000 // size):
            delivery.write(b"x" * size)
        [path] = delivery.pending
        assert 600_000 - os.path.getsize(path) <= 65_536
        delivery.close()
        assert not os.path.exists(path)


LF_MESSAGES = {  # what stands between DATA and NOOP: what is stored
    b"Subject: nc\n\n..dot\r\nend\n.\n": b"Subject: nc\r\n\r\n.dot\r\nend\r\n",
    b"Subject: nc\n\nx\n.\r\n": b"Subject: nc\r\n\r\nx\r\n",
    b"Subject: nc\n\nx\r.\rMAIL FROM:<>\r.\n.\n": b"Subject: nc\r\n\r\nx\r\n.\r\nMAIL FROM:<>\r\n.\r\n",
    b"Subject: nc\n\n\r\r\n.\n": b"Subject: nc\r\n\r\n\r\n",
    b"Subject: nc" + b"\n" * 10_000 + b".\n": b"Subject: nc" + b"\r\n" * 10_000,
}


@pytest.mark.parametrize("size", [1, 3, 100_000])
@pytest.mark.parametrize("text", LF_MESSAGES, ids=lambda text: repr(text[-12:]))
def test_a_session_that_begins_with_lf_ends_lines_with_lf(smtp, store, text, size):
    """Somebody with netcat: the first line ended in LF, so LF ends lines everywhere, the dot's included."""
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.send(b"EHLO me\n")
        client.reply()
        everything = (
            b"MAIL FROM:<>\nRCPT TO:<alice@example.test>\nDATA\n"
            + text
            + b"NOOP\nBDAT 2\n\n\nNOOP\n"
        )
        for start in range(0, len(everything), size):
            client.send(everything[start : start + size])
        assert [client.reply()[:3] for _ in range(7)] == [
            "250",
            "250",
            "354",
            "250",
            "250",
            "503",
            "250",
        ]
    [path] = store.paths("alice@example.test")
    with open(path, "rb") as file:
        assert b"Subject" + file.read().partition(b"Subject")[2] == LF_MESSAGES[text]


@pytest.mark.parametrize("size", [1, 3, 100_000])
def test_a_chunk_behind_data_of_such_a_session_is_as_it_was_sent(smtp, store, size):
    """What follows the end of a message is put back unchanged: a chunk's octets are counted."""
    envelope = b"MAIL FROM:<>\nRCPT TO:<alice@example.test>\n"
    text = envelope + b"DATA\nx\n.\n" + envelope + b"BDAT 7 LAST\na\r\nb\r\n\rNOOP\nQUIT\n"
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.send(b"EHLO me\n")
        client.reply()
        for start in range(0, len(text), size):
            client.send(text[start : start + size])
        codes = [client.reply()[:3] for _ in range(9)]
    assert codes == ["250", "250", "354", "250", "250", "250", "250", "250", "221"]
    with open(store.paths("alice@example.test")[1], "rb") as file:
        assert file.read().endswith(b"\r\na\r\nb\r\n\r\n")


def test_a_first_line_that_would_go_on_with_our_fields(smtp, store):
    """It begins a body without a header, as an empty line in front of it says."""
    for text in (b"\t@evil.test\r\nX-A: b\r\n\r\nx\r\n", b" x\r\n"):
        assert send(smtp, text).startswith("250")
        with open(store.paths("alice@example.test")[-1], "rb") as file:
            assert file.read().endswith(b"\r\n\r\n" + text)
        message = store.messages("alice@example.test")[-1]
        assert (message["X-A"], "evil" in message["Received"]) == (None, False)


def test_lf_later_in_a_session_does_not(smtp, store):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO me")
        client.send(b"MAIL FROM:<>\nRCPT TO:<alice@example.test>\nDATA\n")
        client.send(b"Subject: x\n\nx\n.\nMAIL FROM:<>\n\r\n.\r\nNOOP\r\n")
        replies = [client.reply()[:3] for _ in range(5)]
    assert replies == ["250", "250", "354", "250", "250"]
    assert len(store.messages("alice@example.test")) == 1


def test_a_large_message_for_several_is_whole_in_each_mailbox(smtp, store):
    """It streams into the first file while it arrives, and is copied from there."""
    text = b"Subject: big\r\n\r\n" + b"0123456789abcde\r\n" * 200_000
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        for command in (
            "EHLO x",
            "MAIL FROM:<>",
            "RCPT TO:<alice@example.test>",
            "RCPT TO:<bob@example.test>",
            "DATA",
        ):
            client.ask(command)
        client.send(text + b".\r\n")
        assert client.reply().startswith("250")
    for address in ("alice@example.test", "bob@example.test"):
        [path] = store.paths(address)
        with open(path, "rb") as file:
            data = file.read()
        assert data.startswith(b"Return-Path: <>\r\nDelivered-To: " + address.encode() + b"\r\n")
        assert data.endswith(b"\r\n" + text)
        assert f",S={len(data)},W={len(data)}" in path


def test_too_large_is_read_to_its_end(store, monkeypatch):
    with (
        smtpd_simple.SMTPServer(("127.0.0.1", 0), store, size_limit=1000) as smtp,
        Line(smtp.host, smtp.port) as client,
    ):
        client.reply()
        client.ask("EHLO me")
        for size, wanted in ((998, "250"), (999, "552 5.3.4"), (5_000_000, "552 5.3.4")):
            client.ask("MAIL FROM:<>")
            client.ask("RCPT TO:<alice@example.test>")
            client.ask("DATA")
            client.send(b"x" * size + b"\r\n.\r\n")
            assert client.reply().startswith(wanted)
        assert client.ask("NOOP").startswith("250")
    assert len(store.paths("alice@example.test")) == 1
    assert os.listdir(f"{store.mailbox('alice@example.test')}/tmp") == []


CR_RUNS = [1, 2, 3, 999, 1000, 1001, 3000]


@pytest.mark.parametrize("behind", [b"\n", b"x", b""])
@pytest.mark.parametrize("count", CR_RUNS)
def test_a_run_of_crs_wherever_blocks_end(count, behind):
    """Up to a thousand belong to the LF behind them; each other one ends a line."""
    lines = count if behind != b"\n" else max(count - 1000, 0) + 1
    wanted = b"a" + b"\r\n" * lines + behind.strip(b"\n")
    data = b"a" + b"\r" * count + behind
    for size in (0, 1, 700, 1000, 1001):
        line_ends = LineEnds()
        assert b"".join(map(line_ends.feed, pieces(data, size))) + line_ends.end() == wanted, size


def test_the_size_that_list_shows_is_what_retr_sends(store, pop3):
    """Also where a block ends inside a run of CRs; retrieve() compares them."""
    store.make_folder(store.mailbox("alice@example.test"))
    content = b"a" * ((1 << 17) - 1500) + b"\r" * 3000 + b"\nend\n" + b"z" * 70000
    with open(f"{store.mailbox('alice@example.test')}/new/1.foreign", "wb") as file:
        file.write(content)
    assert retrieve(pop3).endswith(b"\r\nend\r\n" + b"z" * 70000 + b"\r\n")


def test_a_million_crs_hold_up_nobody(smtp, store):
    """In time that grows with their number, not with its square: this would take minutes."""
    assert send(smtp, b"\r" * 1_000_000 + b"x\r\n").startswith("250")
    [path] = store.paths("alice@example.test")
    assert os.path.getsize(path) > 2_000_000
