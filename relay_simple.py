"""The way to other hosts: routes, the queue's worker, the client session, delivery reports.

smtpd_simple.py puts mail for elsewhere into the queue of store.py; a `Relay` sends it on, through
smtplib, to the next host that its `Routing` names.  What fails is tried again with growing pauses;
what fails for good, or for too long, comes back to the sender as a report (RFC 3461, 3464).

    relay = Relay(store, "mail.example.test", routes={"example.net": "mail.example.net:25"})
    with SMTPServer(("127.0.0.1", 0), store, relay=relay) as smtp:
        ...
    relay.stop()

Read it in this order: `Routing`, `Relay.work`, `attempt`, `apply_outcomes`; then the reports.
"""

import contextlib
import functools
import io
import itertools
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from lineserver import (
    CUT_TIMEOUT,
    MAX_LINE,
    STOP_TIMEOUT,
    ClientTimeout,
    Disconnect,
    LineReader,
    check_option,
    clock,
    dot_stuff,
    is_host_name,
    join,
    printable,
    show_address,
)
from store import (
    Delivery,
    QueuedRecipient,
    QueueEntry,
    Store,
    Target,
    canonical,
    mail_date,
    new_id,
    to_crlf,
    unlock,
)

if TYPE_CHECKING:
    from smtplib import SMTP

READ_BLOCK = 1 << 17  # octets of a message that are read at once
MAX_HEADER = 1 << 16  # octets of a header that are looked into
MAX_RETURNED = 1 << 20  # octets of a message that a report gives back whole
ETRN_PAUSE = 1.0  # seconds between two tries that are asked for
POLL_SECONDS = 1.0  # between two looks at the queue: other processes put mail into it, too
CONNECT_TIMEOUT = 30  # seconds for a connection, which a stop can't cut
FINAL_TIMEOUT = 600  # seconds for the reply to a message, RFC 5321 4.5.3.2.6
MAX_TEXT_LINE = 998  # octets of a line of mail, RFC 5322 2.1.1
MAX_REPLY_LINES = 200  # of a next host's reply; EHLO's are the longest

# xtext (RFC 3461 4): what stands for printable ASCII.
HEXCHAR = r"\+(?:[2-6][0-9A-F]|7[0-9A-E])"

Host = tuple[str, int]
Recipients = list[QueuedRecipient]


# ---------------------------------------------------------------- where mail goes


class Routing:
    """Where mail for an address goes: to mailboxes here, to a next host, or nowhere.

    `default` is the next host for everything that is not local, `routes` those for single domains;
    each is `host` or `host:port`.  Raises ValueError for a bad one.
    """

    def __init__(
        self, store: Store, hostname: str, default: str | None, routes: dict[str, str] | None
    ):
        self.store = store
        self.hostname = canonical(hostname)
        self.default = None if default is None else split_address(default, f"relay {default}")
        self.routes = {
            canonical(domain): split_address(to, f"route {domain}={to}")
            for domain, to in (routes or {}).items()
        }

    def mailboxes(self, address: str) -> list[str]:
        """Return the mailboxes here that mail for an address reaches, in order.

        A route of its own beats a catch-all.  Our own postmaster, from whom reports are, is here.
        """
        users, domain = self.store.users, domain_of(address)
        if canonical(address) == f"postmaster@{self.hostname}" and not users.is_local(domain):
            return users.mailboxes("postmaster")
        elsewhere = domain in self.routes and not users.is_local(domain)
        return [] if elsewhere else users.mailboxes(address)

    def next_host(self, domain: str) -> Host | None:
        """Return the next host for a domain, that of its own route first, or None."""
        return self.routes.get(canonical(domain), self.default)

    def may_report_to(self, sender: str) -> bool:
        """Say whether a report may go to a sender who has not logged in.

        That is to a mailbox here, or along the domain's own route: anybody can write anybody's
        address behind MAIL FROM, and must not make us send mail to strangers.
        """
        return bool(self.mailboxes(sender)) or domain_of(sender) in self.routes

    def serves_node(self, node: str) -> bool:
        """Say whether mail for ETRN's `host`, `@domain` or `#` (all) is ours to send."""
        if node == "#":
            return bool(self.default or self.routes)
        named = any(matches_node(node, domain) for domain in self.routes)
        return not node.startswith("#") and bool(self.default or named)


def domain_of(address: str) -> str:
    """Return the domain of an address in its canonical form."""
    return canonical(address.rpartition("@")[2])


def matches_node(node: str, domain: str) -> bool:
    """Say whether ETRN's node (in its canonical form) stands for a domain (RFC 1985 5.3)."""
    below = node.startswith("@") and domain.endswith("." + node[1:])
    return node in ("#", domain, f"@{domain}") or below


def split_address(text: str, option: str) -> Host:
    """Read `host`, `host:port` or `[address]:port`; raise ValueError that quotes the option."""
    if text.count(":") > 1 and re.fullmatch("[0-9A-Fa-f:.]+", text):
        return text, 25  # an IPv6 address without brackets
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::([0-9]{1,5}))?", text)
    if match and 0 < (port := int(match[3] or 25)) < 65536:
        if match[1]:
            return match[1], port
        with contextlib.suppress(UnicodeError):  # a label that is empty or too long
            host = match[2].encode("idna").decode()
            if is_host_name(host):
                return host, port
    raise ValueError(f"{printable(option)}: not HOST or HOST:PORT, with a port of 1 to 65535")


def as_routes(given: "dict[str, str] | list[str] | None") -> dict[str, str]:
    """Return routes from a dict or from `domain=host:port` texts; raise ValueError or TypeError."""
    if isinstance(given, dict):
        return given
    check_option("route", given, list, tuple, None)
    routes = {}
    for text in given or []:
        domain, equals, host = text.partition("=")
        if not (domain and equals and host):
            raise ValueError(f"route {printable(text)}: not DOMAIN=HOST or DOMAIN=HOST:PORT")
        routes[domain] = host
    return routes


# ---------------------------------------------------------------- the worker


class Outcome(NamedTuple):
    """The result of one attempt for one recipient: relayed, delayed or failed (RFC 3464 2.3.3).

    `dsn`: the next host supports DSN and reports success itself.
    """

    action: str
    status: str
    diagnostic: str
    dsn: bool = False

    @classmethod
    def from_reply(cls, code: int, text: bytes, dsn: bool = False) -> "Outcome":
        """Read a reply of the next host."""
        said = printable(b" ".join(text.split()).decode("utf-8", "replace"))[:400]
        action = {2: "relayed", 5: "failed"}.get(code // 100, "delayed")
        digit = {"relayed": 2, "failed": 5, "delayed": 4}[action]
        status = re.match(rf"{digit}\.[0-9]{{1,3}}\.[0-9]{{1,3}}\b", said)
        return cls(action, status[0] if status else f"{digit}.0.0", f"{code} {said}", dsn)


Outcomes = dict[str, Outcome]  # by address


class UnreadableMessage(Exception):
    """A message in the queue can't be read, which is not the next host's fault."""


class MessageFile(io.FileIO):
    """A queued message; reading it raises UnreadableMessage, where OSErrors are the network's."""

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            return super().read(size) or b""
        except OSError as error:
            raise UnreadableMessage(error.strerror) from None

    def size(self) -> int:
        """Return its octets."""
        return os.fstat(self.fileno()).st_size


class Relay:
    """The queue's worker: sends mail on, tries again, and reports to senders.

    A recipient that the next host has accepted is never sent to again, unless the server ends
    before that is on disk (killed behind the 250, or with a full disk).  One process works at a
    time, by a lock in the queue's folder.

    Options, in seconds: `first_pause`, doubled after each try up to `longest_pause`; `lifetime`,
    after which a message goes back; `warn_after`, for those who asked for a report on delay;
    `timeout` for each reply, and up to ten times that for the one to a message.  `hosts_at_once`:
    how many next hosts are talked to at a time.
    """

    def __init__(
        self,
        store: Store,
        hostname: str,
        default: str | None = None,
        routes: dict[str, str] | None = None,
        *,
        first_pause: float = 60,
        longest_pause: float = 4 * 3600,
        lifetime: float = 5 * 86400,
        warn_after: float = 4 * 3600,
        timeout: float = 300,
        hosts_at_once: int = 20,
    ):
        check_option("relay", default, str, None)
        pauses = {"first_pause": first_pause, "longest_pause": longest_pause}
        ages = {"lifetime": lifetime, "warn_after": warn_after}
        for name, value in (pauses | ages).items():
            check_option(name, value, int, float, least=0)
        check_option("timeout", timeout, int, float, least=0.001)
        check_option("hosts_at_once", hosts_at_once, int, least=1)
        self.store = store
        self.hostname = hostname
        self.routing = Routing(store, hostname, default, routes)
        self.first_pause = first_pause
        self.longest_pause = longest_pause
        self.lifetime = lifetime
        self.warn_after = warn_after
        self.timeout = timeout
        self.hosts_at_once = hosts_at_once
        self.entries: dict[str, QueueEntry] = {}  # the queue, by ID
        self.unsaved: set[str] = set()  # IDs of entries that are not on disk as they are here
        self.active: dict[Host | None, threading.Thread] = {}  # by the host that each talks to
        self.clients: set[SMTP] = set()
        self.thread: threading.Thread | None = None
        self.queue_lock: int | None = None
        self.lock = threading.RLock()
        self.domains: dict[tuple[str, int], set[str]] = {}  # of the recipients of each entry
        self.count_lock = threading.Lock()
        self.stopping = threading.Event()
        self.log = logging.getLogger("relay")

    def waiting_for(self, node: str) -> int:
        """Return how many queued messages an ETRN node stands for; raise OSError.

        One entry is in memory at a time, however many clients ask, and each is read once.
        """
        with self.count_lock:
            known, self.domains = self.domains, {}
            for name in self.store.queue_names():
                version = self.store.entry_version(name)
                if version is not None and (name, version) in known:
                    self.domains[name, version] = known[name, version]
                elif version is not None and (entry := self.store.entry(name)):
                    self.domains[name, version] = {r.domain for r in entry.recipients}
            found = self.domains.values()
            return sum(any(matches_node(node, domain) for domain in domains) for domains in found)

    def start(self) -> None:
        """Work on the queue in a thread, if there is any route, or mail from when there was one."""
        if self.thread is None and (self.routing.serves_node("#") or self.store.queue_names()):
            thread = threading.Thread(target=self.work, daemon=True, name="relay")
            thread.start()
            self.thread = thread

    def begin_stop(self) -> None:
        """Begin nothing new."""
        self.stopping.set()
        self.store.queue_changed.set()

    def stop(self, seconds: float = STOP_TIMEOUT) -> None:
        """Stop; a transaction under way gets `seconds` to end, otherwise it is tried again."""
        self.begin_stop()
        deadline = clock() + max(seconds, CUT_TIMEOUT)
        join(filter(None, [self.thread]), deadline)  # first, for it may just be starting others
        join(list(self.active.values()), deadline)
        for client in list(self.clients):  # close() would wait for the thread that reads
            with contextlib.suppress(OSError, AttributeError):
                client.sock.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        join(list(self.active.values()), clock() + 1)
        if self.queue_lock is not None:
            self.save_again()
            unlock(self.queue_lock)
            self.queue_lock = None

    def work(self) -> None:
        while not self.stopping.is_set():
            self.store.queue_changed.clear()
            pause = POLL_SECONDS
            try:
                if self.queue_lock is None:
                    self.queue_lock = self.store.lock_queue()
                if self.queue_lock is not None:
                    self.refresh_queue()
                    pause = self.send_what_is_due()
                    if self.unsaved:
                        pause = min(pause, self.first_pause)
            except Exception:
                self.log.exception("relay")
            self.store.queue_changed.wait(min(max(pause, 0.01), POLL_SECONDS))

    def refresh_queue(self) -> None:
        """Load new entries, drop those whose files are gone, make due what ETRN asked for."""
        names = set(self.store.queue_names())
        with self.lock:
            for name in names - set(self.entries):
                self.load_entry(name)
            self.save_again()
            for gone in set(self.entries) - names - self.unsaved:
                del self.entries[gone]
            for node in self.store.take_start_requests():
                recipients = (entry.recipients for entry in self.entries.values())
                for recipient in itertools.chain.from_iterable(recipients):
                    if matches_node(node, recipient.domain):
                        # At most one try per ETRN_PAUSE, however often ETRN is sent.
                        soon = recipient.last_try + ETRN_PAUSE
                        recipient.due = min(recipient.due, soon)

    def save_again(self) -> None:
        """Report and save what could not be reported or saved before."""
        for name in list(self.unsaved):
            if name not in self.entries:
                self.unsaved.discard(name)
                continue
            try:
                self.report_and_save(self.entries[name])
            except OSError as error:
                self.store.complain_once("%s can't be saved: %s", name, error)

    def load_entry(self, name: str) -> None:
        """Load one entry; one that can't be read now is looked at again."""
        if entry := self.store.readable_entry(name):
            for recipient in entry.recipients:
                # The clock may have been wrong: nothing waits longer than the longest pause.
                wait = min(recipient.next_try - time.time(), self.longest_pause)
                recipient.due = clock() + max(wait, 0)
                if recipient.report_due:
                    self.unsaved.add(name)
            self.entries[name] = entry

    def send_what_is_due(self) -> float:
        """Start a thread for each host that mail is due for; return seconds until the next is."""
        now, soonest = clock(), 3600.0
        jobs: dict[Host | None, dict[str, list[QueuedRecipient]]] = {}
        with self.lock:
            for entry in sorted(self.entries.values(), key=lambda entry: entry.arrival_time):
                for recipient in entry.recipients:
                    host = self.routing.next_host(recipient.domain)
                    if host in self.active or recipient.done:
                        continue
                    if recipient.due > now:
                        soonest = min(soonest, recipient.due - now)
                    else:
                        jobs.setdefault(host, {}).setdefault(entry.id, []).append(recipient)
            for host, messages in jobs.items():
                if len(self.active) < self.hosts_at_once:
                    args = host, messages
                    thread = threading.Thread(
                        target=self.serve_host, args=args, daemon=True, name="relay"
                    )
                    with contextlib.suppress(RuntimeError, MemoryError):  # no thread to be had now
                        thread.start()
                        self.active[host] = thread
        return soonest

    def serve_host(self, host: Host | None, messages: dict[str, list[QueuedRecipient]]) -> None:
        """Try everything that is due for one host; when it is down the rest waits untried.

        None is the host of mail that has lost its route: it waits for a route, or for its end.
        """
        down = None if host else Outcome("delayed", "4.4.4", "no route to this domain any more")
        try:
            for name, recipients in messages.items():
                entry = self.entries.get(name)
                if self.stopping.is_set():
                    return
                try:
                    if entry and host and down is None:
                        down = self.attempt(host, entry, recipients)
                    elif entry and down:
                        outcomes = dict.fromkeys(addresses(recipients), down)
                        self.apply_outcomes(host, entry, recipients, outcomes)
                except Exception:  # for instance a full disk: the other messages need not wait
                    self.log.exception("%s to %s", name, host)
                    for recipient in recipients:
                        recipient.due = max(recipient.due, clock() + self.first_pause)
        finally:
            with self.lock:  # send_what_is_due() may not have entered it yet
                del self.active[host]
            self.store.queue_changed.set()

    def attempt(self, host: Host, entry: QueueEntry, recipients: Recipients) -> Outcome | None:
        """Try one message, over a connection of its own.

        Returns the outcome when the host can't be talked to at all, and None otherwise.
        """
        outcomes: Outcomes = {}
        client = lost = None
        try:
            with self.open_message(entry.id) as file:
                client = self.connect(host)
                if not self.stopping.is_set():
                    self.transact(client, entry, file, recipients, outcomes)
        except UnreadableMessage as error:
            lost = Outcome("delayed", "4.3.0", f"the message can't be read: {error}")
        except OSError as error:  # smtplib's are OSErrors, too
            why = reply_in(error) or printable(f"{show_address(*host)}: {error}")[:400]
            lost = Outcome("delayed", "4.4.2" if client else "4.4.1", why)
        if lost and not self.stopping.is_set():  # a stop is no attempt
            for address in addresses(recipients):
                outcomes.setdefault(address, lost)
        try:
            self.apply_outcomes(host, entry, recipients, outcomes)
        finally:
            if client and lost:
                self.drop(client)
            elif client:
                self.leave(client)
        return lost if lost and lost.status == "4.4.1" else None

    def open_message(self, name: str) -> "MessageFile":
        """Open a queued message; raise UnreadableMessage."""
        try:
            return MessageFile(f"{self.store.queue_folder}/{name}")
        except OSError as error:
            raise UnreadableMessage(error.strerror) from None

    def apply_outcomes(
        self, host: Host | None, entry: QueueEntry, recipients: Recipients, outcomes: Outcomes
    ) -> None:
        """Record the outcome for each recipient, durably, and report to the sender.

        In memory first: if anything fails later, accepted recipients must not be sent to again.
        """
        tried = [recipient for recipient in recipients if recipient.address in outcomes]
        if not tried:
            return
        now, wall_clock, age = clock(), time.time(), entry.age()
        with self.lock:
            for recipient in tried:
                outcome = outcomes[recipient.address]
                self.record_outcome(recipient, outcome, host, age)
                if not recipient.done:
                    pause = self.pause_after(recipient, age)
                    recipient.due, recipient.next_try = now + pause, wall_clock + pause
                recipient.last_try = now
                where = show_address(*host) if host else "nowhere"
                log_values = entry.id, recipient.address, where, recipient.action
                self.log.info("%s to <%s> via %s: %s (%s)", *log_values, recipient.diagnostic)
            self.report_and_save(entry)

    def record_outcome(
        self, recipient: QueuedRecipient, outcome: Outcome, host: Host | None, age: float
    ) -> None:
        """Write an outcome into a recipient's record, and whether the sender gets a report."""
        recipient.action, recipient.status, recipient.diagnostic = outcome[:3]
        recipient.remote = remote_name(host[0]) if host else ""
        recipient.attempts += 1
        if outcome.action == "delayed" and age >= self.lifetime:
            recipient.action, recipient.status = "failed", "5.4.7"
        if recipient.action == "relayed":
            recipient.report_due = recipient.wants("SUCCESS") and not outcome.dsn
        elif recipient.action == "failed":
            recipient.report_due = recipient.wants("FAILURE")
        elif recipient.wants("DELAY") and not recipient.warned and age >= self.warn_after:
            recipient.warned = recipient.report_due = True

    def pause_after(self, recipient: QueuedRecipient, age: float) -> float:
        """Return how long a recipient waits after an attempt.

        Those that were tried together wait equally, and are tried together again: one transaction
        for one host.
        """
        pause: float = self.first_pause * 2 ** min(recipient.attempts - 1, 30)
        return min(pause, self.longest_pause, max(self.lifetime - age, 0.01))

    def report_and_save(self, entry: QueueEntry) -> None:
        """Report what is due, then put the entry on disk as it is now, or remove it.

        What fails is tried again by refresh_queue(): until then the entry stays in memory, and
        nobody who is done is sent to again.  Raises OSError when the entry can't be saved.
        """
        self.unsaved.add(entry.id)
        if entry.recipients and self.store.entry(entry.id) is None:
            self.unsaved.discard(entry.id)  # somebody has removed it from the queue meanwhile
            return
        due = [recipient for recipient in entry.recipients if recipient.report_due]
        with contextlib.suppress(OSError):  # which is logged
            if due:
                self.report(entry, due, f"{self.store.queue_folder}/{entry.id}")
            for recipient in due:
                recipient.report_due = False
        entry.recipients = [r for r in entry.recipients if r.report_due or not r.done]
        if entry.recipients:
            self.store.save_entry(entry)
        else:
            self.store.dequeue(entry.id)
            self.entries.pop(entry.id, None)
        if not any(recipient.report_due for recipient in entry.recipients):
            self.unsaved.discard(entry.id)

    # ---- the client session

    def connect(self, host: Host, tls: bool = True) -> "SMTP":
        """Return a client that has said EHLO, over TLS when the host offers it; raise OSError."""
        import smtplib

        client: SMTP = client_class()(local_hostname=self.hostname, timeout=self.timeout)
        client._host = host[0]  # type: ignore[attr-defined]  # which TLS tells the next host
        self.clients.add(client)  # before it waits for the greeting, so that stop() can cut it
        try:
            code, text = client.connect(*host)
            if code != 220:
                raise smtplib.SMTPConnectError(code, text)
            with contextlib.suppress(PermissionError):
                # A message's end, a small packet of its own, must not wait for the next host's
                # delayed acknowledgement.
                client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # type: ignore[union-attr]
            self.greet(client)
            if tls and client.has_extn("starttls") and not self.encrypt(client, host):
                self.drop(client)
                return self.connect(host, tls=False)
        except BaseException:
            self.drop(client)
            raise
        return client

    def greet(self, client: "SMTP") -> None:
        """Say EHLO, or HELO to a host that refuses it for good; a 4yz means "later"."""
        import smtplib

        code, text = client.ehlo()
        if code // 100 == 5:
            code, text = client.helo()
        if code // 100 != 2:
            raise smtplib.SMTPHeloError(code, text)

    def encrypt(self, client: "SMTP", host: Host) -> bool:
        """Start TLS; return False when that has failed, and the connection with it.

        Certificates are not checked (RFC 7435): encryption without proof is better than clear text.
        """
        import smtplib
        import ssl

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        where = show_address(*host)
        try:
            client.starttls(context=context)
            if client.sock.version() is None:  # type: ignore[union-attr]
                raise ConnectionError("cut")  # before the handshake, which ssl does not tell
        except smtplib.SMTPResponseException as error:  # RFC 3207 4: we may go on without
            self.log.warning("relay to %s: in clear: %s", where, reply_in(error))
            return True
        except OSError as error:
            self.log.warning("relay to %s: in clear, since TLS failed: %s", where, error)
            return False
        self.greet(client)
        return True

    def leave(self, client: "SMTP") -> None:
        with contextlib.suppress(OSError):
            client.timeout = min(client.timeout, 5)  # the transaction is over
            client.quit()
        self.drop(client)

    def drop(self, client: "SMTP") -> None:
        client.close()
        self.clients.discard(client)

    def transact(
        self,
        client: "SMTP",
        entry: QueueEntry,
        file: MessageFile,
        recipients: Recipients,
        outcomes: Outcomes,
    ) -> None:
        """Carry out one mail transaction; write each recipient's outcome as soon as it is known."""
        dsn = client.has_extn("dsn")
        client.command_encoding = "utf-8"
        if "SMTPUTF8" in entry.parameters and not client.has_extn("smtputf8"):
            header = file.read(MAX_HEADER).partition(b"\r\n\r\n")[0]
            file.seek(0)
            outcomes.update(needing_utf8(entry.sender, header, recipients, dsn))
            recipients = [r for r in recipients if r.address not in outcomes]
            if not recipients:
                return
        eight_bit = (entry.parameters.get("BODY") or "").upper() == "8BITMIME"
        if eight_bit and not client.has_extn("8bitmime"):
            self.log.warning("%s: sent as it is to a host without 8BITMIME", entry.id)
        options = mail_options(client, entry, file.size())  # with our Received
        code, text = client.docmd("MAIL", f"FROM:<{entry.sender}>{options}")
        if code // 100 != 2:
            refused = Outcome.from_reply(code, text)
            outcomes.update(dict.fromkeys(addresses(recipients), refused))
            return
        accepted = []
        for r in recipients:
            code, text = client.docmd("RCPT", f"TO:<{r.address}>{rcpt_options(r) if dsn else ''}")
            if code // 100 == 2:
                accepted.append(r.address)
            else:
                refused = Outcome.from_reply(code, text)
                if too_many_recipients(code, text):
                    refused = refused._replace(action="delayed", status="4.5.3")
                outcomes[r.address] = refused
        if accepted:
            outcome = Outcome.from_reply(*self.send_content(client, file), dsn)
            outcomes.update(dict.fromkeys(accepted, outcome))

    def send_content(self, client: "SMTP", file: MessageFile) -> tuple[int, bytes]:
        """Send DATA and the message; return the reply, also one that comes too early."""
        code, text = client.docmd("DATA")
        if code // 100 == 2:
            # A 2yz reply to DATA is a protocol error: no message was sent, none was accepted.
            raise ConnectionError(f"answered DATA with {code} {text.decode(errors='replace')}")
        if code != 354:
            return code, text
        try:
            for block in itertools.chain(dot_stuff(to_crlf(file.read, READ_BLOCK)), [b".\r\n"]):
                client.sock.sendall(block)  # type: ignore[union-attr]
        except OSError:  # the host may have said why it hung up; only a refusal can be meant
            code, text = client.getreply()
            if code // 100 not in (4, 5):
                raise
            return code, text
        client.timeout = min(self.timeout * 10, max(self.timeout, FINAL_TIMEOUT))
        try:
            return client.getreply()
        finally:
            client.timeout = self.timeout

    # ---- delivery reports

    def report(self, entry: QueueEntry, recipients: Recipients, path: str) -> None:
        """Report to a message's sender on some recipients; `path` is the message's file.

        A report comes from the null sender, and none is sent to it, so that none ever answers
        another (RFC 3461 5.2.8).  Raises OSError when it can't be stored.
        """
        if not entry.sender:
            return
        name = new_id()
        try:
            original, whole = self.returned_part(entry, recipients, path)
            report = build_report(self, name, entry, recipients, original, whole)
            self.inject(name, entry.sender, report)
        except OSError as error:
            self.store.complain_once(
                "no report to <%s> about %s: %s", entry.sender, entry.id, error
            )
            raise

    def returned_part(
        self, entry: QueueEntry, recipients: Recipients, path: str
    ) -> tuple[bytes, bool]:
        """Return what a report gives back of the message in a file, and whether that is all of it.

        Only of a failed message, and unless the sender wants the header alone (RFC 3461 4.3).
        """
        failed = any(recipient.action == "failed" for recipient in recipients)
        whole = failed and (entry.parameters.get("RET") or "FULL").upper() == "FULL"
        try:
            with open(path, "rb", buffering=0) as file:
                size = MAX_RETURNED if whole else MAX_HEADER
                original = file.read(size)
                whole = whole and not file.read(1)
        except FileNotFoundError:
            return b"", False
        received = (b"\n" + original).find(b"\nReceived: ")
        original = original[max(received, 0) :]  # whose mailbox it was is not for senders
        return original if whole else original.partition(b"\r\n\r\n")[0] + b"\r\n", whole

    def inject(self, name: str, recipient: str, text: bytes) -> None:
        """Send a report from the null sender: to a mailbox, along a route, or nowhere."""
        received = f"Received: by {self.hostname} id {name}; {mail_date(int(time.time()))}\r\n"
        mailboxes, entry = self.routing.mailboxes(recipient), None
        targets = [self.store.mailbox_target(m, "", recipient, received) for m in mailboxes]
        if not mailboxes:
            domain = domain_of(recipient)
            if self.store.users.is_local(domain) or not self.routing.next_host(domain):
                self.log.warning("report %s for <%s> dropped: no route", name, recipient)
                return
            targets = [Target(self.store.queue_folder, received.encode(), name)]
            parameters: dict[str, str | None] = {"BODY": "8BITMIME"}
            if not recipient.isascii():
                parameters["SMTPUTF8"] = None
            entry = QueueEntry(name, "", parameters, [QueuedRecipient(recipient)])
        with contextlib.closing(Delivery(self.store, targets)) as delivery:
            delivery.write(text)
            delivery.commit(entry)
        self.log.info("report %s to <%s>", name, recipient)


@functools.lru_cache(maxsize=1)
def client_class() -> "type[SMTP]":
    """Return smtplib's client with replies that end, and that are read one after the other."""
    import smtplib

    class Client(smtplib.SMTP):
        reader: LineReader | None = None

        def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
            sock: socket.socket = super()._get_socket(  # type: ignore[misc]
                host, port, min(timeout, CONNECT_TIMEOUT)
            )
            return sock

        def getreply(self) -> tuple[int, bytes]:
            if self.reader is None or self.reader.sock is not self.sock:  # TLS is a new socket
                assert self.sock
                self.reader = LineReader(self.sock, lambda: None)
            try:
                return read_reply(self.reader, self.timeout)
            finally:
                self.reader.limit(self.timeout)  # sending what follows has a deadline of its own

        def close(self) -> None:
            self.reader = None
            super().close()

    return Client


def read_reply(reader: LineReader, seconds: float) -> tuple[int, bytes]:
    """Read a reply of limited length within `seconds`; return code and text.

    Raises OSError: the next host is gone, is too slow, or sends something that is not a reply.
    """
    deadline = clock() + seconds
    text: list[bytes] = []
    try:
        while len(text) < MAX_REPLY_LINES:
            line = reader.readline(MAX_LINE, deadline - clock())
            match = re.fullmatch(rb"([2-5][0-9]{2})(?:([ -])(.*))?\s*", line, re.DOTALL)
            if not match:
                raise ConnectionError("sent something that is not a reply")
            text.append((match[3] or b"").strip())
            if match[2] != b"-":
                return int(match[1]), b"\n".join(text)
    except ClientTimeout:
        raise TimeoutError("timed out") from None
    except Disconnect as error:
        raise ConnectionError(str(error)) from None
    raise ConnectionError("sent an endless reply")


def reply_in(error: OSError) -> str | None:
    """Return the reply that smtplib made an exception of, or None."""
    text, code = getattr(error, "smtp_error", None), getattr(error, "smtp_code", 0)
    return Outcome.from_reply(code, text).diagnostic if isinstance(text, bytes) else None


def too_many_recipients(code: int, text: bytes) -> bool:
    """Say whether a refused RCPT means that there are too many: RFC 5321 4.5.3.1.10 has 552 for it.

    With another enhanced code, such as for a full mailbox, it does not.
    """
    enhanced = re.match(rb"[245]\.([0-9]+\.[0-9]+)", text)
    return code == 552 and (not enhanced or enhanced[1] == b"5.3")


def needing_utf8(sender: str, header: bytes, recipients: Recipients, dsn: bool) -> Outcomes:
    """Return the failures of those who can't be reached without SMTPUTF8 (RFC 6531 3.2)."""
    failures = {}
    for r in recipients:
        if not (sender + r.address + (rcpt_options(r) if dsn else "")).isascii():
            why = "5.6.7", "the next host does not take addresses that are not ASCII"
        elif not header.isascii():
            why = "5.6.9", "the next host does not take header fields that are not ASCII"
        else:
            continue
        failures[r.address] = Outcome("failed", *why)
    return failures


def mail_options(client: "SMTP", entry: QueueEntry, size: int) -> str:
    """Return MAIL's parameters, as the client gave them, those that the next host offers."""
    parameters, offered = entry.parameters, client.has_extn
    options = f" SIZE={size}" if offered("size") else ""
    for name, extension in (("BODY", "8bitmime"), ("RET", "dsn"), ("ENVID", "dsn")):
        if parameters.get(name) and offered(extension):
            options += f" {name}={parameters[name]}"
    return options + " SMTPUTF8" * ("SMTPUTF8" in parameters and offered("smtputf8"))


def addresses(recipients: Iterable[QueuedRecipient]) -> list[str]:
    """Return the addresses of queued recipients."""
    return [recipient.address for recipient in recipients]


def remote_name(host: str) -> str:
    """Return a host as reports name it: addresses in brackets."""
    if ":" in host:
        return f"[IPv6:{host}]"
    return f"[{host}]" if re.fullmatch(r"[0-9.]+", host) else host


def rcpt_options(recipient: QueuedRecipient) -> str:
    """Return RCPT's DSN parameters as the client gave them."""
    notify = f" NOTIFY={recipient.notify}" if recipient.notify else ""
    return notify + (f" ORCPT={recipient.orcpt}" if recipient.orcpt else "")


# ---------------------------------------------------------------- the text of a report


def build_report(
    relay: Relay, name: str, entry: QueueEntry, recipients: Recipients, original: bytes, whole: bool
) -> bytes:
    """Return a delivery report (RFC 3462, 3464) on some recipients of one message.

    `original` is what it gives back: the `whole` message, or its header.
    """
    actions = {recipient.action for recipient in recipients}
    titles = {
        "failed": "could not be delivered",
        "delayed": "is delayed",
        "delivered": "was delivered",
    }
    title = next((titles[action] for action in titles if action in actions), "was passed on")
    boundary = f"report-{name}"
    lines = [
        f"Date: {mail_date(int(time.time()))}",
        f"From: Mail delivery <postmaster@{relay.hostname}>",
        f"To: <{entry.sender}>",
        f"Subject: Your message {title}",
        f"Message-ID: <{name}@{relay.hostname}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        "Content-Type: multipart/report; report-type=delivery-status;",
        f'\tboundary="{boundary}"',
        "Content-Transfer-Encoding: 8bit",
        f"\r\n--{boundary}\r\nContent-Type: text/plain; charset=utf-8",
        "Content-Transfer-Encoding: 8bit\r\n",
        *map(cut, explain(relay, entry, recipients, title)),
        f"\r\n--{boundary}\r\nContent-Type: message/delivery-status\r\n",
        *map(cut, status_fields(relay, entry, recipients)),
        f"\r\n--{boundary}",
        f"Content-Type: {'message/rfc822' if whole else 'text/rfc822-headers'}",
        "Content-Transfer-Encoding: 8bit\r\n\r\n",
    ]
    return "\r\n".join(lines).encode() + original + f"\r\n--{boundary}--\r\n".encode()


def cut(line: str) -> str:
    """Return what of a line is not too long for mail (RFC 5322 2.1.1)."""
    return line.encode()[:MAX_TEXT_LINE].decode(errors="ignore")


def explain(relay: Relay, entry: QueueEntry, recipients: Recipients, title: str) -> list[str]:
    """Return a report's part for people."""
    when = mail_date(int(entry.arrival_time))
    opening = f"This is the mail server {relay.hostname}. Your message of {when} {title}:"
    about = [f"  <{r.address}>: {r.action}. {r.diagnostic}".rstrip() for r in recipients]
    return [opening, "", *about]


def status_fields(relay: Relay, entry: QueueEntry, recipients: Recipients) -> list[str]:
    """Return a report's part for programs: fields about the message, then of each recipient."""
    envid = entry.parameters.get("ENVID")
    lines = [f"Original-Envelope-Id: {unxtext(envid)}"] if envid else []
    lines.append(f"Reporting-MTA: dns; {relay.hostname}")
    lines.append(f"Arrival-Date: {mail_date(int(entry.arrival_time))}")
    for r in recipients:
        lines.append("")
        if r.orcpt:
            kind, _, original = r.orcpt.partition(";")
            original = unxtext(original)
            lines.append(f"Original-Recipient: {kind};{escape_address(original, kind)}")
        kind = "rfc822" if r.address.isascii() else "utf-8"
        lines.append(f"Final-Recipient: {kind};{escape_address(r.address, kind)}")
        lines += [f"Action: {r.action}", f"Status: {r.status}"]
        if r.remote:
            lines.append(f"Remote-MTA: dns; {r.remote}")
        if re.match(r"[2-5][0-9][0-9] ", r.diagnostic):
            lines.append(f"Diagnostic-Code: smtp; {escape_address(r.diagnostic)[:900]}")
        if r.action == "delayed":
            end = time.time() + relay.lifetime - entry.age()
            lines.append(f"Will-Retry-Until: {mail_date(int(end))}")
    return lines


def unxtext(text: str) -> str:
    """Decode xtext (RFC 3461 4), but for what would not be printable ASCII."""
    return re.sub(HEXCHAR, lambda match: chr(int(match[0][1:], 16)), text)


def escape_address(address: str, kind: str = "") -> str:
    """Write an address of a kind in ASCII, as RFC 6533 3 does for fields that must be ASCII."""
    special = "+=\\" if kind.lower() == "utf-8" else ""
    escape = (f"\\x{{{ord(c):X}}}" if c in special or not c.isascii() else c for c in address)
    return "".join(escape)
