"""The trace: the dialogue as a class sees it on the projector, without a single password."""

import io
import re

from conversation import Line

from lineserver import Trace
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer


def test_both_protocols_in_one_timeline(store):
    out = io.StringIO()
    trace = Trace(out)
    with (
        SMTPServer(("127.0.0.1", 0), store, trace=trace) as smtp,
        POP3Server(("127.0.0.1", 0), store, trace=trace) as pop3,
    ):
        with Line(smtp.host, smtp.port) as client:
            client.reply()
            secrets = [
                "AUTH LOGIN",
                "YWxpY2U=",
                "d29uZGVybGFuZA==",
                "AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=",
            ]
            secrets += [
                "AUTH PLAIN\tAGFsaWNlAHdvbmRlcmxhbmQ=",
                " AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=",
            ]
            for command in [
                "EHLO x",
                *secrets,
                "MAIL FROM:<>",
                "RCPT TO:<alice@example.test>",
                "DATA",
            ]:
                client.ask(command)
            for line in (
                "Subject: x",
                "",
                "..dot",
                *["line"] * 100,
                ".",
            ):  # one by one, as a person types them
                client.send(line + "\r\n")
            client.reply()
        with Line(pop3.host, pop3.port) as client:
            client.readline()
            for command in ("PASS\twonderland", "USER alice", "PASS wonderland"):
                client.ask(command)
            client.send("RETR 1\r\n")
            while client.readline() != ".":
                pass
    text = out.getvalue()
    assert "wonderland" not in text
    assert "d29uZG" not in text
    assert "AGFsaWNl" not in text
    lines = [re.sub(r"^\d\d:\d\d:\d\d\.\d{3} ", "", line) for line in text.splitlines()]
    assert re.fullmatch(r"SMTP  +\d+  S: 220 .*", lines[0])
    assert any(re.fullmatch(r"SMTP  +\d+  C: AUTH PLAIN \*\*\*\*", line) for line in lines)
    assert any(re.fullmatch(r"POP3  +\d+  C: PASS \*\*\*\*", line) for line in lines)
    assert any("C: | Subject: x" in line for line in lines)
    assert any(line.endswith("C: | ..dot") for line in lines)
    assert any(line.endswith("S: | ..dot") for line in lines)
    assert any(re.search(r"C: \| \(620 octets in all\)", line) for line in lines)
    assert any(re.search(r"S: \| \(\d+ octets in all\)", line) for line in lines)
    assert 50 < len([line for line in lines if line.endswith("| line")]) <= 2 * Trace.DATA_LINES


def test_colours_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, variable, wanted in (
        (io.StringIO(), "", False),
        (Terminal(), "", True),
        (Terminal(), "1", False),
    ):
        monkeypatch.setenv("NO_COLOR", variable)
        Trace(stream).line("SMTP", 1, "S", "550 no \x1b[2J")
        assert ("\x1b[31m" in stream.getvalue()) is wanted
        assert "\x1b[2J" not in stream.getvalue()
