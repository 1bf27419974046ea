"""A small benchmark of this server, run by hand; aiosmtpd is measured beside it when it is installed.

    python tests/bench.py [--seconds 2]

Everything is on the loopback and in a temporary folder; compare ratios of one run, never numbers of two.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Delivery, Store, Target

ROOT = Path(__file__).resolve().parent.parent
TEXT = b"Subject: bench\r\n\r\n" + b"x" * 70 + b"\r\n" * 12
ALICE = {"alice@example.test": "wonderland"}


def progress(what):
    print(f"\r\x1b[K{what} ...", end="", file=sys.stderr, flush=True)


def start(folder, *argv):
    """Start the program; return the process and its ports."""
    (folder / "users.txt").write_text("alice@example.test:wonderland\n")
    command = [sys.executable, ROOT / "smtpd_simple.py", "--port", "0", "--pop3", "0", *argv]
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process, [int(process.stdout.readline().rpartition(":")[2]) for _ in range(2)]


def talk(port, lines):
    """Send lines one by one, each after the answer to the one before."""
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.recv(4096)
        for line in lines:
            sock.sendall(line + b"\r\n")
            sock.recv(65536)


ENVELOPE = [
    b"EHLO bench",
    b"MAIL FROM:<>",
    b"RCPT TO:<alice@example.test>",
    b"DATA",
    TEXT + b"\r\n.",
    b"QUIT",
]
POLL = [b"USER alice@example.test", b"PASS wonderland", b"STAT", b"QUIT"]


def rate(port, lines, clients, seconds):
    """Return sessions a second with so many clients at once."""
    counts, end = [0] * clients, time.perf_counter() + seconds

    def work(index):
        while time.perf_counter() < end:
            talk(port, lines)
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begin)


def throughput(smtp, pop3):
    """Return MB/s of 50 MB in and out."""
    block = b"0123456789abcde\r\n" * 60_000
    with socket.create_connection(("127.0.0.1", smtp), 60) as sock:
        sock.recv(4096)
        for line in ENVELOPE[:4]:
            sock.sendall(line + b"\r\n")
            sock.recv(4096)
        begin = time.perf_counter()
        for _ in range(49):
            sock.sendall(block)
        sock.sendall(b".\r\n")
        sock.recv(4096)
        taken = 49 * len(block) / (time.perf_counter() - begin) / 1e6
    with socket.create_connection(("127.0.0.1", pop3), 60) as sock, sock.makefile("rb") as file:
        file.readline()
        sock.sendall(b"USER alice\r\nPASS wonderland\r\nRETR 1\r\n")
        for _ in range(3):
            reply = file.readline()
        begin = time.perf_counter()
        octets = len(file.read(int(reply.split()[1])))
        given = octets / (time.perf_counter() - begin) / 1e6
        sock.sendall(b"DELE 1\r\nQUIT\r\n")
        file.read()
    return taken, given


def opening(folder, port, count):
    """Return the milliseconds from PASS to STAT with so many messages."""
    store = Store(folder / "spool", ALICE, sync=False)
    store.clear()
    for _ in range(count):
        delivery = Delivery(store, [Target(store.mailbox("alice@example.test"), b"")])
        delivery.write(TEXT)
        delivery.commit()
    begin = time.perf_counter()
    talk(port, POLL)
    return (time.perf_counter() - begin) * 1e3


def median_ms(act, times=50):
    """Return the median of what `act` takes, in milliseconds."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        taken.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(taken)


def embedding():
    """Return rows about the servers inside a test, and aiosmtpd's where it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, ALICE, sync=False)

        def start_and_stop():
            with SMTPServer(("127.0.0.1", 0), store), POP3Server(("127.0.0.1", 0), store):
                pass

        def one_message():
            with SMTPServer(("127.0.0.1", 0), store) as smtp:
                talk(smtp.port, ENVELOPE)
                store.wait("alice@example.test", timeout=1)
            store.clear()

        rows = [
            ("start plus stop of both servers in process", f"{median_ms(start_and_stop):.2f} ms")
        ]
        rows.append(("a test with one message, start to stop", f"{median_ms(one_message):.2f} ms"))
        rows.append(("wait() after the 250", f"{waiting(store):.2f} ms"))
    try:
        from aiosmtpd.controller import Controller
        from aiosmtpd.handlers import Sink
    except ImportError:
        return rows

    ports = iter(range(20_000, 21_000))

    def theirs():
        controller = Controller(Sink(), hostname="127.0.0.1", port=next(ports))
        controller.start()
        controller.stop()

    return [*rows, ("start plus stop of aiosmtpd's Controller", f"{median_ms(theirs):.2f} ms")]


def waiting(store):
    """Return the median time from a 250 to the return of a wait() in another thread, in ms."""
    times = []
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        for _ in range(30):
            returned = []

            def wait(returned=returned):
                store.wait("alice@example.test")
                returned.append(time.perf_counter())

            thread = threading.Thread(target=wait)
            thread.start()
            talk(smtp.port, ENVELOPE[:-1])
            answered = time.perf_counter()
            thread.join()
            times.append((returned[0] - answered) * 1e3)
            store.clear()
    return statistics.median(times)


def memory(folder, sessions=200):
    """Return the KiB that a stranger's session takes who sends 1 MB slowly, on Linux."""
    process, (smtp, _) = start(folder, "--no-sync")
    try:
        before, clients = resident(process.pid), []
        for _ in range(sessions):
            sock = socket.create_connection(("127.0.0.1", smtp), 30)
            sock.recv(4096)
            for line in ENVELOPE[:4]:
                sock.sendall(line + b"\r\n")
                sock.recv(4096)
            sock.sendall(b"X: " + b"y" * 1_000_000)
            clients.append(sock)
        time.sleep(1)
        return (resident(process.pid) - before) / sessions
    finally:
        for sock in clients:
            sock.close()
        process.terminate()
        process.communicate()


def resident(pid):
    """Return a process's resident memory in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2)
    seconds, rows = parser.parse_args().seconds, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, argv in (
            ("synced", []),
            ("--no-sync", ["--no-sync"]),
            ("--no-sync, 2 processes", ["--no-sync", "--processes", "2"]),
        ):
            process, (smtp, pop3) = start(folder, *argv)
            try:
                for clients in (1, 10):
                    progress(f"messages in, {title}, {clients} clients")
                    rows.append(
                        (
                            f"messages in, {title}, {clients} at once",
                            f"{rate(smtp, ENVELOPE, clients, seconds):,.0f} /s",
                        )
                    )
                if title == "--no-sync":
                    Store(folder / "spool", ALICE).clear()
                    progress("POP3 sessions")
                    rows.append(
                        ("POP3 sessions, 10 at once", f"{rate(pop3, POLL, 10, seconds):,.0f} /s")
                    )
                    progress("50 MB")
                    taken, given = throughput(smtp, pop3)
                    rows.append(("50 MB in; out", f"{taken:,.0f} MB/s; {given:,.0f} MB/s"))
                    progress("10,000 messages")
                    rows.append(
                        ("to STAT of 10,000 messages", f"{opening(folder, pop3, 10_000):,.0f} ms")
                    )
            finally:
                process.terminate()
                process.communicate()
        if os.path.exists("/proc/self/status"):
            progress("memory")
            rows.append(("a session that sends 1 MB slowly", f"{memory(folder):,.0f} KiB"))
    rows += embedding()
    progress("done")
    print(file=sys.stderr)
    for what, value in rows:
        print(f"{what:50} {value:>20}")


if __name__ == "__main__":
    main()
