"""An SMTP server: takes mail for the mailboxes of users.txt, and sends mail on for its users.

    python smtpd_simple.py                       SMTP on 127.0.0.1:1025
    python smtpd_simple.py --pop3                SMTP and POP3: the whole mail server
    python smtpd_simple.py --relay mail.example.net --tls-self-signed

RFC 5321 with the extensions that EHLO shows.  It is no open relay (mail for elsewhere needs a login
and a route), no filter (octets go to disk as they came, behind our own trace fields), and it asks
no DNS (but for the next host that the command line names).

In a test: `with SMTPServer(("127.0.0.1", 0), Store("spool", {...})) as smtp:`.

A message's way: `SMTPHandler` reads commands and keeps an `Envelope`; DATA or BDAT pass the
content, piece by piece, through `Content` into store.py's Delivery; then 250.  Mail for elsewhere
goes into the queue, from where relay_simple.py sends it on.

Read it in this order: the tables at the end of `SMTPHandler`, `mail`, `rcpt`, `data`, `Content`.
"""

import contextlib
import errno
import functools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lineserver import (
    STOP_TIMEOUT,
    ClientTimeout,
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
    clock,
    dot_unstuff,
    is_loopback,
    printable,
    self_signed,
)
from relay_simple import HEXCHAR, Relay, as_routes
from store import (
    MAX_DOMAIN,
    MAX_LOCAL,
    Delivery,
    HeaderScan,
    LineEnds,
    QueuedRecipient,
    QueueEntry,
    Store,
    Target,
    Users,
    canonical,
    count_messages,
    mail_date,
    new_id,
)

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["Disconnect", "Envelope", "Relay", "SMTPHandler", "SMTPServer", "Store"]

MAX_SIZE = 102_400_000  # octets of a message, as EHLO says (RFC 1870)
MAX_RECIPIENTS = 1000  # RFC 5321 4.5.3.1.8 asks for 100; more are refused with 452
MIN_RECIPIENTS = 100  # accepted whatever their octets, RFC 5321 4.5.3.1.8
MAX_ENVELOPE = 1 << 16  # octets of recipients' addresses and parameters beyond those
MAX_HOPS = 50  # `Received` fields; RFC 5321 6.3 would allow 100
READ_BLOCK = 1 << 16  # octets of a message that are read at once

# RFC 5321 4.1.2, with RFC 6531 3.3 for what is not ASCII, and dots anywhere in a local part, as
# Postfix takes them.  The character classes are negated, because Unicode ranges take 0.1 s to
# compile.  Octets that are not UTF-8 arrive as surrogates; they match here and fail isprintable().
LOCAL_PART = r"[^\x00-\x20\"(),:;<>@\[\\\]\x7f-\x9f]+"
QUOTED = r'"(?:[^"\\\x00-\x1f\x7f]|\\[ -~])*"'
LETTER = r"[^\x00-/:-@\[-^`{-\x9f]"  # at the ends of a label; _ is common
INNER = r"[^\x00-,./:-@\[-^`{-\x9f]"
DOMAIN = rf"{LETTER}(?:{INNER}*{LETTER})?(?:\.{LETTER}(?:{INNER}*{LETTER})?)*"
TAGGED = r"(?i:IPv6):[0-9A-Fa-f:.]+|[A-Za-z0-9-]*[A-Za-z0-9]:[!-Z^-~]+"
LITERAL = rf"\[(?:[0-9]{{1,3}}(?:\.[0-9]{{1,3}}){{3}}|{TAGGED})\]"
MAILBOX = rf"({LOCAL_PART}|{QUOTED})(?:@({DOMAIN}|{LITERAL}))?"
PATH = re.compile(rf"<(?:@{DOMAIN}(?:,@{DOMAIN})*:)?{MAILBOX}>|{MAILBOX}(?=\s|$)")
XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"  # RFC 3461 4

MAIL_PARAMETERS = {  # a pattern for each value; None: the parameter has none
    "SIZE": r"[0-9]{1,20}",  # RFC 1870
    "BODY": r"(?i:7BIT|8BITMIME)",  # RFC 6152
    "SMTPUTF8": None,  # RFC 6531
    "AUTH": rf"<>|(?!<>){XTEXT}{{1,500}}",  # RFC 4954 5
    "RET": r"(?i:FULL|HDRS)",  # RFC 3461 4.3
    "ENVID": rf"(?:[!-*,-<>-~]|{HEXCHAR}){{1,100}}",  # RFC 3461 4.4
}
EVENT = "(?:SUCCESS|FAILURE|DELAY)"
RCPT_PARAMETERS = {  # RFC 3461 4.1 and 4.2, RFC 6533 3
    "NOTIFY": rf"(?i:NEVER|{EVENT}(?:,{EVENT}){{0,2}})",
    "ORCPT": rf"[A-Za-z0-9-]{{1,30}};{XTEXT}{{1,500}}|(?i:utf-8);(?:{XTEXT}|[^\x00-\x9f]){{1,500}}",
}
# A HELO name that can stand in `Received` as it is; some say localhost.(none).
NAME = "[!#-'*+./0-9=?A-Z^-~-]"
HELO_NAME = re.compile(rf"(?:{NAME}++|\({NAME}*+\))++|{LITERAL}")
NODE = re.compile(rf"#[!-~]*|@?{DOMAIN}")


# ---------------------------------------------------------------- pure helpers


def parse_path(text: str) -> tuple[str, str]:
    """Read `<path>`, or an address without brackets, at the start of `text`.

    Returns the address, its quotes undone where they are not needed, and what follows.  A source
    route is dropped (RFC 5321 C), `<>` is the address "", and a domain may be missing.  Raises
    ValueError saying what is wrong.
    """
    text = text.lstrip(" ")
    if text.startswith("<>"):
        return "", text[2:]
    match = PATH.match(text)
    if not match or not match[0].isprintable():
        raise ValueError("write the address as <name@domain>")
    local, domain = match[1] or match[3], match[2] or match[4] or ""
    if local.startswith('"'):
        plain = re.sub(r"\\(.)", r"\1", local[1:-1])
        local = plain if re.fullmatch(LOCAL_PART, plain) else local
    if len(local.encode()) > MAX_LOCAL or len(domain.encode()) > MAX_DOMAIN:
        raise ValueError(f"the address is longer than {MAX_LOCAL}@{MAX_DOMAIN} octets")
    if domain.startswith("[") and not good_literal(domain[1:-1]):
        raise ValueError("the address has no such numbers")
    return f"{local}@{domain}" if domain else local, text[match.end() :]


def good_literal(text: str) -> bool:
    """Say whether an address literal (RFC 5321 4.1.3) names an address; unknown kinds may."""
    kind, colon, rest = text.partition(":")
    if colon and kind.lower() != "ipv6":
        return True
    with contextlib.suppress(OSError):
        family, address = (socket.AF_INET6, rest) if colon else (socket.AF_INET, text)
        return bool(socket.inet_pton(family, address))
    return False


def parse_parameters(text: str, known: dict[str, Any]) -> dict[str, str | None]:
    """Read ` KEY=value KEY` by a table of what each value may be.

    Keys come in upper case, values untouched.  Raises Refused: 501 for a bad or repeated one, 555
    for one that EHLO does not offer (RFC 5321 4.1.1.11).
    """
    if text and not text.startswith(" "):
        raise Refused("501 5.5.4 Put a space after >")
    found: dict[str, str | None] = {}
    for word in filter(None, text.split(" ")):
        name, equals, value = word.partition("=")
        name = name.upper()
        if not re.fullmatch(r"[A-Z0-9][A-Z0-9-]*", name) or (equals and not value):
            raise Refused("501 5.5.4 Write parameters as KEY=value")
        if name not in known:
            raise Refused("555 5.5.4 Unknown parameter; EHLO shows what is offered")
        if name in found:
            raise Refused(f"501 5.5.4 {name} is given twice")
        if bool(equals) != bool(known[name]):
            raise Refused(f"501 5.5.4 {name} takes {'a' if known[name] else 'no'} value")
        if equals and not (value.isprintable() and re.fullmatch(known[name], value, re.ASCII)):
            raise Refused(f"501 5.5.4 Bad value for {name}")
        found[name] = value if equals else None
    return found


def reply_lines(code: str, texts: list[str]) -> list[str]:
    """Return the lines of a reply (RFC 5321 4.2.1)."""
    return [f"{code}-{text}" for text in texts[:-1]] + [f"{code} {texts[-1]}"]


def escape_comment(text: str) -> str:
    """Return a text as it can stand in a header field's comment (RFC 5322 3.2.2)."""
    return re.sub(r"[()\\]", r"\\\g<0>", text).encode("ascii", "backslashreplace").decode()


# ---------------------------------------------------------------- one message


class Recipient(NamedTuple):
    """One RCPT: the mailboxes it reaches (none: it is for elsewhere), and its DSN parameters."""

    address: str
    mailboxes: list[str]
    notify: str | None = None
    orcpt: str | None = None


class Envelope:
    """What MAIL and RCPT have said about one message; None stands for no open transaction.

    Attributes: `id` (the queue ID), `sender` (the reverse path without its brackets; "" is the null
    sender), `parameters` (of MAIL), `recipients` (the addresses that were accepted).
    """

    def __init__(self, sender: str, parameters: dict[str, str | None]):
        self.id = new_id()
        self.sender = sender
        self.parameters = parameters
        self.accepted: list[Recipient] = []
        self.refused = 0  # RCPTs
        self.octets = 0  # of addresses and parameters

    @property
    def recipients(self) -> list[str]:
        """The addresses that were accepted."""
        return [recipient.address for recipient in self.accepted]

    def has_room(self) -> bool:
        """Say whether one more recipient is taken: memory is bounded, whatever a client sends."""
        count = len(self.accepted)
        return count < MIN_RECIPIENTS or (count < MAX_RECIPIENTS and self.octets < MAX_ENVELOPE)


class Content:
    """The content of one message while it comes in: checked, counted and stored piece by piece.

    A fault is remembered and answered at the end: a client can't be interrupted (RFC 5321 4.5.4.2).
    """

    def __init__(self, delivery: Delivery, limit: int):
        self.delivery = delivery
        self.limit = limit  # octets
        self.octets = 0
        self.refusal: str | None = None
        self.fault: OSError | None = None  # of the disk
        self.line_ends = LineEnds()
        self.header = HeaderScan()

    def add(self, block: bytes) -> None:
        """Take a piece of the content."""
        self.store(self.line_ends.feed(block))

    def end(self) -> None:
        """Take what the last piece has left, and look for loops."""
        self.store(self.line_ends.end())
        self.write(self.header.end())
        if self.header.hops >= MAX_HOPS:
            self.refuse(f"554 5.4.6 The message has passed {MAX_HOPS} hosts: a loop")

    def store(self, block: bytes) -> None:
        self.octets += len(block)
        if self.octets > self.limit:
            self.refuse(f"552 5.3.4 The message is larger than {self.limit} octets")
        self.write(self.header.feed(block))

    def write(self, block: bytes) -> None:
        if self.refusal or self.fault or not block:
            return
        try:
            self.delivery.write(block)
        except OSError as error:
            self.fault = error
            self.delivery.close()

    def refuse(self, reply: str) -> None:
        self.refusal = self.refusal or reply
        self.delivery.close()


# ---------------------------------------------------------------- one session


class SMTPHandler(LoginHandler):
    """One SMTP session.  `envelope` and `content` are all the state that RSET has to forget."""

    protocol = "SMTP"
    error_prefix = "5"
    challenge_format = "334 {}"
    reply_pattern = re.compile(r"(?:[2-5][0-9]{2}-[^\n]*\r?\n)*[2-5][0-9]{2}(?: .*)?")
    replies = {
        "busy": "421 4.7.0 Too many sessions, try again later",
        "stopping": "421 4.3.2 The server is stopping",
        "timeout": "421 4.4.2 Timeout, closing the connection",
        "no dot": "421 4.4.2 Timeout: no line with only a dot has ended the message",
        "internal error": "421 4.3.0 Internal error; see the server's log",
        "errors": "421 4.7.0 Too many errors, closing the connection",
        "logins": "421 4.7.0 Too many failed logins, closing the connection",
        "http": "421 4.7.0 This is not a web server",
        "unknown": "500 5.5.2 Unknown command; try HELP",
        "long": "500 5.5.2 The line is too long",
        "long answer": "500 5.5.6 The answer is too long",
        "disk": "451 4.3.0 Disk failure, try again later",
        "full": "452 4.3.1 The disk is full, try again later",
        "mechanism": "504 5.5.4 Unknown mechanism; write AUTH LOGIN",
        "cancelled": "501 5.7.0 Login cancelled",
        "base64": "501 5.5.2 Not base64. Send the output of: printf 'your text' | base64",
        "plain": "501 5.5.2 Send the output of: printf '\\0name\\0password' | base64",
        "initial": "501 5.7.0 CRAM-MD5 begins with our challenge: send AUTH CRAM-MD5",
        "wrong": "535 5.7.8 Wrong name or password",
        "blocked": "454 4.7.0 Too many failed logins at this account; wait {} seconds",
        "login queue": "454 4.7.0 Too many logins at the same time, try again later",
    }

    server: "SMTPServer"

    def setup(self) -> None:
        super().setup()
        self.esmtp = False
        self.envelope: Envelope | None = None
        self.content: Content | None = None  # once DATA or BDAT has begun

    def greeting(self) -> str:
        return f"220 {self.server.hostname} ESMTP smtpd_simple, ready"

    @property
    def users(self) -> Users:
        return self.server.store.users

    def store_failed(self, what: str, error: OSError) -> str:
        disk = super().store_failed(what, error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return str(self.replies["full"]) if full else disk

    def start_tls(self) -> None:
        super().start_tls()
        self.esmtp = False
        self.reset()

    def reset(self) -> None:
        """End the mail transaction, if there is one."""
        if self.content:
            self.content.delivery.close()
        self.envelope = self.content = None

    release = reset

    def check_command(self, verb: str, argument: str) -> None:
        if refusal := self.refusal_before_login(verb):
            self.skip_chunk(verb, argument)
            raise Refused(refusal)
        if argument and verb in self.without_argument:
            raise Refused(f"501 5.5.4 {verb} takes no argument")

    def refusal_before_login(self, verb: str) -> str | None:
        """Return the refusal of a command that has to wait for TLS or for a login, or None."""
        if self.server.require_tls and not self.tls and verb not in self.before_tls:
            return "530 5.7.0 Send STARTTLS first"
        wants_login = verb in self.commands and verb not in self.before_login
        if self.server.require_auth and not self.user and wants_login:
            return "530 5.7.0 Log in first: AUTH"
        return None

    def hook_reply(self, verb: str, argument: str) -> str | None:
        try:
            reply = super().hook_reply(verb, argument)
        except Refused as refusal:
            reply = str(refusal)
        if reply is not None:
            self.skip_chunk(verb, argument)
        return reply

    def may_log_in(self) -> bool:
        return self.server.auth and super().may_log_in()

    def log_in(self, name: str, check: Callable[[], str | None]) -> str:
        return name or "anybody" if self.server.any_login else super().log_in(name, check)

    # ---- hello

    def helo_(self, argument: str) -> Reply:
        self.say_hello(argument, "HELO")
        return f"250 {self.server.hostname}"

    def ehlo_(self, argument: str) -> Reply:
        self.say_hello(argument, "EHLO")
        return reply_lines("250", [f"{self.server.hostname} greets you", *self.keywords()])

    def say_hello(self, argument: str, verb: str) -> None:
        """Take any name: no mail is refused because of it."""
        if not argument or len(argument.encode("utf-8", "surrogateescape")) > MAX_DOMAIN:
            raise Refused(f"501 Write {verb} and your host's name, like this: {verb} my.host.name")
        self.helo, self.esmtp = argument, verb == "EHLO"
        self.reset()

    def keywords(self) -> list[str]:
        """Return what EHLO shows."""
        server, limits = self.server, f"LIMITS RCPTMAX={MAX_RECIPIENTS}"
        words = ["PIPELINING", f"SIZE {server.size_limit}", "VRFY", "ETRN"]
        if server.tls and not self.tls:
            words.append("STARTTLS")
        if self.may_log_in():
            words += [f"AUTH {' '.join(self.offered())}", "AUTH=LOGIN PLAIN"]
        words += ["ENHANCEDSTATUSCODES", "8BITMIME", "SMTPUTF8", "CHUNKING", "DSN"]
        return [*words, limits, "EXPN", "HELP"]

    def starttls(self, argument: str) -> Reply:
        if self.tls:
            raise Refused("503 5.5.1 The session is encrypted already")
        if not self.server.tls:
            raise Refused("502 5.5.1 This server has no certificate, so no TLS")
        self.reply("220 2.0.0 Start TLS now")
        self.start_tls()
        return None

    def auth(self, argument: str) -> Reply:
        mechanism, *initial = argument.split() or [""]
        if not self.server.auth:
            raise Refused("502 5.5.1 This server has no logins")
        if self.user:
            raise Refused("503 5.5.1 You are logged in already")
        if self.envelope:
            raise Refused("503 5.5.1 Not inside a mail transaction; send RSET first")
        if not self.helo:
            raise Refused("503 5.5.1 Send EHLO first")
        if not self.may_log_in():
            raise Refused("538 5.7.11 Send STARTTLS first: passwords are not taken in clear here")
        if not mechanism or len(initial) > 1:
            raise Refused("501 5.5.4 Write AUTH LOGIN, or AUTH PLAIN and base64")
        self.user = self.sasl(mechanism, initial[0] if initial else None)
        return "235 2.7.0 Logged in"

    # ---- the mail transaction

    def mail(self, argument: str) -> Reply:
        if not self.helo:
            raise Refused("503 5.5.1 Send EHLO first")
        if self.envelope:
            raise Refused("503 5.5.1 There is a sender already; RCPT TO is next, or RSET")
        sender, rest = self.path(argument, "FROM", "501 5.1.7")
        if sender and "@" not in sender.rpartition('"')[2]:
            sender = f"{sender}@{self.server.hostname}"
        parameters = parse_parameters(rest, MAIL_PARAMETERS)
        if not sender.isascii() and "SMTPUTF8" not in parameters:
            raise Refused("553 5.6.7 An address that is not ASCII needs the parameter SMTPUTF8")
        size = int(parameters.get("SIZE") or 0)
        if size > self.server.size_limit:
            raise Refused(f"552 5.3.4 Messages have at most {self.server.size_limit} octets here")
        if size and size > self.server.store.free_space():
            raise Refused(str(self.replies["full"]))
        self.envelope = Envelope(sender, parameters)
        return f"250 2.1.0 Sender <{sender}> ok"

    def rcpt(self, argument: str) -> Reply:
        if self.envelope is None:
            raise Refused("503 5.5.1 Send MAIL FROM first")
        if self.content:
            raise Refused("503 5.5.1 BDAT has begun; end it with LAST, or send RSET")
        if not self.envelope.has_room():
            return "452 4.5.3 Too many recipients; send the message again to the others"
        self.envelope.refused += 1  # taken back below, when it is accepted
        address, rest = self.path(argument, "TO", "501 5.1.3")
        if not address:
            raise Refused("501 5.1.3 Bad recipient: <> reaches nobody; write TO:<name@domain>")
        parameters = parse_parameters(rest, RCPT_PARAMETERS)
        orcpt, utf8 = parameters.get("ORCPT"), "SMTPUTF8" in self.envelope.parameters
        if not address.isascii() and not utf8:
            raise Refused("553 5.6.7 An address that is not ASCII needs SMTPUTF8 at MAIL")
        if orcpt and not orcpt.isascii() and not utf8:
            raise Refused("501 5.5.4 Bad value for ORCPT")
        recipient = Recipient(address, self.resolve(address), parameters.get("NOTIFY"), orcpt)
        self.envelope.accepted.append(recipient)
        self.envelope.octets += len(argument)
        self.envelope.refused -= 1
        return f"250 2.1.5 Recipient <{address}> ok"

    def path(self, argument: str, word: str, code: str) -> tuple[str, str]:
        """Read `FROM:<path>` or `TO:<path>`; return the address and what follows."""
        name, colon, rest = argument.partition(":")
        if not colon or name.rstrip(" ").upper() != word:
            verb = "MAIL" if word == "FROM" else "RCPT"
            raise Refused(f"501 5.5.4 Write {verb} {word}:<name@domain>")
        try:
            return parse_path(rest)
        except ValueError as error:
            who = "sender" if word == "FROM" else "recipient"
            raise Refused(f"{code} Bad {who}: {error}") from None

    def resolve(self, address: str) -> list[str]:
        """Return the mailboxes that an address reaches; none: it goes on to another host."""
        routing, domain = self.server.relay.routing, address.rpartition("@")[2]
        if mailboxes := routing.mailboxes(address):
            return mailboxes
        if "@" not in address or self.server.store.users.is_local(domain):
            raise Refused(f"550 5.1.1 <{address}>: no such user")
        if not self.user:
            raise Refused(f"550 5.7.1 <{address}>: not local; log in (AUTH) to send elsewhere")
        if not routing.next_host(domain):
            raise Refused(f"550 5.7.1 <{address}>: not local, and there is no route to its domain")
        return []

    def need_recipients(self) -> Envelope:
        """Return the envelope; raise Refused unless it has a recipient."""
        if self.envelope is None:
            raise Refused("503 5.5.1 Send MAIL FROM first")
        if not self.envelope.accepted:
            if self.envelope.refused:
                raise Refused("554 5.5.1 No recipient was accepted; send RCPT TO again, or RSET")
            raise Refused("503 5.5.1 Send RCPT TO first")
        return self.envelope

    def begin_content(self, envelope: Envelope) -> Content:
        delivery = Delivery(self.server.store, self.targets(envelope))
        self.content = Content(delivery, self.server.size_limit)
        return self.content

    def data(self, argument: str) -> Reply:
        envelope = self.need_recipients()
        if self.content:
            raise Refused("503 5.5.1 BDAT has begun; end it with LAST, or send RSET")
        content = self.begin_content(envelope)
        self.reply("354 Send the message; a line with only a dot ends it")
        try:
            for block in self.read_lines() if self.bare_lf else self.read_data():
                content.add(block)
                del block  # waiting for the next one may take minutes
            return self.finish_content(envelope, content)
        except ClientTimeout:
            raise Disconnect("timed out", self.replies["no dot"]) from None
        finally:
            self.reset()

    def read_data(self) -> Iterator[bytes]:
        """Yield the message that follows DATA, un-stuffed; put back what comes behind its end."""
        rest, begun, trace = b"\r\n", False, self.trace_data("C")
        for block in self.reader.blocks(self.server.timeout, READ_BLOCK):
            content, rest, ended = dot_unstuff(rest + block)
            if trace:
                trace.feed(block[: len(block) - len(rest)] if ended else block)
            if content:
                yield content if begun else content[2:]
                begun = True
            del block, content  # waiting for the next one may take minutes
            if ended:
                break
        if trace:
            trace.end()
        self.reader.buffer[:0] = rest

    def read_lines(self) -> Iterator[bytes]:
        """Yield the same in a session whose lines end in LF, so the line with the dot does, too.

        Somebody types into netcat, so speed does not matter.
        """
        line_start, trace = True, self.trace_data("C")
        while True:
            line = self.reader.readline(READ_BLOCK, self.server.timeout)
            if trace:
                trace.feed(line)
            if line_start and line in (b".\n", b".\r\n"):
                break
            yield line.removeprefix(b".") if line_start else line
            line_start = line.endswith(b"\n")
        if trace:
            trace.end()

    def bdat(self, argument: str) -> Reply:
        size, last = self.chunk(argument)
        try:
            envelope = self.need_recipients()
        except Refused:
            self.skip_chunk("BDAT", argument)
            raise
        content = self.content or self.begin_content(envelope)
        try:
            for block in self.read_chunk(size):
                content.add(block)
                del block
        except BaseException:
            self.reset()
            raise
        if not content.refusal and not content.fault and not last:
            return f"250 2.0.0 {size} octets taken"
        try:
            return self.finish_content(envelope, content)
        finally:
            self.reset()

    def chunk(self, argument: str) -> tuple[int, bool]:
        """Read `size [LAST]` (RFC 3030 2)."""
        match = re.fullmatch(r"([0-9]{1,20})(?: +(LAST))?", argument, re.IGNORECASE | re.ASCII)
        if not match:
            raise Refused("501 5.5.4 Write BDAT size or BDAT size LAST")
        return int(match[1]), bool(match[2])

    def read_chunk(self, size: int) -> Iterator[bytes]:
        """Yield the octets of a chunk."""
        blocks = self.reader.blocks(self.server.timeout, READ_BLOCK)
        trace = self.trace_data("C")
        while size:
            block = self.reader.take(min(size, READ_BLOCK)) or next(blocks)
            if len(block) > size:
                block, self.reader.buffer[:0] = block[:size], block[size:]
            size -= len(block)
            if trace:
                trace.feed(block)
            yield block
            del block
        if trace:
            trace.end()

    def skip_chunk(self, verb: str, argument: str) -> None:
        """Read the chunk of a refused BDAT: it contains no commands."""
        if verb == "BDAT":
            for _ in self.read_chunk(self.chunk(argument)[0]):
                pass

    def rset(self, argument: str) -> Reply:
        self.reset()
        return "250 2.0.0 Ok"

    # ---- the end of a message

    def finish_content(self, envelope: Envelope, content: Content) -> str:
        """Put the message on disk and return the reply to its end."""
        content.end()
        if content.line_ends.bare and not self.bare_lf:
            self.log("%s: %d bare CR or LF made CRLF", envelope.id, content.line_ends.bare)
        if content.fault and not content.refusal:
            return self.store_failed(envelope.id, content.fault)
        if reply := content.refusal or self.hook_reply(".", ""):
            return reply
        entry = self.queue_entry(envelope)
        published = functools.partial(self.call_on_message, envelope)
        try:
            paths = content.delivery.commit(entry, published if self.server.on_message else None)
        except OSError as error:
            return self.store_failed(envelope.id, error)
        stored = envelope.id, envelope.sender, ", ".join(envelope.recipients), content.octets
        self.log("queued as %s from <%s> to %s, %d octets", *stored)
        self.report_success(envelope, paths[0])
        return f"250 2.0.0 Ok: queued as {envelope.id}"

    def targets(self, envelope: Envelope) -> Iterator[Target]:
        """Yield a copy per mailbox, and one for the queue if any of it goes elsewhere."""
        store, received, seen = self.server.store, self.received(envelope), set()
        for recipient in envelope.accepted:
            for mailbox in recipient.mailboxes:
                if mailbox not in seen:
                    seen.add(mailbox)
                    sender, address = envelope.sender, recipient.address
                    yield store.mailbox_target(mailbox, sender, address, received)
        if not all(recipient.mailboxes for recipient in envelope.accepted):
            yield Target(store.queue_folder, received.encode(), envelope.id)

    def received(self, envelope: Envelope) -> str:
        """Return this hop's trace field (RFC 5321 4.4, `with` by RFC 3848 and RFC 6531 4.3)."""
        protocol = "S" * self.tls + "A" * bool(self.user)
        utf8 = "SMTPUTF8" in envelope.parameters
        protocol = ("UTF8SMTP" if utf8 else "ESMTP") + protocol
        if not self.esmtp and protocol == "ESMTP":
            protocol = "SMTP"
        ip = self.peer[0].partition("%")[0]
        ip = f"IPv6:{ip}" if ":" in ip else ip
        name = f"{self.helo} ([{ip}])"
        if not HELO_NAME.fullmatch(self.helo):
            name = f"[{ip}] (HELO {escape_comment(printable(self.helo)[:200])})"
        only = len(envelope.accepted) == 1
        whom = f"\r\n\tfor <{envelope.accepted[0].address}>" if only else ""
        by = f"by {self.server.hostname} with {protocol} id {envelope.id}{whom}"
        return f"Received: from {name}\r\n\t{by}; {mail_date(int(time.time()))}\r\n"

    def queue_entry(self, envelope: Envelope) -> QueueEntry | None:
        """Return the queue's record of a message for other hosts; None: all of it stays here."""
        remote = {r.address: r for r in envelope.accepted if not r.mailboxes}
        if not remote:
            return None
        queued = [QueuedRecipient(r.address, r.notify, r.orcpt) for r in remote.values()]
        return QueueEntry(envelope.id, envelope.sender, envelope.parameters, queued)

    def call_on_message(self, envelope: Envelope, paths: list[str]) -> None:
        """Call the embedding program's hook for each file; the mail is stored, whatever it does."""
        assert self.server.on_message
        for path in paths:
            try:
                self.server.on_message(envelope, path)
            except Disconnect:
                raise
            except BaseException:
                self.log_error("on_message", traceback=True)

    def report_success(self, envelope: Envelope, path: str) -> None:
        """Report to a sender who asked for it (NOTIFY=SUCCESS) that a message was delivered."""
        done = []
        for recipient in envelope.accepted:
            if recipient.mailboxes and recipient.notify:
                record = QueuedRecipient(recipient.address, recipient.notify, recipient.orcpt)
                record.action, record.status = "delivered", "2.0.0"
                if record.wants("SUCCESS"):
                    done.append(record)
        relay = self.server.relay
        if done and (self.user or relay.routing.may_report_to(envelope.sender)):
            entry = QueueEntry(envelope.id, envelope.sender, envelope.parameters, done)
            with contextlib.suppress(OSError):  # it is logged; the message itself is safe
                relay.report(entry, done, path)

    # ---- questions

    def vrfy(self, argument: str) -> Reply:
        name, utf8 = self.vrfy_argument(argument, "VRFY")
        if not self.may_query():
            return "252 2.5.0 Send a message and see"
        users, routing = self.server.store.users, self.server.relay.routing
        domain = name.rpartition("@")[2]
        elsewhere = "@" in name and not users.is_local(domain)
        found = routing.mailboxes(name)[:1] if elsewhere else users.lookup(name)
        if elsewhere and not found and routing.next_host(domain):
            return "252 2.5.0 Not a mailbox here; send a message and see"
        if not found:
            raise Refused("550 5.1.1 No such user")
        if len(found) > 1:
            raise Refused("553 5.1.4 More than one has this name; write VRFY name@domain")
        return self.answer_query([f"250 2.1.5 <{found[0]}>"], utf8)

    def expn(self, argument: str) -> Reply:
        name, utf8 = self.vrfy_argument(argument, "EXPN")
        if not self.may_query():
            raise Refused("550 5.7.1 Log in first (AUTH)")
        members = self.server.store.users.members(name)
        if members is None:
            raise Refused("550 5.1.1 No such list")
        return self.answer_query(reply_lines("250", [f"2.1.5 <{m}>" for m in members]), utf8)

    def vrfy_argument(self, argument: str, verb: str) -> tuple[str, bool]:
        """Return the name that VRFY or EXPN asks about, and whether SMTPUTF8 follows it.

        (RFC 6531 3.7.4.2.)
        """
        utf8 = argument.upper().endswith(" SMTPUTF8")
        name = argument[:-9].strip() if utf8 else argument
        if name.endswith(">"):
            name = name[name.rfind("<") + 1 : -1]
        if not name or not name.isprintable() or name.upper() == "SMTPUTF8":
            raise Refused(f"501 5.5.4 Write {verb} name or {verb} name@domain")
        with contextlib.suppress(ValueError):  # quotes and a source route don't count
            name = parse_path(f"<{name}>")[0]
        return name, utf8

    def answer_query(self, lines: list[str], utf8: bool) -> Reply:
        """Answer with addresses, in UTF-8 if the client has asked for it."""
        if "".join(lines).isascii():
            return lines
        if not utf8:
            raise Refused("553 5.6.8 The answer is not ASCII; ask again with SMTPUTF8")
        for line in lines:
            self.trace("S", line)
        self.write("\r\n".join([*lines, ""]).encode())
        return None

    def may_query(self) -> bool:
        return bool(self.user) or is_loopback(self.peer[0])

    def etrn(self, argument: str) -> Reply:
        routing, node = self.server.relay.routing, canonical(argument)
        if self.envelope:
            raise Refused("503 5.5.1 Not inside a mail transaction; send RSET first")
        good = NODE.fullmatch(node) and node.isprintable() and len(node.encode()) <= MAX_DOMAIN
        if not good:
            raise Refused("501 5.5.4 Write ETRN host, ETRN @domain or ETRN #")
        if not self.may_query() or not routing.serves_node(node):
            return f"459 4.7.1 {node} not allowed: no route to it, or you have to log in"
        try:
            waiting = self.server.relay.waiting_for(node)
            if not waiting:
                return f"251 2.0.0 No messages waiting for {node}"
            self.server.store.ask_for_start(node)
        except OSError as error:
            self.log_error("ETRN: %s", error)
            return f"458 4.3.0 Unable to start {node}"
        if node == "#":
            return "250 2.0.0 Started all of the queue"
        return f"253 2.0.0 {count_messages(waiting)} waiting for {node} started"

    def help(self, argument: str) -> Reply:
        verb = argument.upper()
        if argument and verb not in self.help_texts:
            raise Refused("504 5.5.4 No such command; HELP lists them")
        if argument:
            return reply_lines("214", [f"2.0.0 {line}" for line in self.help_texts[verb]])
        here = [v for v in self.commands if v != "STARTTLS" or self.server.tls]
        here = [v for v in here if v != "AUTH" or self.server.auth]
        lines = [f"Commands: {' '.join(here)}", f"Now: {' '.join(self.next_commands())}"]
        lines.append("HELP MAIL explains MAIL, and so on; QUIT ends the session")
        return reply_lines("214", [f"2.0.0 {line}" for line in lines])

    def next_commands(self) -> list[str]:
        """Return the commands that make sense now."""
        always = ["HELP", "NOOP", "RSET", "QUIT"]
        upgrade = ["STARTTLS"] if self.server.tls and not self.tls else []
        if not self.helo:
            return ["EHLO", "HELO", *upgrade, *always]
        if self.envelope:
            ready = ["DATA", "BDAT"] if self.envelope.accepted else []
            return [*(["BDAT"] if self.content else ["RCPT", *ready]), *always]
        login = ["AUTH"] if not self.user and self.may_log_in() else []
        verbs = [*upgrade, *login, "MAIL", "VRFY", "EXPN", "ETRN", *always]
        return [verb for verb in verbs if not self.refusal_before_login(verb)]

    def noop(self, argument: str) -> Reply:
        return "250 2.0.0 Ok"

    def quit(self, argument: str) -> Reply:
        raise Quit("quit", "221 2.0.0 Good bye")

    commands = {
        "HELO": helo_,
        "EHLO": ehlo_,
        "STARTTLS": starttls,
        "AUTH": auth,
        "MAIL": mail,
        "RCPT": rcpt,
        "DATA": data,
        "BDAT": bdat,
        "RSET": rset,
        "VRFY": vrfy,
        "EXPN": expn,
        "ETRN": etrn,
        "HELP": help,
        "NOOP": noop,
        "QUIT": quit,
    }
    help_texts = {
        "HELO": ("HELO your.host.name", "say who you are, without extensions; EHLO is better"),
        "EHLO": ("EHLO your.host.name", "say who you are and see what this server can do"),
        "STARTTLS": ("STARTTLS", "encrypt; by hand: openssl s_client -starttls smtp -connect ..."),
        "AUTH": ("AUTH LOGIN", "log in; name and password are asked for, in base64"),
        "MAIL": ("MAIL FROM:<you@example.test>", "begin a message: who sends it (<> is nobody)"),
        "RCPT": ("RCPT TO:<alice@example.test>", "who shall get it; once for each recipient"),
        "DATA": ("DATA", "header lines, an empty line, text; then a line with only a dot"),
        "BDAT": ("BDAT 1000 LAST", "a message, or a piece of it, of so many octets"),
        "RSET": ("RSET", "forget the message that has begun"),
        "VRFY": ("VRFY alice@example.test", "is there such a mailbox?"),
        "EXPN": ("EXPN staff@example.test", "who is on that list?"),
        "ETRN": ("ETRN example.net", "send what waits for that host; @example.net, # for all"),
        "HELP": ("HELP MAIL", "explain one command; HELP alone lists them"),
        "NOOP": ("NOOP", "nothing, politely"),
        "QUIT": ("QUIT", "good bye"),
    }
    without_argument = {"STARTTLS", "DATA", "RSET", "QUIT"}
    before_tls = {"EHLO", "STARTTLS", "NOOP", "QUIT"}  # RFC 3207 4
    # RFC 4954 6
    before_login = {"HELO", "EHLO", "STARTTLS", "AUTH", "NOOP", "RSET", "HELP", "QUIT"}


# ---------------------------------------------------------------- the server


class SMTPServer(LineServer):
    """One SMTP listener on `address`, (host, port); port 0 takes a free one.  `with` serves.

    As the program's options of these names: `hostname`, `tls_cert`, `tls_key`, `tls_self_signed`,
    `require_tls`, `require_auth`, `any_login`, `catch_all` (an address, or True for the first
    account), `size_limit` (octets), `max_connections`, `timeout` (seconds), `relay`, `route` (a
    dict of domain to "host:port", or a list of "domain=host:port") and `trace`.

    Besides: `auth=False` (no AUTH at all), `implicit_tls` (TLS from the first octet),
    `max_per_address` (sessions of one client address), `relay` as a Relay to share, which its maker
    stops, `relay_options` (keywords of Relay), `on_message(envelope, path)`, called for each file
    once a message is on disk and before its 250, and `intercept(session, verb, argument)`, which
    sees each command first, "CONNECT" before the greeting and "." at the end of a message: a string
    that it returns is the reply, raising Disconnect drops the connection.
    """

    store: Store

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
        require_auth: bool = False,
        auth: bool = True,
        any_login: bool = False,
        catch_all: str | bool | None = None,
        size_limit: int = MAX_SIZE,
        max_connections: int = 1000,
        max_per_address: int | None = None,
        timeout: float | None = None,
        relay: str | Relay | None = None,
        route: dict[str, str] | list[str] | None = None,
        relay_options: dict[str, Any] | None = None,
        trace: bool | Trace = False,
        on_message: Callable[[Envelope, str], object] | None = None,
        intercept: Callable[[SMTPHandler, str, str], str | None] | None = None,
    ):
        check_option("store", store, Store)
        self.store = store
        hostname = check_hostname(store.host if hostname is None else hostname)
        self.set_policy(require_auth, auth, any_login, size_limit, on_message)
        self.set_relay(hostname, relay, route, relay_options)
        if tls_self_signed:
            tls_cert, tls_key = self_signed(store.folder, hostname)
        tls = TLSOptions(tls_cert, tls_key, implicit_tls, require_tls)
        limits = Limits(max_connections, max_per_address, timeout)
        super().__init__(address, SMTPHandler, hostname, tls, limits, trace, intercept)
        if catch_all is not None:
            self.set_catch_all(catch_all)

    def set_catch_all(self, target: str | bool) -> None:
        """Let the store deliver mail for every other address to one account."""
        try:
            self.store.set_catch_all(target)
        except BaseException:
            self.stop()
            raise

    def set_policy(
        self, require_auth: bool, auth: bool, any_login: bool, size_limit: int, on_message: Any
    ) -> None:
        """Take the options of who may send what."""
        check_option("require_auth", require_auth, bool)
        check_option("auth", auth, bool)
        check_option("any_login", any_login, bool)
        check_option("size_limit", size_limit, int, least=1)
        check_option("on_message", on_message, Callable, None)
        if not auth and (require_auth or any_login):
            raise ValueError("auth: require_auth and any_login need logins")
        self.require_auth = require_auth
        self.auth = auth
        self.any_login = any_login
        self.size_limit = size_limit
        self.on_message: Callable[[Envelope, str], object] | None = on_message

    def set_relay(self, hostname: str, relay: Any, route: Any, options: Any) -> None:
        """Take the Relay to share, or make one."""
        check_option("relay", relay, str, Relay, None)
        check_option("relay_options", options, dict, None)
        self.owns_relay = not isinstance(relay, Relay)
        if not self.owns_relay and (route or options):
            raise ValueError("route, relay_options: give them to the Relay that is shared")
        if self.owns_relay:
            relay = Relay(self.store, hostname, relay, as_routes(route), **(options or {}))
        self.relay: Relay = relay
        if self.any_login and relay.routing.serves_node("#"):
            raise ValueError("any_login: with a route anybody could send mail to anywhere")

    def __enter__(self) -> "SMTPServer":
        self.start()
        return self

    def start(self) -> None:
        """Begin to serve, and to work on the queue; RuntimeError when the server was stopped."""
        super().start()
        try:
            self.relay.start()
        except BaseException:
            self.stop()
            raise

    def begin_stop(self) -> None:
        super().begin_stop()
        if self.owns_relay and self.stopping.is_set():
            self.relay.begin_stop()

    def stop(self, seconds: float = STOP_TIMEOUT) -> None:
        """Stop and close; what is being stored or sent on gets `seconds` to finish."""
        deadline = clock() + seconds
        super().stop(seconds)
        if self.owns_relay and self.stopping.is_set():
            self.relay.stop(deadline - clock())


def main(argv: list[str] | None = None) -> int:
    """Run the server as the command line says; return the exit status."""
    import startup_simple

    args = startup_simple.parse_arguments(argv, "SMTP")
    return startup_simple.run_program(args, make_servers)


def make_servers(args: "Namespace", store: Store, options: dict[str, Any]) -> list[LineServer]:
    """Open the listeners that the options name; raise ValueError or OSError."""
    names = ("require_auth", "any_login", "size_limit")
    smtp = options | {name: getattr(args, name) for name in names}
    catch_all, route = args.catch_all, args.route
    first = SMTPServer(
        (args.host, args.port), store, relay=args.relay, route=route, catch_all=catch_all, **smtp
    )
    servers: list[LineServer] = [first]
    if args.smtps_port is not None:
        address = args.host, args.smtps_port
        servers.append(SMTPServer(address, store, relay=first.relay, implicit_tls=True, **smtp))
    for port, implicit_tls in ((args.pop3, False), (args.pop3s_port, True)):
        if port is not None:
            from pop3d_simple import POP3Server

            address = args.host, port
            servers.append(POP3Server(address, store, implicit_tls=implicit_tls, **options))
    return servers


if __name__ == "__main__":
    sys.exit(main())
