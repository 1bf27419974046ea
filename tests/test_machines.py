"""Whatever machine it runs on: sandboxes, other file systems, Windows' rules for files, odd starts."""

import errno
import os
import poplib
import shutil
import smtplib
import socket
import stat
import subprocess
import sys

import pytest
from conversation import Line
from helpers import FAST, ROOT, Program, send, until_tried

import lineserver
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store

BIG = b"Subject: big\r\n\r\n" + b"0123456789abcde\r\n" * 330_000  # 5 MiB
needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/fd"), reason="there is no /proc here"
)


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("alice@example.test:wonderland\n")
    return path


# ---- Windows


@pytest.fixture
def windows_files(monkeypatch):
    """A file that is open can't be renamed or removed; rename never replaces."""
    replace, unlink, rename = os.replace, os.unlink, os.rename

    def check(path):
        if not os.path.isfile(path):
            return
        wanted = os.stat(path)
        for fd in os.listdir("/proc/self/fd"):
            try:
                state = os.fstat(int(fd))
            except OSError:
                continue
            if (state.st_dev, state.st_ino) == (wanted.st_dev, wanted.st_ino):
                raise PermissionError(errno.EACCES, "The file is used by another process", path)

    def strict_replace(old, new):
        check(old)
        check(new)
        replace(old, new)

    def strict_unlink(path):
        check(path)
        unlink(path)

    def strict_rename(old, new):
        check(old)
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, "The file exists", old, None, new)
        rename(old, new)

    monkeypatch.setattr(os, "replace", strict_replace)
    monkeypatch.setattr(os, "unlink", strict_unlink)
    monkeypatch.setattr(os, "rename", strict_rename)


@needs_proc
@pytest.mark.parametrize(
    "content", [b"Subject: x\r\n\r\n" + b"y" * 1000 + b"\r\n", BIG], ids=["1k", "5M"]
)
def test_delivery_and_pop3_with_windows_rules(windows_files, store, smtp, pop3, content):
    with smtplib.SMTP(smtp.host, smtp.port) as client:
        client.sendmail("", ["alice@example.test", "bob@example.test"], content)
    client = poplib.POP3(pop3.host, pop3.port)
    client.user("alice")
    client.pass_("wonderland")
    assert client.stat()[0] == 1
    assert client.retr(1)[2] > len(content)
    client.dele(1)
    client.quit()
    assert store.messages("alice@example.test") == []
    assert len(store.messages("bob@example.test")) == 1


@needs_proc
def test_relay_with_windows_rules(windows_files, tmp_path):
    """An attempt that fails is noted, the next one is made, and the message leaves the queue."""
    a = Store(tmp_path / "a", {"alice@a.example": "wonderland"}, sync=False)
    b = Store(tmp_path / "b", {"bob@b.example": "x"}, sync=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = {"route": [f"b.example=127.0.0.1:{port}"], "relay_options": FAST}
    with SMTPServer(("127.0.0.1", 0), a, **options) as smtp:
        with smtplib.SMTP(smtp.host, smtp.port) as client:
            client.login("alice", "wonderland")
            client.sendmail("alice@a.example", ["bob@b.example"], BIG)
        until_tried(a)
        with SMTPServer(("127.0.0.1", port), b):
            b.wait("bob@b.example", timeout=10)
            while a.queued():
                a.queue_changed.wait(0.01)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_listener_that_cannot_be_shut_down(store, monkeypatch, host):
    """Windows: accept() goes on until somebody connects, and nobody can connect to 0.0.0.0."""
    shutdown, connect = socket.socket.shutdown, socket.create_connection

    def no_shutdown(sock, how):
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.ENOTCONN, "not connected")
        return shutdown(sock, how)

    def no_connect(address, *args, **options):
        if address[0] == "0.0.0.0":
            raise OSError(errno.EADDRNOTAVAIL, "not valid")
        return connect(address, *args, **options)

    monkeypatch.setattr(socket.socket, "shutdown", no_shutdown)
    monkeypatch.setattr(socket, "create_connection", no_connect)
    with SMTPServer((host, 0), store) as smtp:
        while not smtp.waiting:
            pass
        threads = set(smtp.threads)
    assert not any(thread.is_alive() for thread in threads)


# ---- file systems


def folder_sync(monkeypatch, code):
    """Let fsync() of a folder fail."""
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, caplog, code):
    """Shared folders of virtual machines: no failure, and logged once for each folder."""
    folder_sync(monkeypatch, code)
    store = Store(tmp_path / "spool", {"alice@example.test": "x"})
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        for _ in range(3):
            assert send(smtp).startswith("250")
    assert len(store.messages("alice@example.test")) == 3
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines))
    assert any("alice@example.test/new can't be synced" in line for line in lines)


def test_a_folder_sync_that_fails_is_a_failure(tmp_path, monkeypatch):
    store = Store(tmp_path / "spool", {"alice@example.test": "x"})
    folder_sync(monkeypatch, errno.EIO)
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        assert send(smtp).startswith("451 4.3.0")


class Disk:
    """A model of what a power failure would leave: names that nobody has synced are lost."""

    def __init__(self, monkeypatch, root):
        self.root, self.unsynced, self.failures = str(root), set(), []
        mkdir, replace, fsync = os.mkdir, os.replace, os.fsync

        def note_mkdir(path, *args):
            mkdir(path, *args)
            self.unsynced.add(str(path))

        def note_replace(old, new):
            replace(old, new)
            self.unsynced.add(str(new))

        def note_fsync(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path in self.failures:
                self.failures.remove(path)
                raise OSError(errno.EIO, "Input/output error")
            fsync(fd)
            self.unsynced -= {name for name in self.unsynced if os.path.dirname(name) == path}

        monkeypatch.setattr(os, "mkdir", note_mkdir)
        monkeypatch.setattr(os, "replace", note_replace)
        monkeypatch.setattr(os, "fsync", note_fsync)

    def lost(self, path):
        """Return the names on the way to a message that a power failure would take."""
        return [name for name in self.unsynced if (path + "/").startswith(name + "/")]


@pytest.fixture
def disk(monkeypatch, tmp_path):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("there is no /proc here")
    return Disk(monkeypatch, tmp_path)


@pytest.mark.parametrize("spool", ["spool", "x/y/spool"])
@pytest.mark.parametrize("fails", [None, "", "/alice@example.test", "/.."])
def test_new_folders_are_durable_at_the_250(disk, tmp_path, spool, fails):
    """All of them, however deep, and also when a sync failed before and is done again."""
    store = Store(tmp_path / spool, {"alice@example.test": "x"})
    if fails is not None:
        disk.failures.append(os.path.normpath(store.folder + fails))
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        assert send(smtp)[:3] == ("250" if fails is None else "451")
        assert send(smtp).startswith("250")
        [*_, path] = store.paths("alice@example.test")
        assert disk.lost(path) == []


def test_folders_of_a_start_without_sync_are_durable_later(disk, tmp_path):
    first = Store(tmp_path / "x" / "spool", {"alice@example.test": "x"}, sync=False)
    with SMTPServer(("127.0.0.1", 0), first) as smtp:
        assert send(smtp).startswith("250")
    second = Store(first.folder, {"alice@example.test": "x"})
    with SMTPServer(("127.0.0.1", 0), second) as smtp:
        assert send(smtp).startswith("250")
    [_, path] = second.paths("alice@example.test")
    assert disk.lost(path) == []


def test_a_second_sender_waits_for_the_folders_of_the_first(disk, tmp_path, monkeypatch):
    """Two first deliveries at once: neither 250 stands on names that may be lost."""
    import threading

    store = Store(tmp_path / "spool", {"alice@example.test": "x"})
    real, blocked, go_on = store.sync_folder, threading.Event(), threading.Event()

    def slow(folder):
        if folder == store.folder and not blocked.is_set():
            blocked.set()
            go_on.wait(10)
        real(folder)

    monkeypatch.setattr(store, "sync_folder", slow)
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        first = threading.Thread(target=send, args=(smtp,))
        first.start()
        assert blocked.wait(10)
        assert send(smtp).startswith("250")
        [path] = store.paths("alice@example.test")
        assert disk.lost(path) == []
        go_on.set()
        first.join()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_only_the_owner_may_look(tmp_path, users, umask, certificate):
    """Folders are 0700 and files 0600, whatever the umask."""
    argv = ["--port", 0, "--tls-self-signed", "--hostname", "mail.example.test"]
    with Program(*argv, cwd=tmp_path, umask=umask) as program:
        assert send(program).startswith("250")
    for folder, _, files in os.walk(tmp_path / "spool"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700, folder
        for name in files:
            assert stat.S_IMODE(os.stat(f"{folder}/{name}").st_mode) == 0o600, name


# ---- what only makes things faster


def test_socket_options_that_are_refused(store, monkeypatch):
    """As in a sandbox: everything is served all the same."""
    real = socket.socket.setsockopt

    def refuse(sock, level, name, *value):
        if name in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO) or level == socket.IPPROTO_TCP:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return real(sock, level, name, *value)

    monkeypatch.setattr(socket.socket, "setsockopt", refuse)
    with SMTPServer(("127.0.0.1", 0), store) as smtp, POP3Server(("127.0.0.1", 0), store) as pop3:
        assert send(smtp).startswith("250")
        client = poplib.POP3(pop3.host, pop3.port)
        client.user("alice")
        assert client.pass_("wonderland").startswith(b"+OK 1 ")
        client.quit()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_cpu_affinity_and_limits_that_are_refused(monkeypatch, code):
    import startup_simple

    resource = pytest.importorskip("resource")

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    startup_simple.pin_to_cpu(1)
    startup_simple.take_descriptors()


def test_an_infinite_limit_is_asked_for_in_a_number(monkeypatch):
    """macOS takes no more than OPEN_MAX, even where the hard limit is infinite."""
    import startup_simple

    resource, asked = pytest.importorskip("resource"), []
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, infinite))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    startup_simple.take_descriptors()
    assert asked == [(10_240, infinite)]


def test_few_descriptors_lower_the_number_of_sessions(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert lineserver.Limits(1000, None, None).connections == 192


# ---- odd starts


def test_started_with_closed_descriptors(tmp_path, users):
    """They are opened on the null device: the log never reaches a client."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = f'exec "{sys.executable}" "{ROOT}/smtpd_simple.py" --port {port} <&- >&- 2>&-'
    process = subprocess.Popen(["sh", "-c", command], cwd=tmp_path)
    try:
        while True:
            try:
                client = Line("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                assert process.poll() is None
        with client:
            assert client.readline().startswith("220 ")
            with Line("127.0.0.1", port) as other:
                other.reply()
            assert client.ask("NOOP") == "250 2.0.0 Ok"
    finally:
        process.terminate()
        assert process.wait(10) == 0


ODD_STARTS = {
    "-O": ["-O"],
    "-OO": ["-OO"],
    "-W error -X dev": ["-W", "error", "-X", "dev"],
    "-I": ["-I"],
}


@pytest.mark.parametrize("flags", ODD_STARTS)
def test_flags_of_python(tmp_path, users, flags):
    """No failure and no warning; HELP works without docstrings."""
    argv = [*ODD_STARTS[flags], str(ROOT / "smtpd_simple.py"), "--port", "0", "--pop3", "0"]
    if flags == "-I":
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import smtpd_simple"
        argv = ["-I", "-c", f"{code}; sys.exit(smtpd_simple.main())", "--port", "0", "--pop3", "0"]
    environment = {"PATH": os.defpath, "LC_ALL": "C"}
    command = [sys.executable, *argv]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, env=environment, **pipes)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        with Line("127.0.0.1", port) as client:
            client.reply()
            client.ask("EHLO x")
            assert client.ask("HELP MAIL").startswith("214-2.0.0 MAIL FROM:<")
            client.ask("QUIT")
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "Warning" not in errors
    assert "Traceback" not in errors


def test_a_stdout_that_cannot_show_a_character(tmp_path):
    """It is escaped, in what the server and what store.py print."""
    (tmp_path / "users.txt").write_text("用户@example.test:x\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    with Program("--port", 0, cwd=tmp_path, env=environment) as program:
        lines = [program.process.stdout.readline() for _ in range(2)]
    assert "\\u7528\\u6237@example.test" in lines[1]
    command = [sys.executable, ROOT / "store.py", "accounts"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("\\u7528\\u6237@example.test\t0 messages")


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10"])
@pytest.mark.parametrize("script", ["smtpd_simple.py", "pop3d_simple.py", "store.py"])
def test_old_pythons_get_one_line(tmp_path, script, version):
    python = shutil.which(f"python{version}")
    if not python or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"Python {version} is not installed")
    result = subprocess.run([python, ROOT / script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Python 3.11 or newer is needed; this is {version}.")
    assert result.stderr.count("\n") == 1
