"""SMTP's extensions, a conversation for each rule: RFC 1870, 3030, 3461, 4954, 6152, 6531, 9422, and 1985's syntax."""

import base64
import hmac

import pytest
from conftest import USERS
from conversation import Line, play

from pop3d_simple import POP3Server
from smtpd_simple import MAX_RECIPIENTS, SMTPServer
from store import Store, hash_password

START = "S: 220 *\nC: EHLO client.test\nS: 250-*\n...\nS: 250 *\n"
MAIL = START + "C: MAIL FROM:<me@client.test>\nS: 250 2.1.0 *\n"
RCPT = MAIL + "C: RCPT TO:<alice@example.test>\nS: 250 2.1.5 *\n"
PLAIN = base64.b64encode(b"\0alice@example.test\0wonderland").decode()
WRONG = base64.b64encode(b"\0alice@example.test\0x").decode()
AS_BOB = base64.b64encode(b"bob@example.test\0alice@example.test\0wonderland").decode()
AS_SELF = base64.b64encode(b"alice\0alice@example.test\0wonderland").decode()

SCRIPTS = {
    "1870 SIZE": START + "C: MAIL FROM:<a@b.test> SIZE=1000\nS: 250 *",
    "1870 SIZE too large at MAIL": START
    + "C: MAIL FROM:<a@b.test> SIZE=102400001\nS: 552 5.3.4 *\nC: MAIL FROM:<a@b.test>\nS: 250 *",
    "1870 bad SIZE": START
    + "".join(
        f"C: MAIL FROM:<a@b.test> SIZE{v}\nS: 501 5.5.4 *\n"
        for v in ("", "=", "=-1", "=+1", "=0x1", "=1_0", "=" + "9" * 21)
    ),
    "1870 SIZE of 20 digits": START + "C: MAIL FROM:<a@b.test> SIZE=" + "9" * 20 + "\nS: 552 5.3.4 *",
    "6152 BODY": START
    + "C: MAIL FROM:<a@b.test> BODY=8BITMIME\nS: 250 *\nC: RSET\nS: 250 *\nC: MAIL FROM:<a@b.test> body=7bit\nS: 250 *",
    "6152 bad BODY": START
    + "C: MAIL FROM:<a@b.test> BODY=BINARYMIME\nS: 501 *\nC: MAIL FROM:<a@b.test> BODY\nS: 501 *",
    "3461 parameters of MAIL": START
    + "C: MAIL FROM:<a@b.test> RET=HDRS ENVID=a+2Bb\nS: 250 *\nC: RCPT TO:<alice@example.test> "
    "NOTIFY=SUCCESS,DELAY ORCPT=rfc822;alice+40example.test\nS: 250 *\nC: RCPT TO:<bob@example.test> NOTIFY=NEVER\nS: 250 *",
    "3461 bad parameters": START
    + "C: MAIL FROM:<a@b.test> RET=SOME\nS: 501 *\nC: MAIL FROM:<a@b.test> ENVID=a+b\nS: 501 *\n"
    "C: MAIL FROM:<a@b.test> ENVID=\nS: 501 *\nC: MAIL FROM:<a@b.test>\nS: 250 *\n"
    + "".join(
        f"C: RCPT TO:<alice@example.test> {p}\nS: 501 5.5.4 *\n"
        for p in ("NOTIFY=NEVER,SUCCESS", "NOTIFY=", "NOTIFY=X", "ORCPT=alice", "ORCPT=rfc822;a b+"[:14] + "+z")
    ),
    "3461 parameters of the other command": START
    + "C: MAIL FROM:<a@b.test> NOTIFY=NEVER\nS: 555 *\nC: MAIL FROM:<a@b.test>\nS: 250 *\nC: RCPT TO:<bob@example.test> RET=FULL\nS: 555 *",
    "4954 AUTH PLAIN at once": START + f"C: AUTH PLAIN {PLAIN}\nS: 235 2.7.0 *\nC: AUTH PLAIN {PLAIN}\nS: 503 5.5.1 *",
    "4954 AUTH PLAIN, asked": START + f"C: auth plain\nS: 334 \nC: {PLAIN}\nS: 235 2.7.0 *",
    "4954 AUTH LOGIN with the name": START
    + "C: AUTH LOGIN YWxpY2U=\nS: 334 UGFzc3dvcmQ6\nC: d29uZGVybGFuZA==\nS: 235 *",
    "4954 an identity of one's own": START + f"C: AUTH PLAIN {AS_SELF}\nS: 235 *",
    "4954 another's identity": START + f"C: AUTH PLAIN {AS_BOB}\nS: 535 5.7.8 *",
    "4954 wrong password": START + f"C: AUTH PLAIN {WRONG}\nS: 535 5.7.8 *\nC: NOOP\nS: 250 *",
    "4954 five wrong passwords": START + f"C: AUTH PLAIN {WRONG}\nS: 535 5.7.8 *\n" * 5 + "S: 421 4.7.0 *\nEOF",
    "4954 cancel": START
    + "C: AUTH LOGIN\nS: 334 *\nC: *\nS: 501 5.7.0 *\nC: AUTH LOGIN\nS: 334 *\nC: YQ==\nS: 334 *\nC: *\nS: 501 *",
    "4954 bad base64": START
    + "".join(f"C: AUTH PLAIN {a}\nS: 501 5.5.2 *\n" for a in ("YQ", "Y", "a===", "YQ==YQ==", "Ä", "=YQ=", "YQ==")),
    "4954 empty initial response": START
    + "C: AUTH PLAIN =\nS: 501 5.5.2 *\nC: AUTH LOGIN =\nS: 334 UGFzc3dvcmQ6\nC: eA==\nS: 535 *",
    "4954 unknown mechanism": START + "C: AUTH FOO\nS: 504 5.5.4 *\nC: AUTH PLAIN a b\nS: 501 5.5.4 *",
    "4954 AUTH alone": START + "C: AUTH\nS: 501 5.5.4 *",
    "4954 an answer that is too long": START
    + "C: AUTH PLAIN\nS: 334 \nC: "
    + "YWFh" * 5000
    + "\nS: 500 5.5.6 *\nC: NOOP\nS: 250 *",
    "4954 before EHLO": f"S: 220 *\nC: AUTH PLAIN {PLAIN}\nS: 503 5.5.1 *",
    "4954 inside a transaction": MAIL + f"C: AUTH PLAIN {PLAIN}\nS: 503 5.5.1 *",
    "4954 CRAM-MD5 has no initial response": START + "C: AUTH CRAM-MD5 YQ==\nS: 501 5.7.0 *",
    "4954 AUTH= on MAIL": START
    + "C: MAIL FROM:<a@b.test> AUTH=<>\nS: 250 *\nC: RSET\nS: 250 *\nC: MAIL FROM:<a@b.test> AUTH=e+3Dmc2@example.com\nS: 250 *\n"
    "C: RSET\nS: 250 *\nC: MAIL FROM:<a@b.test> AUTH=a+zz\nS: 501 *",
    "6531 SMTPUTF8": START
    + "C: MAIL FROM:<用户@例子.example> SMTPUTF8\nS: 250 *\nC: RCPT TO:<ünï@example.test>\nS: 550 5.1.1 *",
    "6531 not asked for": START
    + "C: MAIL FROM:<用户@例子.example>\nS: 553 5.6.7 *\nC: MAIL FROM:<a@b.test>\nS: 250 *\nC: RCPT TO:<ünï@example.test>\nS: 553 5.6.7 *",
    "6531 SMTPUTF8 takes no value": START + "C: MAIL FROM:<a@b.test> SMTPUTF8=1\nS: 501 *",
    "6531 not UTF-8": START + 'X: b"MAIL FROM:<\\xff@b.test> SMTPUTF8\\r\\n"\nS: 501 5.1.7 *',
    "6531 VRFY": START + "C: VRFY alice SMTPUTF8\nS: 250 *",
    "3030 BDAT in one piece": RCPT
    + 'X: b"BDAT 8 LAST\\r\\nx: y\\r\\n\\r\\n"\nS: 250 2.0.0 Ok: queued as *\nC: NOOP\nS: 250 *',
    "3030 BDAT in pieces": RCPT
    + 'X: b"BDAT 3\\r\\nabcBDAT 0\\r\\nBDAT 4\\r\\nd\\r\\neBDAT 0 LAST\\r\\n"\nS: 250 2.0.0 3 *\nS: 250 2.0.0 0 *\nS: 250 2.0.0 4 *\nS: 250 2.0.0 Ok: queued *',
    "3030 all in one packet": START
    + 'X: b"MAIL FROM:<>\\r\\nRCPT TO:<alice@example.test>\\r\\nBDAT 3 LAST\\r\\na\\r\\nQUIT\\r\\n"\nS: 250 *\nS: 250 *\nS: 250 *queued*\nS: 221 *',
    "3030 BDAT without MAIL": START + 'X: b"BDAT 6\\r\\nQUIT\\r\\n"\nS: 503 5.5.1 *\nC: NOOP\nS: 250 *',
    "3030 BDAT without RCPT": MAIL + 'X: b"BDAT 6 LAST\\r\\nQUIT\\r\\n"\nS: 503 5.5.1 *\nC: NOOP\nS: 250 *',
    "3030 DATA after BDAT": RCPT
    + 'X: b"BDAT 1\\r\\na"\nS: 250 *\nC: DATA\nS: 503 5.5.1 *\nC: RCPT TO:<bob@example.test>\nS: 503 *\nC: BDAT 0 LAST\nS: 250 *queued*',
    "3030 RSET in the middle": RCPT
    + 'X: b"BDAT 1\\r\\na"\nS: 250 *\nC: RSET\nS: 250 *\nC: BDAT 0 LAST\nS: 503 *\nC: MAIL FROM:<>\nS: 250 *',
    "3030 bad BDAT": RCPT
    + "".join(
        f"C: BDAT {n}\nS: 501 5.5.4 *\n" for n in ("", "x", "-1", "+1", "0x1", "1 LAS", "1 LAST x", "١", "9" * 21)
    ),
    "1985 ETRN without routes": START
    + "C: ETRN other.test\nS: 459 4.7.1 *\nC: ETRN @other.test\nS: 459 *\nC: ETRN #\nS: 459 *",
    "1985 bad ETRN": MAIL
    + "C: ETRN x\nS: 503 *\nC: RSET\nS: 250 *\nC: ETRN\nS: 501 *\nC: ETRN a b\nS: 501 *\nC: ETRN <x>\nS: 501 *",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rule(smtp, name):
    play(smtp, SCRIPTS[name], name)


def ehlo(client):
    """Return the keywords after EHLO."""
    return [line[4:] for line in client.ask("EHLO client.test").split("\n")[1:]]


def test_keywords_in_clear(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        assert ehlo(client) == [
            "PIPELINING",
            "SIZE 102400000",
            "VRFY",
            "ETRN",
            "AUTH LOGIN PLAIN CRAM-MD5",
            "AUTH=LOGIN PLAIN",
            "ENHANCEDSTATUSCODES",
            "8BITMIME",
            "SMTPUTF8",
            "CHUNKING",
            "DSN",
            f"LIMITS RCPTMAX={MAX_RECIPIENTS}",
            "EXPN",
            "HELP",
        ]


def test_every_reply_after_ehlo_has_an_enhanced_code(smtp):
    """RFC 2034 4: class and code agree; greeting, HELO and EHLO have none, nor 3xx."""
    commands = "NOOP,RSET,MAIL,MAIL FROM:<>,RCPT TO:<x@y.test>,RCPT TO:<alice@example.test>,AUTH,BDAT,BDAT x,ETRN,VRFY a,EXPN b,HELP,FOO,"
    with Line(smtp.host, smtp.port) as client:
        assert "." not in client.reply()[4:6]
        client.ask("EHLO client.test")
        for command in (commands + "STARTTLS,DATA x,MAIL FROM:<> X=1,HELP MAIL,QUIT").split(","):
            for line in client.ask(command).split("\n"):
                code, enhanced = line[:3], line[4:].split(" ")[0]
                assert enhanced.split(".")[0] == code[0], (command, line)
                assert len(enhanced.split(".")) == 3, (command, line)


def test_cram_md5(smtp):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        for password, wanted in ((b"wrong", "535"), (b"wonderland", "235")):
            challenge = base64.b64decode(client.ask("AUTH cram-md5")[4:])
            answer = b"alice " + hmac.new(password, challenge, "md5").hexdigest().encode()
            assert client.ask(base64.b64encode(answer).decode()).startswith(wanted)


def test_a_hashed_password_serves_plain_and_not_cram_md5(tmp_path):
    store = Store(tmp_path, {"carol@example.test": hash_password("secret")})
    with SMTPServer(("127.0.0.1", 0), store) as smtp, Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        challenge = base64.b64decode(client.ask("AUTH CRAM-MD5")[4:])
        answer = b"carol " + hmac.new(b"secret", challenge, "md5").hexdigest().encode()
        assert client.ask(base64.b64encode(answer).decode()).startswith("535 5.7.8")
        assert client.ask("AUTH PLAIN " + base64.b64encode(b"\0carol\0secret").decode()).startswith("235")


def test_login_for_everything(store):
    script = START + (
        "C: MAIL FROM:<a@b.test>\nS: 530 5.7.0 AUTH first\nC: VRFY alice\nS: 530 *\n"
        'X: b"BDAT 6 LAST\\r\\nQUIT\\r\\n"\nS: 530 *\nC: NOOP\nS: 250 *\nC: FOO\nS: 500 *\n'
        f"C: AUTH PLAIN {PLAIN}\nS: 235 *\nC: MAIL FROM:<a@b.test>\nS: 250 *"
    )
    with SMTPServer(("127.0.0.1", 0), store, require_auth=True) as smtp:
        play(smtp, script)


def test_utf8_account_all_the_way(tmp_path):
    """用户@例子.example from users.txt over MAIL and the folder to POP3's login; an A-label is the same domain."""
    users = tmp_path / "users.txt"
    users.write_text("用户@例子.example:密码\n", encoding="utf-8")
    store = Store(tmp_path / "spool", users)
    ace = "例子.example".encode("idna").decode()
    script = START + (
        "C: MAIL FROM:<用户@例子.example> SMTPUTF8\nS: 250 *\nC: RCPT TO:<用户@例子.example>\nS: 250 *\n"
        f"C: RCPT TO:<用户@{ace}>\nS: 250 *\n"
        "C: DATA\nS: 354 *\nC: Subject: 你好\nC:\nC: x\nC: .\nS: 250 *"
    )
    with SMTPServer(("127.0.0.1", 0), store) as smtp, POP3Server(("127.0.0.1", 0), store) as pop3:
        play(smtp, script)
        assert (tmp_path / "spool" / "用户@例子.example" / "new").is_dir()
        play(
            pop3,
            "S: +OK*\nC: UTF8\nS: +OK*\nC: USER 用户@例子.example\nS: +OK*\nC: PASS 密码\nS: +OK 1 message*\n"
            "C: TOP 1 0\nS: +OK*\nS: Return-Path: <用户@例子.example>\nS: Delivered-To: 用户@例子.example\n...\nS: Subject: 你好\nS:\nS: .",
        )
    [message] = store.messages("用户@例子.example")
    assert " UTF8SMTP " in message["Received"] or "with UTF8SMTP id" in message["Received"]


def test_bdat_is_the_octets_and_ends_its_last_line_on_the_wire(smtp, pop3, store):
    """No dots are undone; bare newlines become CRLF, also across chunks; a missing last CRLF is added by POP3 only."""
    chunks = [b"Subject: x\r\n\r\n.", b"\r\n..\r\n.\r\nbare\r", b"\nlf\nno end"]
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        client.ask("MAIL FROM:<>")
        client.ask("RCPT TO:<alice@example.test>")
        for chunk in chunks:
            client.send(b"BDAT %d%s\r\n" % (len(chunk), b" LAST" * (chunk is chunks[-1])) + chunk)
            assert client.reply().startswith("250")
    wanted = b"Subject: x\r\n\r\n.\r\n..\r\n.\r\nbare\r\nlf\r\nno end"
    [path] = store.paths("alice@example.test")
    with open(path, "rb") as file:
        data = file.read()
    assert data.endswith(wanted)
    assert path.endswith(f",S={len(data)},W={len(data) + 2}")
    from test_data_path import retrieve

    assert retrieve(pop3) == data + b"\r\n"


def test_bdat_too_large_stays_in_step(store):
    with SMTPServer(("127.0.0.1", 0), store, size_limit=10) as smtp:
        play(
            smtp,
            RCPT + 'X: b"BDAT 8\\r\\n12345678"\nS: 250 *\nX: b"BDAT 8\\r\\nQUIT\\r\\n12"\nS: 552 5.3.4 *\n'
            'X: b"BDAT 6 LAST\\r\\nQUIT\\r\\n"\nS: 503 *\nC: MAIL FROM:<>\nS: 250 *',
        )
    assert store.messages("alice@example.test") == []


def test_questions_from_afar(store, monkeypatch):
    """VRFY and EXPN answer the loopback and those who have logged in; others learn nothing."""
    monkeypatch.setattr("smtpd_simple.is_loopback", lambda host: False)
    monkeypatch.setattr("lineserver.is_loopback", lambda host: False)
    script = START + "C: VRFY alice\nS: 252 *\nC: VRFY nobody\nS: 252 *\nC: EXPN staff\nS: 550 5.7.1 *\n"
    script += f"C: AUTH PLAIN {PLAIN}\nS: 235 *\nC: VRFY alice\nS: 250 *\nC: EXPN staff\nS: 250-*\nS: 250 *"
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        play(smtp, script)


def test_received_says_how(store, tls):
    """RFC 3848: SMTP, ESMTP, S for TLS, A for a login."""
    login = f"C: AUTH PLAIN {PLAIN}\nS: 235 *\n"
    message = (
        "C: MAIL FROM:<>\nS: 250 *\nC: RCPT TO:<alice@example.test>\nS: 250 *\nC: DATA\nS: 354 *\nC: .\nS: 250 *\n"
    )
    tls_start = START + "C: STARTTLS\nS: 220 *\nTLS\n" + START.split("\n", 1)[1]
    with SMTPServer(("127.0.0.1", 0), store, **tls) as smtp:
        for begin in ("S: 220 *\nC: HELO x\nS: 250 *\n", START, START + login, tls_start, tls_start + login):
            play(smtp, begin + message)
    protocols = [message["Received"].split(" with ")[1].split()[0] for message in store.messages("alice@example.test")]
    assert protocols == ["SMTP", "ESMTP", "ESMTPA", "ESMTPS", "ESMTPSA"]


def test_the_null_sender_and_lists(smtp, store):
    play(
        smtp,
        MAIL
        + "C: RCPT TO:<staff@example.test>\nS: 250 *\nC: RCPT TO:<alice+tag@example.test>\nS: 250 *\nC: DATA\nS: 354 *\nC: .\nS: 250 *",
    )
    assert [len(store.messages(address)) for address in list(USERS)[:2]] == [1, 1]
