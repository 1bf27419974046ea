"""The machinery that SMTP and POP3 share: lines, sessions, logins, threads, TLS, the trace.

Both protocols are dialogues in lines: the client sends a verb and an argument, the server answers.
This module reads the line, calls the command and sends the reply; it knows neither protocol:

- `LineReader`    lines and blocks from a socket, each with a limit and a deadline
- `LineHandler`   one session: reads a command, looks it up in a table, sends the reply
- `LoginHandler`  the same with SASL logins, slowed down by a `LoginThrottle`
- `LineServer`    one listener: threads, limits on sessions, TLS, an orderly stop
- `Trace`         the dialogue as a person wants to see it

A protocol subclasses `LoginHandler`, fills in `commands` and `replies`, and writes one method per
verb that returns its reply: see pop3d_simple.py, the shorter example.  A thread per session keeps a
dialogue straight code, and a thread that has finished takes the next connection.

Read it in this order: `LineHandler.handle` and `serve_command`, `LineReader`, then
`LineServer.serve_connections`.
"""

import binascii
import collections
import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import socket
import socketserver
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

if TYPE_CHECKING:
    import ssl

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")

VERSION = "1.1"

MAX_LINE = 4096  # octets of a command line; RFC 5321 4.5.3.1.4 asks for 512, RFC 2449 4 for 255
MAX_REPLY = 510  # octets of a reply line without its CRLF, RFC 5321 4.5.3.1.5
MAX_SASL_LINE = 12288  # octets of an answer in a login, RFC 4954 4
MAX_ERRORS = 20  # in a row; a good command starts the count again
MAX_LOGINS = 5  # failed logins in one session
MAX_FAILURES = 20  # failed logins at one account from one address, then that pair is blocked
FAILURE_MEMORY = 600  # seconds after which a failed login no longer counts
MAX_REMEMBERED = 10_000  # pairs of address and account whose failures are remembered
MAX_DELAY = 2.0  # seconds before a failed login is answered, at most
HASHES_AT_ONCE = 2  # password hashes that are computed at the same time: each takes 16 MiB
MAX_WAITING_HASHES = 100  # logins of one client address that may wait for their turn
HANDSHAKE_TIMEOUT = 30  # seconds for a TLS handshake
LINGER_TIMEOUT = 2  # seconds in which a client that still sends may read our last reply
SPARE_DESCRIPTORS = 64  # reserved for spool files; sessions may have the others
SPARE_THREADS = 32  # threads without a session that are kept
STOP_TIMEOUT = 6  # seconds that sessions have to end when the server stops
CUT_TIMEOUT = 0.5  # seconds that they have once their connections are cut
SHORTAGE_PAUSE = 0.1  # seconds before accept() is tried again when the system is out of something
SEND_BLOCK = 1 << 16  # octets collected before they are sent
FIRST_BLOCK = 1 << 15  # octets of a message read at first: most are smaller

END_OF_DATA = b"\r\n.\r\n"
IAC = "\udcff"  # with which telnet begins a control sequence, as readline() decodes it
KERNEL_TIMEOUT = sys.platform == "linux" and struct.calcsize("l") == 8  # a timeval is two longs
HTTP_VERBS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HOST:"}
SHORTAGE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

Reply = str | list[str] | None  # a line, several lines, or: the command has answered by itself
Turn = Callable[[], AbstractContextManager[None]]  # held while a password hash is computed
Answer = Callable[[bytes], str]  # a password's right answer to the challenge
Path = str | os.PathLike[str]
Hook = Callable[[Any, str, str], str | None]  # session, verb, argument; returns a reply or None

# Seconds that pass whatever is done to the clock: tests that freeze time patch time.monotonic.
clock: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
    if hasattr(time, "clock_gettime")
    else functools.partial(time.monotonic)
)


class Disconnect(Exception):
    """The session ends: the client left, or we end it.  `reply` is sent first when given."""

    def __init__(self, why: str = "hung up", reply: str | None = None):
        super().__init__(why)
        self.reply = reply


class Quit(Disconnect):
    """The client has said QUIT: it will send nothing more."""


class ClientTimeout(Exception):
    """The client did not send what it should in time.

    Not a TimeoutError, because that is an OSError and would be reported as a disk failure.
    """


class Refused(Exception):
    """A command is refused; the text is the reply.  `ours`: it is no error of the client."""

    def __init__(self, reply: str, ours: bool = False):
        super().__init__(reply)
        self.ours = ours


class HookError(Exception):
    """The embedding program's hook has failed, or has returned something that is not a reply."""


# ---------------------------------------------------------------- pure helpers


def printable(text: str) -> str:
    """Return `text` with everything escaped that could break a log line or a terminal."""
    return text if text.isprintable() else "".join(map(escaped, text))


def escaped(char: str) -> str:
    """Return one character as printable() writes it."""
    if char.isprintable():
        return char
    if "\udc80" <= char <= "\udcff":  # an octet that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return ascii(char)[1:-1]


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine talking to itself."""
    return host.startswith(("127.", "::ffff:127.")) or host in ("::1", "localhost")


def show_address(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host_name(name: str) -> bool:
    """Say whether a name can stand in a greeting, a header and a file name."""
    allowed = all(c.isascii() and (c.isalnum() or c in ".-_[]:") for c in name)
    return 0 < len(name) <= 255 and allowed


def timestamp(seconds: float) -> str:
    """Return a time as log and trace show it."""
    return f"{date_and_time(int(seconds))}.{int(seconds % 1 * 1000):03d}"


@functools.lru_cache(maxsize=1)
def date_and_time(second: int) -> str:
    """Format a whole second.  Cached, since many lines are written within one."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def set_timeout(sock: socket.socket, seconds: float) -> None:
    """Let every wait on a socket end after `seconds`, with TimeoutError or BlockingIOError.

    On 64-bit Linux SO_RCVTIMEO makes a timed read one system call; settimeout() needs poll() and
    recv(), and releases the GIL twice (15 % slower with ten clients).  TLS, and sockets that have a
    Python timeout already, use settimeout().
    """
    if KERNEL_TIMEOUT and sock.gettimeout() is None:
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000) or 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
            return
        except PermissionError:  # a sandbox that refuses socket options
            pass
    sock.settimeout(seconds)


def dot_stuff(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Double the dot at each line's start (RFC 5321 4.5.2, RFC 1939 3) in blocks of CRLF lines."""
    line_start = True
    for block in blocks:
        if line_start and block.startswith(b"."):
            yield b"."
        line_start = block.endswith(b"\n")
        # rfind() is the fastest way to see that a block has no such line.
        yield block if block.rfind(b"\n.") < 0 else block.replace(b"\n.", b"\n..")


def dot_unstuff(data: bytes) -> tuple[bytes, bytes, bool]:
    """Undo dot-stuffing in a piece of a DATA section that begins with the CRLF before a line.

    Returns (content, rest, ended).  Until the end of data has come, put `rest` before the next
    piece; then it is what the client sent behind it.  Only CRLF.CRLF ends data: a server that takes
    less can be made to see commands in a message (SMTP smuggling).
    """
    end = data.find(END_OF_DATA)
    if end >= 0:
        content = data[: end + 2].replace(b"\r\n.", b"\r\n")
        return content, data[end + len(END_OF_DATA) :], True
    # The piece may end inside the end of data: hold back what could be its beginning.
    held = next((n for n in (4, 3, 2, 1) if data.endswith(END_OF_DATA[:n])), 0)
    cut = len(data) - held
    return data[:cut].replace(b"\r\n.", b"\r\n"), data[cut:], False


# ---------------------------------------------------------------- what the client sends


class LineReader:
    """What a client sends, by lines and by blocks, each with a limit and a deadline.

    `before_waiting` is called whenever reading is about to wait, and only then: replies that it
    flushes answer a pipelined batch in one packet (RFC 2920 3.2).  Reading raises ClientTimeout
    when the time is over, and Disconnect when the client is gone.
    """

    def __init__(self, sock: socket.socket, before_waiting: Callable[[], None]):
        self.sock = sock
        self.before_waiting = before_waiting
        self.buffer = bytearray()  # octets that have arrived and were not read yet
        self.seconds = 0.0  # the timeout that the socket has now

    def receive(self, seconds: float, size: int) -> bytes:
        """Return up to `size` octets that arrive next, not those in the buffer."""
        self.before_waiting()
        if seconds <= 0:
            raise ClientTimeout
        try:
            if seconds != self.seconds:
                self.limit(seconds)
            block = self.sock.recv(size)
        except (TimeoutError, BlockingIOError):
            raise ClientTimeout from None
        except OSError as error:
            raise Disconnect(f"lost: {error.strerror or error}") from None
        if not block:
            raise Disconnect("hung up")
        return block

    def limit(self, seconds: float) -> None:
        """Let every wait on the socket end after `seconds`, also for sending."""
        set_timeout(self.sock, seconds)
        self.seconds = seconds

    def readline(self, limit: int, seconds: float) -> bytes:
        """Return the next line with its LF, or its first `limit` octets.

        All of it must arrive within `seconds`.
        """
        deadline, seen = clock() + seconds, 0
        if not self.buffer:
            block = self.receive(seconds, min(limit, MAX_LINE))
            if (
                block.find(b"\n") == len(block) - 1
            ):  # one line, from a client that does not pipeline
                return block
            self.buffer += block
        while (end := self.buffer.find(b"\n", seen, limit)) < 0 and len(self.buffer) < limit:
            seen = len(self.buffer)
            self.buffer += self.receive(deadline - clock(), MAX_LINE)
        return self.take(end + 1 if end >= 0 else limit)

    def take(self, size: int) -> bytes:
        """Return and remove up to `size` octets that have arrived."""
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def blocks(self, seconds: float, size: int) -> Iterator[bytes]:
        """Yield what arrives in blocks of up to `size` octets, while the caller wants more.

        A line, or `size` octets without one, must arrive within `seconds`: a client that sends an
        octet a minute holds the session no longer than one that sends nothing.
        """
        deadline, since, ahead = clock() + seconds, 0, FIRST_BLOCK
        left = seconds
        while True:
            block = self.take(size) if self.buffer else self.receive(left, ahead)
            since += len(block)
            if len(block) == ahead:
                ahead = size
            if since >= size or b"\n" in block:
                deadline, since, left = clock() + seconds, 0, seconds
            else:
                left = deadline - clock()
            yield block
            del block  # the next one may be long in coming

    def skip_line(self, seconds: float) -> None:
        """Read on to the end of a line that is too long, and forget it."""
        deadline = clock() + seconds
        while not self.readline(MAX_LINE, deadline - clock()).endswith(b"\n"):
            pass


# ---------------------------------------------------------------- one session


class LineHandler(socketserver.BaseRequestHandler):
    """One session, from the greeting to the close; a protocol fills in the words.

    A command is a function of handler and argument that returns its `Reply`.  A subclass has a
    method `greeting` and may refine `check_command`, `store_failed` and `release`.

    Attributes: `peer` (host, port), `helo` (the name the client gave), `user` (the account that
    logged in, or None), `tls` (whether the session is encrypted), `bare_lf` (whether the first line
    ended in LF alone; None before it).
    """

    protocol: str  # its name, in log and trace
    commands: Mapping[str, Callable[[Any, str], Reply]]  # by verb
    replies: Mapping[str, Any]  # by situation, such as "timeout"
    error_prefix: str  # how a refusal begins
    reply_pattern: re.Pattern[str]  # of a hook's reply
    keep_spaces: frozenset[str] = frozenset()  # verbs whose argument keeps its spaces
    numbers = itertools.count(1)  # of sessions

    server: "LineServer"
    request: socket.socket

    def setup(self) -> None:
        self.number = next(self.numbers)
        self.peer: tuple[str, int] = self.client_address[:2]
        self.helo = ""
        self.user: str | None = None
        self.tls = False
        self.bare_lf: bool | None = None
        self.pending: list[bytes] = []  # replies that are not sent yet
        self.pending_size = 0  # their octets
        self.errors = 0  # in a row
        self.reader = LineReader(self.request, self.flush)
        self.thread = threading.current_thread()
        self.server.sessions.add(self)

    def greeting(self) -> str:
        """Return the first line of the dialogue."""
        raise NotImplementedError

    def handle(self) -> None:
        """Converse until the session ends, and say what the way that it ends calls for."""
        why, farewell, linger = "the server stops", self.replies["stopping"], True
        try:
            self.converse()
        except Disconnect as end:
            if end.reply or not self.server.stopping.is_set():
                why, farewell = str(end), end.reply
            linger = bool(farewell) and bool(self.reader.buffer or not isinstance(end, Quit))
        except ClientTimeout:
            why, farewell = "timed out", self.replies["timeout"]
        except BaseException:  # a hook may raise anything, pytest.fail() and sys.exit() included
            why, farewell = "internal error", self.replies["internal error"]
            self.log_error("internal error", traceback=True)
        self.release()
        self.say_goodbye(farewell, linger)
        self.log("closed: %s", why)

    def converse(self) -> None:
        self.log("connected from %s", show_address(*self.peer))
        if self.server.stopping.is_set():  # it came too late for begin_stop()
            raise Disconnect
        if self.server.implicit_tls:
            self.start_tls()
        self.reply(self.hook_reply("CONNECT", "") or self.greeting())
        while self.errors < MAX_ERRORS:
            self.reply(self.serve_command())
        raise Disconnect("too many errors", self.replies["errors"])

    def serve_command(self) -> Reply:
        """Read one command and return its reply."""
        verb, reply, ours = "?", None, False
        try:
            verb, argument = self.read_command()
            reply = self.dispatch(verb, argument)
        except Refused as refusal:
            reply, ours = str(refusal), refusal.ours
        except OSError as error:  # sockets raise Disconnect, hooks HookError: this is the disk
            reply, ours = self.store_failed(verb, error), True
        if not isinstance(reply, str) or not reply.startswith(self.error_prefix):
            self.errors = 0
            return reply
        self.errors += not ours
        if not self.server.trace:  # which shows it anyway
            what = verb if verb in self.commands else "an unknown command"
            self.log("refused %s: %s", what, reply)
        return reply

    def read_command(self) -> tuple[str, str]:
        """Return verb and argument of the next command; verbs are case-insensitive in ASCII."""
        verb, _, argument = self.readline().partition(" ")
        verb = verb.rstrip("\t")
        if verb.isascii():
            verb = verb.upper()
        return verb, argument if verb in self.keep_spaces else argument.strip(" \t")

    def dispatch(self, verb: str, argument: str) -> Reply:
        """Return the reply to a command: the hook's, if it wants to answer, else the command's."""
        if self.server.intercept and verb not in ("CONNECT", "."):  # the hook's own steps
            reply = self.hook_reply(verb, argument)
            if reply is not None:
                return reply
        if verb in HTTP_VERBS or (" HTTP/" in argument and verb not in self.commands):
            # Any web page can make a browser send our commands behind a POST.
            raise Disconnect("speaks HTTP", self.replies["http"])
        self.check_command(verb, argument)
        if verb not in self.commands:
            raise Refused(self.replies["unknown"])
        return self.commands[verb](self, argument)

    def check_command(self, verb: str, argument: str) -> None:
        """Look at each command first; a protocol that forbids it here and now raises Refused."""

    def hook_reply(self, verb: str, argument: str) -> str | None:
        """Return what the embedding program's hook answers in our place, or None.

        Raises HookError when it fails, or returns something that is not a reply.
        """
        if not self.server.intercept:
            return None
        try:
            reply = self.server.intercept(self, verb, argument)
            if reply is not None and not self.reply_pattern.fullmatch(reply):
                raise ValueError(
                    f"intercept returned {reply!r}, which is not a {self.protocol} reply"
                )
        except (Disconnect, Refused, ClientTimeout):
            raise
        except BaseException as error:
            raise HookError(f"intercept, at {printable(verb)}") from error
        return None if reply is None else re.sub("\r?\n", "\r\n", reply)

    def store_failed(self, what: str, error: OSError) -> str:
        """Log what the disk did to a command or message; return the reply."""
        self.log_error("%s: %s", what, error)
        return str(self.replies["disk"])

    def release(self) -> None:
        """Give back what the session holds, before the last reply; may be called twice."""

    # ---- lines in and out

    def readline(self, limit: int = MAX_LINE, secret: bool = False) -> str:
        """Return the next line without its end.

        One that is longer than `limit` octets is read to its end; then Refused is raised.
        """
        line = self.reader.readline(limit, self.server.timeout)
        too_long = not line.endswith(b"\n")
        if self.bare_lf is None:
            self.bare_lf = not too_long and not line.endswith(b"\r\n")
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
        if self.server.trace:
            shown = "****" if secret else self.masked(text)
            self.trace("C", f"({limit} octets and more without a line end)" if too_long else shown)
        if too_long:
            self.reader.skip_line(self.server.timeout)
            raise Refused(self.replies["long answer" if secret else "long"])
        return text

    def masked(self, line: str) -> str:
        """Return a command line as the trace may show it."""
        return line

    def reply(self, reply: Reply) -> None:
        """Queue a reply; it is sent when the session is about to wait."""
        if reply is None:
            return
        if self.server.trace:
            for line in [reply] if isinstance(reply, str) else reply:
                self.trace("S", line)
        if isinstance(reply, str):
            data = reply.encode("ascii", "backslashreplace")
            if len(data) > MAX_REPLY and b"\n" not in data:
                data = data[:MAX_REPLY]
        else:
            data = "\r\n".join(reply).encode("ascii", "backslashreplace")
        self.write(data + b"\r\n")

    def write(self, data: bytes) -> None:
        """Queue octets as they are; what is waiting is sent when it grows large."""
        self.pending.append(data)
        self.pending_size += len(data)
        if self.pending_size > SEND_BLOCK:
            self.flush()

    def flush(self, seconds: float | None = None) -> None:
        """Send what is queued; raise Disconnect when the client is gone or does not read.

        All of it has one deadline, so a client that reads an octet a minute does not hold the
        session.
        """
        if not self.pending:
            return
        data = self.pending[0] if len(self.pending) == 1 else b"".join(self.pending)
        self.pending, self.pending_size = [], 0
        seconds = seconds or self.server.timeout
        deadline = clock() + seconds
        try:
            if seconds != self.reader.seconds:
                self.reader.limit(seconds)
            sent = self.request.send(data)
            while sent < len(data):  # a TLS record was sent, or the client has not read for a while
                if clock() > deadline:
                    raise Disconnect("does not read")
                sent += self.request.send(memoryview(data)[sent:])
        except (TimeoutError, BlockingIOError):
            raise Disconnect("does not read") from None
        except OSError as error:
            raise Disconnect(f"lost: {error.strerror or error}") from None

    def say_goodbye(self, farewell: str | None, linger: bool) -> None:
        """Send the last reply, if any; with `linger` let a client that still sends read it."""
        try:
            self.reply(farewell)
            self.flush(LINGER_TIMEOUT if linger else None)
            if self.tls:
                self.request.setblocking(False)
                with contextlib.suppress(OSError):
                    self.request.unwrap()  # type: ignore[attr-defined]  # sends close_notify
            if linger:
                self.linger()
        except (OSError, Disconnect, ValueError):
            pass  # the client is gone

    def linger(self) -> None:
        """Shut down sending and read on for a moment.

        Closing a socket that has unread input resets the connection, and the client might never see
        our last reply.  This works on the bare socket, since TLS, if there was any, has ended.
        """
        socket.socket.shutdown(self.request, socket.SHUT_WR)
        deadline = clock() + LINGER_TIMEOUT
        while (left := deadline - clock()) > 0 and not self.server.stopping.is_set():
            set_timeout(self.request, left)
            if not socket.socket.recv(self.request, SEND_BLOCK):
                return

    def finish(self) -> None:
        self.release()
        self.server.sessions.discard(self)
        with contextlib.suppress(OSError):  # a child process may hold the socket, too
            socket.socket.shutdown(self.request, socket.SHUT_WR)
        self.request.close()
        del self.reader  # breaks the cycle handler-reader, so that memory is freed now

    # ---- TLS

    def start_tls(self) -> None:
        """Encrypt the session; nothing said before counts (RFC 3207 4.2, RFC 2595 4).

        A client that has sent something in clear behind the command that asks for TLS is hung up
        on.  The handshake runs in the session's own thread, under a deadline, so that a silent
        client holds up nobody else.
        """
        if self.reader.buffer:
            raise Disconnect("sent commands in clear behind the one that starts TLS")
        assert self.server.tls
        self.flush()
        try:
            self.request.settimeout(min(HANDSHAKE_TIMEOUT, self.server.timeout))
            tls = self.server.tls.wrap_socket(
                self.request, server_side=True, do_handshake_on_connect=False
            )
            self.request = tls
            tls.do_handshake()
        except OSError as error:
            raise Disconnect(f"TLS: {error.strerror or error}") from None
        self.reader = LineReader(tls, self.flush)
        self.helo, self.user, self.tls, self.bare_lf = "", None, True, None
        self.log("TLS: %s %s", tls.version(), (tls.cipher() or ["unknown"])[0])

    # ---- log and trace

    def log(self, text: str, *values: object) -> None:
        """Log one fact about this session."""
        self.server.log(f"{self.protocol} {self.number} {text}", *values)

    def log_error(self, text: str, *values: object, traceback: bool = False) -> None:
        """Log what should not have happened."""
        line = f"{self.protocol} {self.number} {text}"
        self.server.logger.error(line, *values, exc_info=traceback)

    def trace(self, direction: str, text: str) -> None:
        """Show one line of the dialogue, if there is a trace."""
        if self.server.trace:
            self.server.trace.line(self.protocol, self.number, direction, text)

    def trace_data(self, direction: str) -> "DataTrace | None":
        """Return what shows a message's data as it passes, if there is a trace."""
        return DataTrace(self, direction) if self.server.trace else None


# ---------------------------------------------------------------- logging in


class Accounts(Protocol):
    """What a LoginHandler asks of the accounts (store.Users)."""

    takes_digests: bool

    def login_address(self, name: str) -> str | None: ...
    def check_password(self, name: str, password: bytes, turn: Turn) -> str | None: ...
    def check_digest(self, name: str, answer: Answer, digest: str) -> str | None: ...


LOGIN_VERB = re.compile(r"\W*(AUTH|APOP|PASS|USER)(?![0-9A-Za-z])", re.IGNORECASE)


class LoginHandler(LineHandler):
    """A session in which one can log in: by SASL (RFC 4422), or by a protocol's own commands."""

    challenge_format: str  # how a login asks

    @property
    def users(self) -> Accounts:
        """The accounts there are now."""
        raise NotImplementedError

    def setup(self) -> None:
        super().setup()
        self.failed_logins = 0
        self.mask_unknown = False  # behind a login an unknown command may be a password

    def may_log_in(self) -> bool:
        """Say whether a password may cross this connection."""
        if self.tls:
            return True
        in_clear = is_loopback(self.peer[0]) or self.server.tls is None
        return in_clear and not self.server.require_tls

    def sasl(self, mechanism: str, initial: str | None) -> str:
        """Carry out one SASL exchange and return the account's address; raise Refused."""
        exchange = self.mechanisms.get(mechanism.upper())
        if exchange is None:
            raise Refused(self.replies["mechanism"])
        return exchange(self, initial)

    def ask(self, question: bytes) -> bytes:
        """Send a challenge and return the decoded answer; `*` cancels."""
        challenge = binascii.b2a_base64(question, newline=False).decode()
        self.reply(self.challenge_format.format(challenge))
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

    def initial_response(self, initial: str | None, question: bytes) -> bytes:
        """Return the client's first answer, or ask for it; `=` is an empty one (RFC 4954 4)."""
        if initial is None:
            return self.ask(question)
        return b"" if initial == "=" else self.decode(initial)

    def sasl_plain(self, initial: str | None) -> str:
        identity, *rest = self.initial_response(initial, b"").split(b"\0")
        if len(rest) != 2:
            raise Refused(self.replies["plain"])
        name, other = rest[0].decode("utf-8", "replace"), identity.decode("utf-8", "replace")
        same = not other or self.users.login_address(other) == self.users.login_address(name)

        def check() -> str | None:
            # Always check: the time taken must not reveal whether the name exists.
            found = self.check_password(name, rest[1])
            return found if same else None

        return self.log_in(name, check)

    def sasl_login(self, initial: str | None) -> str:
        octets = self.initial_response(initial, b"Username:")
        name = octets.decode("utf-8", "surrogateescape")
        if not name.isprintable():  # a name that was not encoded, and is base64 by accident
            raise Refused(self.replies["base64"])
        password = self.ask(b"Password:")
        return self.log_in(name, lambda: self.check_password(name, password))

    def sasl_cram_md5(self, initial: str | None) -> str:
        if initial is not None:
            raise Refused(self.replies["initial"])
        nonce = f"{time.monotonic_ns()}.{os.urandom(8).hex()}"
        challenge = f"<{nonce}@{self.server.hostname}>".encode()
        name, _, digest = self.ask(challenge).decode("utf-8", "replace").rpartition(" ")
        import hmac

        def answer(password: bytes) -> str:
            return hmac.new(password, challenge, "md5").hexdigest()

        return self.log_in(name, lambda: self.users.check_digest(name, answer, digest))

    mechanisms: Mapping[str, Callable[[Any, str | None], str]] = {
        "LOGIN": sasl_login,
        "PLAIN": sasl_plain,
        "CRAM-MD5": sasl_cram_md5,
    }

    def masked(self, line: str) -> str:
        """Hide what may be a password, also where a client gets the form or the protocol wrong."""
        login = LOGIN_VERB.match(line)
        if not login:
            if line.partition(" ")[0].rstrip("\t").upper() in self.commands:
                self.mask_unknown = False
            return "****" if self.mask_unknown else line
        self.mask_unknown = True
        if login[1].upper() == "USER":
            return line
        first, *words = line.split()
        name = first.upper() == "APOP" and len(words) > 1
        mechanism = first.upper() == "AUTH" and "".join(words[:1]).upper() in self.mechanisms
        harmless = words[:1] if name or mechanism else []
        shown = " ".join([login[1], *harmless])
        return shown if shown == line.strip() else f"{shown} ****"

    def offered(self) -> list[str]:
        """Return the mechanisms to log in with; where all passwords are hashes no digest is."""
        return [m for m in self.mechanisms if m != "CRAM-MD5" or self.users.takes_digests]

    def check_password(self, name: str, password: bytes) -> str | None:
        """Return the account that name and password open; a hash waits for its turn."""
        turn = functools.partial(hashing.turn, self.peer[0])
        return self.users.check_password(name, password, turn)

    def log_in(self, name: str, check: Callable[[], str | None]) -> str:
        """Return the account that `check()` finds; else delay and raise Refused.

        After too many failures in the session raise Disconnect.  A client address that has failed
        too often at this account is refused without a check.
        """
        throttle, host, account = self.server.throttle, self.peer[0], ""
        if not is_loopback(host):  # tests and classes work there
            account = self.users.login_address(name) or name[:100]
            if seconds := throttle.begin(host, account):
                return self.fail(name, str(self.replies["blocked"]).format(round(seconds) + 1))
        try:
            address = check()
        except TooManyHashes:
            throttle.take_back(host, account)
            raise Refused(self.replies["login queue"]) from None
        if address:
            throttle.clear(host, account)
            self.log("logged in as %s", address)
            self.mask_unknown = False
            return address
        delay = throttle.delay(host, account, self.server.login_delay)
        self.server.stopping.wait(delay)
        return self.fail(name, str(self.replies["wrong"]))

    def fail(self, name: str, reply: str) -> NoReturn:
        """Refuse a login with `reply`; after too many failures hang up."""
        self.failed_logins += 1
        self.log("failed login %d as %s", self.failed_logins, printable(name[:100]))
        if self.failed_logins < MAX_LOGINS:
            raise Refused(reply)
        self.reply(reply)
        raise Disconnect("too many failed logins", self.replies["logins"])


class LoginThrottle:
    """Failed logins by client address and account: each delays the next, and too many block.

    Only that account is blocked, and only from that address, since many people may share either.
    Failures are forgotten one by one.  A check that is under way counts as a failure, so guesses
    at the same time gain nothing.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.failures: dict[tuple[str, str], collections.deque[float]] = {}  # times, oldest first

    def begin(self, host: str, account: str) -> float:
        """Count a check; return 0.0, or for how many seconds the account is still blocked."""
        with self.lock:
            times = self.failures.pop((host, account), None) or collections.deque()
            while times and clock() - times[0] > FAILURE_MEMORY:
                times.popleft()
            self.failures[host, account] = times  # as the last, so that the oldest go first
            if len(times) >= MAX_FAILURES:
                return times[0] + FAILURE_MEMORY - clock()
            times.append(clock())
            if len(self.failures) > MAX_REMEMBERED:
                del self.failures[next(iter(self.failures))]
        return 0.0

    def take_back(self, host: str, account: str) -> None:
        """Don't count the last check: it was not carried out."""
        with self.lock:
            if times := self.failures.get((host, account)):
                times.pop()

    def clear(self, host: str, account: str) -> None:
        """Forget the failures before a good login."""
        with self.lock:
            self.failures.pop((host, account), None)

    def delay(self, host: str, account: str, first: float) -> float:
        """Return for how many seconds the answer to a failed login waits, the `first` and later."""
        with self.lock:
            count = len(self.failures.get((host, account), ()))
        return min(first * 2 ** min(count - 1, 10), MAX_DELAY) if count else 0.0


# By Store: a block counts at all listeners that have the same accounts.
throttles: weakref.WeakKeyDictionary[Any, LoginThrottle] = weakref.WeakKeyDictionary()


class TooManyHashes(Exception):
    """So many logins of one client address wait already that one more is not worth it."""


class FairQueue:
    """Lets a few callers work at once, and of each client address one: nobody waits for a crowd."""

    def __init__(self, at_once: int):
        self.slots = threading.Semaphore(at_once)
        self.lock = threading.Lock()
        self.addresses: dict[str, threading.Semaphore] = {}
        self.waiting: collections.Counter[str] = collections.Counter()  # callers by address

    @contextlib.contextmanager
    def turn(self, host: str) -> Iterator[None]:
        """Wait for a turn and hold it; raise TooManyHashes."""
        with self.lock:
            if self.waiting[host] >= MAX_WAITING_HASHES:
                raise TooManyHashes
            self.waiting[host] += 1
            own = self.addresses.setdefault(host, threading.Semaphore(1))
        try:
            with own, self.slots:
                yield
        finally:
            with self.lock:
                self.waiting[host] -= 1
                if not self.waiting[host]:
                    del self.waiting[host], self.addresses[host]


hashing = FairQueue(HASHES_AT_ONCE)


# ---------------------------------------------------------------- one listener


class LineServer(socketserver.ThreadingTCPServer):
    """One listener and its sessions.  `with` serves in threads, and stops them within a deadline.

    start() and stop() do the same without `with`.  The listener is open when the constructor
    returns; a wrong option raises ValueError or TypeError there, a port in use OSError.

    Attributes: `host` and `port` (where it listens), `hostname` (its name in greetings),
    `sessions` (the handlers of the sessions that are open), `stopping` (an Event).
    """

    request_queue_size = 1024  # socketserver's 5 makes a burst of clients wait for seconds
    allow_reuse_address = os.name == "posix"  # on Windows two servers could share a port
    store: Any  # whose accounts log in
    default_timeout: float = 300
    login_delay = 0.25  # seconds before the first failed login is answered

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[LineHandler],
        hostname: str,
        tls: "TLSOptions",
        limits: "Limits",
        trace: "bool | Trace",
        intercept: Hook | None,
    ):
        check_option("trace", trace, bool, Trace)
        check_option("intercept", intercept, Callable, None)
        self.hostname = hostname
        self.logger = logging.getLogger(handler.protocol.lower())
        self.log = self.logger.info  # takes each fact about a session
        self.tls_options = tls
        self.tls = tls.context()
        self.implicit_tls = tls.implicit
        self.require_tls = tls.required
        self.limits = limits
        self.timeout: float = limits.timeout or self.default_timeout  # seconds for a line to arrive
        self.trace = Trace() if trace is True else trace or None
        self.intercept = intercept
        self.sessions: set[LineHandler] = set()
        self.throttle = throttles.setdefault(self.store, LoginThrottle())
        self.stopping = threading.Event()
        self.lock = threading.RLock()  # a signal handler may call stop() while we hold it
        self.threads: set[threading.Thread] = set()
        self.waiting = 0  # threads that wait for a connection
        self.active = 0  # sessions
        self.by_address: dict[str, int] = {}  # sessions of each client address
        self.pid: int | None = None  # of the process that serves, once it does
        self.shares_listener = False  # with other processes
        self.open_listener(address, handler)

    def open_listener(self, address: tuple[str, int], handler: type[LineHandler]) -> None:
        """Bind to an address of either family; raise OSError that names it."""
        host, port = check_address(address)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # IPv4 first, so that "localhost" is where clients look for it.
            family, _, _, _, sockaddr = min(found, key=lambda info: info[0] != socket.AF_INET)
            self.address_family = family
            super().__init__(sockaddr, handler)  # type: ignore[arg-type]
        except OSError as error:
            where = printable(show_address(host, port))
            raise OSError(error.errno, error.strerror or str(error), where) from None
        self.host: str = self.server_address[0]  # type: ignore[assignment]
        self.port: int = self.server_address[1]

    def server_bind(self) -> None:
        with contextlib.suppress(OSError):  # neither is needed to serve
            if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # Inherited by every connection: the last piece of a long answer must not wait for an
            # acknowledgement.
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().server_bind()

    @property
    def name(self) -> str:
        """What the listener is called: SMTP, SMTPS, POP3, POP3S."""
        protocol: str = self.RequestHandlerClass.protocol  # type: ignore[attr-defined]
        return protocol + "S" * self.implicit_tls

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} on {show_address(self.host, self.port)}>"

    def reload(self) -> None:
        """Read the certificate again; raise OSError or ValueError, and keep the old one then."""
        self.tls = self.tls_options.context()

    # ---- threads: at least one accepts; one that gets a connection serves the session, and first
    # ---- starts another if no one is left to accept

    def start(self) -> None:
        """Begin to serve, in threads of our own; RuntimeError when the server was stopped."""
        if self.stopping.is_set():
            raise RuntimeError(f"{self!r} was stopped; make a new server")
        if self.pid is not None:
            return
        self.pid = os.getpid()
        try:
            self.add_acceptor()
        except BaseException:  # never listen without serving
            self.stop()
            raise

    def add_acceptor(self) -> None:
        """Start a thread that accepts; raise RuntimeError or MemoryError where there is none."""
        name = f"{self.name} {self.port}"
        thread = threading.Thread(target=self.serve_connections, daemon=True, name=name)
        with self.lock:
            self.waiting += 1
        self.threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self.threads.discard(thread)
            with self.lock:
                self.waiting -= 1
            raise

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until another thread stops the server: socketserver's name; it polls nothing."""
        self.start()
        self.stopping.wait()

    def serve_connections(self) -> None:
        """Take a connection, serve it, come back for the next: the life of one thread."""
        try:
            while not self.stopping.is_set():
                try:
                    request, address = self.get_request()
                except (OSError, MemoryError) as error:
                    self.pause_after(error)
                    continue
                self.process_request(request, address)
                with self.lock:
                    if self.waiting >= SPARE_THREADS:
                        return
                    self.waiting += 1
        finally:
            self.threads.discard(threading.current_thread())

    def pause_after(self, error: Exception) -> None:
        """Wait a moment after a failed accept(), so that a shortage does not make it spin."""
        if self.stopping.is_set() or isinstance(error, ConnectionAbortedError):
            return
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in SHORTAGE:
            self.logger.warning("%s can't accept a connection: %s", self.name, error)
        self.stopping.wait(SHORTAGE_PAUSE)

    def process_request(self, request: socket.socket, client_address: Any) -> None:  # type: ignore[override]
        """Serve a connection, or turn it away; see that another thread takes the next."""
        host = client_address[0]
        if not self.admit(host):
            return self.turn_away(request, client_address)
        try:
            self.finish_request(request, client_address)
        except BaseException:
            self.handle_error(request, client_address)
        finally:
            request.close()
            self.count_out(host)
        return None

    def admit(self, host: str) -> bool:
        """Count a new session in, or return False when there are too many.

        The calling thread no longer accepts; if it was the last to do so it starts another one.
        """
        with self.lock:
            self.waiting -= 1
            from_this_address = self.by_address.get(host, 0)
            if not self.limits.allow(self.active, from_this_address, host):
                return False
            self.active += 1
            self.by_address[host] = from_this_address + 1
            nobody_accepts = self.waiting == 0 and not self.stopping.is_set()
        if nobody_accepts:
            try:
                self.add_acceptor()
            except (RuntimeError, MemoryError) as error:  # then this thread has to go on accepting
                self.logger.warning("%s can't start a thread: %s", self.name, error)
                self.count_out(host)
                return False
        return True

    def count_out(self, host: str) -> None:
        """Count a session as ended."""
        with self.lock:
            self.active -= 1
            self.by_address[host] -= 1
            if not self.by_address[host]:
                del self.by_address[host]

    def turn_away(self, request: socket.socket, client_address: Any) -> None:
        """Say that there are too many sessions, without spending a thread or a wait on it."""
        client = show_address(*client_address[:2])
        self.logger.info("%s turned away %s: too many sessions", self.name, client)
        try:
            request.setblocking(False)
            if not self.implicit_tls:
                replies: Mapping[str, str] = self.RequestHandlerClass.replies  # type: ignore[attr-defined]
                request.send(replies["busy"].encode() + b"\r\n")
            request.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.logger.exception("%s session of %s", self.name, show_address(*client_address[:2]))

    # ---- the end

    def begin_stop(self) -> None:
        """Stop accepting, and wake every session that waits for its client."""
        if self.stopping.is_set() or self.is_copy():
            return
        self.stopping.set()
        if self.pid is not None and not self.shares_listener:
            self.wake_acceptors()
        for session in list(self.sessions):
            with contextlib.suppress(OSError, ValueError):
                # The TLS socket's own shutdown() would drop the encryption during the session.
                socket.socket.shutdown(session.request, socket.SHUT_RD)

    def is_copy(self) -> bool:
        """Say whether this is a forked child's copy: the parent serves, and goes on."""
        return self.pid is not None and self.pid != os.getpid()

    def wake_acceptors(self) -> None:
        """Make every accept() return: Linux does when the listener is shut down.

        Other systems want a connection.
        """
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
            for _ in range(self.waiting):
                with contextlib.suppress(OSError):
                    socket.create_connection((host, self.port), 1).close()

    def stop(self, seconds: float = STOP_TIMEOUT) -> None:
        """Stop and close; sessions that are storing something get `seconds` to finish.

        A second call does nothing more.
        """
        self.begin_stop()
        if not self.is_copy():
            deadline = clock() + seconds
            # Where the listener is shared, threads without a session stay in accept().
            sessions = {session.thread for session in list(self.sessions)}
            join(sessions if self.shares_listener else set(self.threads), deadline)
            self.cut_sessions()
        super().server_close()

    def cut_sessions(self) -> None:
        """Cut the connections of sessions that do not end, such as of clients that do not read."""
        here = threading.current_thread()
        left = [session for session in list(self.sessions) if session.thread is not here]
        for session in left:
            with contextlib.suppress(OSError, ValueError):
                socket.socket.shutdown(session.request, socket.SHUT_RDWR)
        join([session.thread for session in left], clock() + CUT_TIMEOUT)

    def server_close(self, seconds: float = STOP_TIMEOUT) -> None:
        """The name that socketserver has for the end."""
        self.stop(seconds)

    def shutdown(self) -> None:
        """The name that socketserver has for stopping."""
        self.stop()

    def __exit__(self, *_: object) -> None:
        self.stop()


def join(threads: Iterable[threading.Thread], deadline: float) -> None:
    """Wait for threads until a time of our clock()."""
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(deadline - clock(), 0))


# ---- the options: a mistake is an error at once, which names the keyword


def check_option(name: str, value: object, *kinds: Any, least: float | None = None) -> None:
    """Raise TypeError when an option is not of these kinds, ValueError when it is too small."""
    types = tuple(type(None) if kind is None else kind for kind in kinds)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: {value!r} is not {wanted}")
    if least is not None and isinstance(value, int | float) and not least <= value <= 10**15:
        raise ValueError(f"{name}: {value!r} is not a number from {least} upwards")


def check_address(address: object) -> tuple[str, int]:
    """Return host and port; raise ValueError or TypeError."""
    if not (isinstance(address, tuple) and len(address) == 2):
        raise TypeError(f"address: {address!r} is not a tuple (host, port)")
    host, port = address
    check_option("address: host", host, str)
    check_option("address: port", port, int)
    if not 0 <= port < 65536:
        raise ValueError(f"address: {port} is not a port, 0 to 65535")
    if not host.isprintable():
        raise ValueError(f"address: {printable(host)} is not a host")
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", port


def check_hostname(name: object) -> str:
    """Return our own name; raise ValueError when it could not stand in a greeting and a header."""
    if not (isinstance(name, str) and is_host_name(name)):
        raise ValueError(f"hostname: {printable(str(name))} is not a host name")
    return name


class TLSOptions:
    """The TLS options of a server, with the paths of certificate and key, which may be one file."""

    def __init__(self, cert: Path | None, key: Path | None, implicit: bool, required: bool):
        check_option("tls_cert", cert, str, os.PathLike, None)
        check_option("tls_key", key, str, os.PathLike, None)
        check_option("implicit_tls", implicit, bool)
        check_option("require_tls", required, bool)
        if cert is None and (key is not None or implicit or required):
            raise ValueError("TLS needs a certificate: tls_cert and tls_key, or tls_self_signed")
        self.cert = cert
        self.key = cert if key is None else key
        self.implicit = implicit  # from the first octet
        self.required = required  # nothing else works in clear

    def context(self) -> "ssl.SSLContext | None":
        """Read the certificate, if there is one; raise OSError or ValueError."""
        if self.cert is None or self.key is None:
            return None
        return tls_context(os.fspath(self.cert), os.fspath(self.key))


class Limits:
    """How many sessions a server may have, and how long (in seconds) it waits for a line."""

    def __init__(self, connections: int, per_address: int | None, timeout: float | None):
        check_option("max_connections", connections, int, least=1)
        check_option("max_per_address", per_address, int, None, least=1)
        check_option("timeout", timeout, int, float, None, least=0.001)
        self.connections = min(connections, spare_descriptors())
        self.per_address = per_address or self.connections - self.connections // 10
        self.on_loopback = per_address or self.connections
        self.timeout = timeout

    def allow(self, active: int, from_this_address: int, host: str) -> bool:
        """Say whether there is room for one more session of a client address."""
        own_limit = self.on_loopback if is_loopback(host) else self.per_address
        return active < self.connections and from_this_address < own_limit


def spare_descriptors() -> int:
    """Return how many descriptors this process may use for sessions."""
    try:
        import resource
    except ImportError:  # Windows
        return 10**6
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10**6 if soft == resource.RLIM_INFINITY else max(soft - SPARE_DESCRIPTORS, soft // 4)


# ---------------------------------------------------------------- TLS certificates


def tls_context(cert: str, key: str) -> "ssl.SSLContext":
    """Return a server's TLS settings, TLS 1.2 and up.

    Raises OSError or ValueError that names a file which does not serve.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Treat EOF without close_notify as a normal end: begin_stop() shuts down the reading side, and
    # the session must still be able to send its 421 over TLS.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    for path in (cert, key):  # ssl does not say which of them can't be read
        with open(path, "rb"):
            pass
    try:
        context.load_cert_chain(cert, key, password="")  # never ask for one
    except OSError as error:  # ssl's errors are OSErrors, too
        why = getattr(error, "reason", None) or "not PEM, or the key wants a password"
        raise ValueError(f"{cert}, {key}: not a certificate and its key ({why})") from None
    return context


def self_signed(folder: Path, hostname: str) -> tuple[str, str]:
    """Return the paths of a certificate for `hostname` and of its key, in `folder`.

    They are made once, by the openssl program; ValueError says why they could not be.
    """
    home = os.path.join(os.path.abspath(folder), f"{hostname}.tls")
    cert, key = os.path.join(home, "cert.pem"), os.path.join(home, "key.pem")
    if not os.path.exists(home):
        import tempfile

        os.makedirs(folder, 0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:  # only its owner can look into it
            run_openssl(f"{made}/tls", hostname)
            with contextlib.suppress(OSError):  # another server was faster
                os.rename(f"{made}/tls", home)
    return cert, key


def run_openssl(folder: str, hostname: str) -> None:
    """Make a folder with cert.pem and key.pem in it; raise ValueError saying what went wrong."""
    import subprocess

    names = f"subjectAltName=DNS:{hostname},DNS:localhost,IP:127.0.0.1,IP:::1"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    argv += ["-nodes", "-days", "3650", "-subj", f"/CN={hostname[:64]}", "-addext", names]
    argv += ["-keyout", "key.pem", "-out", "cert.pem"]
    os.mkdir(folder, 0o700)
    try:
        subprocess.run(argv, cwd=folder, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        raise ValueError("a self-signed certificate needs the openssl program") from None
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or error
        raise ValueError(f"openssl made no certificate: {said}") from None
    for name in ("cert.pem", "key.pem"):
        os.chmod(f"{folder}/{name}", 0o600)


# ---------------------------------------------------------------- the trace


# What telnet sends besides text (RFC 854): Ctrl-C is IAC IP.  These octets are never UTF-8.
TELNET = {0xF3: "BRK", 0xF4: "IP", 0xF5: "AO", 0xF6: "AYT", 0xFB: "WILL", 0xFC: "WONT"}
TELNET |= {0xFD: "DO", 0xFE: "DONT", 0xFF: "IAC"}
TELNET_NAMES = {0xDC00 + octet: f"<{name}>" for octet, name in TELNET.items()}


class Trace:
    """The dialogue, live, one line each: time, protocol, session, direction, text.

    In colour on a terminal, unless NO_COLOR is set.
    """

    COLOURS = {"C": "36", "S": "32", "refusal": "31", "head": "2"}

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.colour = self.stream.isatty() and not os.environ.get("NO_COLOR")

    def line(self, protocol: str, number: int, direction: str, text: str) -> None:
        """Show one line; `direction` is C (the client sent it) or S (the server did)."""
        head = f"{timestamp(time.time())} {protocol:5}{number:>4}"
        text = f"{direction}: {printable(text.translate(TELNET_NAMES) if IAC in text else text)}"
        if self.colour:
            refusal = direction == "S" and text[3:4] in ("4", "5", "-")
            tone = self.COLOURS["refusal" if refusal else direction]
            head, text = f"\x1b[{self.COLOURS['head']}m{head}\x1b[0m", f"\x1b[{tone}m{text}\x1b[0m"
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            self.stream.write(f"{head}  {text}\n")
            self.stream.flush()


class DataTrace:
    """Shows a message's data as it is on the wire, line by line as it comes: the first lines."""

    SHOWN_LINES = 40
    SHOWN_OCTETS = 1000  # of a line

    def __init__(self, session: LineHandler, direction: str):
        self.session = session
        self.direction = direction
        self.count = 0  # lines that have ended
        self.octets = 0
        self.partial = b""  # the beginning of a line that has not ended
        self.ended = False  # whether the last line was the dot

    def feed(self, block: bytes) -> None:
        """Take a piece of the data."""
        self.octets += len(block)
        *lines, self.partial = (self.partial + block).split(b"\n")
        self.partial = self.partial[: self.SHOWN_OCTETS]
        for line in lines:
            self.count += 1
            self.ended = line.rstrip(b"\r") == b"."
            if self.count <= self.SHOWN_LINES:
                self.show(line.removesuffix(b"\r"))

    def show(self, line: bytes) -> None:
        text = line[: self.SHOWN_OCTETS].decode("utf-8", "surrogateescape")
        self.session.trace(self.direction, text)

    def end(self) -> None:
        """Show how much more there was, and the final dot."""
        more = self.count - self.SHOWN_LINES
        if more > 0:
            text = f"({more} more lines, {self.octets} octets in all)"
            self.session.trace(self.direction, text)
            if self.ended:
                self.session.trace(self.direction, ".")
        elif self.partial:
            self.show(self.partial)
