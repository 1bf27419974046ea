"""The three programs, run as their users run them."""

import contextlib
import email.policy
import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
import types
from email.message import EmailMessage
from pathlib import Path

import pytest
from conversation import Line
from helpers import ROOT, Program, send

from pop3d_simple import main as pop3_main
from smtpd_simple import main as smtp_main
from store import Delivery, Store, Target, show_list
from store import main as store_main


def run(script, *argv, **options):
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=20,
        **options,
    )


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call a program's main() in tmp_path: call("store.py", argument, ...) gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("startup_simple.serve", lambda *_: pytest.fail("it started"))

    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", [script])
        try:
            status = {
                "store.py": store_main,
                "smtpd_simple.py": smtp_main,
                "pop3d_simple.py": pop3_main,
            }[script]([str(word) for word in argv])
        except SystemExit as end:  # argparse's way
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("alice@example.test:wonderland\nstaff@example.test = alice@example.test\n")
    return path


LOCKED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAjUcGs0y4W0xgICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEAfl/R4RSSI0Yly9CNiuTr8EQDyV
3fXUBgBKfZKB0cWDj8/i3qoSnQcNu3unUuAVopNIAfXCmdRlATP6bJRf9ROlMnrh
2Hi6GsrYXx3ucMjETtc=
-----END ENCRYPTED PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBLjCB4aADAgECAhRGF35dZEufDDJuBvTTPvnMhQf76zAFBgMrZXAwDDEKMAgG
A1UEAwwBeDAgFw0yNjExMjUxODQ0NTdaGA8yMTI2MTEwMTE4NDQ1N1owDDEKMAgG
A1UEAwwBeDAqMAUGAytlcAMhABf1z+fPenvPiEnc20Z5BB5fXWyHX2n77HJrjJm1
8XR4o1MwUTAdBgNVHQ4EFgQUgXSxZHAwNWZxqC5UTooc/TV1658wHwYDVR0jBBgw
FoAUgXSxZHAwNWZxqC5UTooc/TV1658wDwYDVR0TAQH/BAUwAwEB/zAFBgMrZXAD
QQD69DxCFNug2TDzUAnTDqzFmhZCBaIub531cGu/BREx3NU+0weMnUbPXjP5W85W
ngN2Molr7gSF/5/P8XFTK18H
-----END CERTIFICATE-----
"""  # a certificate whose key has a password


@pytest.mark.parametrize("script", ["smtpd_simple.py", "pop3d_simple.py"])
@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--port", "x"], 2, "not a port"),
        (["--port", "65536"], 2, "not a port"),
        (["--port", "00000000099999"], 2, "not a port"),
        (["--timeout", "9" * 20], 2, "above 0"),
        (["--timeout", "9" * 12], 2, "above 0"),
        (["--hostname", "a b"], 2, "not a host name"),
        (["--hostname", "a/b"], 2, "not a host name"),
        (["--tls-cert", ".", "--tls-key", "users.txt"], 1, ".: Is a directory"),
        (
            ["--tls-cert", "locked.pem", "--tls-key", "locked.pem"],
            2,
            "locked.pem: not a certificate and its key",
        ),
        (["--max-connections", "0"], 2, "above 0"),
        (["--nonsense"], 2, "unrecognized"),
        (["--max-conn", "5"], 2, "unrecognized"),
        (["--users", ""], 2, "no name"),
        (["--spool", ""], 2, "no name"),
        (["--hostname", ""], 2, "not a host name"),
        (["--tls-cert", "", "--tls-key", ""], 1, "an empty name: No such file"),
        (["--tls-cert", "x"], 2, "go together"),
        (["--require-tls"], 2, "needs --tls-cert"),
        (["--tls-cert", "missing", "--tls-key", "missing"], 1, "missing: No such file"),
        (["--tls-cert", "users.txt", "--tls-key", "users.txt"], 2, "not a certificate"),
        (["--users", "missing.txt"], 1, "missing.txt: No such file"),
        (["--users", "broken.txt"], 2, "broken.txt:2: "),
        (["--spool", "users.txt/spool"], 1, "users.txt: Not a directory"),
        (["--host", "\udcff"], 2, "\\xff is not a host"),
        (["--host", "nosuch.invalid"], 1, "nosuch.invalid:0: "),
        (["--host", "203.0.113.1"], 1, "203.0.113.1"),
    ],
)
def test_mistakes_give_one_line(tmp_path, users, call, script, argv, status, said):
    (tmp_path / "broken.txt").write_text("alice@example.test:x\nbroken\n")
    (tmp_path / "locked.pem").write_text(LOCKED)
    ended, _, stderr = call(script, "--port", 0, *argv)
    assert ended == status, stderr
    assert said in stderr
    assert stderr.startswith(f"{script}: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["smtpd_simple.py", "pop3d_simple.py"])
def test_a_port_in_use(tmp_path, users, script):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(script, "--port", port, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"{script}: 127.0.0.1:{port}: Address already in use\n"


MISTAKES = [["--route", "x"], ["--relay", "x:y"], ["--relay", ""], ["--intercept", "users.txt"]]
MISTAKES += [["--intercept", f"{name}.py"] for name in ("number", "leaves", "fails")]


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_mistakes_of_smtp(tmp_path, users, call, argv):
    (tmp_path / "number.py").write_text("intercept = 5")
    (tmp_path / "leaves.py").write_text("raise SystemExit(7)")
    (tmp_path / "fails.py").write_text("{}['x']")
    status, _, stderr = call("smtpd_simple.py", "--port", 0, *argv)
    assert (status, stderr.count("\n")) == (2, 1)


def test_a_hook_that_is_not_there(users, call):
    for path, name in (("missing.py", "missing.py"), ("", "an empty name")):
        said = f"smtpd_simple.py: {name}: No such file or directory\n"
        assert call("smtpd_simple.py", "--port", 0, "--intercept", path) == (1, "", said)


def test_version_and_help():
    for script in ("smtpd_simple.py", "pop3d_simple.py"):
        assert re.fullmatch(rf"{script} \d+\.\d+\n", run(script, "--version").stdout)
        assert "--tls-self-signed" in run(script, "--help").stdout


def test_readme_lists_every_option():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## Reference")[2]
    flags = set(
        re.findall(r"^  (--[a-z][a-z0-9-]+)", run("smtpd_simple.py", "--help").stdout, re.MULTILINE)
    )
    assert len(flags) > 20
    for flag in flags - {"--version"}:
        assert f"`{flag}" in table, flag


def test_the_whole_server(tmp_path, users, certificate):
    """All listeners in one process: their lines, what a newcomer is told, a message through, the end with status 0."""
    argv = [
        "--port",
        0,
        "--pop3",
        0,
        "--smtps-port",
        0,
        "--pop3s-port",
        0,
        "--hostname",
        "mail.example.test",
    ]
    argv += ["--tls-cert", certificate[0], "--tls-key", certificate[1]]
    with Program(*argv, cwd=tmp_path, count=4) as program:
        assert list(program.ports) == ["SMTP", "SMTPS", "POP3", "POP3S"]
        assert "spool     " in program.process.stdout.readline()
        assert "alice@example.test" in program.process.stdout.readline()
        assert send(program).startswith("250")
        for name, greeting in (("SMTPS", "220"), ("POP3S", "+OK")):
            with Line("127.0.0.1", program.ports[name]) as client:
                client.start_tls()
                assert client.readline().startswith(greeting)
        status, errors = program.stop()
    assert status == 0
    assert "queued as" in errors
    assert "Traceback" not in errors
    assert len(Store(tmp_path / "spool", users).messages("alice@example.test")) == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_with_sessions_open(tmp_path, users, how):
    """Idle sessions hear 421, a message that is arriving is the sender's again, the status is 0."""
    with Program("--port", 0, "--pop3", 0, cwd=tmp_path, count=2) as program:
        idle, arriving, pop3 = (
            Line("127.0.0.1", program.ports[name]) for name in ("SMTP", "SMTP", "POP3")
        )
        idle.reply(), pop3.readline(), arriving.reply()
        for command in ("EHLO x", "MAIL FROM:<>", "RCPT TO:<alice@example.test>", "DATA"):
            arriving.ask(command)
        arriving.send("Subject: half\r\n")
        idle.ask("NOOP")
        status, errors = program.stop(how)
        assert status == 0, errors
        assert idle.readline().startswith("421 4.3.2")
        assert arriving.readline().startswith("421 4.3.2")
        assert pop3.at_end()
        for client in (idle, arriving, pop3):
            client.close()
    assert Store(tmp_path / "spool", users).messages("alice@example.test") == []


@pytest.mark.parametrize("extra", [[], ["--processes", 2]])
def test_two_signals_at_once(tmp_path, users, extra):
    """As a terminal and a supervisor may send them: one is enough, and the second does no harm."""
    with Program("--port", 0, *extra, cwd=tmp_path) as program:
        program.process.send_signal(signal.SIGINT)
        status, errors = program.stop()
    assert status == 0
    assert errors == ""


def test_mail_survives_a_restart(tmp_path, users):
    for n in range(2):
        with Program("--port", 0, cwd=tmp_path) as program:
            assert send(program, f"Subject: {n}\r\n\r\n".encode()).startswith("250")
            assert program.stop()[0] == 0
    assert [
        m["Subject"] for m in Store(tmp_path / "spool", users).messages("alice@example.test")
    ] == ["0", "1"]


def test_demo_passwords_on_an_open_address(tmp_path):
    for address, wanted in (("0.0.0.0", True), ("127.0.0.1", False)):
        with Program(
            "--port", 0, "--host", address, "--users", ROOT / "users.txt", cwd=tmp_path
        ) as program:
            assert ("WARNING" in program.stop()[1]) is wanted


def test_modules_alone_have_the_demo_accounts(tmp_path):
    """As after `pip install`, from any folder: there is no users.txt then."""
    for module in ("lineserver", "pop3d_simple", "smtpd_simple", "store"):
        shutil.copy(ROOT / f"{module}.py", tmp_path)
    script = tmp_path / "smtpd_simple.py"
    with Program("--port", 0, script=script, cwd=tmp_path) as program:
        assert send(program).startswith("250")


def test_intercept_from_a_file(tmp_path, users):
    (tmp_path / "hook.py").write_text(
        "def intercept(session, verb, argument):\n    return '451 4.7.1 no' if verb == 'MAIL' else None\n"
    )
    with (
        Program("--port", 0, "--intercept", "hook.py", cwd=tmp_path) as program,
        Line("127.0.0.1", program.port) as client,
    ):
        client.reply()
        client.ask("EHLO x")
        assert client.ask("MAIL FROM:<>") == "451 4.7.1 no"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")
def test_processes(tmp_path, users):
    """They share the listeners; one that dies is replaced while the others serve; one signal ends all."""
    with Program("--port", 0, "--pop3", 0, "--processes", 2, cwd=tmp_path, count=2) as program:
        pid = str(program.process.pid)

        def children():
            out = subprocess.run(
                ["pgrep", "-P", pid], capture_output=True, text=True, check=False
            ).stdout
            return set(map(int, out.split()))

        def until(good):
            deadline = time.monotonic() + 10
            while not good():
                assert time.monotonic() < deadline
            return True

        until(lambda: len(children()) == 2)
        for how in (signal.SIGKILL, signal.SIGTERM):
            before = children()
            os.kill(min(before), how)
            until(lambda before=before: len(children()) == 2 and children() != before)
            for _ in range(10):
                assert send(program).startswith("250")
        before = children()
        status, errors = program.stop()
        assert status == 0
        assert errors.count("takes its place") == 2
        assert "Traceback" not in errors
        until(lambda: not any(os.path.exists(f"/proc/{child}") for child in before))
    assert len(Store(tmp_path / "spool", users).messages("alice@example.test")) == 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork() here")
def test_session_numbers_are_unique_among_processes(tmp_path, users):
    with Program("--port", 0, "--processes", 3, cwd=tmp_path) as program:
        clients = [Line("127.0.0.1", program.port) for _ in range(30)]
        for client in clients:
            client.reply()
        for client in clients:
            client.close()
        _, errors = program.stop()
    numbers = re.findall(r" SMTP (\d+) connected", errors)
    assert len(numbers) == len(set(numbers)) == 30


FORK_FAILS = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
real, calls = os.fork, []
def fork():
    calls.append(1)
    if len(calls) in (3, 4):
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return real()
os.fork = fork
import smtpd_simple
sys.exit(smtpd_simple.main())
"""


@pytest.mark.skipif(not os.path.exists("/proc"), reason="there is no /proc here")
def test_a_fork_that_fails_is_tried_again(tmp_path, users):
    """The moment at which workers die is the moment at which there is no process to be had."""
    argv = [sys.executable, "-c", FORK_FAILS, str(ROOT), "--port", "0", "--processes", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(argv, cwd=tmp_path, text=True, **pipes)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])

        def children():
            path = f"/proc/{process.pid}/task/{process.pid}/children"
            return Path(path).read_text().split()

        server = types.SimpleNamespace(host="127.0.0.1", port=port)
        assert send(server).startswith("250")
        os.kill(int(children()[0]), signal.SIGKILL)
        assert send(server).startswith("250")
        deadline = time.monotonic() + 10
        while len(children()) < 2:
            assert time.monotonic() < deadline
        assert send(server).startswith("250")
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "trying again" in errors


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
@pytest.mark.parametrize("extra", [[], ["--processes", 2]])
def test_sighup_reads_users_and_certificate_again(tmp_path, users, certificate, extra):
    """At once; a broken one is logged and changes nothing."""
    for name, path in zip(("cert.pem", "key.pem"), certificate, strict=True):
        shutil.copy(path, tmp_path / name)
    tls = ["--tls-cert", "cert.pem", "--tls-key", "key.pem"]

    def answers(program, address, wanted):
        deadline = time.monotonic() + 10
        while True:
            with Line("127.0.0.1", program.port) as client:
                client.reply(), client.ask("EHLO x"), client.ask("MAIL FROM:<>")
                reply = client.ask(f"RCPT TO:<{address}>")
                if reply.startswith(wanted):
                    assert client.ask("RSET").startswith("250")
                    assert client.ask("STARTTLS").startswith("220")
                    client.start_tls()
                    return
            assert time.monotonic() < deadline

    with Program("--port", 0, *tls, *extra, cwd=tmp_path) as program:
        answers(program, "dora@example.test", "550")
        users.write_text(users.read_text() + "dora@example.test:x\n")
        program.process.send_signal(signal.SIGHUP)
        answers(program, "dora@example.test", "250")
        users.write_text("broken\n")
        (tmp_path / "cert.pem").write_text("broken\n")
        program.process.send_signal(signal.SIGHUP)
        while not any("cert.pem" in line for line in program.errors):
            assert program.process.poll() is None
        answers(program, "dora@example.test", "250")
        status, errors = program.stop()
    assert (status, "Traceback" in errors) == (0, False)


@pytest.mark.skipif(not shutil.which("sleep"), reason="there is no sleep here")
def test_programs_that_a_hook_starts_have_their_signals(tmp_path, users):
    (tmp_path / "hook.py").write_text(
        "import subprocess\n"
        "def intercept(session, verb, argument):\n"
        "    if verb == 'NOOP':\n"
        "        return f\"250 2.0.0 {subprocess.Popen(['sleep', '60']).pid}\"\n"
    )
    with Program("--port", 0, "--intercept", "hook.py", cwd=tmp_path) as program:
        with Line("127.0.0.1", program.port) as client:
            client.reply()
            pid = int(client.ask("NOOP").split()[-1])
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (
            "sleep 60"
            in subprocess.run(
                ["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True
            ).stdout
        ):
            assert time.monotonic() < deadline


NOTICES = {  # options: which of the commands in the notice are run
    "nothing": ([], ["send", "read"]),
    "a login": (["--require-auth"], ["send", "read"]),
    "TLS": (["--tls-self-signed", "--require-tls", "--require-auth"], ["send", "read"]),
    "all addresses": (["--host", "0.0.0.0"], ["send", "read"]),
    "IPv6": (["--host", "[::1]"], ["send", "read"]),
}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("name", NOTICES)
def test_the_commands_in_the_notice_work_when_pasted(tmp_path, name):
    options, titles = NOTICES[name]
    if "--tls-self-signed" in options and not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    argv = ["--port", 0, "--pop3", 0, "--hostname", "mail.example.test", *options]
    if name == "IPv6" and not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    (tmp_path / "users.txt").write_text("alice@example.test:wonderland\n")
    with Program(*argv, cwd=tmp_path, count=2) as program:
        rows = {}
        while "by hand" not in rows:
            title, _, text = program.process.stdout.readline().strip().partition("  ")
            rows[title] = text.strip()
        for title in titles:
            command = ["bash", "-c", f"set -o pipefail; {rows[title]}"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=20)
            assert result.returncode == 0, (command, result.stderr)
        assert "\nSubject: hello\n" in result.stdout.replace("\r", "")
        words = rows["by hand"].partition(",")[0]
        assert words.startswith("openssl s_client" if "--require-tls" in options else "telnet ")


@pytest.mark.skipif(not os.path.exists("/proc"), reason="there is no /proc here")
def test_processes_end_with_their_parent(tmp_path, users):
    with Program("--port", 0, "--processes", 2, cwd=tmp_path) as program:
        with smtplib.SMTP("127.0.0.1", program.port) as client:
            client.noop()
        out = subprocess.run(
            ["pgrep", "-P", str(program.process.pid)], capture_output=True, text=True, check=False
        ).stdout
        children = out.split()
        assert children
        program.process.kill()
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{child}") for child in children):
            assert time.monotonic() < deadline


# ---- store.py


HEADERS = {
    b"From: <": "<",
    b"From: a@[": "a@[",
    b"From: =?us-ascii?q?=0a?= <x@y>": "<x@y>",
    b"From: =?utf-8?q?J=C3=B6rg?= <j@x.test>": "Jörg <j@x.test>",
    b"From: =?utf-8?q?=1B]0;pwned=07?= <x@y>": "\\x1b]0;pwned\\x07 <x@y>",
    b"From: \x1b[31mred": "\\x1b[31mred",
    b"From: a\xff": "a\ufffd",
}


def test_what_a_person_sees_of_a_header(store, deliver, capsys):
    """Decoded where it can be, whatever strangers have written, and nothing that a terminal would obey."""
    for header in HEADERS:
        deliver(header + b"\r\n\r\n")
    show_list(store, types.SimpleNamespace(address="alice@example.test"))
    assert [line.split("\t")[3] for line in capsys.readouterr().out.splitlines()] == list(
        HEADERS.values()
    )


def test_store_words(tmp_path, users, call, deliver):
    deliver(b"From: me@client.test\r\nSubject: hello\r\n\r\ntext\r\n")
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    listed = f"1\t{date}\t46\tme@client.test\thello\n"
    alices = "alice@example.test\t1 message\t46 octets\nstaff@example.test\t= alice@example.test\n"
    assert call("store.py", "accounts") == (0, alices, "")
    assert call("store.py", "--spool", "spool", "list", "alice") == (0, listed, "")
    assert call("store.py", "list", "alice@example.test", "--spool", "spool") == (0, listed, "")
    assert call("store.py", "wait", "alice") == (0, listed, "")
    assert call("store.py", "queue") == (0, "", "")
    for mistake in (
        "list nobody",
        "show alice 2",
        "show alice",
        "accounts x",
        "nonsense",
        "list",
        "wait x --timeout nan",
        "wait alice --count 0",
        "show alice x",
    ):
        status, _, stderr = call("store.py", *mistake.split())
        assert (status, stderr.count("\n")) == (2, 1), stderr
    Store(tmp_path / "spool", users).clear()
    status, _, stderr = call("store.py", "wait", "alice", "--timeout", "0.1")
    assert (status, "nothing" in stderr) == (1, True)


def test_store_words_while_mail_is_fetched(tmp_path, users, call, deliver, monkeypatch):
    """What goes between the look at the folder and the look at the file is gone, and no mistake."""
    deliver(b"From: me@client.test\r\nSubject: hello\r\n\r\ntext\r\n")
    real = Store.paths
    monkeypatch.setattr(
        Store, "paths", lambda store, address: [f"{store.folder}/gone", *real(store, address)]
    )
    for words in (["list", "alice"], ["wait", "alice"]):
        status, out, err = call("store.py", *words)
        assert (status, err) == (0, "")
        assert re.fullmatch(r"2\t.{16}\t46\tme@client.test\thello\n", out)
    assert call("store.py", "accounts")[1].startswith("alice@example.test\t1 message\t46 octets\n")


def test_store_as_a_program(tmp_path, users, deliver):
    deliver(b"From: me@client.test\r\nSubject: hello\r\n\r\ntext\r\n")
    shown = run("store.py", "show", "alice", 1, cwd=tmp_path)
    assert shown.stdout == "From: me@client.test\nSubject: hello\n\ntext\n"
    secret = run("store.py", "hash", cwd=tmp_path, input="secret\n").stdout.strip()
    users.write_text(f"alice@example.test:{secret}\n")
    assert Store(tmp_path / "spool", users).users.check_password("alice", b"secret")


def terminal(tmp_path, *argv):
    """Return what store.py shows on a terminal."""
    pty = pytest.importorskip("pty")
    primary, secondary = pty.openpty()
    command = [sys.executable, ROOT / "store.py", *argv]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=secondary, stderr=secondary)
    os.close(secondary)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is the end
        while data := os.read(primary, 65536):
            shown += data
    os.close(primary)
    assert process.wait(10) == 0
    return shown.decode()


NASTY = "Subject: hi \x1b]0;owned\x07\r\nFrom: \u202eevil\r\n\r\n\x1b[2J\x9b31m\x07 text\r\n"


@pytest.mark.parametrize(
    "words", [["list", "alice"], ["show", "alice", "1"], ["show", "--raw", "alice", "1"]]
)
def test_nothing_reaches_a_terminal_as_a_control_sequence(tmp_path, users, deliver, words):
    deliver(NASTY.encode())
    shown = terminal(tmp_path, *words)
    assert "owned" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_columns_line_up_on_a_terminal(tmp_path, users, deliver):
    for sender in ("me@client.test", "用户@client.test", "a@b.test"):
        deliver(f"From: {sender}\r\nSubject: S\r\n\r\n".encode())
    lines = terminal(tmp_path, "list", "alice").splitlines()
    widths = [len(line.rpartition("S")[0]) + sum(c in "用户" for c in line) for line in lines]
    assert len(set(widths)) == 1, lines


def test_show_is_for_people_and_raw_is_not(tmp_path, users, deliver, call):
    message = EmailMessage()
    message["From"], message["Subject"] = "me@client.test", "你好"
    message.set_content("the text\n")
    message.add_alternative("<b>the text</b>", subtype="html")
    message.add_attachment(b"12345", maintype="application", subtype="pdf", filename="a.pdf")
    deliver(message.as_bytes(policy=email.policy.SMTP))
    status, out, _ = call("store.py", "show", "alice", 1)
    assert status == 0
    assert out == (
        "From: me@client.test\nSubject: 你好\n\nthe text\n"
        "[attachment: without a name, text/html, 16 octets]\n"
        "[attachment: a.pdf, application/pdf, 5 octets]\n"
    )
    raw = run("store.py", "show", "--raw", "alice", 1, cwd=tmp_path).stdout
    assert "Content-Disposition: attachment" in raw


def test_store_only_looks(tmp_path, users, call):
    """It makes no folder, and says that there is no spool where there is none."""
    status, _, error = call("store.py", "accounts")
    assert (status, error.count("\n")) == (1, 1)
    assert "no spool" in error
    assert not (tmp_path / "spool").exists()
    Store(tmp_path / "spool", users)
    for folder in (tmp_path / "spool", tmp_path / "spool" / "queue"):
        folder.chmod(0o500)
    for words in ("accounts", "list alice", "queue"):
        assert call("store.py", *words.split())[0] == 0
    for folder in (tmp_path / "spool", tmp_path / "spool" / "queue"):
        folder.chmod(0o700)


def test_wait_and_clear(tmp_path, users, call, deliver):
    deliver(b"Subject: 1\r\n\r\n")
    assert call("store.py", "wait", "alice", "--count", 2, "--timeout", "0.05")[0] == 1
    deliver(b"Subject: 2\r\n\r\n")
    status, out, _ = call("store.py", "wait", "alice", "--count", 2)
    assert (status, out.count("\n")) == (0, 2)
    assert call("store.py", "clear", "nobody@example.test")[0] == 2
    assert call("store.py", "clear", "alice") == (0, "", "")
    assert call("store.py", "list", "alice") == (0, "", "")
    status, out, _ = call("store.py")
    assert (status, "commands:" in out) == (2, True)


def test_wait_begins_before_there_is_a_spool(tmp_path, users, call):
    """A script starts the server in the background, and waits at once."""

    def deliver_later():
        store = Store(tmp_path / "spool", users)
        target = Target(store.mailbox("alice@example.test"), b"")
        delivery = Delivery(store, [target])
        delivery.write(b"Subject: late\r\n\r\nx\r\n")
        delivery.commit()

    timer = threading.Timer(0.2, deliver_later)
    timer.start()
    status, out, error = call("store.py", "wait", "alice")
    timer.join()
    assert (status, error) == (0, "")
    assert out.endswith("\tlate\n")


def test_show_text_without_a_charset(deliver, call, users):
    """As telnet sends it: UTF-8."""
    deliver("Subject: x\r\n\r\nGr\u00fc\u00dfe, \u4f60\u597d\r\n".encode())
    assert call("store.py", "show", "alice", 1)[1].endswith("\nGr\u00fc\u00dfe, \u4f60\u597d\n")


def test_show_a_delivery_report(deliver, call, users):
    """What the report is about is text for people, too."""
    part = "--b\r\nContent-Type: {}\r\n\r\n{}\r\n"
    deliver(
        b"Content-Type: multipart/report; boundary=b\r\n\r\n"
        + "".join(
            [
                part.format("text/plain", "It could not be delivered."),
                part.format(
                    "message/delivery-status", "Reporting-MTA: dns; x\r\n\r\nStatus: 5.1.1"
                ),
                part.format("text/rfc822-headers", "Subject: the lost one"),
                part.format("message/rfc822", "Subject: inside\r\n\r\ntext"),
                "--b--\r\n",
            ]
        ).encode()
    )
    _, shown, _ = call("store.py", "show", "alice", 1)
    for text in ("not be delivered", "Status: 5.1.1", "Subject: the lost one", "message/rfc822"):
        assert text in shown


@pytest.mark.parametrize("closed", ["<&-", ">&-", ">/dev/full"])
def test_store_py_without_standard_descriptors(tmp_path, users, deliver, closed):
    deliver()
    command = f"exec {sys.executable} {ROOT}/store.py list alice {closed}"
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    if closed == ">/dev/full":
        assert (result.returncode, result.stderr) == (1, "store.py: No space left on device\n")
    else:
        assert (result.returncode, result.stderr) == (0, "")


def test_mistakes_of_store_py_say_what_to_write(call, users):
    for words, wanted in {
        "list": "write list ADDRESS",
        "show alice": "write show ADDRESS N",
        "hash x": "write hash",
        "clear a b": "write clear [ADDRESS]",
    }.items():
        status, _, error = call("store.py", *words.split())
        assert (status, error) == (2, f"store.py: {wanted} (--help shows the commands)\n")
