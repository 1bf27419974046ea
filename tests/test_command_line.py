"""The three programs, run as their users run them."""

import os
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import time
import types

import pytest
from conversation import Line
from helpers import ROOT, Program, send

from pop3d_simple import main as pop3_main
from smtpd_simple import main as smtp_main
from store import Store, show_list
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
