"""An SMTP server: takes mail for the mailboxes of users.txt, relays what logged-in users send elsewhere, reports back.

    python smtpd_simple.py                       SMTP on 127.0.0.1:1025
    python smtpd_simple.py --pop3                SMTP and POP3: the whole mail server
    python smtpd_simple.py --relay mail.example.net --tls-self-signed

RFC 5321 with the extensions that EHLO shows.  What it refuses to be: an open relay (mail for elsewhere needs a login
and a route), a filter (octets go to disk as they came, behind our own trace fields), a user of DNS (but for the next
host that the command line names).

In a test:

    store = Store("spool", {"alice@example.test": "wonderland"}, sync=False)
    with SMTPServer(("127.0.0.1", 0), store) as smtp:
        ...                                      # send something to smtp.host, smtp.port
        [message] = store.wait("alice@example.test")

A message's way: `SMTPHandler` reads lines, keeps an `Envelope` -> `Arrival` reads the content -> store.py puts it on
disk -> 250.  Mail for elsewhere goes to the queue in the spool, from there `Relay` sends it on through smtplib.
"""

import contextlib
import errno
import re
import socket
import sys
import time

import lineserver
from lineserver import Disconnect, LineHandler, LineServer, Quit, Refused, dot_stuff, dot_unstuff, is_loopback
from relay_simple import HEXCHAR, Recipient, Relay, as_routes, new_entry, wants
from store import (
    MAX_DOMAIN,
    MAX_LOCAL,
    Delivery,
    Store,
    Target,
    in_words,
    line_ends,
    mail_date,
    new_id,
    trace_fields,
    users_file,
)

__all__ = ["Disconnect", "Envelope", "Relay", "SMTPHandler", "SMTPServer", "Store"]

MAX_SIZE = 102_400_000  # octets of a message, as EHLO says (RFC 1870)
MAX_RECIPIENTS = 1000  # RFC 5321 4.5.3.1.8 asks for 100; beyond it 452, and the client sends the rest later
MAX_HOPS = 50  # `Received` fields; RFC 5321 6.3 would allow 100, but who uses this is never that far from anybody
READ_BLOCK = 1 << 18  # octets of a message that are read at once
MAX_HEADER = 1 << 20  # octets of a header that are looked into

# RFC 5321 4.1.2, with RFC 6531 3.3 for what is not ASCII.  The classes say what is not in them: ranges of Unicode take
# a tenth of a second to compile.  Surrogates, which stand for octets that are not UTF-8, fail isprintable() later.
ATOM = r"[^\x00-\x20\"(),.:;<>@\[\\\]\x7f-\x9f]+"
DOT_STRING = rf"{ATOM}(?:\.{ATOM})*"
QUOTED = r'"(?:[^"\\\x00-\x1f\x7f]|\\[ -~])*"'
LETTER, INNER = r"[^\x00-/:-@\[-^`{-\x9f]", r"[^\x00-,./:-@\[-^`{-\x9f]"  # of a label: _ is common, - not at its ends
DOMAIN = rf"{LETTER}(?:{INNER}*{LETTER})?(?:\.{LETTER}(?:{INNER}*{LETTER})?)*"
IPV4 = r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
LITERAL = rf"\[(?:{IPV4}|(?i:IPv6):[0-9A-Fa-f:.]+|[A-Za-z0-9-]*[A-Za-z0-9]:[!-Z^-~]+)\]"
PATH = re.compile(rf"<(?:@{DOMAIN}(?:,@{DOMAIN})*:)?({DOT_STRING}|{QUOTED})@({DOMAIN}|{LITERAL})>")
NO_DOMAIN = re.compile(r"<((?i:postmaster)?)>", re.ASCII)  # RFC 5321 4.1.1.3, and the null path
XTEXT = r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})"  # RFC 3461 4

MAIL_PARAMETERS = {  # what each may be; None: no value
    "SIZE": r"[0-9]{1,20}",  # RFC 1870
    "BODY": r"(?i:7BIT|8BITMIME)",  # RFC 6152
    "SMTPUTF8": None,  # RFC 6531
    "AUTH": rf"<>|(?!<>){XTEXT}{{1,500}}",  # RFC 4954 5
    "RET": r"(?i:FULL|HDRS)",  # RFC 3461 4.3
    "ENVID": rf"(?:[!-*,-<>-~]|{HEXCHAR}){{1,100}}",  # RFC 3461 4.4
}
RCPT_PARAMETERS = {
    "NOTIFY": r"(?i:NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY)){0,2})",  # RFC 3461 4.1
    "ORCPT": rf"[A-Za-z0-9-]{{1,30}};{XTEXT}{{1,500}}|(?i:utf-8);(?:{XTEXT}|[^\x00-\x9f]){{1,500}}",  # 4.2, RFC 6533 3
}
NAME = r"[!#-'*+./0-9=?A-Z^-~-]"
HELLO = rf"(?:{NAME}|\({NAME}*\))+|{LITERAL}|\[[0-9A-Fa-f:.]+\]"  # such as localhost.(none)
NODE = rf"#|@?{DOMAIN}"


# ---------------------------------------------------------------- pure helpers


def parse_path(text: str) -> tuple[str, str]:
    """Read `<path>` at the start of `text`; return the address, quotes undone where it can be, and what follows it.

    A source route is read and dropped (RFC 5321 C), `<>` is the address "".  Raises ValueError saying what is wrong.
    """
    text = text.lstrip(" ")
    match = PATH.match(text)
    if not match and (special := NO_DOMAIN.match(text)):
        return special[1], text[special.end() :]
    if not match or not match[0].isprintable():
        raise ValueError("write the address as <name@domain>")
    local, domain = match.groups()
    if local.startswith('"'):
        plain = re.sub(r"\\(.)", r"\1", local[1:-1])
        local = plain if re.fullmatch(DOT_STRING, plain) else local
    if len(local.encode()) > MAX_LOCAL or len(domain.encode()) > MAX_DOMAIN:
        raise ValueError(f"the address is longer than {MAX_LOCAL}@{MAX_DOMAIN} octets")
    if domain.startswith("[") and not good_literal(domain[1:-1]):
        raise ValueError("the address has no such numbers")
    return f"{local}@{domain}", text[match.end() :]


def good_literal(text: str) -> bool:
    """Say whether an address literal (RFC 5321 4.1.3) names an address; kinds that are not known here may."""
    kind, colon, rest = text.partition(":")
    if colon and kind.lower() != "ipv6":
        return True
    try:
        socket.inet_pton(socket.AF_INET6 if colon else socket.AF_INET, rest if colon else text)
    except OSError:
        return False
    return True


def parse_parameters(text: str, known: dict) -> dict[str, str | None]:
    """Read ` KEY=value KEY` by a table of what each value may be; keys come in upper case, values untouched.

    Raises Refused: 501 for a bad or repeated one, 555 for one that EHLO does not offer (RFC 5321 4.1.1.11).
    """
    if text and not text.startswith(" "):
        raise Refused("501 5.5.4 A space belongs behind the >")
    found = {}
    for word in filter(None, text.split(" ")):
        name, equals, value = word.partition("=")
        name = name.upper()
        if not re.fullmatch(r"[A-Z0-9][A-Z0-9-]*", name) or (equals and not value):
            raise Refused("501 5.5.4 Write parameters as KEY=value")
        if name not in known:
            raise Refused("555 5.5.4 A parameter that is not offered here; EHLO shows those that are")
        if name in found:
            raise Refused(f"501 5.5.4 {name} is there twice")
        if bool(equals) != bool(known[name]):
            raise Refused(f"501 5.5.4 {name} takes {'a' if known[name] else 'no'} value")
        if equals and not (value.isprintable() and re.fullmatch(known[name], value, re.ASCII)):
            raise Refused(f"501 5.5.4 Bad value for {name}")
        found[name] = value if equals else None
    return found


class Newlines:
    """Turns bare CR and bare LF into CRLF, block by block; `bare` counts them."""

    def __init__(self):
        self.held, self.bare = b"", 0

    def feed(self, block: bytes) -> bytes:
        """Return a block with proper line ends; a CR at its end waits for what follows."""
        block = self.held + block
        self.held = b"\r" if block.endswith(b"\r") else b""
        block = block.removesuffix(b"\r")
        if line_ends(block) in (None, "\r\n"):
            return block
        self.bare += block.count(b"\n") + block.count(b"\r") - 2 * block.count(b"\r\n")
        return block.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")

    def end(self) -> bytes:
        """Return what is still held back."""
        self.bare += bool(self.held)
        held, self.held = self.held, b""
        return b"\r\n" if held else b""


def count_hops(header: bytes) -> int:
    """Return how many hosts a message has come through, by its `Received` fields."""
    fields = (b"\n" + header.lower()).split(b"\nreceived")[1:]
    return sum(field.lstrip(b" \t").startswith(b":") for field in fields)


# ---------------------------------------------------------------- one message


class Envelope:
    """What MAIL and RCPT have said about one message; there is one while a transaction is open, and none otherwise.

    `sender` is the reverse path without its brackets; "" is the null sender.  `accepted` holds
    a Recipient for each RCPT, `refused` counts the others.
    """

    def __init__(self, sender: str, parameters: dict, name: str):
        self.sender, self.parameters, self.id = sender, parameters, name
        self.accepted, self.refused = [], 0
        self.arrival = None  # once DATA or BDAT has begun

    @property
    def recipients(self) -> list[str]:
        """The addresses that were accepted."""
        return [recipient.address for recipient in self.accepted]


class Arrival:
    """The content of one message while it comes in: counts it, checks it, stores it.

    What goes wrong is remembered and said at the end: a client can't be interrupted (RFC 5321 4.5.4.2).
    """

    def __init__(self, session: "SMTPHandler", envelope: Envelope):
        self.session, self.envelope = session, envelope
        self.limit, self.octets, self.refusal = session.server.size_limit, 0, None
        self.newlines, self.header, self.in_header = Newlines(), bytearray(), True
        self.shown = bytearray()  # in the trace
        self.delivery = Delivery(session.server.store, session.copies(envelope))

    def add(self, block: bytes) -> None:
        """Take a piece of the content."""
        self.put(self.newlines.feed(block))

    def put(self, block: bytes) -> None:
        if not self.octets and block[:1] in (b" ", b"\t"):  # it would go on with our last trace field
            self.delivery.write(b"\r\n")
        self.octets += len(block)
        if self.session.server.trace and len(self.shown) < lineserver.Trace.DATA_OCTETS:
            self.shown += block
        if self.octets > self.limit:
            self.refuse(f"552 5.3.4 The message is larger than {self.limit} octets")
        if self.refusal or not block:
            return
        if self.in_header:
            seen = max(len(self.header) - 3, 0)  # an end that is cut begins here
            self.header += block
            self.in_header = self.header.find(b"\r\n\r\n", seen) < 0 and len(self.header) < MAX_HEADER
        try:
            self.delivery.write(block)
        except OSError as error:
            self.refuse(self.session.store_failed(self.envelope.id, error))

    def refuse(self, reply: str) -> None:
        self.refusal = self.refusal or reply
        self.delivery.close()

    def finish(self) -> str:
        """Put the message on disk and return the reply to its end."""
        session, envelope = self.session, self.envelope
        self.put(self.newlines.end())
        if self.newlines.bare and not session.bare_lf:
            session.log("%s: %d bare CR or LF made CRLF", envelope.id, self.newlines.bare)
        if count_hops(self.header.partition(b"\r\n\r\n")[0]) >= MAX_HOPS:
            self.refuse(f"554 5.4.6 The message has come through {MAX_HOPS} hosts: a loop")
        if reply := self.refusal or session.intercepted(".", ""):
            return reply
        try:
            paths = self.delivery.commit(session.queue_entry(envelope))
        except OSError as error:
            return session.store_failed(envelope.id, error)
        session.stored(envelope, self.octets, paths)
        return f"250 2.0.0 Ok: queued as {envelope.id}"


# ---------------------------------------------------------------- one session


class SMTPHandler(LineHandler):
    """One SMTP session.  `envelope` is None outside a mail transaction: that is all the state there is to reset."""

    protocol = "SMTP"
    error = "5"
    challenge = "334 {}"
    secret = {"AUTH": 1}
    replies = {
        "busy": "421 4.7.0 Too many sessions, try again later",
        "stopping": "421 4.3.2 The server is stopping",
        "timeout": "421 4.4.2 Nothing came in time, good bye",
        "bug": "421 4.3.0 Our mistake; it has been logged",
        "errors": "421 4.7.0 Too many errors, good bye",
        "logins": "421 4.7.0 Too many failed logins, good bye",
        "unknown": "500 5.5.2 There is no such command; HELP lists those there are",
        "long": "500 5.5.2 The line is too long",
        "long answer": "500 5.5.6 The answer is too long",
        "disk": "451 4.3.0 Our disk failed, try again later",
        "full": "452 4.3.1 Our disk is full, try again later",
        "mechanism": "504 5.5.4 Unknown mechanism; EHLO shows those there are",
        "cancelled": "501 5.7.0 Login cancelled",
        "base64": "501 5.5.2 That is not base64",
        "plain": "501 5.5.2 Send base64 of \\0name\\0password",
        "initial": "501 5.7.0 CRAM-MD5 begins with our challenge: send AUTH CRAM-MD5",
        "wrong": "535 5.7.8 Wrong name or password",
    }

    def setup(self):
        super().setup()
        self.esmtp = False

    def finish(self):
        self.reset()
        super().finish()

    def greeting(self):
        return f"220 {self.server.hostname} ESMTP smtpd_simple, ready"

    def store_failed(self, what, error):
        disk = super().store_failed(what, error)
        return self.replies["full"] if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else disk

    def start_tls(self):
        super().start_tls()
        self.esmtp = False
        self.reset()

    def reset(self):
        """End the mail transaction, if there is one."""
        if self.envelope and self.envelope.arrival:
            self.envelope.arrival.delivery.close()
        self.envelope = None

    def allow(self, verb, argument):
        if too_early := self.too_early(verb):
            self.skip_chunk(verb, argument)
            raise Refused(too_early)
        if argument and verb in self.without_argument:
            raise Refused(f"501 5.5.4 {verb} takes nothing behind it")

    def too_early(self, verb):
        """Return the refusal of a command that has to wait for TLS or for a login, or None."""
        if self.server.require_tls and not self.tls and verb not in self.before_tls:
            return "530 5.7.0 STARTTLS first"
        if self.server.require_auth and not self.user and verb in self.commands and verb not in self.before_login:
            return "530 5.7.0 AUTH first"
        return None

    def intercepted(self, verb, argument):
        reply = super().intercepted(verb, argument)
        if reply is not None:
            self.skip_chunk(verb, argument)
        return reply

    # ---- hello

    def helo_(self, argument):
        """HELO your.host.name -- say who you are, without extensions; EHLO is better"""
        self.say_hello(argument, "HELO")
        return f"250 {self.server.hostname}"

    def ehlo_(self, argument):
        """EHLO your.host.name -- say who you are and see what this server can do"""
        self.say_hello(argument, "EHLO")
        lines = [f"{self.server.hostname} greets you", *self.keywords()]
        return [f"250-{line}" for line in lines[:-1]] + [f"250 {lines[-1]}"]

    def say_hello(self, argument, verb):
        if not re.fullmatch(HELLO, argument) or len(argument) > MAX_DOMAIN:
            raise Refused(f"501 Write {verb} and your host's name")
        self.helo, self.esmtp = argument, verb == "EHLO"
        self.reset()

    def keywords(self):
        """Return what EHLO shows."""
        server, limits = self.server, f"LIMITS RCPTMAX={MAX_RECIPIENTS}"
        words = ["PIPELINING", f"SIZE {server.size_limit}", "VRFY", "ETRN"]
        if server.tls and not self.tls:
            words.append("STARTTLS")
        if self.may_log_in_here():
            words += [f"AUTH {' '.join(self.mechanisms)}", "AUTH=LOGIN PLAIN"]
        return [*words, "ENHANCEDSTATUSCODES", "8BITMIME", "SMTPUTF8", "CHUNKING", "DSN", limits, "EXPN", "HELP"]

    def starttls(self, argument):
        """STARTTLS -- encrypt the session; then EHLO again"""
        if self.tls:
            raise Refused("503 5.5.1 The session is encrypted already")
        if not self.server.tls:
            raise Refused("502 5.5.1 There is no certificate here, so no TLS")
        self.reply("220 2.0.0 Go ahead with TLS")
        self.start_tls()

    def auth(self, argument):
        """AUTH LOGIN -- log in; name and password are asked for, in base64"""
        mechanism, *initial = argument.split() or [""]
        if self.user:
            raise Refused("503 5.5.1 You are logged in already")
        if self.envelope:
            raise Refused("503 5.5.1 Not inside a mail transaction; RSET first")
        if not self.helo:
            raise Refused("503 5.5.1 EHLO first")
        if not self.may_log_in_here():
            raise Refused("538 5.7.11 STARTTLS first: a password must not cross this line in clear")
        if not mechanism or len(initial) > 1:
            raise Refused("501 5.5.4 Write AUTH mechanism or AUTH mechanism base64")
        self.user = self.sasl(mechanism, initial[0] if initial else None)
        return "235 2.7.0 Welcome"

    # ---- the mail transaction

    def mail(self, argument):
        """MAIL FROM:<you@example.test> -- begin a message: who sends it (<> is nobody)"""
        if not self.helo:
            raise Refused("503 5.5.1 EHLO first")
        if self.envelope:
            raise Refused("503 5.5.1 There is a sender already; RCPT, or RSET to begin again")
        sender, rest = self.path(argument, "FROM", "501 5.1.7")
        if sender and "@" not in sender:
            raise Refused("501 5.1.7 Bad sender: write the address as <name@domain>")
        parameters = parse_parameters(rest, MAIL_PARAMETERS if self.esmtp else {})
        if not sender.isascii() and "SMTPUTF8" not in parameters:
            raise Refused("553 5.6.7 An address that is not ASCII needs the parameter SMTPUTF8")
        if int(parameters.get("SIZE") or 0) > self.server.size_limit:
            raise Refused(f"552 5.3.4 This server takes {self.server.size_limit} octets at most")
        self.envelope = Envelope(sender, parameters, new_id())
        return f"250 2.1.0 Sender <{sender}> ok"

    def rcpt(self, argument):
        """RCPT TO:<alice@example.test> -- who shall get it; once for each recipient"""
        if self.envelope is None:
            raise Refused("503 5.5.1 MAIL first")
        if self.envelope.arrival:
            raise Refused("503 5.5.1 BDAT has begun; end it with LAST, or RSET")
        if len(self.envelope.accepted) >= MAX_RECIPIENTS:
            return f"452 4.5.3 {MAX_RECIPIENTS} recipients at most; send the message again to the others"
        self.envelope.refused += 1  # until we know better
        address, rest = self.path(argument, "TO", "501 5.1.3")
        if not address:
            raise Refused("501 5.1.3 Bad recipient: <> is nobody")
        parameters = parse_parameters(rest, RCPT_PARAMETERS if self.esmtp else {})
        orcpt, utf8 = parameters.get("ORCPT"), "SMTPUTF8" in self.envelope.parameters
        if not address.isascii() and not utf8:
            raise Refused("553 5.6.7 An address that is not ASCII needs the parameter SMTPUTF8 at MAIL")
        if orcpt and not orcpt.isascii() and not utf8:
            raise Refused("501 5.5.4 Bad value for ORCPT")
        recipient = Recipient(address, self.resolve(address), parameters.get("NOTIFY"), orcpt)
        self.envelope.accepted.append(recipient)
        self.envelope.refused -= 1
        return f"250 2.1.5 Recipient <{address}> ok"

    def path(self, argument, word, code):
        """Read `FROM:<path>` or `TO:<path>`; return the address and what follows."""
        name, colon, rest = argument.partition(":")
        if not colon or name.rstrip(" ").upper() != word:
            raise Refused(f"501 5.5.4 Write {word}:<name@domain>")
        try:
            return parse_path(rest)
        except ValueError as error:
            raise Refused(f"{code} Bad {'sender' if word == 'FROM' else 'recipient'}: {error}") from None

    def resolve(self, address):
        """Return the mailboxes that an address reaches; none means that it goes on to another host."""
        relay, domain = self.server.relay, address.rpartition("@")[2]
        if mailboxes := relay.mailboxes(address):
            return mailboxes
        if "@" not in address or relay.store.users.is_local(domain):
            raise Refused(f"550 5.1.1 <{address}>: nobody of that name here")
        if not self.user:
            raise Refused(f"550 5.7.1 <{address}>: not a mailbox here; log in (AUTH) to send mail elsewhere")
        if not relay.route(domain):
            raise Refused(f"550 5.7.1 <{address}>: not a mailbox here, and no route leads there")
        return []

    def need_recipients(self):
        if self.envelope is None:
            raise Refused("503 5.5.1 MAIL first")
        if not self.envelope.accepted:
            if self.envelope.refused:
                raise Refused("554 5.5.1 No recipient was accepted; RCPT again, or RSET")
            raise Refused("503 5.5.1 RCPT first")

    def data(self, argument):
        """DATA -- the message: header lines, an empty line, text; then a line with only a dot"""
        self.need_recipients()
        if self.envelope.arrival:
            raise Refused("503 5.5.1 BDAT has begun; end it with LAST, or RSET")
        arrival = self.envelope.arrival = Arrival(self, self.envelope)
        self.reply("354 Send the message; a line with only a dot ends it")
        try:
            for block in self.content_by_line() if self.bare_lf else self.content():
                arrival.add(block)
            if self.server.trace:
                self.trace_data("C", b"".join(dot_stuff([bytes(arrival.shown)])), arrival.octets)
            return arrival.finish()
        finally:
            self.reset()

    def content(self):
        """Yield the message that follows DATA, un-stuffed; put back what comes behind its end."""
        rest, begun = b"\r\n", False
        for block in self.reader.blocks(self.server.timeout, READ_BLOCK):
            content, rest, ended = dot_unstuff(rest + block)
            if content:
                yield content if begun else content[2:]
                begun = True
            if ended:
                self.reader.buffer[:0] = rest
                return

    def content_by_line(self):
        """The same in a session whose lines end in LF: somebody types into netcat, so speed does not matter."""
        line_start = True
        while True:
            line = self.reader.readline(READ_BLOCK, self.server.timeout)
            if line_start and line in (b".\n", b".\r\n"):
                return
            yield line.removeprefix(b".") if line_start else line
            line_start = line.endswith(b"\n")

    def bdat(self, argument):
        """BDAT 1000 LAST -- a message, or a piece of it, of so many octets, which follow at once"""
        size, last = self.chunk(argument)
        try:
            self.need_recipients()
        except Refused:
            self.skip_chunk("BDAT", argument)
            raise
        arrival = self.envelope.arrival = self.envelope.arrival or Arrival(self, self.envelope)
        for block in self.read_chunk(size):
            arrival.add(block)
        if not arrival.refusal and not last:
            return f"250 2.0.0 {size} octets taken"
        try:
            self.trace_data("C", arrival.shown, arrival.octets)
            return arrival.refusal or arrival.finish()
        finally:
            self.reset()

    def chunk(self, argument):
        """Read `size [LAST]` (RFC 3030 2)."""
        match = re.fullmatch(r"([0-9]{1,20})(?: +(LAST))?", argument, re.IGNORECASE | re.ASCII)
        if not match:
            raise Refused("501 5.5.4 Write BDAT size or BDAT size LAST")
        return int(match[1]), bool(match[2])

    def read_chunk(self, size):
        """Yield the octets of a chunk."""
        blocks = self.reader.blocks(self.server.timeout, READ_BLOCK)
        while size:
            block = self.reader.take(min(size, READ_BLOCK)) or next(blocks)
            if len(block) > size:
                block, self.reader.buffer[:0] = block[:size], block[size:]
            size -= len(block)
            yield block

    def skip_chunk(self, verb, argument):
        """Read a chunk that comes with a refused BDAT: it is no command."""
        if verb == "BDAT":
            for _ in self.read_chunk(self.chunk(argument)[0]):
                pass

    def rset(self, argument):
        """RSET -- forget the message that has begun"""
        self.reset()
        return "250 2.0.0 Ok"

    # ---- what becomes of the message

    def copies(self, envelope):
        """Return a copy per mailbox, each with its trace fields, and one for the queue if any of it goes elsewhere."""
        received, copies = self.received(envelope), {}
        for recipient in envelope.accepted:
            for mailbox in recipient.mailboxes:
                if mailbox not in copies:
                    head = trace_fields(envelope.sender, mailbox, recipient.address, received)
                    copies[mailbox] = Target(self.server.store.mailbox(mailbox), head)
        if not all(recipient.mailboxes for recipient in envelope.accepted):
            copies[None] = Target(self.server.store.queue_folder, received.encode(), envelope.id)
        return list(copies.values())

    def received(self, envelope):
        """Return the trace field of this hop (RFC 5321 4.4, `with` by RFC 3848 and RFC 6531 4.3)."""
        protocol = "S" * self.tls + "A" * bool(self.user)
        protocol = ("UTF8SMTP" if "SMTPUTF8" in envelope.parameters else "ESMTP") + protocol
        if not self.esmtp and protocol == "ESMTP":
            protocol = "SMTP"
        ip = f"IPv6:{self.peer[0]}" if ":" in self.peer[0] else self.peer[0]
        only = f"\r\n\tfor <{envelope.accepted[0].address}>" if len(envelope.accepted) == 1 else ""
        by = f"\tby {self.server.hostname} with {protocol} id {envelope.id}{only}; {mail_date(time.time())}\r\n"
        return f"Received: from {self.helo} ([{ip}])\r\n{by}"

    def queue_entry(self, envelope):
        """Return the queue's record of a message for other hosts, or None when all of it stays here."""
        remote = {recipient.address: recipient for recipient in envelope.accepted if not recipient.mailboxes}
        return new_entry(envelope.id, envelope.sender, list(remote.values()), envelope.parameters) if remote else None

    def stored(self, envelope, octets, paths):
        """Tell everybody who wants to know that a message is on disk."""
        server, to = self.server, ", ".join(envelope.recipients)
        self.log("queued as %s from <%s> to %s, %d octets", envelope.id, envelope.sender, to, octets)
        if server.on_message:
            try:
                server.on_message(envelope, paths[0])
            except Exception:
                self.log_error("on_message", traceback=True)
        done = [r for r in envelope.accepted if r.mailboxes and wants(r.notify, "SUCCESS")]
        # Nothing leaves the machine for somebody who has not logged in: a sender's address proves nothing.
        if done and (self.user or server.relay.mailboxes(envelope.sender)):
            entry = new_entry(envelope.id, envelope.sender, done, envelope.parameters)
            for recipient in entry["recipients"]:
                recipient.update(action="delivered", status="2.0.0", error="")
            with contextlib.suppress(OSError):  # logged; the message itself is safe
                server.relay.report(entry, entry["recipients"], "", paths[0])

    # ---- questions

    def vrfy(self, argument):
        """VRFY alice@example.test -- is there such a mailbox?"""
        name, utf8 = self.asked_name(argument, "VRFY")
        if not self.may_ask():
            return "252 2.5.0 Send a message and see"
        users, relay, domain = self.server.store.users, self.server.relay, name.rpartition("@")[2]
        elsewhere = "@" in name and not users.is_local(domain)
        found = relay.mailboxes(name)[:1] if elsewhere else users.find(name)
        if elsewhere and not found and relay.route(domain):
            return "252 2.5.0 Not a mailbox here; send a message and see"
        if not found:
            raise Refused("550 5.1.1 Nobody of that name here")
        if len(found) > 1:
            raise Refused("553 5.1.4 More than one has that name; VRFY name@domain")
        self.needs_utf8(found, utf8)
        return f"250 2.1.5 <{found[0]}>"

    def expn(self, argument):
        """EXPN staff@example.test -- who is on that list?"""
        name, utf8 = self.asked_name(argument, "EXPN")
        if not self.may_ask():
            raise Refused("550 5.7.1 Only for those who have logged in")
        members = self.server.store.users.members(name)
        if members is None:
            raise Refused("550 5.1.1 No list of that name here")
        self.needs_utf8(members, utf8)
        return [f"250-2.1.5 <{member}>" for member in members[:-1]] + [f"250 2.1.5 <{members[-1]}>"]

    def asked_name(self, argument, verb):
        """Return the name that VRFY or EXPN asks about, and whether SMTPUTF8 stands behind it (RFC 6531 3.7.4.2)."""
        name, _, word = argument.rpartition(" ") if argument.upper().endswith(" SMTPUTF8") else (argument, "", "")
        name = name.strip()
        name = name[name.rfind("<") + 1 : -1] if name.endswith(">") else name  # with or without who it is
        if not name or not name.isprintable() or name.upper() == "SMTPUTF8":
            raise Refused(f"501 5.5.4 Write {verb} name or {verb} name@domain")
        with contextlib.suppress(ValueError):  # quotes and a route don't count
            name = parse_path(f"<{name}>" if "@" in name else f"<{name}@x>")[0].removesuffix("@x")
        return name, bool(word)

    def needs_utf8(self, addresses, offered):
        if not offered and not "".join(addresses).isascii():
            raise Refused("553 5.6.8 The answer is not ASCII; ask again with SMTPUTF8")

    def may_ask(self):
        return bool(self.user) or is_loopback(self.peer[0])

    def etrn(self, argument):
        """ETRN example.net -- try now what waits for that host; @example.net for a domain and below, # for all"""
        relay, node = self.server.relay, argument.lower()
        if self.envelope:
            raise Refused("503 5.5.1 Not inside a mail transaction; RSET first")
        if not re.fullmatch(NODE, node) or not node.isprintable() or len(node) > MAX_DOMAIN:
            raise Refused("501 5.5.4 Write ETRN host, ETRN @domain or ETRN #")
        if not self.may_ask() or not relay.leads_to(node):
            return f"459 4.7.1 {node} not allowed: no route leads there, or you have to log in"
        try:
            waiting = relay.waiting_for(node)
            if not waiting:
                return f"251 2.0.0 No messages waiting for {node}"
            self.server.store.ask_for_start(node)
        except OSError as error:
            self.log_error("ETRN: %s", error)
            return f"458 4.3.0 Unable to start {node}"
        if node == "#":
            return "250 2.0.0 Started all of the queue"
        return f"253 2.0.0 {in_words(waiting)} waiting for {node} started"

    def help(self, argument):
        """HELP MAIL -- explain one command; HELP alone lists them"""
        function = self.commands.get(argument.upper())
        if argument and not function:
            raise Refused("504 5.5.4 There is no such command; HELP lists those there are")
        if function:
            line, _, meaning = function.__doc__.partition(" -- ")
            return [f"214-2.0.0 {line}", f"214 2.0.0 {meaning}"]
        here = [verb for verb in self.commands if verb != "STARTTLS" or self.server.tls]
        lines = [f"Commands: {' '.join(here)}", f"Now: {' '.join(self.sensible())}"]
        return [f"214-2.0.0 {line}" for line in lines] + ["214 2.0.0 HELP MAIL explains MAIL, and so on"]

    def sensible(self):
        """Return the commands that lead on from here."""
        always = ["NOOP", "QUIT"]
        if not self.helo:
            return ["EHLO", "HELO", *always]
        if self.envelope:
            ready = ["DATA", "BDAT"] if self.envelope.accepted else []
            return (["BDAT"] if self.envelope.arrival else ["RCPT", *ready]) + ["RSET", *always]
        upgrade = ["STARTTLS"] if self.server.tls and not self.tls else []
        login = ["AUTH"] if not self.user and self.may_log_in_here() else []
        return [v for v in [*upgrade, *login, "MAIL", "VRFY", "EXPN", "ETRN", *always] if not self.too_early(v)]

    def noop(self, argument):
        """NOOP -- nothing, politely"""
        return "250 2.0.0 Ok"

    def quit(self, argument):
        """QUIT -- good bye"""
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
    without_argument = {"STARTTLS", "DATA", "RSET", "QUIT"}
    before_tls = {"EHLO", "STARTTLS", "NOOP", "QUIT"}  # RFC 3207 4
    before_login = {"HELO", "EHLO", "STARTTLS", "AUTH", "NOOP", "RSET", "HELP", "QUIT"}  # RFC 4954 6


# ---------------------------------------------------------------- the server and the command line


class SMTPServer(LineServer):
    """One SMTP listener on `address`, (host, port); port 0 takes a free one.  `with` serves.

    Keywords, besides those of LineServer: `require_auth`, `size_limit` (octets), `relay` ("host:port", or a Relay to
    share, which its maker stops), `route` (a dict of domain to "host:port", or a list of "domain=host:port"),
    `relay_options` (keywords of Relay), `on_message(envelope, path)` (called when a message is on disk, before its 250)
    and `intercept(session, verb, argument)`, which sees each command first, "CONNECT" before the greeting and "." at
    the end of a message: a string that it returns is the reply, raising Disconnect drops the line.
    """

    def __init__(
        self,
        address: tuple[str, int],
        store: Store,
        *,
        require_auth: bool = False,
        size_limit: int = MAX_SIZE,
        relay: "str | Relay | None" = None,
        route: "dict[str, str] | list[str] | None" = None,
        relay_options: dict | None = None,
        on_message=None,
        **options,
    ):
        self.require_auth, self.size_limit, self.on_message = require_auth, size_limit, on_message
        self.owns_relay = not isinstance(relay, Relay)
        if self.owns_relay:
            hostname = options.get("hostname") or store.host
            relay = Relay(store, hostname, relay, as_routes(route), **(relay_options or {}))
        self.relay = relay
        super().__init__(address, SMTPHandler, store, **options)

    def start(self) -> None:
        super().start()
        self.relay.start()

    def begin_stop(self) -> None:
        super().begin_stop()
        if self.owns_relay:
            self.relay.begin_stop()

    def server_close(self, seconds: float = lineserver.STOPPING) -> None:
        super().server_close(seconds)
        if self.owns_relay:
            self.relay.stop()


def parse_arguments(argv: list[str] | None):
    """Read the command line; end the program when it is wrong."""
    import startup_simple

    about, tls_ports = "A small mail server: SMTP in, POP3 out.", [("--smtps-port", 1465), ("--pop3s-port", 1995)]
    parser = startup_simple.option_parser("smtpd_simple.py", about, 1025, tls_ports)
    add = parser.add_argument
    port = startup_simple.port_number
    add("--pop3", type=port, nargs="?", const=1110, metavar="PORT", help="serve POP3 as well (port %(const)s)")
    add("--require-auth", action="store_true", help="no mail and no questions before a login")
    add(
        "--size-limit",
        type=startup_simple.positive,
        default=MAX_SIZE,
        metavar="BYTES",
        help="of a message (%(default)s)",
    )
    add("--relay", metavar="HOST[:PORT]", help="next host for what is not local, from users who logged in")
    add("--route", action="append", metavar="DOMAIN=HOST[:PORT]", help="next host for one domain; may be repeated")
    add("--intercept", metavar="FILE.py", help="a file whose intercept(session, verb, argument) may answer")
    add("--no-sync", action="store_true", help="acknowledge mail before the disk has it")
    args = parser.parse_args(argv)
    startup_simple.check_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the server as the command line says; return the exit status."""
    import startup_simple

    args = parse_arguments(argv)
    return startup_simple.exit_status("smtpd_simple.py", lambda: serve(args))


def serve(args) -> int:
    """Open the listeners that the options name, and serve; raise ValueError or OSError."""
    import startup_simple

    options, listen, host = startup_simple.shared_options(args), startup_simple.listen, args.host
    options["intercept"] = None if args.intercept is None else startup_simple.load_intercept(args.intercept)
    store = Store(args.spool, users_file(args.users), sync=not args.no_sync)
    smtp = {"require_auth": args.require_auth, "size_limit": args.size_limit, **options}
    servers = [listen(SMTPServer, (host, args.port), store, relay=args.relay, route=args.route, **smtp)]
    if args.smtps_port is not None:
        shared = {"relay": servers[0].relay, "implicit_tls": True}
        servers.append(listen(SMTPServer, (host, args.smtps_port), store, **shared, **smtp))
    for port, implicit_tls in ((args.pop3, False), (args.pop3s_port, True)):
        if port is not None:
            from pop3d_simple import POP3Server

            servers.append(listen(POP3Server, (host, port), store, implicit_tls=implicit_tls, **options))
    return startup_simple.run(servers, args.processes, startup_simple.notice(store, servers))


if __name__ == "__main__":
    sys.exit(main())
