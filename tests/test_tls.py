"""TLS in both protocols: STARTTLS (RFC 3207), STLS (RFC 2595), implicit TLS, and nothing that crosses the border."""

import poplib
import smtplib
import ssl
import threading

import pytest
from conversation import Line, play, scripts

from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer

SMTP, POP3, OPTIONS = scripts("smtp_tls.txt"), scripts("pop3_tls.txt"), scripts("options.txt")
START = OPTIONS["a session that begins"] + "\n"


@pytest.mark.parametrize("name", SMTP)
def test_smtp(store, tls, name):
    with SMTPServer(("127.0.0.1", 0), store, **tls) as smtp:
        play(smtp, SMTP[name], name)


@pytest.mark.parametrize("name", POP3)
def test_pop3(store, tls, name):
    with POP3Server(("127.0.0.1", 0), store, **tls) as pop3:
        play(pop3, POP3[name], name)


def test_an_idle_session_hears_that_the_server_stops(store, tls):
    with SMTPServer(("127.0.0.1", 0), store, **tls) as smtp:
        client = Line(smtp.host, smtp.port)
        client.reply()
        client.ask("EHLO client.test")
        client.ask("STARTTLS")
        client.start_tls()
        client.ask("EHLO client.test")
    assert client.readline().startswith("421 4.3.2")
    client.close()


def test_no_certificate_no_tls(smtp, pop3):
    play(smtp, START + "C: STARTTLS\nS: 502 5.5.1 *\nC: NOOP\nS: 250 *")
    play(pop3, "S: +OK*\nC: STLS\nS: -ERR *\nC: CAPA\nS: +OK*\n...\nS: .")


def test_nothing_but_tls_when_it_is_required(store, tls):
    with SMTPServer(("127.0.0.1", 0), store, require_tls=True, **tls) as smtp:
        play(smtp, OPTIONS["SMTP that requires TLS"])
    with POP3Server(("127.0.0.1", 0), store, require_tls=True, **tls) as pop3:
        play(pop3, OPTIONS["POP3 that requires TLS"])


def test_passwords_in_clear_from_afar(store, tls, monkeypatch):
    """In clear a password may cross the loopback, and other lines only where there is no certificate."""
    monkeypatch.setattr("lineserver.is_loopback", lambda host: False)
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        play(smtp, START.replace("...", "...\nS: 250-AUTH LOGIN *\n..."))
    with SMTPServer(("127.0.0.1", 0), store, **tls) as smtp:
        play(smtp, START + "C: AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=\nS: 538 5.7.11 *")
    with POP3Server(("127.0.0.1", 0), store, **tls) as pop3:
        play(pop3, "S: +OK*\nC: USER alice\nS: -ERR send STLS first*")


def test_implicit_tls_with_python_clients(store, certificate, tls):
    context = ssl.create_default_context(cafile=certificate[0])
    with (
        SMTPServer(("127.0.0.1", 0), store, implicit_tls=True, **tls) as smtp,
        POP3Server(("127.0.0.1", 0), store, implicit_tls=True, **tls) as pop3,
    ):
        with smtplib.SMTP_SSL("localhost", smtp.port, context=context) as client:
            client.login("alice", "wonderland")
            client.sendmail("a@b.test", "alice@example.test", "Subject: over TLS\n\nx\n")
        client = poplib.POP3_SSL("localhost", pop3.port, context=context)
        client.user("alice")
        client.pass_("wonderland")
        assert b"Subject: over TLS" in client.retr(1)[1]
        client.quit()


def test_starttls_and_stls_with_python_clients(store, certificate, tls):
    context = ssl.create_default_context(cafile=certificate[0])
    with (
        SMTPServer(("127.0.0.1", 0), store, **tls) as smtp,
        POP3Server(("127.0.0.1", 0), store, **tls) as pop3,
    ):
        with smtplib.SMTP("localhost", smtp.port) as client:
            client.starttls(context=context)
            client.login("alice", "wonderland")
            client.sendmail(
                "a@b.test",
                "alice@example.test",
                b"Subject: big\r\n\r\n" + b"x" * 70 + b"\r\n" * 50_000,
            )
        client = poplib.POP3("localhost", pop3.port)
        client.stls(context=context)
        client.user("alice")
        client.pass_("wonderland")
        assert len(client.retr(1)[1]) > 50_000
        client.quit()


def test_old_tls_is_refused(store, tls):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = (
            ssl.TLSVersion.TLSv1,
            ssl.TLSVersion.TLSv1_1,
        )
    with (
        SMTPServer(("127.0.0.1", 0), store, implicit_tls=True, **tls) as smtp,
        Line(smtp.host, smtp.port) as client,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        client.start_tls(context)


def test_silent_tls_clients_disturb_nobody(store, tls):
    """A handshake runs in the session's thread, under a deadline: others are served at once."""
    with SMTPServer(("127.0.0.1", 0), store, implicit_tls=True, timeout=1, **tls) as smtp:
        silent = [Line(smtp.host, smtp.port) for _ in range(20)]
        with Line(smtp.host, smtp.port) as client:
            client.start_tls()
            assert client.reply().startswith("220")
        assert all(client.at_end() for client in silent)
        for client in silent:
            client.close()


def test_a_session_ends_with_close_notify(store, tls):
    """Without it a client can't tell the end from a cut line."""
    with (
        SMTPServer(("127.0.0.1", 0), store, implicit_tls=True, **tls) as smtp,
        Line(smtp.host, smtp.port) as client,
    ):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client.file.close()
        client.sock = context.wrap_socket(client.sock, suppress_ragged_eofs=False)
        client.file = client.sock.makefile("rb")
        client.reply()
        assert client.ask("QUIT").startswith("221")
        assert client.file.read() == b""


def test_a_self_signed_certificate_is_made_once(tmp_path, certificate):
    from lineserver import self_signed

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(self_signed(tmp_path / "spool", "a.test")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == self_signed(tmp_path / "spool", "a.test")
    ssl.create_default_context(cafile=results[0][0])
