"""The way to other hosts: the queue's worker, the client session, delivery reports."""

import collections
import contextlib
import itertools
import logging
import os
import re
import socket
import threading
import time

import lineserver
from lineserver import Disconnect, LineReader, dot_stuff, printable, show_address
from store import Delivery, Store, Target, mail_date, new_id, trace_fields, wire

READ_BLOCK = 1 << 18  # octets of a message that are read at once
MAX_HEADER = 1 << 20  # octets of a header that are looked into
MAX_RETURNED = 1 << 20  # octets of a message that a report gives back whole
ETRN_PAUSE = 1.0  # seconds between two tries that are asked for
MAX_REPLY_LINES = 200  # of a next host's reply; EHLO's are the longest
HEXCHAR = r"\+(?:[2-6][0-9A-F]|7[0-9A-E])"  # of xtext, what stands for printable ASCII


class Recipient(collections.namedtuple("Recipient", "address mailboxes notify orcpt", defaults=[None, None])):
    """One RCPT: where it leads (mailboxes here, or none: elsewhere) and what its sender wants to hear (RFC 3461)."""


def wants(notify: str | None, event: str) -> bool:
    """Say whether a report about SUCCESS, FAILURE or DELAY is wanted; without NOTIFY, about failure."""
    return event in notify.upper().split(",") if notify else event == "FAILURE"


def unxtext(text: str) -> str:
    """Decode xtext (RFC 3461 4); what would not be printable ASCII stays as it was."""
    return re.sub(HEXCHAR, lambda match: chr(int(match[0][1:], 16)), text)


# ---------------------------------------------------------------- from here to the next host


def new_entry(name: str, sender: str, recipients: list[Recipient], parameters: dict) -> dict:
    """Return the record of a message that the queue keeps as JSON, one dict per recipient who waits."""
    fresh = {"attempts": 0, "next": 0.0, "tried": 0.0, "error": "", "warned": False}
    waiting = [{"address": r.address, "notify": r.notify, "orcpt": r.orcpt, **fresh} for r in recipients]
    return {"id": name, "sender": sender, "arrived": time.time(), "parameters": parameters, "recipients": waiting}


class Outcome(collections.namedtuple("Outcome", "action status error dsn", defaults=[False])):
    """What an attempt came to for one recipient: `action` is relayed, delayed or failed (RFC 3464 2.3.3).

    With `dsn` the next host reports by itself.
    """

    @classmethod
    def of(cls, code: int, text: bytes, dsn: bool = False) -> "Outcome":
        """Take a reply of the next host."""
        said = printable(b" ".join(text.split()).decode("utf-8", "replace"))[:400]
        action = {2: "relayed", 5: "failed"}.get(code // 100, "delayed")
        kind = {"relayed": 2, "failed": 5, "delayed": 4}[action]
        status = re.match(rf"{kind}\.[0-9]{{1,3}}\.[0-9]{{1,3}}\b", said)
        return cls(action, status[0] if status else f"{kind}.0.0", f"{code} {said}", dsn)


class Relay:
    """The queue's worker: sends what waits for other hosts, tries again, and reports to senders.

    `default` is the next host for everything that is not local, `routes` those for single domains, each `host` or
    `host:port`.  A recipient that the next host has taken is never sent to again, unless the server ends before that
    could be noted on disk (a kill behind the 250, a full disk).  One process works at a time, by a lock in the queue's
    folder.  Options, in seconds: `first_pause`, doubled after each try up to `longest_pause`; `lifetime`, after which a
    message goes back; `warn_after`, for those who asked for a report on delay; `timeout`, for each answer (ten times as
    long for the one to the message).  `hosts_at_once`: how many are talked to at a time.
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
        timeout: float = 60,
        hosts_at_once: int = 20,
    ):
        self.store, self.hostname = store, hostname
        self.default = None if default is None else lineserver.split_address(default, 25)
        self.routes = {domain.lower(): lineserver.split_address(to, 25) for domain, to in (routes or {}).items()}
        self.first_pause, self.longest_pause, self.lifetime = first_pause, longest_pause, lifetime
        self.warn_after, self.timeout, self.hosts_at_once = warn_after, timeout, hosts_at_once
        self.entries, self.active = {}, {}  # the queue's entries by id, and the threads by the host that each talks to
        self.clients, self.thread, self.queue_lock = set(), None, None
        self.guard, self.stopping = threading.RLock(), threading.Event()
        self.log = logging.getLogger("relay")

    # ---- where mail goes

    def mailboxes(self, address: str) -> list[str]:
        """Return the mailboxes here that mail for an address reaches; a route of its own beats a catch-all."""
        users, domain = self.store.users, address.rpartition("@")[2]
        if address.lower() == f"postmaster@{self.hostname.lower()}" and not users.is_local(domain):
            address = domain = "postmaster"  # whom our reports are from
        elsewhere = domain.lower() in self.routes and not users.is_local(domain)
        return [] if elsewhere else users.mailboxes(address)

    def route(self, domain: str) -> tuple[str, int] | None:
        """Return the next host for a domain, the more exact route first, or None."""
        return self.routes.get(domain.lower(), self.default)

    def leads_to(self, node: str) -> bool:
        """Say whether mail for ETRN's `node`, `@domain` or `#` is ours to send."""
        return bool(self.default or (self.routes if node == "#" else any(self.covers(node, d) for d in self.routes)))

    def covers(self, node: str, domain: str) -> bool:
        domain = domain.lower()
        return node in ("#", domain, f"@{domain}") or (node.startswith("@") and domain.endswith("." + node[1:]))

    def waiting_for(self, node: str) -> int:
        """Return how many queued messages ETRN's node stands for."""
        queued = [[domain_of(r) for r in entry["recipients"]] for entry in self.store.queued()]
        return sum(any(self.covers(node, domain) for domain in domains) for domains in queued)

    # ---- the worker

    def start(self) -> None:
        """Work on the queue in a thread, if there is any route, or mail from when there was one."""
        if self.thread is None and (self.default or self.routes or self.store.queue_names()):
            self.thread = threading.Thread(target=self.work, daemon=True, name="relay")
            self.thread.start()

    def begin_stop(self) -> None:
        """Begin nothing new."""
        self.stopping.set()
        self.store.queue_changed.set()

    def stop(self, seconds: float = 2) -> None:
        """Stop; a transaction under way gets `seconds` to end, otherwise it is tried again another time."""
        self.begin_stop()
        deadline = time.monotonic() + seconds
        lineserver.join(filter(None, [self.thread]), deadline)  # first, for it may just be starting others
        lineserver.join(list(self.active.values()), deadline)
        for client in list(self.clients):  # close() would wait for the thread that reads
            with contextlib.suppress(OSError, AttributeError):
                client.sock.shutdown(socket.SHUT_RDWR)
        if self.queue_lock is not None:
            os.close(self.queue_lock)
            self.queue_lock = None

    def work(self) -> None:
        while not self.stopping.is_set():
            self.store.queue_changed.clear()
            pause = 1.0  # other processes put mail into the queue, too
            try:
                if self.queue_lock is None:
                    self.queue_lock = self.store.lock_queue()
                if self.queue_lock is not None:
                    self.look()
                    pause = self.send_what_is_due()
            except Exception:
                self.log.exception("relay")
            self.store.queue_changed.wait(min(max(pause, 0.01), 1.0))

    def look(self) -> None:
        """Take notice of new messages and of what ETRN asks for."""
        names = set(self.store.queue_names())
        with self.guard:
            for name in names - set(self.entries):
                if entry := self.store.entry(name):
                    self.entries[name] = entry
            for gone in set(self.entries) - names:
                del self.entries[gone]
            for entry in [entry for entry in self.entries.values() if not entry["recipients"]]:
                with contextlib.suppress(OSError):  # its file still can't be removed
                    self.forget(entry)
            for node in self.store.take_start_requests():
                for waiting in itertools.chain.from_iterable(e["recipients"] for e in self.entries.values()):
                    if self.covers(node, domain_of(waiting)):  # but who asks often does not make us knock as often
                        waiting["next"] = min(waiting["next"], waiting["tried"] + ETRN_PAUSE)

    def send_what_is_due(self) -> float:
        """Start a thread for each host that something is due for; return the seconds until the next is."""
        now, jobs, soonest = time.time(), {}, 3600.0
        with self.guard:
            for entry in sorted(self.entries.values(), key=lambda entry: entry["arrived"]):
                for waiting in entry["recipients"]:
                    host = self.route(domain_of(waiting))
                    if host in self.active:
                        continue
                    if waiting["next"] > now:
                        soonest = min(soonest, waiting["next"] - now)
                    else:
                        jobs.setdefault(host, {}).setdefault(entry["id"], []).append(waiting)
            for host, messages in jobs.items():
                if len(self.active) < self.hosts_at_once:
                    thread = threading.Thread(target=self.serve_host, args=(host, messages), daemon=True, name="relay")
                    with contextlib.suppress(RuntimeError):  # no more threads to be had, for now
                        thread.start()
                        self.active[host] = thread
        return soonest

    def serve_host(self, host: tuple[str, int] | None, messages: dict[str, list[dict]]) -> None:
        """Try everything that is due for one host; when it is down, the rest waits without a try of its own.

        None is the host of what has lost its route: that waits for the route to come back, or for its end.
        """
        down = None if host else Outcome("delayed", "4.4.4", "no route leads there any more")
        try:
            for name, recipients in messages.items():
                entry = self.entries.get(name)
                if self.stopping.is_set():
                    return
                try:
                    if entry and down is None:
                        down = self.attempt(host, entry, recipients)
                    elif entry:
                        self.settle(host, entry, recipients, dict.fromkeys(addresses(recipients), down))
                except Exception:  # such as a disk that fails: the others need not wait for this one
                    self.log.exception("%s to %s", name, host)
                    later = time.time() + self.first_pause
                    for waiting in recipients:
                        waiting["next"] = max(waiting["next"], later)
        finally:
            with self.guard:  # send_what_is_due() may not have entered it yet
                del self.active[host]
            self.store.queue_changed.set()

    def attempt(self, host: tuple[str, int], entry: dict, recipients: list[dict]) -> Outcome | None:
        """Try one message; return what came of it when there was no talking to the host."""
        outcomes, client = {}, None
        try:
            client = self.connect(host)
            if self.stopping.is_set():
                raise OSError("the server stops")
            self.transact(client, entry, recipients, outcomes)
        except OSError as error:  # smtplib's are OSErrors, too
            why = reply_in(error) or printable(f"{show_address(*host)}: {error}")[:400]
            lost = Outcome("delayed", "4.4.1" if client is None else "4.4.2", why)
            for address in addresses(recipients):
                outcomes.setdefault(address, lost)
            return lost if client is None else None
        finally:
            try:
                self.settle(host, entry, recipients, outcomes)
            finally:
                if client:
                    self.leave(client)

    def connect(self, host: tuple[str, int], tls: bool = True):
        """Return a client that has said EHLO, over TLS when the host offers it."""
        import smtplib

        class Client(smtplib.SMTP):
            getreply = read_reply

        client = Client(*host, local_hostname=self.hostname, timeout=self.timeout)
        self.clients.add(client)
        try:
            # A message's end, a small packet of its own, must not wait for the other side's delayed acknowledgement.
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.greet(client)
            if tls and client.has_extn("starttls") and not self.encrypt(client, host):
                self.drop(client)
                return self.connect(host, tls=False)
        except BaseException:
            self.drop(client)
            raise
        return client

    def greet(self, client) -> None:
        """Say EHLO, or HELO to a host that knows no better; a 4yz is no answer to that, but "later"."""
        import smtplib

        code, text = client.ehlo()
        if code // 100 == 5:
            code, text = client.helo()
        if code // 100 != 2:
            raise smtplib.SMTPHeloError(code, text)

    def encrypt(self, client, host: tuple[str, int]) -> bool:
        """Start TLS; return False when that has failed, and with it the connection.

        No certificate is asked to prove anything (RFC 7435: better than clear text, and there is nobody to ask).
        """
        import smtplib
        import ssl

        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            client.starttls(context=context)
        except smtplib.SMTPResponseException as error:  # not now: RFC 3207 4 leaves it to us to go on without
            self.log.warning("relay to %s: in clear: %s", show_address(*host), reply_in(error))
            return True
        except OSError as error:
            self.log.warning("relay to %s: in clear, since TLS failed: %s", show_address(*host), error)
            return False
        self.greet(client)
        return True

    def leave(self, client) -> None:
        with contextlib.suppress(OSError):
            client.quit()
        self.drop(client)

    def drop(self, client) -> None:
        client.close()
        self.clients.discard(client)

    def transact(self, client, entry: dict, recipients: list[dict], outcomes: dict[str, Outcome]) -> None:
        """Carry out one mail transaction; `outcomes` gets what becomes of each recipient as soon as it is known."""
        parameters, dsn = entry["parameters"], client.has_extn("dsn")
        client.command_encoding = "utf-8"
        if "SMTPUTF8" in parameters and not client.has_extn("smtputf8"):
            outcomes.update(self.needing_utf8(entry, recipients, dsn))
            recipients = [waiting for waiting in recipients if waiting["address"] not in outcomes]
            if not recipients:
                return
        if parameters.get("BODY", "").upper() == "8BITMIME" and not client.has_extn("8bitmime"):
            self.log.warning("%s goes as it is to a host that does not offer 8BITMIME", entry["id"])
        code, text = client.docmd("MAIL", f"FROM:<{entry['sender']}>{self.mail_options(client, entry)}")
        if code // 100 != 2:
            outcomes.update(dict.fromkeys(addresses(recipients), Outcome.of(code, text)))
            return
        taken = []
        for waiting in recipients:
            code, text = client.docmd("RCPT", f"TO:<{waiting['address']}>{rcpt_options(waiting) if dsn else ''}")
            if code // 100 == 2:
                taken.append(waiting["address"])
            else:  # 552 means too many recipients here (RFC 5321 4.5.3.1.10)
                outcomes[waiting["address"]] = Outcome.of(452 if code == 552 else code, text)
        if taken:
            outcomes.update(dict.fromkeys(taken, Outcome.of(*self.send_content(client, entry["id"]), dsn)))

    def needing_utf8(self, entry: dict, recipients: list[dict], dsn: bool) -> dict[str, Outcome]:
        """Return the failures of those whom a message can't reach over a host without SMTPUTF8 (RFC 6531 3.2)."""
        with self.store.queued_message(entry["id"]) as file:
            plain = file.read(MAX_HEADER).partition(b"\r\n\r\n")[0].isascii()
        failures = {}
        for waiting in recipients:
            if not (entry["sender"] + waiting["address"] + (rcpt_options(waiting) if dsn else "")).isascii():
                why = "5.6.7", "the next host does not take addresses that are not ASCII"
            elif not plain:
                why = "5.6.9", "the next host does not take header fields that are not ASCII"
            else:
                continue
            failures[waiting["address"]] = Outcome("failed", *why)
        return failures

    def send_content(self, client, name: str) -> tuple[int, bytes]:
        """Send DATA and a queued message; return the reply to it, also when it comes before the message has ended."""
        with self.store.queued_message(name) as file:
            code, text = client.docmd("DATA")
            if code == 354:
                try:
                    for block in dot_stuff(wire(file.read, READ_BLOCK)):
                        client.sock.sendall(block)
                    client.sock.sendall(b".\r\n")
                    client.timeout *= 10  # they may have a lot to do now, RFC 5321 4.5.3.2.6
                except OSError:  # they may have said why they hung up; only a refusal can be meant
                    code, text = client.getreply()
                    if code // 100 not in (4, 5):
                        raise
                    return code, text
                try:
                    return client.getreply()
                finally:
                    client.timeout = self.timeout
        if code // 100 == 2:  # out of step: what was not sent can't have been taken
            raise ConnectionError(f"answered DATA with {code} {text.decode('utf-8', 'replace')}")
        return code, text

    def mail_options(self, client, entry: dict) -> str:
        """Return MAIL's parameters, as the client gave them and as far as the next host offers them."""
        parameters, offered = entry["parameters"], client.has_extn
        size = os.path.getsize(f"{self.store.queue_folder}/{entry['id']}")  # with our Received
        options = f" SIZE={size}" if offered("size") else ""
        options += f" BODY={parameters['BODY']}" if "BODY" in parameters and offered("8bitmime") else ""
        options += " SMTPUTF8" if "SMTPUTF8" in parameters and offered("smtputf8") else ""
        for name in ("RET", "ENVID"):
            options += f" {name}={parameters[name]}" if name in parameters and offered("dsn") else ""
        return options

    def settle(self, host, entry: dict, recipients: list[dict], outcomes: dict[str, Outcome]) -> None:
        """Note what became of each recipient, durably, and report what their sender wants to hear."""
        with self.guard:
            now, where = time.time(), show_address(*host) if host else "nowhere"
            for waiting in recipients:  # first of all, so that whatever fails below does not make us send it again
                outcome = outcomes.get(waiting["address"], Outcome("delayed", "4.3.0", "our mistake"))
                self.note(waiting, outcome, now, now - entry["arrived"])
                action, error = waiting["action"], waiting["error"]
                self.log.info("%s to <%s> via %s: %s (%s)", entry["id"], waiting["address"], where, action, error)
            entry["recipients"] = [r for r in entry["recipients"] if r.get("action") != "relayed"]
            if self.store.entry(entry["id"]) is None:
                return  # somebody has taken it out of the queue meanwhile
            told = [r for r in recipients if r["tell"]]
            if told:
                self.tell(entry, told, remote_name(host[0]) if host else "")
            entry["recipients"] = [r for r in entry["recipients"] if r.get("action") != "failed"]
            if entry["recipients"]:
                self.store.save_entry(entry)
            else:
                self.forget(entry)

    def forget(self, entry: dict) -> None:
        """Remove a message that nobody waits for; while its file can't be removed it stays known, and unsent."""
        self.store.unqueue(entry["id"])
        self.entries.pop(entry["id"], None)

    def tell(self, entry: dict, recipients: list[dict], host: str) -> None:
        """Report; a failure that can't be reported, since the disk is full, stays in the queue and comes up again."""
        try:
            self.report(entry, recipients, host, f"{self.store.queue_folder}/{entry['id']}")
        except OSError:
            later = time.time() + self.first_pause
            for waiting in recipients:
                if waiting["action"] == "failed":
                    waiting.update(action="delayed", next=later)

    def note(self, waiting: dict, outcome: Outcome, now: float, age: float) -> None:
        """Write an attempt's outcome into a recipient's record, with when to try again and whether to tell.

        All that were tried together get the same time, and are tried together again: one transaction for one host.
        """
        waiting.update(action=outcome.action, status=outcome.status, error=outcome.error, tell=False, tried=now)
        waiting["attempts"] += 1
        if outcome.action == "relayed":
            waiting["tell"] = wants(waiting["notify"], "SUCCESS") and not outcome.dsn
        elif outcome.action == "failed":
            waiting["tell"] = wants(waiting["notify"], "FAILURE")
        elif age >= self.lifetime:
            waiting.update(action="failed", status="5.4.7", tell=wants(waiting["notify"], "FAILURE"))
        else:
            pause = min(self.first_pause * 2 ** min(waiting["attempts"] - 1, 30), self.longest_pause)
            waiting["next"] = now + min(pause, max(self.lifetime - age, 0.01))
            if wants(waiting["notify"], "DELAY") and not waiting["warned"] and age >= self.warn_after:
                waiting.update(warned=True, tell=True)

    # ---- delivery reports

    def report(self, entry: dict, recipients: list[dict], host: str, path: str) -> None:
        """Tell a message's sender what became of some recipients; a message from nobody is not reported on.

        A report comes from the null sender, so that none ever answers another (RFC 3461 5.2.8).
        """
        sender = entry["sender"]
        if not sender:
            return
        name = new_id()
        try:
            original = b""
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                original = file.read(MAX_RETURNED + 1)
            received = (b"\n" + original).find(b"\nReceived: ")
            original = original[max(received, 0) :]  # whose mailbox it was is not for senders
            text = build_report(self, name, entry, recipients, host, original)
            self.post(name, sender, text)
        except OSError as error:
            self.log.error("no report to <%s> about %s: %s", sender, entry["id"], error)
            raise

    def post(self, name: str, recipient: str, text: bytes) -> None:
        """Send a message of our own, from the null sender: to a mailbox here, else along a route, else nowhere."""
        mailboxes = self.mailboxes(recipient)
        received = f"Received: by {self.hostname} id {name}; {mail_date(time.time())}\r\n"
        copies, entry = [], None
        for mailbox in mailboxes:
            copies.append(Target(self.store.mailbox(mailbox), trace_fields("", mailbox, recipient, received)))
        if not mailboxes:
            domain = recipient.rpartition("@")[2]
            if self.store.users.is_local(domain) or not self.route(domain):
                self.log.warning("report %s is for <%s>, where no way leads", name, recipient)
                return
            copies = [Target(self.store.queue_folder, received.encode(), name)]
            parameters = {"BODY": "8BITMIME"} | ({} if recipient.isascii() else {"SMTPUTF8": None})
            entry = new_entry(name, "", [Recipient(recipient, [])], parameters)
        with contextlib.closing(Delivery(self.store, copies)) as delivery:
            delivery.write(text)
            delivery.commit(entry)
        self.log.info("report %s to <%s>", name, recipient)


def reply_in(error: OSError) -> str | None:
    """Return the reply that smtplib made an exception of, or None when it was none."""
    text = getattr(error, "smtp_error", None)
    return None if text is None else Outcome.of(error.smtp_code, text).error


def read_reply(client) -> tuple[int, bytes]:
    """Read a reply for an smtplib.SMTP, whose own getreply() has no end while lines come; return code and text.

    Raises OSError: the next host is gone, is too slow, or says what is no reply.
    """
    reader, deadline, text = LineReader(client.sock, lambda: None), time.monotonic() + client.timeout, []
    try:
        while len(text) < MAX_REPLY_LINES:
            line = reader.readline(lineserver.MAX_LINE, deadline - time.monotonic())
            if not (match := re.fullmatch(rb"([2-5][0-9]{2})(?:([ -])(.*))?\s*", line, re.DOTALL)):
                break
            text.append((match[3] or b"").strip())
            if match[2] != b"-":
                return int(match[1]), b"\n".join(text)
    except TimeoutError:
        raise TimeoutError("timed out") from None
    except Disconnect as error:
        raise ConnectionError(str(error)) from None
    raise ConnectionError("an endless reply" if len(text) == MAX_REPLY_LINES else "no reply to understand")


def addresses(recipients: list[dict]) -> list[str]:
    """Return the addresses of queued recipients."""
    return [waiting["address"] for waiting in recipients]


def domain_of(waiting: dict) -> str:
    """Return the domain of a queued recipient."""
    return waiting["address"].rpartition("@")[2]


def remote_name(host: str) -> str:
    """Return a host as reports name it: addresses in brackets."""
    return f"[IPv6:{host}]" if ":" in host else f"[{host}]" if re.fullmatch(r"[0-9.]+", host) else host


def rcpt_options(waiting: dict) -> str:
    """Return RCPT's DSN parameters as the client gave them."""
    return "".join(f" {name.upper()}={waiting[name]}" for name in ("notify", "orcpt") if waiting[name])


def build_report(relay: Relay, name: str, entry: dict, recipients: list[dict], host: str, original: bytes) -> bytes:
    """Return a delivery report (RFC 3462, 3464) on some recipients of one message, as the octets of a message."""
    header, _, _ = original.partition(b"\r\n\r\n")
    actions = {r["action"] for r in recipients}
    whole = "failed" in actions and (entry["parameters"].get("RET") or "FULL").upper() == "FULL"
    whole = whole and len(original) <= MAX_RETURNED
    titles = {"failed": "could not be delivered", "delayed": "is delayed", "delivered": "was delivered"}
    title = next((titles[action] for action in titles if action in actions), "was passed on")
    boundary = f"report-{name}"
    lines = [
        f"Date: {mail_date(time.time())}",
        f"From: Mail delivery <postmaster@{relay.hostname}>",
        f"To: <{entry['sender']}>",
        f"Subject: Your message {title}",
        f"Message-ID: <{name}@{relay.hostname}>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="{boundary}"',
        "Content-Transfer-Encoding: 8bit",
        f"\r\n--{boundary}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n",
        *explain(relay, entry, recipients, title),
        f"\r\n--{boundary}\r\nContent-Type: message/delivery-status\r\n",
        *status_fields(relay, entry, recipients, host),
        f"\r\n--{boundary}\r\nContent-Type: {'message/rfc822' if whole else 'text/rfc822-headers'}",
        "Content-Transfer-Encoding: 8bit\r\n\r\n",
    ]
    returned = original if whole else header + b"\r\n"
    return "\r\n".join(lines).encode() + returned + f"\r\n--{boundary}--\r\n".encode()


def explain(relay: Relay, entry: dict, recipients: list[dict], title: str) -> list[str]:
    """Return a report's part for people."""
    opening = f"This is the mail server {relay.hostname}. Your message of {mail_date(entry['arrived'])} {title}:"
    return [opening, "", *[f"  <{r['address']}>: {r['action']}. {r['error']}".rstrip() for r in recipients]]


def status_fields(relay: Relay, entry: dict, recipients: list[dict], host: str) -> list[str]:
    """Return a report's part for programs: a group of fields about the message, one for each recipient."""
    lines = [f"Reporting-MTA: dns; {relay.hostname}", f"Arrival-Date: {mail_date(entry['arrived'])}"]
    if envid := entry["parameters"].get("ENVID"):
        lines.insert(0, f"Original-Envelope-Id: {unxtext(envid)}")
    for r in recipients:
        lines.append("")
        if r["orcpt"]:
            kind, _, original = r["orcpt"].partition(";")
            lines.append(f"Original-Recipient: {kind};{escape_address(unxtext(original))}")
        kind = "rfc822" if r["address"].isascii() else "utf-8"
        lines.append(f"Final-Recipient: {kind};{escape_address(r['address'])}")
        lines += [f"Action: {r['action']}", f"Status: {r['status']}"]
        if host:
            lines.append(f"Remote-MTA: dns; {host}")
        if re.match(r"[2-5][0-9][0-9] ", r["error"]):
            lines.append(f"Diagnostic-Code: smtp; {escape_address(r['error'])[:900]}")
        if r["action"] == "delayed":
            lines.append(f"Will-Retry-Until: {mail_date(entry['arrived'] + relay.lifetime)}")
    return lines


def escape_address(address: str) -> str:
    """Write an address in ASCII, as RFC 6533 3 does for fields that must be ASCII."""
    return "".join(c if c.isascii() else f"\\x{{{ord(c):X}}}" for c in address)


def as_routes(given) -> dict[str, str]:
    """Read routes from a dict or from `domain=host:port` texts; raise ValueError."""
    if not isinstance(given, dict):
        pairs = [text.partition("=") for text in given or []]
        if bad := ["".join(pair) for pair in pairs if not all(pair)]:
            raise ValueError(f"a route is DOMAIN=HOST or DOMAIN=HOST:PORT, not {bad[0]!r}")
        given = {domain: host for domain, _, host in pairs}
    return given
