"""The two sessions that every reader types first, line for line, and APOP after them."""

import hashlib

from conversation import Line, play

from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store

USERS = {"test1@domain.com": "1982214", "test2@domain.com": "hunter2", "costa@amaxit.net": "1982214"}

SMTP = """
    S: 220 * ESMTP *
    C: helo test.com
    S: 250 *
    C: ehlo test.com
    S: 250-*
    S: 250-PIPELINING
    S: 250-SIZE 102400000
    S: 250-VRFY
    S: 250-ETRN
    S: 250-AUTH LOGIN PLAIN*
    S: 250-AUTH=LOGIN PLAIN*
    S: 250-ENHANCEDSTATUSCODES
    S: 250-8BITMIME
    ...
    S: 250-DSN
    ...
    S: 250 *
    C: auth login
    S: 334 VXNlcm5hbWU6
    C: Y29zdGFAYW1heGl0Lm5ldA==
    S: 334 UGFzc3dvcmQ6
    C: d3Jvbmc=
    S: 535 *
    C: auth login
    S: 334 VXNlcm5hbWU6
    C: Y29zdGFAYW1heGl0Lm5ldA==
    S: 334 UGFzc3dvcmQ6
    C: MTk4MjIxNA==
    S: 235 *
    C: mail from: <test1@domain.com>
    S: 250 *
    C: rcpt to: <test2@domain.com>
    S: 250 *
    C: data
    S: 354 *
    C: From: test1@domain.com
    C: To: test2@domain.com
    C: Date: Mon, 25 Oct 2004 14:24:27 +0800
    C: Subject: test mail
    C:
    C: Hi, test2
    C: This is a test mail, you don't reply it.
    C:
    C: .
    S: 250 * queued as [0-9A-F]*
    C: vrfy test2@domain.com
    S: 250 *test2@domain.com*
    C: expn staff@domain.com
    S: 550 *
    C: help
    S: 214*
    ...
    S: 214 *
    C: noop
    S: 250 *
    C: rset
    S: 250 *
    C: quit
    S: 221 *
    EOF
"""

POP3 = """
    S: +OK * <*@*>
    C: user test2@domain.com
    S: +OK*
    C: pass wrong
    S: -ERR *
    C: pass hunter2
    S: -ERR *
    C: user test2@domain.com
    S: +OK*
    C: pass hunter2
    S: +OK 2 messages *
    C: stat
    S: +OK 2 *
    C: list
    S: +OK*
    S: 1 *
    S: 2 *
    S: .
    C: uidl
    S: +OK*
    S: 1 *
    S: 2 *
    S: .
    C: uidl 2
    S: +OK 2 *
    C: top 1
    S: +OK*
    S: Return-Path: <test1@domain.com>
    S: Delivered-To: test2@domain.com
    S: Received: *
    ...
    S: Subject: test mail
    S:
    S: .
    C: top 1 1
    S: +OK*
    ...
    S:
    S: Hi, test2
    S: .
    C: retr 1
    S: +OK * octets
    S: Return-Path: <test1@domain.com>
    S: Delivered-To: test2@domain.com
    S: Received: *
    ...
    S: This is a test mail, you don't reply it.
    S:
    S: .
    C: dele 1
    S: +OK*
    C: dele 2
    S: +OK*
    C: stat
    S: +OK 0 0
    C: rset
    S: +OK*
    C: stat
    S: +OK 2 *
    C: dele 1
    S: +OK*
    C: dele 2
    S: +OK*
    C: noop
    S: +OK*
    C: quit
    S: +OK*
    EOF
"""

AGAIN = """
    S: +OK * <*@*>
    C: user test2@domain.com
    S: +OK*
    C: pass hunter2
    S: +OK 0 messages*
    C: quit
    S: +OK*
"""


def test_the_example_sessions(tmp_path):
    store = Store(tmp_path, USERS)
    with SMTPServer(("127.0.0.1", 0), store) as smtp, POP3Server(("127.0.0.1", 0), store) as pop3:
        play(smtp, SMTP, "smtp")
        play(smtp, SMTP, "smtp, again")
        play(pop3, POP3, "pop3")
        play(pop3, AGAIN, "pop3, again")


def test_apop(tmp_path):
    store = Store(tmp_path, USERS)
    with POP3Server(("127.0.0.1", 0), store) as pop3, Line(pop3.host, pop3.port) as client:
        timestamp = client.readline()
        timestamp = timestamp[timestamp.index("<") :]
        digest = hashlib.md5((timestamp + "hunter2").encode()).hexdigest()
        assert client.ask(f"apop test2@domain.com {digest}").startswith("+OK 0 messages")
