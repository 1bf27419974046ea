"""What SMTP and POP3 stand on: threads, lines, deadlines, TLS, logins, the trace, starting and stopping.

Both protocols are a conversation in lines: the client sends a verb and an argument, the server answers.  This module
holds the mechanism and hardly any of the words:

- `LineReader`   lines and blocks from a socket, each with a limit and a deadline
- `LineHandler`  one session: reads a line, looks the verb up in a table, sends the reply, counts errors
- `LineServer`   one listener: threads, limits on sessions, TLS, an orderly end
- `Trace`        the dialogue as a person wants to see it
- `run`          one or several servers, in one or several processes, until a signal ends them

A protocol subclasses `LineHandler`, fills `commands` and `replies`, and writes one method per verb that returns its
reply.  See smtpd_simple.py and pop3d_simple.py.  There is no event loop: a thread per session keeps a dialogue
straight code, and a thread that has finished takes the next connection.  Behind `LineServer` come certificates, the
trace, and what the two programs do alike: options, log, signals, processes.
"""

import binascii
import contextlib
import errno
import itertools
import logging
import os
import socket
import socketserver
import struct
import sys
import threading
import time

VERSION = "1.0"

MAX_LINE = 4096  # octets of a command line; RFC 5321 4.5.3.1.4 asks for 512, RFC 2449 4 for 255, parameters add to it
MAX_SASL_LINE = 12288  # octets of an answer in a login, RFC 4954 4
MAX_ERRORS = 20  # in a row; a good command starts the count again
MAX_LOGINS = 5  # failed ones on one connection
MAX_GUESSES = 100  # failed ones from one address, but for those of accounts that got in at last ...
GUESS_MEMORY = 600  # ... until it has been quiet for these seconds
MAX_GUESSERS = 10_000  # addresses that are remembered
LONGEST_DELAY = 2.0  # seconds that a failed login waits at most
HANDSHAKE = 30  # seconds for a TLS handshake
LINGER = 2  # seconds in which a client that still sends may read our last words
SPARE_DESCRIPTORS = 64  # that sessions leave to spool files and listeners
SPARE_THREADS = 32  # threads that wait for a connection at most
STOPPING = 6  # seconds that sessions have to end when the server stops
LAST_WAIT = 0.5  # seconds that they have once their connections are cut
SEND_BLOCK = 1 << 17  # octets collected before they are sent
FIRST_BLOCK = 1 << 15  # octets of a message read at first: most are smaller, and large buffers are dear to get

END_OF_DATA = b"\r\n.\r\n"
KERNEL_TIMEOUT = sys.platform == "linux" and struct.calcsize("l") == 8  # a timeval is two longs there
HTTP = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "HOST:"}
SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Disconnect(Exception):
    """The session ends: the client left, or we end it; `reply` is said first when given."""

    def __init__(self, why: str = "hung up", reply: str | None = None):
        super().__init__(why)
        self.reply = reply


class Quit(Disconnect):
    """The client has said good bye: nothing more is expected of it."""


class Refused(Exception):
    """What we will not do; its text is the reply."""


# ---------------------------------------------------------------- pure helpers


def printable(text: str) -> str:
    """Return `text` with everything that could break a log line or a terminal escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine talking to itself."""
    return host.startswith(("127.", "::ffff:127.")) or host in ("::1", "localhost")


def show_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host_name(name: str) -> bool:
    """Say whether a name can stand in a greeting, a header and a file name; an address in brackets can, too."""
    return 0 < len(name) <= 255 and all(c.isascii() and (c.isalnum() or c in ".-_[]:") for c in name)


def set_timeout(sock, seconds: float) -> None:
    """Let every wait on a socket end after `seconds`, with TimeoutError or BlockingIOError.

    Where the kernel can keep the time, a read is one system call; with settimeout() it is a poll and a read, and each
    lets another thread take the interpreter (some 15 % of the rate with ten clients).  TLS needs the poll, and so do
    sockets that come to us with a timeout, such as smtplib's.
    """
    if KERNEL_TIMEOUT and sock.gettimeout() is None:
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000) or 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
    else:
        sock.settimeout(seconds)


def split_address(text: str, default: int) -> tuple[str, int]:
    """Read `host`, `host:port` or `[address]:port`; raise ValueError when it is none of them."""
    host, colon, port = text, "", ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(f"{text!r} is not [address]:port")
        colon, port = port[:1], port[1:]
    elif text.count(":") < 2:
        host, colon, port = text.partition(":")
    if not host or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise ValueError(f"{text!r} is not host or host:port")
    return host, int(port) if colon else default


def dot_stuff(blocks, line_start=True):
    """Double the dot at each line's start (RFC 5321 4.5.2, RFC 1939 3); takes and yields blocks of CRLF lines."""
    for block in blocks:
        if line_start and block.startswith(b"."):
            yield b"."
        line_start = block.endswith(b"\n")
        yield block if block.rfind(b"\n.") < 0 else block.replace(b"\n.", b"\n..")  # rfind() is the fastest look


def dot_unstuff(data: bytes) -> tuple[bytes, bytes, bool]:
    """Undo dot-stuffing in a piece of a DATA section that begins with the CRLF before its first line.

    Returns (content, rest, ended).  Until the end of data has come, put `rest` before the next piece; then it is what
    the client sent behind it.  Only CRLF.CRLF ends data: a server that takes less can be made to see commands in a
    message.
    """
    end = data.find(END_OF_DATA)
    if end >= 0:
        return data[: end + 2].replace(b"\r\n.", b"\r\n"), data[end + len(END_OF_DATA) :], True
    # The piece may end inside the end of data: hold back what could be its beginning.
    held = next((n for n in (4, 3, 2, 1) if data.endswith(END_OF_DATA[:n])), 0)
    cut = len(data) - held
    return data[:cut].replace(b"\r\n.", b"\r\n"), data[cut:], False


# ---------------------------------------------------------------- what the client sends


class LineReader:
    """What a client sends, by lines and by blocks, each with a limit and a deadline.

    `before_waiting` is called whenever reading is about to wait, and only then: replies that it flushes answer a
    pipelined batch in one packet (RFC 2920 3.2).  Reading raises TimeoutError when the time is over and Disconnect
    when the client is gone.
    """

    def __init__(self, sock, before_waiting):
        self.sock, self.before_waiting = sock, before_waiting
        self.buffer = bytearray()
        self.seconds = None

    def receive(self, seconds: float, size: int) -> bytes:
        """Return what arrives next, up to `size` octets, whatever the buffer holds; wait `seconds` for it at most."""
        self.before_waiting()
        if seconds <= 0:
            raise TimeoutError
        if seconds != self.seconds:
            self.limit(seconds)
        try:
            block = self.sock.recv(size)
        except (TimeoutError, BlockingIOError):
            raise TimeoutError from None
        except OSError as error:
            raise Disconnect(f"lost: {error.strerror or error}") from None
        if not block:
            raise Disconnect("the client left")
        return block

    def limit(self, seconds: float) -> None:
        """Let every wait on the socket end after `seconds`, also for sending."""
        set_timeout(self.sock, seconds)
        self.seconds = seconds

    def readline(self, limit: int, seconds: float) -> bytes:
        """Return the next line with its LF, or the first `limit` octets of it; all of it must arrive in `seconds`."""
        deadline, seen = time.monotonic() + seconds, 0
        if not self.buffer:
            block = self.receive(seconds, min(limit, MAX_LINE))
            if block.find(b"\n") == len(block) - 1:  # a line and no more, as from all who wait for their answer
                return block
            self.buffer += block
        while (end := self.buffer.find(b"\n", seen, limit)) < 0 and len(self.buffer) < limit:
            seen = len(self.buffer)
            self.buffer += self.receive(deadline - time.monotonic(), MAX_LINE)
        return self.take(end + 1 if end >= 0 else limit)

    def take(self, size: int) -> bytes:
        """Return and remove up to `size` octets that have arrived."""
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def blocks(self, seconds: float, size: int):
        """Yield what arrives in blocks of up to `size` octets, for as long as the caller wants more.

        A line, or `size` octets without one, must arrive within `seconds`: a client that sends an octet a minute does
        not hold the session for longer than one that sends nothing.
        """
        deadline, since, ahead = time.monotonic() + seconds, 0, FIRST_BLOCK
        left = seconds
        while True:
            block = self.take(size) if self.buffer else self.receive(left, ahead)
            since += len(block)
            if len(block) == ahead:
                ahead = size
            if since >= size or b"\n" in block:
                deadline, since, left = time.monotonic() + seconds, 0, seconds
            else:
                left = deadline - time.monotonic()
            yield block

    def skip_line(self, seconds: float) -> None:
        """Read on to the end of a line that is too long, and forget it."""
        deadline = time.monotonic() + seconds
        while not self.readline(MAX_LINE, deadline - time.monotonic()).endswith(b"\n"):
            pass


# ---------------------------------------------------------------- one session


class LineHandler(socketserver.BaseRequestHandler):
    """One session, from the greeting to the close; a protocol fills in the words.

    A command is a function of handler and argument that returns its reply: a line, a list of lines, or None when it
    has answered.  A subclass also has a method `greeting` and may refine `allow` and `store_failed`.

    Attributes: `peer` (host, port), `helo` (the name the client gave), `user` (the account that logged in, or None),
    `tls` (whether the session is encrypted), `envelope` (of the message that is under way, or None), `bare_lf` (whether
    the first line ended in LF alone; None before it).
    """

    protocol: str  # its name
    commands: dict  # verb to function
    replies: dict  # what is said in the situations that this class meets
    error: str  # how a refusal begins
    challenge: str  # how a login asks
    verbatim = frozenset()  # verbs whose argument keeps its spaces
    secret: dict  # verbs whose argument the trace masks, and how many words of it may be shown
    numbers = itertools.count(1)

    def setup(self):
        self.number = next(self.numbers)
        self.peer = self.client_address[:2]
        self.helo, self.user, self.tls, self.envelope = "", None, False, None
        self.pending, self.pending_size = [], 0
        self.errors = self.failed_logins = 0
        self.bare_lf = None
        self.reader = LineReader(self.request, self.flush)
        self.thread = threading.current_thread()
        self.server.sessions.add(self)

    def handle(self):
        """Converse until somebody ends it; the four ways it can end each have their own last words."""
        why, farewell, linger = "the server stops", self.replies["stopping"], True
        try:
            self.converse()
        except Disconnect as end:
            if end.reply or not self.server.stopping.is_set():
                why, farewell = str(end), end.reply
            linger = bool(farewell) and (self.reader.buffer or not isinstance(end, Quit))
        except TimeoutError:
            why, farewell = "timed out", self.replies["timeout"]
        except Exception:
            why, farewell = "a bug", self.replies["bug"]
            self.log_error("a bug", traceback=True)
        self.say_goodbye(farewell, linger)
        self.log("closed: %s", why)

    def converse(self):
        self.log("connected from %s", show_address(*self.peer))
        if self.server.stopping.is_set():  # it came too late for begin_stop()
            raise Disconnect
        if self.server.implicit_tls:
            self.start_tls()
        self.reply(self.intercepted("CONNECT", "") or self.greeting())
        while self.errors < MAX_ERRORS:
            self.reply(self.step())
        raise Disconnect("too many errors", self.replies["errors"])

    def step(self):
        """Read one command and return its reply."""
        verb = "?"
        try:
            verb, _, argument = self.readline().partition(" ")
            verb = verb.rstrip("\t").upper()
            if verb not in self.verbatim:
                argument = argument.strip(" \t")
            reply = self.intercepted(verb, argument) if self.server.intercept else None
            if reply is None:
                if verb in HTTP:  # any web page can make a browser send our commands behind a POST
                    raise Disconnect("speaks HTTP", self.replies["unknown"])
                self.allow(verb, argument)
                if verb not in self.commands:
                    raise Refused(self.replies["unknown"])
                reply = self.commands[verb](self, argument)
        except Refused as refusal:
            reply = str(refusal)
        except TimeoutError:
            raise
        except OSError as error:  # sockets raise Disconnect, so this is the disk
            reply = self.store_failed(verb if verb in self.commands else "?", error)
        if not isinstance(reply, str) or not reply.startswith(self.error):
            self.errors = 0
        else:
            self.errors += 1
            self.log("refused %s: %s", verb if verb in self.commands else "what is no command", reply)
        return reply

    def allow(self, verb: str, argument: str) -> None:
        """Look at each command first; a protocol whose rules forbid it here and now raises Refused."""

    def intercepted(self, verb: str, argument: str) -> str | None:
        """Return what the embedding program's hook answers in our place, if it wants to."""
        return self.server.intercept(self, verb, argument) if self.server.intercept else None

    def store_failed(self, what: str, error: OSError) -> str:
        """Log what the disk did to a command or message; return the reply."""
        self.log_error("%s: %s", what, error)
        return self.replies["disk"]

    # ---- lines in and out

    def readline(self, limit: int = MAX_LINE, secret: bool = False) -> str:
        """Return the next line without its end; a longer one than `limit` octets is read to its end and refused."""
        line = self.reader.readline(limit, self.server.timeout)
        bare_lf = not line.endswith(b"\r\n")
        if bare_lf and not line.endswith(b"\n"):
            self.reader.skip_line(self.server.timeout)
            self.trace("C", f"({limit} octets and more without a line end)")
            raise Refused(self.replies["long answer" if secret else "long"])
        if self.bare_lf is None:
            self.bare_lf = bare_lf
        text = line[: -1 if bare_lf else -2].decode("utf-8", "surrogateescape")
        if self.server.trace:
            self.trace("C", "****" if secret else self.masked(text))
        return text

    def masked(self, line: str) -> str:
        """Return a command line as the trace may show it."""
        words = line.split()
        shown = self.secret.get(words[0].upper()) if words else None
        return line if shown is None else " ".join(words[: shown + 1] + ["****"] * (len(words) > shown + 1))

    def reply(self, reply) -> None:
        """Queue a reply; it is sent when the session is about to wait."""
        if reply is None:
            return
        if self.server.trace:
            for line in [reply] if isinstance(reply, str) else reply:
                self.trace("S", line)
        text = f"{reply}\r\n" if isinstance(reply, str) else "\r\n".join([*reply, ""])
        self.write(text.encode("utf-8", "replace"))

    def write(self, data: bytes) -> None:
        """Queue octets as they are; what is waiting is sent when it grows large."""
        self.pending.append(data)
        self.pending_size += len(data)
        if self.pending_size > SEND_BLOCK:
            self.flush()

    def flush(self, seconds: float | None = None) -> None:
        """Send what is waiting; raise Disconnect when the client can't be reached or does not read.

        A client that reads an octet a minute does not hold the session: what is sent at once has a deadline as a whole.
        """
        if not self.pending:
            return
        data = self.pending[0] if len(self.pending) == 1 else b"".join(self.pending)
        self.pending, self.pending_size = [], 0
        seconds = seconds or self.server.timeout
        deadline = time.monotonic() + seconds
        try:
            if seconds != self.reader.seconds:
                self.reader.limit(seconds)
            sent = self.request.send(data)
            while sent < len(data):  # a TLS record has been sent, or the client has not read for a while
                if time.monotonic() > deadline:
                    raise Disconnect("does not read")
                sent += self.request.send(memoryview(data)[sent:])
        except (TimeoutError, BlockingIOError):
            raise Disconnect("does not read") from None
        except OSError as error:
            raise Disconnect(f"lost: {error.strerror or error}") from None

    def say_goodbye(self, farewell: str | None, linger: bool) -> None:
        """Send the last words, if any; with `linger` see that a client which still sends can read them."""
        try:
            self.reply(farewell)
            self.flush(LINGER if linger else None)
            if self.tls:
                self.request.setblocking(False)
                with contextlib.suppress(OSError):
                    self.request.unwrap()  # sends close_notify; its answer is not waited for
            if linger:
                self.linger()
        except (OSError, Disconnect, ValueError):
            pass  # whoever is gone can't be told

    def linger(self) -> None:
        """Close our half and read on for a moment: closing on unread input would take back what we have just said.

        On the bare socket, since TLS, if there was any, has ended.
        """
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        deadline = time.monotonic() + LINGER
        while (left := deadline - time.monotonic()) > 0 and not self.server.stopping.is_set():
            set_timeout(self.request, left)
            if not socket.socket.recv(self.request, SEND_BLOCK):
                return

    def finish(self):
        self.server.sessions.discard(self)
        self.request.close()
        self.reader = None  # it refers back to us, and memory must not wait for the collector of such circles

    # ---- TLS

    def start_tls(self) -> None:
        """Encrypt the session; what was said before does not count (RFC 3207 4.2, RFC 2595 4).

        Whoever has sent something in clear behind the command that asks for TLS is hung up on.  The handshake runs in
        the session's own thread, under a deadline, so that a silent client holds up nobody.
        """
        if self.reader.buffer:
            raise Disconnect("sent commands in clear behind the one that starts TLS")
        self.flush()
        try:
            self.request.settimeout(min(HANDSHAKE, self.server.timeout))
            self.request = self.server.tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
            self.request.do_handshake()
        except OSError as error:
            raise Disconnect(f"TLS: {error.strerror or error}") from None
        self.reader = LineReader(self.request, self.flush)
        self.helo, self.user, self.tls, self.bare_lf = "", None, True, None
        self.log("TLS: %s %s", self.request.version(), self.request.cipher()[0])

    # ---- logging in

    def may_log_in_here(self) -> bool:
        """Say whether a password may cross this connection."""
        if self.tls:
            return True
        return not self.server.require_tls and (is_loopback(self.peer[0]) or self.server.tls is None)

    def sasl(self, mechanism: str, initial: str | None) -> str:
        """Carry out one SASL exchange (RFC 4422) and return the account's address; raise Refused."""
        exchange = self.mechanisms.get(mechanism.upper())
        if exchange is None:
            raise Refused(self.replies["mechanism"])
        return exchange(self, initial)

    def ask(self, question: bytes) -> bytes:
        """Send a challenge and return the decoded answer; `*` cancels."""
        self.reply(self.challenge.format(binascii.b2a_base64(question, newline=False).decode()))
        answer = self.readline(MAX_SASL_LINE, secret=True)
        if answer == "*":
            raise Refused(self.replies["cancelled"])
        return self.decode(answer)

    def decode(self, answer: str) -> bytes:
        """Decode base64 strictly: alphabet, padding and nothing else."""
        try:
            return binascii.a2b_base64(answer.encode(), strict_mode=True)
        except ValueError:
            raise Refused(self.replies["base64"]) from None

    def opening(self, initial: str | None, question: bytes) -> bytes:
        """Return the client's first answer: the initial response (`=` is an empty one, RFC 4954 4), or ask for it."""
        if initial is None:
            return self.ask(question)
        return b"" if initial == "=" else self.decode(initial)

    def sasl_plain(self, initial):
        identity, *rest = self.opening(initial, b"").split(b"\0")
        if len(rest) != 2:
            raise Refused(self.replies["plain"])
        users, name = self.server.store.users, rest[0].decode("utf-8", "replace")
        other = identity and users.login_address(identity.decode("utf-8", "replace")) != users.login_address(name)

        def check() -> str | None:
            found = users.check_password(name, rest[1])  # in any case: the time that it takes must not tell names
            return None if other else found

        return self.log_in(name, check)

    def sasl_login(self, initial):
        name = self.opening(initial, b"Username:").decode("utf-8", "replace")
        password = self.ask(b"Password:")
        return self.log_in(name, lambda: self.server.store.users.check_password(name, password))

    def sasl_cram_md5(self, initial):
        if initial is not None:
            raise Refused(self.replies["initial"])
        challenge = f"<{time.monotonic_ns()}.{os.urandom(8).hex()}@{self.server.hostname}>".encode()
        name, _, digest = self.ask(challenge).decode("utf-8", "replace").rpartition(" ")
        import hmac

        def answer(password: bytes) -> str:
            return hmac.new(password, challenge, "md5").hexdigest()

        return self.log_in(name, lambda: self.server.store.users.check_digest(name, answer, digest))

    mechanisms = {"LOGIN": sasl_login, "PLAIN": sasl_plain, "CRAM-MD5": sasl_cram_md5}

    def log_in(self, name: str, check) -> str:
        """Return the account that `check()` finds, or delay and refuse; after too many failures hang up."""
        guesses, host = self.server.guesses, self.peer[0]
        if guesses.exhausted(host):
            raise Disconnect("too many failed logins from this address", self.replies["logins"])
        address = check()
        if address:
            guesses.forgive(host, address)
            self.log("logged in as %s", address)
            return address
        self.failed_logins += 1
        self.log("failed login %d as %s", self.failed_logins, printable(name[:100]))
        self.server.stopping.wait(guesses.failed(host, self.server.store.users.login_address(name)))
        if self.failed_logins >= MAX_LOGINS:
            self.reply(self.replies["wrong"])
            raise Disconnect("too many failed logins", self.replies["logins"])
        raise Refused(self.replies["wrong"])

    # ---- log and trace

    def log(self, text: str, *values) -> None:
        """Log one fact about this session."""
        self.server.log(f"{self.protocol} {self.number} {text}", *values)

    def log_error(self, text: str, *values, traceback: bool = False) -> None:
        """Log what should not have happened."""
        self.server.logger.error(f"{self.protocol} {self.number} {text}", *values, exc_info=traceback)

    def trace(self, direction: str, text: str) -> None:
        """Show one line of the dialogue, if anybody watches."""
        if self.server.trace:
            self.server.trace.line(self.protocol, self.number, direction, text)

    def trace_data(self, direction: str, head: bytes, octets: int) -> None:
        """Show a message that passes by its first lines and its size."""
        if self.server.trace:
            lines = head[: Trace.DATA_OCTETS].decode("utf-8", "replace").splitlines()
            for text in lines[: Trace.DATA_LINES]:
                self.trace(direction, f"| {text}")
            self.trace(direction, f"| ({octets} octets in all)")


class Guesses:
    """Failed logins by client address: each waits longer than the one before, and at last nobody listens."""

    def __init__(self, first_delay: float):
        self.first_delay, self.lock, self.known = first_delay, threading.Lock(), {}

    def failed(self, host: str, account: str | None) -> float:
        """Count one more failure at an account, or at none; return the seconds that its answer has to wait."""
        with self.lock:
            if len(self.known) > MAX_GUESSERS:
                self.known.clear()
            accounts = self.recent(host)
            accounts[account] = accounts.get(account, 0) + 1
            self.known[host] = accounts, time.monotonic()
            count = sum(accounts.values())
        return min(self.first_delay * 2 ** min(count - 1, 10), LONGEST_DELAY)

    def recent(self, host: str) -> dict[str | None, int]:
        """Return how often logins from an address have failed lately, by account."""
        accounts, last = self.known.get(host, ({}, 0.0))
        return accounts if time.monotonic() - last < GUESS_MEMORY else {}

    def exhausted(self, host: str) -> bool:
        """Say whether an address has guessed so often that it is not listened to for a while."""
        return sum(list(self.recent(host).values())) >= MAX_GUESSES

    def forgive(self, host: str, account: str) -> None:
        """Forget the failures of somebody who has logged in; what was tried at others stays counted."""
        self.recent(host).pop(account, None)


# ---------------------------------------------------------------- one listener


class LineServer(socketserver.ThreadingTCPServer):
    """One listener and its sessions: `with` serves in threads and stops them within a deadline.

    Keywords, as the programs' options of these names: `hostname`, `tls_cert`, `tls_key`, `tls_self_signed`,
    `require_tls`, `max_connections`, `timeout` (seconds), `trace` (True, or a Trace to share).  Besides: `implicit_tls`
    (from the first octet), `max_per_address` (sessions of one client address; all but a tenth), and `intercept`, which
    may answer a command in the server's place, see SMTPServer.

    Attributes: `host` and `port` (where it listens), `store`, `hostname`, `sessions` (the handlers that are live).
    The listener is open, and a bad option or a port in use has raised, when the constructor returns.
    """

    request_queue_size = 1024  # socketserver's 5 makes a burst of clients wait for seconds
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two servers share a port
    default_timeout = 300
    login_delay = 0.25  # seconds before the first failed login is answered

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[LineHandler],
        store,
        *,
        hostname: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_self_signed: bool = False,
        implicit_tls: bool = False,
        require_tls: bool = False,
        max_connections: int = 1000,
        max_per_address: int | None = None,
        timeout: float | None = None,
        trace: "bool | Trace" = False,
        intercept=None,
    ):
        self.store, self.hostname = store, store.host if hostname is None else hostname
        if not is_host_name(self.hostname):
            raise ValueError(f"{self.hostname!a} is not a host name")
        self.logger = logging.getLogger(handler.protocol.lower())
        self.log = self.logger.info  # takes each fact about a session
        if tls_self_signed:
            tls_cert, tls_key = self_signed(store.folder, self.hostname)
        self.tls = None if tls_cert is None else tls_context(tls_cert, tls_key)
        if (implicit_tls or require_tls) and not self.tls:
            raise ValueError("TLS needs a certificate")
        self.implicit_tls, self.require_tls = implicit_tls, require_tls
        self.max_connections, self.intercept = connection_limit(max_connections), intercept
        self.max_per_address = max_per_address or max_connections - max_connections // 10
        self.timeout = timeout or self.default_timeout
        self.trace = Trace() if trace is True else trace or None
        self.sessions, self.by_address = set(), {}
        self.guesses, self.stopping, self.lock = Guesses(self.login_delay), threading.Event(), threading.Lock()
        self.threads, self.waiting, self.busy, self.shared = set(), 0, 0, False
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)
        self.host, self.port = self.server_address[:2]

    def server_bind(self):
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Inherited by every connection: the last piece of a long answer must not wait for an acknowledgement.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().server_bind()

    @property
    def name(self) -> str:
        return self.RequestHandlerClass.protocol + "S" * self.implicit_tls

    # ---- threads: whoever accepts a connection first sees that somebody waits for the next

    def start(self) -> None:
        """Begin to serve, in threads of our own."""
        self.add_thread()

    def add_thread(self) -> None:
        with self.lock:
            self.waiting += 1
        thread = threading.Thread(target=self.serve_connections, daemon=True, name=f"{self.name} {self.port}")
        self.threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads to be had: those that serve will come back
            self.threads.discard(thread)
            with self.lock:
                self.waiting -= 1

    def serve_forever(self, poll_interval: float | None = None) -> None:
        """Serve until another thread stops the server: the name that `socketserver` has for this; it polls nothing."""
        self.start()
        self.stopping.wait()

    def serve_connections(self) -> None:
        """Take a connection, serve it, come back for the next: the life of one thread."""
        try:
            while not self.stopping.is_set():
                try:
                    request, address = self.get_request()
                except OSError:
                    continue
                self.process_request(request, address)
                with self.lock:
                    if self.waiting >= SPARE_THREADS:
                        return
                    self.waiting += 1
        finally:
            self.threads.discard(threading.current_thread())

    def get_request(self):
        """Accept a connection; out of descriptors, pause instead of spinning."""
        try:
            return super().get_request()
        except OSError as error:
            if not self.stopping.is_set() and not isinstance(error, ConnectionAbortedError):
                if error.errno in SHORTAGE:
                    self.logger.warning("%s can't accept a connection: %s", self.name, error.strerror)
                self.stopping.wait(0.1)
            raise

    def process_request(self, request, client_address):
        """Serve a connection, or turn it away when there are too many; see that another thread takes the next."""
        host = client_address[0]
        with self.lock:
            self.waiting -= 1
            alone = self.waiting == 0 and not self.stopping.is_set()
            mine = self.by_address.get(host, 0)
            welcome = self.busy < self.max_connections and mine < self.max_per_address
            if welcome:
                self.busy += 1
                self.by_address[host] = mine + 1
        if not welcome:
            return self.turn_away(request, client_address)
        if alone:
            self.add_thread()
        try:
            self.finish_request(request, client_address)
        except Exception:
            self.handle_error(request, client_address)
        finally:
            request.close()
            with self.lock:
                self.busy -= 1
                if self.by_address[host] == 1:
                    del self.by_address[host]
                else:
                    self.by_address[host] -= 1

    def turn_away(self, request, client_address) -> None:
        """Say that there are too many sessions, without spending a thread or a wait on it."""
        self.logger.info("%s turned away %s: too many sessions", self.name, show_address(*client_address[:2]))
        try:
            request.setblocking(False)
            if not self.implicit_tls:
                request.send(self.RequestHandlerClass.replies["busy"].encode() + b"\r\n")
            request.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        request.close()

    def handle_error(self, request, client_address):
        self.logger.exception("%s session of %s", self.name, show_address(*client_address[:2]))

    # ---- the end

    def begin_stop(self) -> None:
        """Stop accepting, and wake every session that waits for its client."""
        self.stopping.set()
        if not self.shared:
            self.wake_acceptors()
        for session in list(self.sessions):
            with contextlib.suppress(OSError, ValueError):
                # Not the TLS socket's own shutdown(), which would drop the encryption under the session's feet.
                socket.socket.shutdown(session.request, socket.SHUT_RD)

    def wake_acceptors(self) -> None:
        """Make every accept() return: Linux does when the listener is shut down, other systems want a connection."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            for _ in range(self.waiting):
                try:
                    socket.create_connection(self.server_address[:2], 1).close()
                except OSError:
                    break

    def server_close(self, seconds: float = STOPPING) -> None:
        """Stop; sessions that are storing something get `seconds` to finish."""
        self.begin_stop()
        deadline = time.monotonic() + seconds
        # In a process that shares its listener the threads without a session go on waiting at it.
        threads = {session.thread for session in list(self.sessions)} if self.shared else set(self.threads)
        join(threads, deadline)
        left = [session for session in list(self.sessions) if session.thread is not threading.current_thread()]
        if left:  # such as those whose clients do not read what they have asked for
            for session in left:
                with contextlib.suppress(OSError, ValueError):
                    socket.socket.shutdown(session.request, socket.SHUT_RDWR)
            join([session.thread for session in left], time.monotonic() + LAST_WAIT)
        super().server_close()

    def shutdown(self) -> None:
        """The name that `socketserver` has for stopping."""
        self.server_close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.server_close()


def connection_limit(wanted: int) -> int:
    """Return how many sessions may be open at once: `wanted`, or fewer where the system allows few descriptors."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - SPARE_DESCRIPTORS, soft // 4))


def join(threads, deadline: float) -> None:
    """Wait for threads until a time of the monotonic clock."""
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(deadline - time.monotonic(), 0))


# ---------------------------------------------------------------- TLS certificates


def tls_context(cert: str, key: str | None):
    """Return a server's TLS settings, TLS 1.2 and up; raise OSError or ValueError naming a file that does not serve."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A connection that ends without a close_notify has ended, and begin_stop() ends reading so: it may still be told.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    for path in (cert, key or cert):  # ssl does not say which of them it is
        with open(path, "rb"):
            pass
    try:
        context.load_cert_chain(cert, key, password="")  # nobody is asked for one
    except OSError as error:  # ssl's are OSErrors, too
        why = getattr(error, "reason", None) or "no PEM, or the key wants a password"
        raise ValueError(f"{cert}, {key or cert}: not a certificate and its key ({why})") from None
    return context


def self_signed(folder, hostname: str) -> tuple[str, str]:
    """Return certificate and key for `hostname`, made once by the openssl program, kept beside the spool `folder`."""
    home = f"{os.path.abspath(folder)}.{hostname}.tls"
    cert, key = f"{home}/cert.pem", f"{home}/key.pem"
    if not os.path.exists(home):
        import tempfile

        os.makedirs(os.path.dirname(home), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(home)) as made:  # only its owner can look into it
            run_openssl(f"{made}/tls", hostname)
            with contextlib.suppress(OSError):  # another server has been faster
                os.rename(f"{made}/tls", home)
    return cert, key


def run_openssl(folder: str, hostname: str) -> None:
    """Make a folder with cert.pem and key.pem in it; raise ValueError saying what went wrong."""
    import subprocess

    names = f"subjectAltName=DNS:{hostname},DNS:localhost,IP:127.0.0.1,IP:::1"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    argv += ["-days", "3650", "-subj", f"/CN={hostname[:64]}", "-addext", names]
    os.mkdir(folder, 0o700)
    try:
        subprocess.run(
            [*argv, "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True, capture_output=True, timeout=60
        )
    except FileNotFoundError:
        raise ValueError("--tls-self-signed needs the openssl program; none was found") from None
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or error
        raise ValueError(f"openssl made no certificate: {said}") from None


# ---------------------------------------------------------------- the trace


class Trace:
    """The dialogue, live, a line per line: time, protocol, session, direction, text; in colour on a terminal."""

    DATA_LINES, DATA_OCTETS = 40, 4000  # of a message that passes
    COLOURS = {"C": "36", "S": "32", "error": "31", "dim": "2"}

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.colour = self.stream.isatty() and not os.environ.get("NO_COLOR")

    def line(self, protocol: str, number: int, direction: str, text: str) -> None:
        """Show one line; `direction` is C (the client said it) or S (the server)."""
        now = time.time()
        head = f"{time.strftime('%H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d} {protocol:5}{number:>4}"
        text = printable(text)
        if self.colour:
            failed = direction == "S" and text[:1] in ("4", "5", "-")
            tone = self.COLOURS["error" if failed else direction]
            head, text = f"\x1b[{self.COLOURS['dim']}m{head}\x1b[0m", f"\x1b[{tone}m{direction}: {text}\x1b[0m"
        else:
            text = f"{direction}: {text}"
        with contextlib.suppress(OSError, ValueError):  # nobody looks any more
            self.stream.write(f"{head}  {text}\n")
            self.stream.flush()
