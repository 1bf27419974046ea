"""SMTP's extensions, a conversation for each rule: RFC 1870, 3030, 3461, 4954, 6152, 6531, 9422, and 1985's syntax."""

import base64
import hmac

import pytest
from conversation import Line, play, scripts
from helpers import USERS

from pop3d_simple import POP3Server
from smtpd_simple import MAX_RECIPIENTS, SMTPServer
from store import Store, hash_password

SCRIPTS, OPTIONS = scripts("smtp_extensions.txt"), scripts("options.txt")
EHLO = OPTIONS["a session that begins"] + "\n"
PLAIN = base64.b64encode(b"\0alice@example.test\0wonderland").decode()


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
    commands = "NOOP,RSET,MAIL,MAIL FROM:<>,RCPT TO:<x@y.test>,RCPT TO:<alice@example.test>,AUTH,BDAT,BDAT x,"
    commands += "ETRN,VRFY a,EXPN b,HELP,FOO,,STARTTLS,DATA x,MAIL FROM:<> X=1,HELP MAIL,QUIT"
    with Line(smtp.host, smtp.port) as client:
        assert "." not in client.reply()[4:6]
        client.ask("EHLO client.test")
        for command in commands.split(","):
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
        assert client.ask("AUTH PLAIN " + base64.b64encode(b"\0carol\0secret").decode()).startswith(
            "235"
        )


def test_login_for_everything(store):
    with SMTPServer(("127.0.0.1", 0), store, require_auth=True) as smtp:
        play(smtp, OPTIONS["SMTP that requires a login"])


def test_utf8_account_all_the_way(tmp_path):
    """From users.txt over MAIL and the mailbox's folder to POP3's login; an A-label is the same domain."""
    users = tmp_path / "users.txt"
    users.write_text("用户@例子.example:密码\n", encoding="utf-8")
    store = Store(tmp_path / "spool", users)
    with SMTPServer(("127.0.0.1", 0), store) as smtp, POP3Server(("127.0.0.1", 0), store) as pop3:
        play(smtp, OPTIONS["UTF-8 in SMTP"])
        assert (tmp_path / "spool" / "用户@例子.example" / "new").is_dir()
        play(pop3, OPTIONS["UTF-8 in POP3"])
    [message] = store.messages("用户@例子.example")
    assert "with UTF8SMTP id" in " ".join(message["Received"].split())


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
    from helpers import retrieve

    assert retrieve(pop3) == data + b"\r\n"


def test_bdat_too_large_stays_in_step(store):
    with SMTPServer(("127.0.0.1", 0), store, size_limit=10) as smtp:
        play(smtp, OPTIONS["BDAT beyond the size limit of 10 octets"])
    assert store.messages("alice@example.test") == []


def test_questions_from_afar(store, monkeypatch):
    """VRFY and EXPN answer the loopback and those who have logged in; others learn nothing."""
    monkeypatch.setattr("smtpd_simple.is_loopback", lambda host: False)
    monkeypatch.setattr("lineserver.is_loopback", lambda host: False)
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        play(smtp, OPTIONS["questions from afar"])


def test_a_catch_all_is_nobodys_name(tmp_path):
    store = Store(tmp_path, {**USERS, "*": "alice@example.test"}, sync=False)
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        play(smtp, OPTIONS["a catch-all for everything is nobody's name"])


def test_received_says_how(store, tls):
    """RFC 3848: SMTP, ESMTP, S for TLS, A for a login."""
    login = f"C: AUTH PLAIN {PLAIN}\nS: 235 *\n"
    message = "C: MAIL FROM:<>\nS: 250 *\nC: RCPT TO:<alice@example.test>\nS: 250 *\nC: DATA\nS: 354 *\nC: .\nS: 250 *\n"
    tls_start = EHLO + "C: STARTTLS\nS: 220 *\nTLS\n" + EHLO.split("\n", 1)[1]
    with SMTPServer(("127.0.0.1", 0), store, **tls) as smtp:
        for begin in (
            "S: 220 *\nC: HELO x\nS: 250 *\n",
            EHLO,
            EHLO + login,
            tls_start,
            tls_start + login,
        ):
            play(smtp, begin + message)
    protocols = [
        message["Received"].split(" with ")[1].split()[0]
        for message in store.messages("alice@example.test")
    ]
    assert protocols == ["SMTP", "ESMTP", "ESMTPA", "ESMTPS", "ESMTPSA"]


def test_one_copy_for_each_mailbox(smtp, store):
    play(smtp, OPTIONS["a list and a tag lead to one mailbox"])
    assert [len(store.messages(address)) for address in list(USERS)[:2]] == [1, 1]


def test_a_local_part_that_two_accounts_have(tmp_path):
    store = Store(tmp_path, {"alice@a.test": "x", "alice@b.test": "x", "bob@b.test": "x"})
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        play(smtp, OPTIONS["a local part that two accounts have"])


def test_a_list_with_members_that_are_not_ascii(tmp_path):
    accounts = {"用户@a.test": "x", "alice@a.test": "x"}
    store = Store(tmp_path, {**accounts, "staff@a.test": list(accounts)})
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        play(smtp, OPTIONS["a list with members that are not ASCII"])


@pytest.mark.parametrize(("size", "reply"), [(1000, "250"), (1001, "552 5.3.4")])
def test_size_equal_to_the_limit_is_taken(store, size, reply):
    smtp = SMTPServer(("127.0.0.1", 0), store, size_limit=1000)
    with smtp, Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        assert client.ask(f"MAIL FROM:<> SIZE={size}").startswith(reply)


def test_a_size_that_the_disk_has_no_room_for(store, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    with SMTPServer(("127.0.0.1", 0), store) as smtp, Line(smtp.host, smtp.port) as client:
        client.reply()
        client.ask("EHLO x")
        assert client.ask("MAIL FROM:<> SIZE=1001").startswith("452 4.3.1")
        assert client.ask("MAIL FROM:<> SIZE=1000").startswith("250")


HELO = {  # a name: how it stands in Received, which stays well-formed
    "client.test": "from client.test ([127.0.0.1])",
    "[127.0.0.1]": "from [127.0.0.1] ([127.0.0.1])",
    "localhost.(none)": "from localhost.(none) ([127.0.0.1])",
    "my computer": "from [127.0.0.1] (HELO my computer)",
    "fe80::1%eth0": "from [127.0.0.1] (HELO fe80::1%eth0)",
    "MÜLLER-PC": "from [127.0.0.1] (HELO M\\xdcLLER-PC)",
    "a)b(c\\d": "from [127.0.0.1] (HELO a\\)b\\(c\\\\d)",
    "x\ty\x00": "from [127.0.0.1] (HELO x\\\\ty\\\\x00)",
}


@pytest.mark.parametrize("name", HELO, ids=ascii)
def test_any_helo_name_and_received(store, smtp, name):
    with Line(smtp.host, smtp.port) as client:
        client.reply()
        assert client.ask(f"HELO {name}").startswith("250")
        for command in ("MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
            client.ask(command)
        assert client.ask("Subject: x\r\n\r\n.").startswith("250")
    [path] = store.paths("alice@example.test")
    with open(path, "rb") as file:
        lines = file.read().decode("ascii").split("\r\n")
    assert f"Received: {HELO[name]}" in lines
