"""Disks that fail, processes that are killed, folders that go away: no loss of what was acknowledged, nothing half."""

import errno
import os
import poplib
import random
import re
import shutil
import signal
import smtplib
import subprocess
import sys
import threading
import time
import types

import pytest
from conversation import Line
from helpers import ROOT, Program, send

from smtpd_simple import SMTPServer
from store import Maildrop, Store

BIG = b"Subject: big\r\n\r\n" + b"0123456789abcde\r\n" * 650_000  # 10 MB


def nothing_left(store):
    """No message, and no file in any tmp/."""
    left = [os.path.join(top, name) for top, _, names in os.walk(store.folder) for name in names]
    return [path for path in left if not path.endswith((".lock", "/lock"))]


class Failing:
    """Makes an os function fail with an errno on its nth call (of those whose arguments fit)."""

    def __init__(self, monkeypatch, name, nth=1, code=errno.ENOSPC, fits=lambda *args: True):
        self.real, self.calls = getattr(os, name), 0

        def call(*args, **kwargs):
            if fits(*args):
                self.calls += 1
                if self.calls >= nth:
                    raise OSError(code, os.strerror(code))
            return self.real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


@pytest.fixture
def synced(tmp_path):
    return Store(
        tmp_path / "synced", {"alice@example.test": "wonderland", "bob@example.test": "builder"}
    )


def in_spool(path, *_):
    return "/tmp/" in str(path) and "/synced/" in str(path)


STEPS = {
    "create": ("open", 1, lambda path, *_: "/synced/" in str(path)),
    "first octet": ("write", 1, lambda fd, data: len(data) > 100),
    "middle of 10 MB": ("write", 5, lambda fd, data: len(data) > 100),
    "sync of the file": ("fsync", 1, lambda fd: True),
    "rename": ("replace", 1, lambda *_: True),
    "sync of the folder": ("fsync", 2, lambda fd: True),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("code", "reply"),
    [(errno.ENOSPC, "452 4.3.1"), (errno.EIO, "451 4.3.0"), (errno.EROFS, "451 4.3.0")],
)
def test_a_disk_that_fails(synced, monkeypatch, step, code, reply):
    """The sender keeps the mail, nothing half is seen, and the next message works."""
    synced.make_folder(synced.mailbox("alice@example.test"))
    name, nth, fits = STEPS[step]
    with SMTPServer(("127.0.0.1", 0), synced) as smtp:
        Failing(monkeypatch, name, nth, code, fits)
        assert send(smtp, BIG).startswith(reply)
        monkeypatch.undo()
        if (
            step != "sync of the folder"
        ):  # then it is there, and comes again: twice is better than never
            assert nothing_left(synced) == []
        assert send(smtp).startswith("250")
    assert synced.messages("alice@example.test")[-1]["Subject"] == "hi"


def test_a_disk_that_fails_is_in_the_log(synced, monkeypatch, caplog):
    with SMTPServer(("127.0.0.1", 0), synced) as smtp:
        Failing(monkeypatch, "write", 3, errno.ENOSPC, lambda fd, data: len(data) > 100)
        send(smtp, BIG)
    assert "No space left on device" in caplog.text


def test_a_full_disk_refuses_all_recipients(synced, monkeypatch):
    with SMTPServer(("127.0.0.1", 0), synced) as smtp, smtplib.SMTP(smtp.host, smtp.port) as client:
        Failing(monkeypatch, "write", 2, fits=lambda fd, data: len(data) > 100)
        with pytest.raises(smtplib.SMTPDataError) as error:
            client.sendmail(
                "a@b.test",
                ["alice@example.test", "bob@example.test"],
                "Subject: x\r\n\r\n" + "x" * 500,
            )
        monkeypatch.undo()
        assert error.value.smtp_code == 452
        assert nothing_left(synced) == []
        client.sendmail(
            "a@b.test", ["alice@example.test", "bob@example.test"], "Subject: x\r\n\r\n"
        )


@pytest.fixture
def tmpfs(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.name == "posix" and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("a small tmpfs can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_indeed(tmpfs):
    store = Store(tmpfs / "spool", {"alice@example.test": "wonderland"})
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        assert send(smtp, BIG).startswith("452 4.3.1")
        assert nothing_left(store) == []
        assert send(smtp, BIG[:2_000_000] + b"\r\n").startswith("250")
        assert send(smtp, BIG[:2_000_000] + b"\r\n").startswith("452 4.3.1")
        store.clear()
        assert send(smtp, BIG[:2_000_000] + b"\r\n").startswith("250")


@pytest.mark.parametrize(
    "what", ["", "/alice@example.test", "/alice@example.test/new", "/alice@example.test/tmp"]
)
def test_folders_that_go_away(store, smtp, pop3, what):
    """They are made again: whoever clears the spool has not broken the server."""
    assert send(smtp).startswith("250")
    shutil.rmtree(store.folder + what)
    assert send(smtp).startswith("250")
    assert store.messages("alice@example.test")[-1]["Subject"] == "hi"
    shutil.rmtree(store.folder + what)
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask("USER alice")
        assert client.ask("PASS wonderland").startswith("+OK")


def test_a_spool_that_can_be_written_no_more(store, smtp, pop3):
    shutil.rmtree(store.folder)
    with open(store.folder, "w"):
        pass
    assert send(smtp).startswith("451 4.3.0")
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask("USER alice")
        assert client.ask("PASS wonderland").startswith("-ERR [SYS/TEMP]")
        assert client.ask("QUIT").startswith("+OK")


def test_stale_files_in_tmp_are_removed_at_the_start(store):
    """Those that are ours: who types `--spool .` keeps what other programs have in a folder of that name."""
    folder, other = store.mailbox("alice@example.test"), f"{store.folder}/project"
    store.make_folder(folder)
    os.makedirs(f"{other}/tmp")
    for tmp in (f"{folder}/tmp", f"{store.queue_folder}/tmp", f"{other}/tmp"):
        for name, age in (("old", 37 * 3600), ("young", 35 * 3600)):
            path = f"{tmp}/{name}"
            with open(path, "w"):
                pass
            os.utime(path, (time.time() - age,) * 2)
    for name in ("AB", "AC", "AC.json", "lock"):
        with open(f"{store.queue_folder}/{name}", "w") as file:
            pass
        os.utime(file.name, (0, 0))
    Store(store.folder, {"alice@example.test": "x"})
    assert os.listdir(f"{folder}/tmp") == os.listdir(f"{store.queue_folder}/tmp") == ["young"]
    assert sorted(os.listdir(f"{other}/tmp")) == ["old", "young"]
    assert sorted(os.listdir(store.queue_folder)) == ["AC", "AC.json", "lock", "tmp"]


# ---- kills


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("".join(f"u{n}@example.test:pw\n" for n in range(8)))
    return path


def keep_sending(port, who, acknowledged, pipelined):
    """Send numbered messages until the line breaks; note those that got a 250."""
    number = 0
    try:
        with Line("127.0.0.1", port) as client:
            client.reply()
            client.ask("EHLO x")
            while True:
                number += 1
                lines = ("x" * 70 + "\r\n") * (number % 60)
                text = f"Subject: {who}-{port}-{number}\r\n\r\n{lines}end\r\n.\r\n"
                envelope = f"MAIL FROM:<>\r\nRCPT TO:<u{who}@example.test>\r\nDATA\r\n"
                client.send(envelope + text if pipelined else envelope)
                client.reply(), client.reply(), client.reply()
                if not pipelined:
                    client.send(text)
                if client.reply().startswith("250"):
                    acknowledged.append(f"{who}-{port}-{number}")
    except OSError:
        pass


def test_kill_under_load(tmp_path, users):
    """Eight senders, SIGKILL at random moments: what was acknowledged is there once and whole, and no lock stays."""
    chance, acknowledged = random.Random(1939), []
    for _ in range(20):
        with Program(
            "--port", 0, "--pop3", 0, "--users", users, "--spool", tmp_path / "spool", count=2
        ) as program:
            threads = [
                threading.Thread(
                    target=keep_sending, args=(program.ports["SMTP"], n, acknowledged, n % 2)
                )
                for n in range(8)
            ]
            for thread in threads:
                thread.start()
            goal = len(acknowledged) + chance.randrange(10, 60)
            while len(acknowledged) < goal:
                threads[0].join(0.005)
            program.stop(signal.SIGKILL)
            for thread in threads:
                thread.join()
    store = Store(tmp_path / "spool", users)
    stored = []
    for n in range(8):
        for path in store.paths(f"u{n}@example.test"):
            with open(path, "rb") as file:
                data = file.read()
            assert data.endswith(b"\r\nend\r\n"), path
            assert f",S={len(data)},W={len(data)}" in path
            stored.append(re.search(rb"Subject: (\S+)", data)[1].decode())
        Maildrop(store, f"u{n}@example.test").close()
    assert len(stored) == len(set(stored))
    assert set(acknowledged) <= set(stored)


def fill(program, count):
    with smtplib.SMTP("127.0.0.1", program.ports["SMTP"]) as client:
        for n in range(count):
            client.sendmail("", ["u0@example.test"], f"Subject: {n}\r\n\r\nend\r\n")


def mark_all(client, count):
    client.readline()
    client.ask("USER u0")
    assert client.ask("PASS pw").startswith(f"+OK {count} ")
    client.send("".join(f"DELE {n}\r\n" for n in range(1, count + 1)))
    assert all(client.reply().startswith("+OK") for _ in range(count))


def test_kill_with_marks_and_during_quit(tmp_path, users):
    """Marks of a killed session delete nothing; killed in QUIT each message is whole or gone."""
    argv = ["--port", 0, "--pop3", 0, "--users", users, "--spool", tmp_path / "spool"]
    new = tmp_path / "spool" / "u0@example.test" / "new"
    with Program(*argv, count=2) as program, Line("127.0.0.1", program.ports["POP3"]) as client:
        fill(program, 300)
        mark_all(client, 300)
        program.stop(signal.SIGKILL)
    assert len(os.listdir(new)) == 300
    with Program(*argv, count=2) as program, Line("127.0.0.1", program.ports["POP3"]) as client:
        mark_all(client, 300)
        client.send("QUIT\r\n")
        while len(os.listdir(new)) == 300:
            pass
        program.stop(signal.SIGKILL)
    store = Store(tmp_path / "spool", users)
    left = store.messages("u0@example.test")
    assert len(left) < 300
    assert all(message.get_content() == "end\n" for message in left)
    Maildrop(store, "u0@example.test").close()


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_file_and_folder_are_synced_before_the_250(tmp_path, users):
    """As the kernel sees it: fsync of the file, rename, fsync of the folder, and only then the reply."""
    log = tmp_path / "strace"
    strace = [
        "strace",
        "-D",
        "-f",
        "-y",
        "-o",
        log,
        "-e",
        "trace=fsync,rename,renameat,renameat2,sendto",
        sys.executable,
    ]
    argv = [
        *strace,
        ROOT / "smtpd_simple.py",
        "--port",
        "0",
        "--users",
        users,
        "--spool",
        tmp_path / "spool",
    ]
    process = subprocess.Popen(
        [str(word) for word in argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = process.stdout.readline()
        if " listening on " not in line:
            pytest.skip("strace may not trace here")
        server = types.SimpleNamespace(host="127.0.0.1", port=int(line.rpartition(":")[2]))
        for _ in range(2):
            assert send(server, to="u0@example.test").startswith("250")
    finally:
        process.terminate()
        process.wait(15)
        process.stdout.close()
    seen = re.findall(
        r"fsync\(\d+<.*/(tmp|new)\b|\b(rename)\w*\(|(250 2.0.0 Ok: queued)", log.read_text()
    )
    assert ["".join(event) for event in seen][-4:] == [
        "tmp",
        "rename",
        "new",
        "250 2.0.0 Ok: queued",
    ]


def test_two_programs_on_one_spool(tmp_path, users):
    """SMTP and POP3 as two processes, under load: each message is fetched once, whole, and deleted."""
    spool, acknowledged, fetched = tmp_path / "spool", [], []
    both = ["--port", 0, "--users", users, "--spool", spool]
    with Program(*both) as smtp, Program(*both, script="pop3d_simple.py") as pop3:
        sender = threading.Thread(target=keep_sending, args=(smtp.port, 0, acknowledged, True))
        sender.start()
        while len(acknowledged) < 200:
            fetched += fetch_all(pop3)
        assert smtp.stop()[0] == 0
        sender.join()
        fetched += fetch_all(pop3)
        assert pop3.stop()[0] == 0
    assert len(fetched) == len(set(fetched))
    assert set(acknowledged) <= set(fetched)


def fetch_all(pop3):
    client = poplib.POP3("127.0.0.1", pop3.port)
    client.user("u0")
    client.pass_("pw")
    subjects = []
    for number in range(1, client.stat()[0] + 1):
        lines = client.retr(number)[1]
        assert lines[-1] == b"end"
        subjects.append(next(line for line in lines if line.startswith(b"Subject: "))[9:].decode())
        client.dele(number)
    client.quit()
    return subjects
