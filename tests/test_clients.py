"""Real programs and real mail: what people have installed talks to the server; each skips where it is missing."""

import email.policy
import os
import poplib
import shutil
import smtplib
import subprocess
from email.message import EmailMessage
from pathlib import Path

import pytest
from helpers import retrieve, with_empty_line

from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store, canonical

MESSAGE = "From: me@client.test\nTo: alice@example.test\nSubject: from a client\n\n.dot\nHello.\n"


@pytest.fixture
def mail(store, tls):
    """Both servers with a certificate, as (smtp, pop3)."""
    with (
        SMTPServer(("127.0.0.1", 0), store, **tls) as smtp,
        POP3Server(("127.0.0.1", 0), store, **tls) as pop3,
    ):
        yield smtp, pop3


@pytest.fixture
def secure(store, tls):
    """Both servers with TLS from the first octet."""
    tls = {**tls, "implicit_tls": True}
    with (
        SMTPServer(("127.0.0.1", 0), store, **tls) as smtp,
        POP3Server(("127.0.0.1", 0), store, **tls) as pop3,
    ):
        yield smtp, pop3


def run(*argv, text=None, **options):
    """Run a program that must succeed; skip when it is not installed."""
    if not shutil.which(argv[0]):
        pytest.skip(f"{argv[0]} is not installed")
    result = subprocess.run(
        list(map(str, argv)), input=text, capture_output=True, text=True, timeout=30, **options
    )
    if "TLS not available" in result.stderr:
        pytest.skip(f"{argv[0]}: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def the_message(store):
    [message] = store.wait("alice@example.test")
    assert message["Subject"] == "from a client"
    assert ".dot" in message.get_content()


CURL_SEND = [
    "--mail-from",
    "me@client.test",
    "--mail-rcpt",
    "alice@example.test",
    "--upload-file",
    "-",
    "--crlf",
    "-sS",
]


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--ssl-reqd", "-k"],
        ["-u", "alice:wonderland"],
        *(
            ["-u", "alice:wonderland", "--login-options", f"AUTH={name}"]
            for name in ("PLAIN", "LOGIN", "CRAM-MD5")
        ),
    ],
)
def test_curl_sends(store, mail, how):
    run("curl", f"smtp://127.0.0.1:{mail[0].port}", *CURL_SEND, *how, text=MESSAGE)
    the_message(store)


@pytest.mark.parametrize(
    "how",
    [
        [],
        ["--ssl-reqd", "-k"],
        *(["--login-options", f"AUTH={name}"] for name in ("PLAIN", "LOGIN", "CRAM-MD5", "+APOP")),
    ],
)
def test_curl_fetches(store, mail, deliver, how):
    deliver(MESSAGE.replace("\n", "\r\n").encode())
    out = run(
        "curl",
        "-sS",
        "-u",
        "alice@example.test:wonderland",
        f"pop3://127.0.0.1:{mail[1].port}/1",
        *how,
    )
    assert ".dot" in out


def test_curl_over_implicit_tls(store, secure):
    run("curl", "-k", f"smtps://127.0.0.1:{secure[0].port}", *CURL_SEND, text=MESSAGE)
    the_message(store)
    out = run(
        "curl", "-k", "-sS", "-u", "alice:wonderland", f"pop3s://127.0.0.1:{secure[1].port}/1"
    )
    assert "from a client" in out


@pytest.mark.parametrize(("which", "word"), [(0, "smtp"), (1, "pop3")])
def test_openssl_starttls(mail, which, word):
    argv = [
        "openssl",
        "s_client",
        "-quiet",
        "-ign_eof",
        "-crlf",
        "-starttls",
        word,
        "-connect",
        f"127.0.0.1:{mail[which].port}",
    ]
    assert ("221 2.0.0" if word == "smtp" else "+OK good bye") in run(*argv, text="QUIT\n")


@pytest.mark.parametrize("auth", ["PLAIN", "LOGIN", "CRAM-MD5"])
@pytest.mark.parametrize("encryption", [[], ["--tls"]])
def test_swaks(store, mail, auth, encryption):
    argv = [
        "--server",
        f"127.0.0.1:{mail[0].port}",
        "--to",
        "alice@example.test",
        "--from",
        "me@client.test",
        *encryption,
    ]
    if (
        auth == "CRAM-MD5"
        and subprocess.run(
            ["perl", "-MDigest::HMAC_MD5", "-e", "1"], capture_output=True
        ).returncode
    ):
        pytest.skip("swaks needs Perl's Digest::HMAC_MD5 for CRAM-MD5")
    run(
        "swaks",
        *argv,
        "--auth",
        auth,
        "--auth-user",
        "alice",
        "--auth-password",
        "wonderland",
        "--header",
        "Subject: from a client",
        "--body",
        ".dot",
    )
    the_message(store)


def test_msmtp(store, mail):
    argv = [
        "--host=127.0.0.1",
        f"--port={mail[0].port}",
        "--from=me@client.test",
        "--auth=on",
        "--user=alice",
        "--tls=on",
        "--tls-certcheck=off",
    ]
    run("msmtp", *argv, "--passwordeval=echo wonderland", "alice@example.test", text=MESSAGE)
    the_message(store)


def test_mpop(mail, deliver, tmp_path):
    deliver(MESSAGE.replace("\n", "\r\n").encode())
    for folder in ("tmp", "new", "cur"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    config = tmp_path / "mpoprc"
    config.write_text(
        f"account a\nhost 127.0.0.1\nport {mail[1].port}\nuser alice\npasswordeval echo wonderland\n"
        f"tls on\ntls_starttls on\ntls_certcheck off\ndelivery maildir {tmp_path}/in\n"
        f"uidls_file {tmp_path}/uidls\nkeep off\n"
    )
    config.chmod(0o600)
    run("mpop", "-C", config, "a")
    [fetched] = (tmp_path / "in" / "new").iterdir()
    assert ".dot" in fetched.read_text()
    assert mail[1].store.messages("alice@example.test") == []


def test_fetchmail(mail, deliver, tmp_path):
    deliver(MESSAGE.replace("\n", "\r\n").encode())
    config = tmp_path / "fetchmailrc"
    config.write_text(
        f'poll 127.0.0.1 protocol pop3 port {mail[1].port} user "alice@example.test" password "wonderland" '
        f'sslproto "" mda "cat >> {tmp_path}/fetched"\n'
    )
    config.chmod(0o600)
    run(
        "fetchmail",
        "-f",
        config,
        "--pidfile",
        tmp_path / "pid",
        env={**os.environ, "HOME": str(tmp_path), "FETCHMAILHOME": str(tmp_path)},
    )
    assert ".dot" in (tmp_path / "fetched").read_text()
    assert mail[1].store.messages("alice@example.test") == []


def test_mutt_sends(store, smtp, tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb"}
    settings = f"set smtp_url=smtp://127.0.0.1:{smtp.port}/ ssl_force_tls=no ssl_starttls=no copy=no from=me@client.test"
    argv = [
        "mutt",
        "-n",
        "-F",
        "/dev/null",
        "-e",
        settings,
        "-s",
        "from a client",
        "alice@example.test",
    ]
    run(*argv, text=".dot\nHello.\n", env=env)
    the_message(store)


# ---- Python's clients, and a corpus


def corpus():
    """The messages that Python's own tests keep, and some odd ones."""
    import sysconfig

    folder = Path(sysconfig.get_path("stdlib")) / "test" / "test_email" / "data"
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("msg_*.txt"))}
    odd = {
        "folded": b"Subject: a\r\n\tb\r\n c\r\n\r\n",
        "no colon": b"this is no header\r\n\r\nbody\r\n",
        "utf-8": "Subject: Grüße 用户\r\n\r\n你好\r\n".encode(),
        "latin-1": b"Subject: Gr\xfc\xdfe\r\n\r\n\xe4\xf6\r\n",
        "trailing spaces": b"Subject: x  \r\n\r\n  y  \r\n \r\n\r\n\r\n",
        "mbox": b"From me Mon Oct 25\r\nSubject: x\r\n\r\n>From\r\nFrom\r\n",
    }
    lines = {
        name: content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        for name, content in found.items()
    }
    return {
        name: content.rstrip(b"\n").replace(b"\n", b"\r\n") + b"\r\n"
        for name, content in lines.items()
    } | odd


CORPUS = corpus()


def test_corpus_octet_for_octet(store, smtp, pop3):
    """In through smtplib, out through poplib: the same behind our three fields.

    A message whose header is not complete gets the empty line that is missing.
    """
    with smtplib.SMTP(smtp.host, smtp.port) as client:
        for content in CORPUS.values():
            client.sendmail("me@client.test", ["alice@example.test"], content)
    client = poplib.POP3(pop3.host, pop3.port)
    client.user("alice")
    client.pass_("wonderland")
    for number, (name, wanted) in enumerate(CORPUS.items(), 1):
        lines = client.retr(number)[1]
        data, wanted = b"".join(line + b"\r\n" for line in lines), with_empty_line(wanted)
        assert data.endswith(b"\r\n" + wanted), name
        head = data[: len(data) - len(wanted)].replace(b"\r\n\t", b" ").split(b"\r\n")
        names = [line.split(b":")[0] for line in head]
        assert names == [b"Return-Path", b"Delivered-To", b"Received", b""], name
    client.quit()


def test_send_message_with_an_internationalised_address(tmp_path):
    store = Store(tmp_path, {"用户@例子.example": "x", "alice@example.test": "wonderland"})
    message = EmailMessage(policy=email.policy.SMTPUTF8)
    message["From"], message["To"], message["Subject"] = (
        "me@client.test",
        "用户@例子.example",
        "你好",
    )
    message.set_content("text")
    with SMTPServer(("127.0.0.1", 0), store) as smtp, smtplib.SMTP(smtp.host, smtp.port) as client:
        client.send_message(message)
    [got] = store.messages("用户@例子.example")
    assert got["Subject"] == "你好"
    assert (tmp_path / canonical("用户@例子.example")).is_dir()


@pytest.mark.parametrize("method", ["auth_plain", "auth_login", "auth_cram_md5"])
def test_every_login_of_smtplib(smtp, method):
    with smtplib.SMTP(smtp.host, smtp.port) as client:
        client.ehlo()
        client.user, client.password = "alice@example.test", "wonderland"
        name = method.removeprefix("auth_").replace("_", "-").upper()
        assert client.auth(name, getattr(client, method))[0] == 235


def test_every_login_of_poplib(pop3, deliver):
    deliver(b"Subject: x\r\n\r\n")
    for login in (
        lambda c: (c.user("alice"), c.pass_("wonderland")),
        lambda c: c.apop("alice", "wonderland"),
    ):
        client = poplib.POP3(pop3.host, pop3.port)
        login(client)
        client.quit()
    assert retrieve(pop3) == b"Subject: x\r\n\r\n"
