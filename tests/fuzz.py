"""Mutates good sessions of both protocols and looks whether the servers live.

    python tests/fuzz.py --seconds 600        as long as you like
    python tests/fuzz.py --sessions 3000 --seed 7

After each batch: a good client is served, no thread and no descriptor is left over, nothing has logged a traceback.
Prints the seed and the session that did harm, and ends with status 1.
"""

import argparse
import contextlib
import logging
import os
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lineserver import LineServer
from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store

SMTP = [
    b"EHLO client.test\r\n",
    b"HELO x\r\n",
    b"AUTH LOGIN\r\n",
    b"YWxpY2U=\r\n",
    b"d29uZGVybGFuZA==\r\n",
    b"*\r\n",
    b"AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=\r\n",
    b"AUTH CRAM-MD5\r\n",
    b"MAIL FROM:<a@b.test> SIZE=10 BODY=8BITMIME\r\n",
    b"MAIL FROM:<> SMTPUTF8 RET=HDRS ENVID=x\r\n",
    b"RCPT TO:<alice@example.test> NOTIFY=SUCCESS\r\n",
    b'RCPT TO:<@a,@b:"al ice"@example.test>\r\n',
    b"RCPT TO:<x@other.test> ORCPT=rfc822;a+2Bb\r\n",
    b"DATA\r\n",
    b"Subject: x\r\n\r\n.\r\n..x\r\n",
    b"\r\n.\r\n",
    b"BDAT 10\r\n0123456789",
    b"BDAT 0 LAST\r\n",
    b"BDAT 5 LAST\r\nab\r\nc",
    b"RSET\r\n",
    b"NOOP\r\n",
    b"VRFY alice\r\n",
    b"EXPN staff\r\n",
    b"ETRN @other.test\r\n",
    b"HELP MAIL\r\n",
    b"STARTTLS\r\n",
    b"QUIT\r\n",
]
POP3 = [
    b"CAPA\r\n",
    b"USER alice\r\n",
    b"PASS wonderland\r\n",
    b"APOP alice 0123456789abcdef0123456789abcdef\r\n",
    b"AUTH PLAIN AGFsaWNlAHdvbmRlcmxhbmQ=\r\n",
    b"AUTH LOGIN\r\n",
    b"YWxpY2U=\r\n",
    b"UTF8\r\n",
    b"STLS\r\n",
    b"STAT\r\n",
    b"LIST\r\n",
    b"LIST 1\r\n",
    b"UIDL\r\n",
    b"UIDL 2\r\n",
    b"RETR 1\r\n",
    b"TOP 1 1\r\n",
    b"DELE 1\r\n",
    b"RSET\r\n",
    b"NOOP\r\n",
    b"QUIT\r\n",
]
JUNK = [
    b"\0",
    b"\r",
    b"\n",
    b"\r\n.\r\n",
    b"\xff",
    b" ",
    b"<",
    b">",
    b"@",
    b'"',
    b"\\",
    b"=",
    b"+",
    b"9" * 30,
    b"-1",
    b"x" * 5000,
    "用".encode(),
]


def mutated(chance, lines):
    """Return one session's octets: mostly sensible, with some lines swapped, cut, repeated and broken."""
    session = (
        list(lines) if chance.random() < 0.5 else chance.choices(lines, k=chance.randrange(1, 40))
    )
    for _ in range(chance.randrange(6)):
        at = chance.randrange(len(session))
        line, kind = session[at], chance.randrange(5)
        spot = chance.randrange(len(line) + 1)
        if kind == 0:
            session[at] = line[:spot] + chance.choice(JUNK) + line[spot:]
        elif kind == 1:
            session[at] = line[:spot] + bytes([chance.randrange(256)]) + line[spot + 1 :]
        elif kind == 2:
            session[at] = line[:spot]
        elif kind == 3:
            session.insert(at, line)
        else:
            session[at] = line * chance.randrange(50)
    return b"".join(session)


def send(chance, port, data):
    """Send octets in pieces, read what comes, and leave politely, rudely or not at all for a while."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.settimeout(0.02)
            while data:
                size = chance.choice([1, 7, 100, 100_000])
                sock.sendall(data[:size])
                data = data[size:]
                if chance.random() < 0.1:
                    with contextlib.suppress(TimeoutError):
                        sock.recv(65536)
            if chance.random() < 0.7:
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(5)
                while sock.recv(65536):
                    pass
    except OSError:
        pass


def good_client(port, wanted):
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        assert sock.recv(1000).startswith(wanted), "a good client is not served"


class Tracebacks(logging.Handler):
    seen: list = []

    def emit(self, record):
        if record.exc_info:
            self.seen.append(self.format(record))


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def fuzz(seed, sessions, seconds):
    """Run until either is over; return what went wrong, or None."""
    chance, handler, done, end = random.Random(seed), Tracebacks(), 0, time.monotonic() + seconds
    logging.getLogger().addHandler(handler)
    LineServer.login_delay = 0
    with tempfile.TemporaryDirectory() as folder:
        store = Store(
            folder,
            {"alice@example.test": "wonderland", "staff@example.test": ["alice@example.test"]},
            sync=False,
        )
        route = {"route": ["other.test=127.0.0.1:1"]}
        with (
            SMTPServer(("127.0.0.1", 0), store, timeout=5, **route) as smtp,
            POP3Server(("127.0.0.1", 0), store, timeout=5) as pop3,
        ):
            baseline = None
            while done < sessions and time.monotonic() < end:
                batch = [
                    (port, mutated(chance, lines))
                    for port, lines in ((smtp.port, SMTP), (pop3.port, POP3))
                    for _ in range(15)
                ]
                threads = [
                    threading.Thread(target=send, args=(random.Random(chance.random()), *one))
                    for one in batch
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                done += len(batch)
                good_client(smtp.port, b"220")
                good_client(pop3.port, b"+OK")
                limit = time.monotonic() + 10
                while smtp.active or pop3.active:
                    if time.monotonic() > limit:
                        return f"sessions are left after {done}: {smtp.active} {pop3.active}"
                    time.sleep(0.001)
                baseline = baseline or descriptors() + 5
                if descriptors() > baseline:
                    return f"descriptors leak: {descriptors()} after {done} sessions"
                if handler.seen:
                    return f"after {done} sessions: {handler.seen[0]}\nthe last batch: {batch}"[
                        :20_000
                    ]
                store.clear()
    print(f"{done} sessions, nothing found (seed {seed})")
    return None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--sessions", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    args = parser.parse_args()
    fault = fuzz(
        args.seed,
        args.sessions,
        args.seconds if args.seconds < 1e9 or args.sessions < 10**9 else 60,
    )
    if fault:
        print(f"seed {args.seed}: {fault}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
