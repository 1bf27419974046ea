"""A POP3 server: hands out the mail that smtpd_simple.py (or another program) put into the spool.

    python pop3d_simple.py                  POP3 on 127.0.0.1:1110
    python smtpd_simple.py --pop3           the same, and SMTP, in one process

RFC 1939 with all its optional commands, and the extensions that CAPA shows.  It deletes nothing
before QUIT, lets no two sessions into one mailbox, and keeps no state that is not in the files.

In a test:

    with POP3Server(("127.0.0.1", 0), store) as pop3:
        client = poplib.POP3(pop3.host, pop3.port)

The states of RFC 1939 are the two tables at the end of `POP3Handler`: begin to read there.  The
maildrop of a session is a `Maildrop` of store.py, a snapshot under an exclusive lock.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lineserver import (
    VERSION,
    Disconnect,
    Limits,
    LineServer,
    LoginHandler,
    Quit,
    Refused,
    Reply,
    TLSOptions,
    Trace,
    check_hostname,
    check_option,
    dot_stuff,
    self_signed,
)
from store import InUse, Maildrop, Store, Users, count_messages, to_crlf

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["Disconnect", "POP3Handler", "POP3Server", "Store"]

IDLE_TIMEOUT = 600  # seconds; RFC 1939 3 asks for ten minutes at least
READ_BLOCK = 1 << 17  # octets of a message that are read at once


# ---------------------------------------------------------------- pure helpers


def number(text: str) -> int:
    """Read a decimal number, ASCII digits and nothing else; raise Refused."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Refused("-ERR not a number")
    return int(text)


def top(blocks: Iterable[bytes], count: int) -> Iterator[bytes]:
    """Yield the header, the empty line and `count` lines of a message, given as CRLF blocks."""
    in_header = line_start = True
    for line in split_lines(blocks):
        if not in_header and not count:
            return
        yield line
        if in_header and line_start and line == b"\r\n":
            in_header = False
        elif not in_header and line.endswith(b"\n"):
            count -= 1
        line_start = line.endswith(b"\n")


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of CRLF blocks; one that is cut by the end of a block comes in pieces."""
    for block in blocks:
        *lines, rest = block.split(b"\n")
        for line in lines:
            yield line + b"\n"
        if rest:
            yield rest


# ---------------------------------------------------------------- one session


class POP3Handler(LoginHandler):
    """One POP3 session: `commands` is its state's table, `maildrop` the open mailbox or None."""

    protocol = "POP3"
    error_prefix = "-"
    challenge_format = "+ {}"
    reply_pattern = re.compile(r"(?:\+OK|-ERR)(?: .*)?")
    keep_spaces = frozenset({"PASS"})
    replies = {
        "busy": "-ERR [SYS/TEMP] too many sessions, try again later",
        "stopping": None,  # RFC 1939 3: a session that ends without QUIT gets no reply
        "timeout": None,
        "internal error": "-ERR [SYS/TEMP] internal error; see the server's log",
        "errors": "-ERR too many errors, closing the connection",
        "logins": "-ERR [AUTH] too many failed logins, closing the connection",
        "http": "-ERR this is not a web server",
        "unknown": "-ERR unknown command; try HELP",
        "long": "-ERR the line is too long",
        "long answer": "-ERR the answer is too long",
        "disk": "-ERR [SYS/TEMP] disk failure, try again later",
        "mechanism": "-ERR unknown mechanism; write AUTH LOGIN",
        "cancelled": "-ERR login cancelled",
        "base64": "-ERR not base64; send the output of: printf 'your text' | base64",
        "plain": "-ERR send the output of: printf '\\0name\\0password' | base64",
        "initial": "-ERR CRAM-MD5 begins with our challenge: send AUTH CRAM-MD5",
        "wrong": "-ERR [AUTH] wrong name or password",
        "blocked": "-ERR [SYS/TEMP] too many failed logins at this account; wait {} seconds",
        "login queue": "-ERR [SYS/TEMP] too many logins at the same time, try again later",
    }

    server: "POP3Server"

    def setup(self) -> None:
        super().setup()
        self.maildrop: Maildrop | None = None
        self.deleted: set[int] = set()  # indexes of the messages that are marked
        self.name: str | None = None  # given with USER
        self.timestamp = f"<{os.getpid()}.{os.urandom(8).hex()}@{self.server.hostname}>"
        self.commands = self.authorization

    def release(self) -> None:
        if self.maildrop:
            self.maildrop.close()

    def greeting(self) -> str:
        return f"+OK POP3 server ready {self.timestamp}"

    @property
    def users(self) -> Users:
        return self.server.store.users

    @property
    def drop(self) -> Maildrop:
        """The open maildrop; there is one in the TRANSACTION state."""
        assert self.maildrop
        return self.maildrop

    def check_command(self, verb: str, argument: str) -> None:
        if verb not in ("PASS", "CAPA"):
            self.name = None  # PASS follows USER at once (RFC 1939 7); CAPA may come between
        if verb not in self.commands and verb in self.transaction:
            raise Refused("-ERR log in first: USER name, then PASS password")
        if verb not in self.commands and verb in self.authorization:
            raise Refused("-ERR you are logged in already; QUIT ends the session")
        if argument and verb in self.without_argument:
            raise Refused("-ERR this command takes no argument")

    # ---- both states

    def capa(self, argument: str) -> Reply:
        words = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING"]
        words += ["EXPIRE NEVER", "LOGIN-DELAY 0", "UTF8 USER"]
        if self.server.tls and not self.tls and not self.maildrop:
            words.append("STLS")
        if self.may_log_in():
            words += ["USER", f"SASL {' '.join(self.offered())}"]
        return ["+OK", *words, f"IMPLEMENTATION pop3d_simple-{VERSION}", "."]

    def help(self, argument: str) -> Reply:
        """List the commands of this state; no RFC has it, a class needs it."""
        if argument:
            text = self.help_texts.get(argument.upper())
            if not text:
                raise Refused("-ERR no such command; HELP lists them")
            return f"+OK {text}"
        lines = [self.help_texts[verb] for verb in self.commands if verb in self.help_texts]
        return ["+OK the commands that make sense now:", *lines, "."]

    # ---- AUTHORIZATION

    def stls(self, argument: str) -> Reply:
        if self.tls:
            raise Refused("-ERR the session is encrypted already")
        if not self.server.tls:
            raise Refused("-ERR this server has no certificate, so no TLS")
        self.reply("+OK start TLS now")
        self.start_tls()
        return None

    def utf8(self, argument: str) -> Reply:
        return "+OK UTF-8 headers are sent as they are"

    def user_(self, argument: str) -> Reply:
        self.require_secure_line()
        if not argument:
            raise Refused("-ERR write USER name")
        self.name = argument
        return "+OK now PASS and the password"

    def pass_(self, argument: str) -> Reply:
        self.require_secure_line()
        name, self.name = self.name, None
        if name is None:
            raise Refused("-ERR send USER name first")
        password = argument.encode("utf-8", "surrogateescape")
        return self.open_maildrop(self.log_in(name, lambda: self.check_password(name, password)))

    def apop(self, argument: str) -> Reply:
        name, _, digest = argument.rpartition(" ")
        name = name.strip()
        if self.server.require_tls:
            self.require_secure_line()
        if not name:
            raise Refused("-ERR write APOP name digest")
        import hashlib

        def answer(password: bytes) -> str:
            octets = self.timestamp.encode() + password
            return hashlib.md5(octets, usedforsecurity=False).hexdigest()

        check = functools.partial(self.users.check_digest, name, answer, digest)
        return self.open_maildrop(self.log_in(name, check))

    def auth(self, argument: str) -> Reply:
        if not argument:
            return ["+OK", *(self.offered() if self.may_log_in() else []), "."]
        self.require_secure_line()
        mechanism, _, initial = argument.partition(" ")
        return self.open_maildrop(self.sasl(mechanism, initial.strip() or None))

    def require_secure_line(self) -> None:
        if not self.may_log_in():
            raise Refused("-ERR send STLS first: passwords are not taken in clear here")

    def open_maildrop(self, address: str) -> Reply:
        """Lock the mailbox of the account that has logged in; the TRANSACTION state begins."""
        try:
            self.maildrop = Maildrop(self.server.store, address)
        except InUse:
            raise Refused("-ERR [IN-USE] another session has this mailbox open") from None
        self.user, self.commands = address, self.transaction
        return f"+OK {self.summary()}"

    def quit_authorization(self, argument: str) -> Reply:
        raise Quit("quit", "+OK good bye")

    # ---- TRANSACTION

    def summary(self) -> str:
        """Return the state of the maildrop in words."""
        count, octets = self.totals()
        return f"{count_messages(count)} ({octets} octets)"

    def totals(self) -> tuple[int, int]:
        """Return how many messages there are, and their octets, without those marked."""
        sizes, deleted = self.drop.sizes, self.deleted
        return len(sizes) - len(deleted), sum(sizes) - sum(sizes[index] for index in deleted)

    def message_index(self, text: str) -> int:
        """Return the index of the message that a number names; raise Refused."""
        if not text:
            raise Refused("-ERR the message's number is missing")
        index = number(text) - 1
        if not 0 <= index < len(self.drop.sizes):
            raise Refused(f"-ERR no such message, there are {len(self.drop.sizes)}")
        if index in self.deleted:
            raise Refused(f"-ERR message {index + 1} is marked as deleted; RSET takes that back")
        return index

    def stat(self, argument: str) -> Reply:
        return "+OK {} {}".format(*self.totals())

    def list_(self, argument: str) -> Reply:
        return self.per_message(argument, self.drop.sizes, self.summary)

    def uidl(self, argument: str) -> Reply:
        return self.per_message(argument, self.drop.uids, lambda: "unique-id listing follows")

    def per_message(
        self, argument: str, values: list[int] | list[str], title: Callable[[], str]
    ) -> Reply:
        """Answer LIST and UIDL: one message's value, or a line for each."""
        if argument:
            index = self.message_index(argument)
            return f"+OK {index + 1} {values[index]}"
        lines = [f"{n} {value}" for n, value in enumerate(values, 1)]
        if self.deleted:
            lines = [line for index, line in enumerate(lines) if index not in self.deleted]
        return [f"+OK {title()}", *lines, "."]

    def retr(self, argument: str) -> Reply:
        return self.send(self.message_index(argument), "+OK {} octets")

    def top(self, argument: str) -> Reply:
        which, _, count = argument.partition(" ")
        index, lines = self.message_index(which), number(count.strip() or "0")
        return self.send(index, "+OK top of message follows", lines)

    def send(self, index: int, reply: str, lines: int | None = None) -> Reply:
        """Send a message, or the top of it, as it goes over the wire."""
        try:
            fd, octets = self.drop.open(index)
        except FileNotFoundError:
            what = "is gone: another program has removed it"
            raise Refused(f"-ERR message {index + 1} {what}", ours=True) from None
        try:
            blocks = to_crlf(functools.partial(os.read, fd), min(octets + 2, READ_BLOCK))
            stuffed = dot_stuff(blocks if lines is None else top(blocks, lines))
            first = next(stuffed, b"")  # before +OK: behind it no error can be reported
            self.reply(reply.format(octets))
            self.send_blocks(first, stuffed)
        finally:
            os.close(fd)
        return None

    def send_blocks(self, block: bytes, others: Iterator[bytes]) -> None:
        """Send the content of a multi-line reply, and its end."""
        trace = self.trace_data("S")
        try:
            while block:
                if trace:
                    trace.feed(block)
                self.write(block)
                block = next(others, b"")
        except OSError as error:  # in the middle of a message there is no way to say so
            raise Disconnect(f"a message can't be read on: {error}") from None
        self.write(b".\r\n")
        if trace:
            trace.feed(b".\r\n")
            trace.end()

    def dele(self, argument: str) -> Reply:
        index = self.message_index(argument)
        self.deleted.add(index)
        return f"+OK message {index + 1} will be deleted at QUIT"

    def rset(self, argument: str) -> Reply:
        self.deleted.clear()
        return f"+OK {self.summary()}"

    def noop(self, argument: str) -> Reply:
        return "+OK"

    def quit_transaction(self, argument: str) -> Reply:
        """Enter the UPDATE state: the only place where messages are deleted (RFC 1939 6)."""
        left, _ = self.totals()
        try:
            failed = self.drop.remove(sorted(self.deleted))
        except OSError as error:
            self.log_error("QUIT: %s", error)
            failed = len(self.deleted)
        if failed:
            raise Quit("quit", f"-ERR [SYS/TEMP] {count_messages(failed)} could not be deleted")
        raise Quit(
            f"quit, {len(self.deleted)} deleted", f"+OK good bye, {count_messages(left)} left"
        )

    authorization = {
        "USER": user_,
        "PASS": pass_,
        "APOP": apop,
        "AUTH": auth,
        "STLS": stls,
        "UTF8": utf8,
        "CAPA": capa,
        "HELP": help,
        "QUIT": quit_authorization,
    }
    transaction = {
        "STAT": stat,
        "LIST": list_,
        "UIDL": uidl,
        "RETR": retr,
        "TOP": top,
        "DELE": dele,
        "RSET": rset,
        "NOOP": noop,
        "CAPA": capa,
        "HELP": help,
        "QUIT": quit_transaction,
    }
    without_argument = {"CAPA", "STLS", "UTF8", "STAT", "RSET", "NOOP", "QUIT"}
    help_texts = {
        "USER": "USER alice        who you are",
        "PASS": "PASS wonderland   the password; opens the mailbox",
        "STAT": "STAT              how many messages there are, and their octets",
        "LIST": "LIST              the octets of each message; LIST 1: of the first",
        "UIDL": "UIDL              a name for each message that never changes",
        "RETR": "RETR 1            the first message",
        "TOP": "TOP 1 5           its header and five lines of its text",
        "DELE": "DELE 1            mark it; it is deleted at QUIT",
        "RSET": "RSET              take all marks back",
        "CAPA": "CAPA              what else this server can do",
        "QUIT": "QUIT              the end",
    }


# ---------------------------------------------------------------- the server


class POP3Server(LineServer):
    """One POP3 listener on `address`, (host, port); port 0 takes a free one.  `with` serves.

    The keywords are those that SMTPServer has of the same names.
    """

    store: Store
    default_timeout = IDLE_TIMEOUT

    def __init__(
        self,
        address: tuple[str, int],
        store: Store,
        *,
        hostname: str | None = None,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        tls_self_signed: bool = False,
        implicit_tls: bool = False,
        require_tls: bool = False,
        max_connections: int = 1000,
        max_per_address: int | None = None,
        timeout: float | None = None,
        trace: bool | Trace = False,
        intercept: Callable[[POP3Handler, str, str], str | None] | None = None,
    ):
        check_option("store", store, Store)
        self.store = store
        hostname = check_hostname(store.host if hostname is None else hostname)
        if tls_self_signed:
            tls_cert, tls_key = self_signed(store.folder, hostname)
        tls = TLSOptions(tls_cert, tls_key, implicit_tls, require_tls)
        limits = Limits(max_connections, max_per_address, timeout)
        super().__init__(address, POP3Handler, hostname, tls, limits, trace, intercept)

    def __enter__(self) -> "POP3Server":
        self.start()
        return self


def main(argv: list[str] | None = None) -> int:
    """Run the server as the command line says; return the exit status."""
    import startup_simple

    args = startup_simple.parse_arguments(argv, "POP3")
    return startup_simple.run_program(args, make_servers)


def make_servers(args: "Namespace", store: Store, options: dict[str, Any]) -> list[LineServer]:
    """Open the listeners that the options name; raise ValueError or OSError."""
    servers = [POP3Server((args.host, args.port), store, **options)]
    if args.pop3s_port is not None:
        address = args.host, args.pop3s_port
        servers.append(POP3Server(address, store, implicit_tls=True, **options))
    return list(servers)


if __name__ == "__main__":
    sys.exit(main())
