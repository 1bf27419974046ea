"""A POP3 server: hands out the mail that smtpd_simple.py (or any other program) has put into the spool.

    python pop3d_simple.py                  POP3 on 127.0.0.1:1110
    python smtpd_simple.py --pop3           the same, and SMTP, in one process

RFC 1939 with all its optional commands, and the extensions that CAPA shows.  What it refuses to do: to delete anything
before QUIT, to let two sessions into one mailbox, to keep any state that is not in the files.

In a test:

    with POP3Server(("127.0.0.1", 0), store) as pop3:
        client = poplib.POP3(pop3.host, pop3.port)

The states of RFC 1939 are the two tables at the end of `POP3Handler`; the maildrop of a session is a `Maildrop` of
store.py, a snapshot under an exclusive lock.
"""

import functools
import os
import sys
import time

import lineserver
from lineserver import Disconnect, LineHandler, LineServer, Quit, Refused, dot_stuff, show_address
from store import InUse, Maildrop, Store, in_words, users_file, wire

__all__ = ["Disconnect", "POP3Handler", "POP3Server", "Store"]

IDLE = 600  # seconds; RFC 1939 3 asks for ten minutes at least
READ_BLOCK = 1 << 17  # octets of a message that are read at once


# ---------------------------------------------------------------- pure helpers


def number(text: str) -> int:
    """Read a decimal number, ASCII digits and nothing else; raise Refused."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Refused("-ERR that is not a number")
    return int(text)


def top(lines, count: int):
    """Yield of a message (lines, long ones in several pieces) the header, the empty line and `count` lines more."""
    in_header = line_start = True
    for piece in lines:
        if not in_header and not count:
            return
        yield piece
        if in_header and line_start and piece == b"\r\n":
            in_header = False
        elif not in_header and piece.endswith(b"\n"):
            count -= 1
        line_start = piece.endswith(b"\n")


def split_lines(blocks):
    """Yield the lines of a message that comes in blocks of CRLF lines; one that a block cuts comes in pieces."""
    for block in blocks:
        *lines, rest = block.split(b"\n")
        for line in lines:
            yield line + b"\n"
        if rest:
            yield rest


# ---------------------------------------------------------------- one session


class POP3Handler(LineHandler):
    """One POP3 session: `commands` is the table of its state, `maildrop` the open mailbox or None."""

    protocol = "POP3"
    error = "-"
    challenge = "+ {}"
    verbatim = frozenset({"PASS"})
    secret = {"PASS": 0, "APOP": 1, "AUTH": 1}
    replies = {
        "busy": "-ERR [SYS/TEMP] too many sessions, try again later",
        "stopping": None,  # RFC 1939 3: a session that ends otherwise than by QUIT is closed without a word
        "timeout": None,
        "bug": "-ERR [SYS/TEMP] our mistake; it has been logged",
        "errors": "-ERR too many errors, good bye",
        "logins": "-ERR [AUTH] too many failed logins, good bye",
        "unknown": "-ERR there is no such command here and now; CAPA shows what there is",
        "long": "-ERR the line is too long",
        "long answer": "-ERR the answer is too long",
        "disk": "-ERR [SYS/TEMP] our disk failed, try again later",
        "mechanism": "-ERR unknown mechanism; AUTH alone lists those there are",
        "cancelled": "-ERR login cancelled",
        "base64": "-ERR that is not base64",
        "plain": "-ERR send base64 of \\0name\\0password",
        "initial": "-ERR CRAM-MD5 begins with our challenge: send AUTH CRAM-MD5",
        "wrong": "-ERR [AUTH] wrong name or password",
    }

    def setup(self):
        super().setup()
        self.maildrop, self.deleted, self.name = None, set(), None
        self.timestamp = f"<{os.getpid()}.{time.monotonic_ns()}@{self.server.hostname}>"
        self.commands = self.authorization

    def say_goodbye(self, farewell, linger):
        if self.maildrop:  # before the client gets its time to read this
            self.maildrop.close()
        super().say_goodbye(farewell, linger)

    def greeting(self):
        return f"+OK POP3 server ready {self.timestamp}"

    def allow(self, verb, argument):
        if self.name is not None and verb not in ("PASS", "CAPA"):
            self.name = None  # PASS follows USER at once (RFC 1939 7); a look at what there is may come between

    def nothing(self, argument):
        if argument:
            raise Refused("-ERR this command takes no argument")

    # ---- AUTHORIZATION

    def capa(self, argument):
        self.nothing(argument)
        words = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING"]
        words += ["EXPIRE NEVER", "LOGIN-DELAY 0", "UTF8 USER"]
        if self.server.tls and not self.tls and not self.maildrop:
            words.append("STLS")
        if self.may_log_in_here():
            words += ["USER", f"SASL {' '.join(self.mechanisms)}"]
        return ["+OK", *words, f"IMPLEMENTATION pop3d_simple-{lineserver.VERSION}", "."]

    def stls(self, argument):
        self.nothing(argument)
        if self.tls:
            raise Refused("-ERR the session is encrypted already")
        if not self.server.tls:
            raise Refused("-ERR there is no certificate here, so no TLS")
        self.reply("+OK go ahead with TLS")
        self.start_tls()

    def utf8(self, argument):
        self.nothing(argument)
        return "+OK UTF-8 it is"

    def user(self, argument):
        self.must_be_safe()
        if not argument:
            raise Refused("-ERR write USER name")
        self.name = argument
        return "+OK now the password"

    def pass_(self, argument):
        self.must_be_safe()
        name, self.name = self.name, None
        if name is None:
            raise Refused("-ERR USER first")
        users, password = self.server.store.users, argument.encode("utf-8", "surrogateescape")
        return self.enter(self.log_in(name, lambda: users.check_password(name, password)))

    def apop(self, argument):
        name, _, digest = argument.rpartition(" ")
        name = name.strip()
        if self.server.require_tls:
            self.must_be_safe()
        if not name:
            raise Refused("-ERR write APOP name digest")
        import hashlib

        def answer(password):
            return hashlib.md5(self.timestamp.encode() + password, usedforsecurity=False).hexdigest()

        return self.enter(self.log_in(name, lambda: self.server.store.users.check_digest(name, answer, digest)))

    def auth(self, argument):
        if not argument:
            return ["+OK", *(self.mechanisms if self.may_log_in_here() else []), "."]
        self.must_be_safe()
        mechanism, _, initial = argument.partition(" ")
        return self.enter(self.sasl(mechanism, initial.strip() or None))

    def must_be_safe(self):
        if not self.may_log_in_here():
            raise Refused("-ERR STLS first: a password must not cross this line in clear")

    def enter(self, address):
        """Open the maildrop of who has just logged in; from here on the other table holds."""
        try:
            self.maildrop = Maildrop(self.server.store, address)
        except InUse:
            raise Refused("-ERR [IN-USE] another session has this mailbox open") from None
        self.user, self.commands = address, self.transaction
        return f"+OK {self.scan()}"

    def leave(self, argument):
        self.nothing(argument)
        raise Quit("quit", "+OK good bye")

    # ---- TRANSACTION

    def scan(self):
        """Return the maildrop in words."""
        count, octets = self.totals()
        return f"{in_words(count)} ({octets} octets)"

    def totals(self):
        """Return how many messages there are, and their octets; those marked as deleted don't count."""
        sizes, deleted = self.maildrop.sizes, self.deleted
        return len(sizes) - len(deleted), sum(sizes) - sum(sizes[index] for index in deleted)

    def message(self, text):
        """Return the index of the message that a number names; raise Refused."""
        if not text:
            raise Refused("-ERR which message? write its number")
        index = number(text) - 1
        if not 0 <= index < len(self.maildrop.sizes):
            raise Refused(f"-ERR no such message, there are {len(self.maildrop.sizes)}")
        if index in self.deleted:
            raise Refused(f"-ERR message {index + 1} is deleted; RSET takes that back")
        return index

    def stat(self, argument):
        self.nothing(argument)
        return "+OK {} {}".format(*self.totals())

    def list_(self, argument):
        return self.per_message(argument, self.maildrop.sizes, self.scan())

    def uidl(self, argument):
        return self.per_message(argument, self.maildrop.uids, "unique-id listing follows")

    def per_message(self, argument, values, title):
        """Answer LIST and UIDL: one message's value, or a line for each."""
        if argument:
            index = self.message(argument)
            return f"+OK {index + 1} {values[index]}"
        lines = [f"{n} {value}" for n, value in enumerate(values, 1)]
        if self.deleted:
            lines = [line for index, line in enumerate(lines) if index not in self.deleted]
        return [f"+OK {title}", *lines, "."]

    def retr(self, argument):
        index = self.message(argument)
        return self.send(index, "+OK {} octets")

    def top(self, argument):
        which, _, count = argument.partition(" ")
        index, count = self.message(which), number(count.strip() or "0")
        return self.send(index, "+OK top of message follows", count)

    def send(self, index, reply, lines=None):
        """Send a message, or the top of it, as it goes over the wire."""
        try:
            fd, octets = self.maildrop.open(index)
        except FileNotFoundError:
            raise Refused(f"-ERR message {index + 1} is gone: another program has removed it") from None
        sent, first = 0, b""
        try:
            self.reply(reply.format(octets))
            blocks = wire(functools.partial(os.read, fd), min(octets + 2, READ_BLOCK))
            for block in dot_stuff(blocks if lines is None else top(split_lines(blocks), lines)):
                self.write(block)
                sent, first = sent + len(block), first if len(first) > 1 else first + block  # a dot may come alone
        except OSError as error:  # in the middle of a message there is no way to say so
            raise Disconnect(f"message {index + 1}: {error}") from None
        finally:
            os.close(fd)
        self.trace_data("S", first, sent)
        self.write(b".\r\n")

    def dele(self, argument):
        index = self.message(argument)
        self.deleted.add(index)
        return f"+OK message {index + 1} will be deleted at QUIT"

    def rset(self, argument):
        self.nothing(argument)
        self.deleted.clear()
        return f"+OK {self.scan()}"

    def noop(self, argument):
        self.nothing(argument)
        return "+OK"

    def update(self, argument):
        """Enter the UPDATE state: the only place where messages are deleted (RFC 1939 6)."""
        self.nothing(argument)
        left, _ = self.totals()
        try:
            failed = self.maildrop.remove(sorted(self.deleted))
        except OSError as error:
            self.log_error("QUIT: %s", error)
            failed = len(self.deleted)
        if failed:
            raise Quit("quit", f"-ERR [SYS/TEMP] {in_words(failed)} could not be deleted")
        raise Quit(f"quit, {len(self.deleted)} deleted", f"+OK good bye, {in_words(left)} left")

    authorization = {
        "CAPA": capa,
        "STLS": stls,
        "UTF8": utf8,
        "USER": user,
        "PASS": pass_,
        "APOP": apop,
        "AUTH": auth,
        "QUIT": leave,
    }
    transaction = {
        "CAPA": capa,
        "STAT": stat,
        "LIST": list_,
        "UIDL": uidl,
        "RETR": retr,
        "TOP": top,
        "DELE": dele,
        "RSET": rset,
        "NOOP": noop,
        "QUIT": update,
    }


# ---------------------------------------------------------------- the server and the command line


class POP3Server(LineServer):
    """One POP3 listener on `address`, (host, port); port 0 takes a free one.  `with` serves.

    It takes the keywords of LineServer; see SMTPServer for `intercept`.
    """

    default_timeout = IDLE

    def __init__(self, address: tuple[str, int], store: Store, **options):
        super().__init__(address, POP3Handler, store, **options)


def main(argv: list[str] | None = None) -> int:
    """Run the server as the command line says; return the exit status."""
    import startup_simple

    about = "A small POP3 server on a Maildir spool."
    parser = startup_simple.option_parser("pop3d_simple.py", about, 1110, [("--pop3s-port", 1995)])
    args = parser.parse_args(argv)
    startup_simple.check_options(parser, args)
    return startup_simple.exit_status("pop3d_simple.py", lambda: serve(args))


def serve(args) -> int:
    """Open the listeners that the options name, and serve; raise ValueError or OSError."""
    import startup_simple

    store, options = Store(args.spool, users_file(args.users)), startup_simple.shared_options(args)
    servers = [startup_simple.listen(POP3Server, (args.host, args.port), store, **options)]
    if args.pop3s_port is not None:
        servers.append(
            startup_simple.listen(POP3Server, (args.host, args.pop3s_port), store, implicit_tls=True, **options)
        )
    name, pop3 = next(iter(store.users.accounts.values())), servers[0]
    where, users = show_address(pop3.host, pop3.port), store.users_path or "demo accounts"
    notice = f"  spool     {store.folder}\n  accounts  {users}\n  read      curl -u {name} pop3://{where}/1"
    return startup_simple.run(servers, args.processes, notice)


if __name__ == "__main__":
    sys.exit(main())
