"""The trace: the dialogue as a class sees it on the projector, without a single password."""

import io
import re

import pytest
from conversation import Line

from lineserver import Trace
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer


class Timeline(io.StringIO):
    """What a trace writes; `lines` are without the times."""

    @property
    def lines(self):
        text = self.getvalue().splitlines()
        return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} +", "", line) for line in text]

    def said(self, direction):
        """Return what one side said: C or S."""
        return [
            line.partition(f" {direction}: ")[2] for line in self.lines if f" {direction}: " in line
        ]


@pytest.fixture
def timeline():
    return Timeline()


@pytest.fixture
def smtp(store, timeline):
    with SMTPServer(("127.0.0.1", 0), store, trace=Trace(timeline)) as server:
        yield server


@pytest.fixture
def pop3(store, timeline):
    with POP3Server(("127.0.0.1", 0), store, trace=Trace(timeline)) as server:
        yield server


def begin(client):
    client.reply()
    for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
        client.ask(command)


def test_both_protocols_in_one_timeline(smtp, pop3, timeline):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
    with Line(pop3.host, pop3.port) as client:
        client.readline()
    assert re.fullmatch(r"SMTP +\d+  S: 220 .*", timeline.lines[0])
    assert re.fullmatch(r"POP3 +\d+  S: \+OK .*", timeline.lines[1])


SECRETS = {  # what a client sends: what is shown
    "AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=": "AUTH PLAIN ****",
    "auth plain AGFsaWNlAHdvbmRlcmxhbmQ=": "auth plain ****",
    "AUTH AGFsaWNlAHdvbmRlcmxhbmQ=": "AUTH ****",
    "AUTH PLAIN\tAGFsaWNlAHdvbmRlcmxhbmQ=": "AUTH PLAIN ****",
    " AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=": "AUTH PLAIN ****",
    "AUTH LOGIN d29uZGVybGFuZA==": "AUTH LOGIN ****",
    "AUTH=PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=": "AUTH ****",
    "AUTH\0PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=": "AUTH ****",
    "PASS wonderland": "PASS ****",
    "pass\twonderland": "pass ****",
    "PASS\0wonderland": "PASS ****",
    "APOP wonderland": "APOP ****",
}


@pytest.mark.parametrize("line", SECRETS)
def test_no_password_of_smtp(smtp, timeline, line):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        client.ask(line)
    assert SECRETS[line] in timeline.said("C")


@pytest.mark.parametrize("hello", [True, False])
def test_no_password_after_a_refused_login(smtp, timeline, hello):
    """A client that does not wait for replies goes on with name and password."""
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        if hello:
            client.ask("EHLO x")
            client.ask("MAIL FROM:<>")
        client.send("AUTH LOGIN\r\nYWxpY2U=\r\nd29uZGVybGFuZA==\r\nNOOP\r\nwhat now\r\n")
        assert [client.reply()[:3] for _ in range(5)] == ["503", "500", "500", "250", "500"]
    assert timeline.said("C")[-5:] == ["AUTH LOGIN", "****", "****", "NOOP", "what now"]


def test_no_password_of_pop3(pop3, timeline):
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        for line in ("PASS\twonderland", "USER alice", "PASS wonder land", "APOP alice 0123"):
            client.ask(line)
    assert timeline.said("C") == ["PASS ****", "USER alice", "PASS ****", "APOP alice ****"]


BROKEN_LOGINS = ["AUTH\tLOGIN", " AUTH LOGIN", "AUTH=LOGIN", "auth what", "USER alice"]


@pytest.mark.parametrize("line", [*BROKEN_LOGINS, "AUTH LOGIN " + "x" * 5000])
def test_no_password_behind_a_broken_login(smtp, pop3, timeline, line):
    for server, known in ((smtp, "NOOP"), (pop3, "UTF8")):
        with Line(server.host, server.port) as client:
            client.reply()
            for text in (line, "d29uZGVybGFuZA==", "wonderland", known, "what now"):
                client.ask(text)
        assert timeline.said("C")[-4:] == ["****", "****", known, "what now"]


def test_no_password_that_a_hook_asks_for(store, timeline):
    def ask(session, verb, argument):
        return "334 UGFzc3dvcmQ6" if verb == "AUTH" else None

    with (
        SMTPServer(("127.0.0.1", 0), store, trace=Trace(timeline), intercept=ask) as smtp,
        Line(smtp.host, smtp.port) as client,
    ):
        client.reply()
        client.ask("AUTH LOGIN")
        client.ask("d29uZGVybGFuZA==")
    assert timeline.said("C") == ["AUTH LOGIN", "****"]


def test_data_is_shown_as_it_is_on_the_wire(smtp, pop3, timeline):
    """Line by line as it comes, dots doubled, the final dot included, in both directions."""
    with Line(smtp.host, smtp.port) as client:
        begin(client)
        for line in ("Subject: x", "", "..dot"):
            client.send(line + "\r\n")
            while timeline.said("C")[-1] != line:
                pass  # it is shown before the message has ended
        client.ask(".")
    assert timeline.said("C")[-5:] == ["DATA", "Subject: x", "", "..dot", "."]
    with Line(pop3.host, pop3.port) as client:
        client.readline(), client.ask("USER alice"), client.ask("PASS wonderland")
        client.send("RETR 1\r\n")
        while client.readline() != ".":
            pass
    assert timeline.said("S")[-4:] == ["Subject: x", "", "..dot", "."]


def test_a_forgotten_dot_can_be_seen(smtp, timeline):
    with Line(smtp.host, smtp.port) as client:
        begin(client)
        client.send("Subject: x\r\n\r\nhello\r\nQUIT\r\n")
        while timeline.said("C")[-1] != "QUIT":
            pass
    assert timeline.said("C")[-4:] == ["Subject: x", "", "hello", "QUIT"]


def test_a_long_message_is_shown_by_its_beginning(smtp, timeline):
    with Line(smtp.host, smtp.port) as client:
        begin(client)
        client.ask("Subject: x\r\n\r\n" + "line\r\n" * 100 + ".")
    said = timeline.said("C")
    assert said.count("line") == 38
    assert said[-2:] == ["(63 more lines, 617 octets in all)", "."]


def test_chunks_are_shown(smtp, timeline):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>"):
            client.ask(command)
        client.send(b"BDAT 20\r\nSubject: x\r\n\r\n.dot\r\nBDAT 3 LAST\r\nend")
        client.reply(), client.reply()
    said = timeline.said("C")
    assert said[said.index("BDAT 20") :] == [
        "BDAT 20",
        "Subject: x",
        "",
        ".dot",
        "BDAT 3 LAST",
        "end",
    ]


def test_telnets_control_octets_are_named(smtp, timeline):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.send(b"\xff\xf4\xff\xfd\x06EHLO caf\xe9\r\n")
        client.reply()
    assert timeline.said("C") == ["<IAC><IP><IAC><DO>\\x06EHLO caf\\xe9"]


def test_a_refusal_is_shown_once(smtp, timeline, caplog):
    caplog.set_level("INFO")
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("MAIL FROM:<>")
    assert timeline.said("S")[-1] == "503 5.5.1 Send EHLO first"
    assert "refused" not in caplog.text


def test_colours_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    cases = ((io.StringIO(), "", False), (Terminal(), "", True), (Terminal(), "1", False))
    for stream, variable, wanted in cases:
        monkeypatch.setenv("NO_COLOR", variable)
        Trace(stream).line("SMTP", 1, "S", "550 no \x1b[2J")
        assert ("\x1b[31m" in stream.getvalue()) is wanted
        assert "\x1b[2J" not in stream.getvalue()


def test_a_typing_error_behind_a_good_login_is_shown(smtp, pop3, timeline):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        assert client.ask("AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=").startswith("235")
        client.ask("MIAL FROM:<>")
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask("USER alice")
        client.ask("PASS wonderland")
        client.ask("SATT")
    assert [line for line in timeline.said("C") if line in ("MIAL FROM:<>", "SATT")] == [
        "MIAL FROM:<>",
        "SATT",
    ]
