"""A small benchmark of this server, run by hand; aiosmtpd is measured beside it when it is installed.

    python tests/bench.py [--seconds 2]

Everything is on the loopback and in a temporary folder; compare ratios of one run, never numbers of two.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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


def embedding():
    """Return the milliseconds of start plus stop in process, and aiosmtpd's where it is installed."""
    with tempfile.TemporaryDirectory() as folder:
        store, times = Store(folder, ALICE, sync=False), []
        for _ in range(30):
            begin = time.perf_counter()
            with SMTPServer(("127.0.0.1", 0), store):
                pass
            times.append((time.perf_counter() - begin) * 1e3)
    try:
        from aiosmtpd.controller import Controller
        from aiosmtpd.handlers import Sink
    except ImportError:
        return sorted(times)[15], None
    theirs = []
    for port in range(20_000, 20_030):
        controller = Controller(Sink(), hostname="127.0.0.1", port=port)
        begin = time.perf_counter()
        controller.start()
        controller.stop()
        theirs.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)[15], sorted(theirs)[15]


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
    ours, theirs = embedding()
    rows.append(("start plus stop in process", f"{ours:.2f} ms"))
    if theirs is not None:
        rows.append(("the same, aiosmtpd's Controller", f"{theirs:.2f} ms"))
    progress("done")
    print(file=sys.stderr)
    for what, value in rows:
        print(f"{what:50} {value:>20}")


if __name__ == "__main__":
    main()
