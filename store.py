"""Everything on disk: users.txt, one Maildir per account, the relay's queue.

    spool/<address>/tmp,new,cur   one file per message, CRLF line ends, our trace fields in front
    spool/<address>/pop3.lock     locked by the one POP3 session that has the mailbox open
    spool/queue/                  mail for other hosts: ID (the message) and ID.json (who waits)

A delivery writes into tmp/, syncs, renames into new/, syncs the folder; only then is the message
acknowledged.  A crash leaves files that nobody reads, or a message that comes twice, and loses
none.  Writers need no lock (that is Maildir's point), POP3 sessions lock the mailbox.

Names are `<seconds>.M<microseconds>P<pid>Q<counter>.<host>,S=<octets>,W=<octets>`: S is the size of
the file, W its size on the wire, so a maildrop is opened by listing it.  The name up to a `:` is
the UIDL.

This module knows no socket and no reply code: a full disk or a missing folder is an OSError.

    store = Store("spool", {"alice@example.test": "wonderland"})
    store.wait("alice@example.test")    # blocks until there is a message, returns [EmailMessage]

As a program (`python store.py`) it looks at the spool.  Read it in this order: `Users`, `Delivery`,
`Store`, `Maildrop`; the queue's records and the program when you need them.
"""

import binascii
import collections
import contextlib
import errno
import functools
import io
import itertools
import logging
import os
import re
import socket
import stat
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from email.message import EmailMessage
    from email.policy import EmailPolicy

if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")

BUFFER = 1 << 16  # octets of a message that are held in memory until they go to its file
BLOCK = 1 << 18  # octets of a file that are read at once
MAX_HELD = 1000  # CRs in a row that may belong to one line end
MAX_LOCAL, MAX_DOMAIN = 64, 255  # octets, RFC 5321 4.5.3.1.1 and 4.5.3.1.2
MAX_FOLDER_NAME = 255  # octets, as file systems have it
MAX_UID = 70  # octets, RFC 1939 7
BINARY = getattr(os, "O_BINARY", 0)  # without it Windows would translate line ends
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would block without it
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY
STALE_SECONDS = 36 * 3600  # after which a file in tmp/ belongs to nobody, as Maildir has it
SETTLE_SECONDS = 0.5  # for which a changed users file must have stayed the same
POLL_SECONDS = 0.1  # between two looks at a mailbox into which another process may deliver
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}  # 16 MiB of memory and some 40 ms a hash
FOLLOWS = 20  # times that a file is looked for which another program renames again and again
MAX_MEASURED = 200_000  # files whose sizes are remembered, some 300 octets of memory each
LONG_FIELD = 4000  # characters beyond which a header field is not parsed: time grows squared
MAX_COMPARISONS = 10_000_000  # of lines with boundaries, a second's work; else parts stay text
MAX_SHOWN = 10_000_000  # octets of a message that `show` looks into
MAX_HEADER = 1 << 16  # octets of a message in which `list` looks for its header
DEMO = {"alice@example.test": "wonderland", "bob@example.test": "builder"}  # as in users.txt
NO_FOLDER_SYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
}  # from a file system on which no folder can be synced

# Seconds that pass whatever is done to the clock: tests that freeze time patch time.monotonic.
clock: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
    if hasattr(time, "clock_gettime")
    else functools.partial(time.monotonic)
)

log = logging.getLogger("store")

try:
    import fcntl

    def lock(fd: int) -> None:
        """Lock an open file; raise BlockingIOError if it is locked.  Its end is the lock's."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(fd: int) -> None:
        """Let go of a lock, which a child process would otherwise share, and close its file."""
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

except ImportError:  # Windows
    import msvcrt

    unlock = os.close

    def lock(fd: int) -> None:
        """Lock an open file; raise BlockingIOError if it is locked.  Its end is the lock's."""
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from None


# ---------------------------------------------------------------- who has a mailbox here


class UsersError(ValueError):
    """A users file that can't be used; the text names file, line and fault."""


USERS_LINE = re.compile(r"\s*(\*|\*@[^\s:=@]+|[^\s:@]+@[^\s:=@]+)\s*([:=])(.*)", re.DOTALL)


def canonical(address: str) -> str:
    """Return what an address (or `@domain`) is compared by.

    Case does not count, nor the Unicode normalisation form, nor whether a domain is written in
    U-labels or A-labels (RFC 5890); IDNA 2008 names are included.
    """
    if address.isascii() and "--" not in address:
        return address.lower()
    local, at, domain = address.rpartition("@")
    if len(domain) <= MAX_DOMAIN:
        domain = ".".join(map(u_label, domain.lower().split(".")))
    return unicodedata.normalize("NFC", (local + at + domain).lower())


def u_label(label: str) -> str:
    """Decode an A-label (`xn--...`); whatever is not one stays as it is."""
    if not label.startswith("xn--"):
        return label
    try:
        decoded = label[4:].encode("ascii").decode("punycode")
    except UnicodeError:
        return label
    usable = decoded.isprintable() and not decoded.isascii() and not set(decoded) & set("@./\\ ")
    return decoded.lower() if usable else label


def name_fault(address: str) -> str | None:
    """Return why an address can't name a folder, or None when it can."""
    local, _, domain = canonical(address).rpartition("@")
    if any(c in "/\\" or not c.isprintable() or c.isspace() for c in address):
        return "has a character that no mailbox name may have"
    if local.startswith(".") or domain.startswith("."):
        return "begins with a dot"
    if len(local.encode()) > MAX_LOCAL or len(domain.encode()) > MAX_DOMAIN:
        return f"is longer than {MAX_LOCAL}@{MAX_DOMAIN} octets"
    if len(canonical(address).encode()) > MAX_FOLDER_NAME:
        return f"is longer than a folder's name may be, {MAX_FOLDER_NAME} octets"
    return None


class Users:
    """The accounts, lists and catch-alls of one users file (or mapping), and the passwords.

    Attributes: `accounts` (canonical form to the address as written), `lists` (canonical form to
    the address as written, and its members), `domains` (those that are named).
    """

    def __init__(
        self, lines: Iterable[tuple[str, str, str, str]], catch_all: str | bool | None = None
    ):
        """Take (where, name, ":" or "=", rest) for each line; raise UsersError.

        Mail for any other address goes to `catch_all`: True means the first account.
        """
        self.accounts: dict[str, str] = {}
        self.lists: dict[str, tuple[str, list[str]]] = {}
        self.passwords: dict[str, str] = {}
        self.expanded: dict[str, list[str]] = {}  # shared by thousands of recipients
        places: dict[str, str] = {}
        for where, name, sign, rest in lines:
            if not name.startswith("*") and (fault := name_fault(name)):
                raise UsersError(f"{where}: {name!a} {fault}")
            if canonical(name) in places:
                raise UsersError(f"{where}: {name} is here twice")
            places[canonical(name)] = where
            if sign == "=":
                members = [member.strip() for member in rest.split(",") if member.strip()]
                self.lists[canonical(name)] = name, members
            else:
                self.add_account(where, name, rest)
        if catch_all:
            target = next(iter(self.accounts.values()), "") if catch_all is True else catch_all
            self.lists["*"] = "*", [target]
        for name, (_, members) in self.lists.items():
            self.check_list(places.get(name, "catch_all"), name, members)
        named = [name for name in [*self.accounts, *self.lists] if name != "*"]
        self.domains = {name.rpartition("@")[2] for name in named}
        self.by_local_part: dict[str, list[str]] = {}
        for name in named:
            self.by_local_part.setdefault(name.rpartition("@")[0], []).append(name)
        # Correct passwords as keyed hashes, so that a polling client does not pay for scrypt at
        # each login.
        self.verified: dict[str, bytes] = {}
        self.verified_key = os.urandom(32)
        hashes = [text.startswith("{SCRYPT}") for text in self.passwords.values()]
        self.hashed, self.takes_digests = any(hashes), not all(hashes)

    def add_account(self, where: str, name: str, password: str) -> None:
        if name.startswith("*"):
            raise UsersError(f"{where}: {name} is a catch-all: write {name} = an account")
        if not password:
            raise UsersError(f"{where}: {name} has no password")
        if password.startswith("{SCRYPT}") and parse_hash(password) is None:
            advice = "make one with: python store.py hash"
            raise UsersError(f"{where}: the hash of {name} is damaged; {advice}")
        self.accounts[canonical(name)] = name
        self.passwords[canonical(name)] = password

    def check_list(self, where: str, name: str, members: list[str]) -> None:
        if not members:
            raise UsersError(f"{where}: {name} has no members")
        for member in members:
            if not self.expand_list(canonical(member)):
                hint = "; put commas between addresses" if " " in member else ""
                hint = hint if "@" in member else "; an account is written address:password"
                fault = "is neither an account nor a list that leads to one"
                raise UsersError(f"{where}: {member} {fault}{hint}")

    @classmethod
    def read(cls, path: str, catch_all: str | bool | None = None) -> "Users":
        """Read a users file; raise UsersError (with the line's number) or OSError."""
        if not path:
            raise UsersError("the users file has no name")
        with open(path, "rb") as file:
            raw = file.read()

        def lines() -> Iterator[tuple[str, str, str, str]]:
            for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
                where = f"{path}:{number}"
                try:
                    text = line.removesuffix(b"\r").decode()
                except UnicodeDecodeError:
                    raise UsersError(f"{where}: not UTF-8") from None
                if not text.strip() or text.lstrip().startswith("#"):
                    continue
                if not (match := USERS_LINE.fullmatch(text)):
                    raise UsersError(f"{where}: {line_fault(text)}")
                yield where, match[1], match[2], match[3]

        users = cls(lines(), catch_all)
        if not users.accounts:
            raise UsersError(f"{path}: no account; write one as `address:password`")
        return users

    @classmethod
    def from_mapping(
        cls, mapping: Mapping[str, Any], catch_all: str | bool | None = None
    ) -> "Users":
        """Take a mapping of address to password, and of list or catch-all to members.

        Raises UsersError, or TypeError for a value that is neither a text nor a list of texts.
        """

        def lines() -> Iterator[tuple[str, str, str, str]]:
            for name, value in mapping.items():
                if not (isinstance(name, str) and USERS_LINE.fullmatch(name + ":")):
                    raise UsersError(f"users: {name!a} is not an address")
                members = isinstance(value, list | tuple | set)
                if members and all(isinstance(member, str) for member in value):
                    yield "users", name, "=", ",".join(value)
                elif isinstance(value, str):
                    yield "users", name, "=" if name.startswith("*") else ":", value
                else:
                    wanted = "a password (str) or a list of addresses"
                    raise TypeError(f"users: the value of {name} is {value!r}, not {wanted}")

        return cls(lines(), catch_all)

    # ---- where mail for an address goes

    def mailboxes(self, address: str) -> list[str]:
        """Return the accounts that mail for `address` reaches, in order; none: it is not ours."""
        name = canonical(address)
        local, at, domain = name.rpartition("@")
        if not at:
            return self.postmaster() if name == "postmaster" else self.without_domain(name)
        if not (local and domain):
            return []
        found = self.expand_list(name)
        found = found or self.expand_list(f"{local.partition('+')[0]}@{domain}")
        if not found and local == "postmaster" and domain in self.domains:
            found = self.postmaster()
        return found or self.expand_list(f"*@{domain}") or self.expand_list("*")

    def without_domain(self, local: str) -> list[str]:
        """Return the accounts that a local part alone reaches, if one line names it; else "*"."""
        for part in (local, local.partition("+")[0]):
            if part and part != "*" and len(names := self.by_local_part.get(part, [])) == 1:
                return self.expand_list(names[0])
        return self.expand_list("*") if local else []

    def expand_list(self, name: str) -> list[str]:
        """Return the accounts behind one name, each once; a list within itself adds nothing."""
        if name not in self.accounts and name not in self.lists:
            return []
        if name not in self.expanded:
            found, seen, left = {}, set(), [name]
            while left:
                member = left.pop()
                if member in self.accounts:
                    found[self.accounts[member]] = True
                elif member in self.lists and member not in seen:
                    seen.add(member)
                    left += map(canonical, reversed(self.lists[member][1]))
            self.expanded[name] = list(found)
        return self.expanded[name]

    def postmaster(self) -> list[str]:
        """Return who gets `<postmaster>`'s mail, which must reach somebody (RFC 5321 4.5.1)."""
        names = [name for name in [*self.accounts, *self.lists] if name.startswith("postmaster@")]
        return self.expand_list(names[0]) if names else list(self.accounts.values())[:1]

    def is_local(self, domain: str) -> bool:
        """Say whether the users file names a domain."""
        return canonical(domain) in self.domains

    def lookup(self, name: str) -> list[str]:
        """Return the accounts and lists that a name means; without a domain it may be several."""
        if name.startswith("*"):
            return []
        name = canonical(name)
        if "@" not in name:
            names = self.by_local_part
            found = names.get(name) or names.get(name.partition("+")[0])
            found = found or [canonical(a) for a in self.postmaster() if name == "postmaster"]
            return [self.as_written(full) for full in found]
        return [self.as_written(name)] if name in self.lists else self.mailboxes(name)[:1]

    def as_written(self, name: str) -> str:
        """Return an account or list as the users file writes it."""
        return self.accounts[name] if name in self.accounts else self.lists[name][0]

    def members(self, name: str) -> list[str] | None:
        """Return the members of a list, or None when there is no such list."""
        found = self.lookup(name)
        if len(found) == 1 and canonical(found[0]) in self.lists:
            return self.lists[canonical(found[0])][1]
        return None

    # ---- passwords

    def with_demo_passwords(self) -> list[str]:
        """Return the accounts that still have the password which the project ships."""
        return [
            self.accounts[name] for name, text in DEMO.items() if self.passwords.get(name) == text
        ]

    def login_address(self, name: str) -> str | None:
        """Return the account that a login names, with or without its domain, or None."""
        name = canonical(name)
        if "@" in name:
            return self.accounts.get(name)
        names = [full for full in self.by_local_part.get(name, []) if full in self.accounts]
        return self.accounts[names[0]] if len(names) == 1 else None

    def check_password(
        self,
        name: str,
        password: bytes,
        turn: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> str | None:
        """Return the account that a name and a password open, or None.

        An unknown name takes as long as a wrong password.  A hash is computed within `turn()`.
        """
        import hmac

        address = self.login_address(name)
        stored = self.passwords[canonical(address)] if address else ""  # matches no password
        if not stored.startswith("{SCRYPT}"):
            right = hmac.compare_digest(stored.encode(), password) and address is not None
            if not right and self.hashed:
                with turn():
                    scrypt(password, b"as slow as others")
            return address if right else None
        fingerprint = hmac.digest(self.verified_key, password, "sha256")
        if hmac.compare_digest(self.verified.get(stored, b""), fingerprint):
            return address
        salt, wanted = parse_hash(stored) or (b"", b"")
        with turn():
            right = hmac.compare_digest(scrypt(password, salt), wanted)
        if right:
            self.verified[stored] = fingerprint
        return address if right else None

    def check_digest(self, name: str, answer: Callable[[bytes], str], digest: str) -> str | None:
        """Return the account whose password makes `answer(password)` the digest, or None.

        A hashed password serves no digest, and is refused as a wrong one is.
        """
        import hmac

        address = self.login_address(name)
        stored = self.passwords[canonical(address)] if address else "{SCRYPT}"  # matches no digest
        given = digest.lower().encode("utf-8", "replace")
        right = hmac.compare_digest(answer(stored.encode()).encode(), given)
        return address if right and not stored.startswith("{SCRYPT}") else None


def line_fault(text: str) -> str:
    """Say what is wrong with a line of a users file; one without a sign may be a password."""
    name, sign, _ = text.replace("=", ":").partition(":")
    hint = f" ({name.strip()!a} has no @domain)" if sign and "@" not in name else ""
    return f"neither `address:password` nor `address = address, ...`{hint}"


def scrypt(password: bytes, salt: bytes) -> bytes:
    """Return the hash that users.txt keeps in place of a password."""
    import hashlib

    return hashlib.scrypt(password, salt=salt, maxmem=64 << 20, dklen=32, **SCRYPT)


def hash_password(password: str) -> str:
    """Return `{SCRYPT}...` for a users file."""
    salt = os.urandom(16)
    octets = salt + scrypt(password.encode(), salt)
    return "{SCRYPT}" + binascii.b2a_base64(octets, newline=False).decode()


def parse_hash(text: str) -> tuple[bytes, bytes] | None:
    """Return salt and hash of `{SCRYPT}...`, or None when it is damaged."""
    try:
        encoded = text.removeprefix("{SCRYPT}").strip().encode()
        octets = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError:
        return None
    return (octets[:16], octets[16:]) if len(octets) == 48 else None


# ---------------------------------------------------------------- one message


counter = itertools.count(1)
last_time = [0]  # microseconds, of the newest name


def unique_name(host: str, octets: int, octets_on_wire: int) -> str:
    """Return a Maildir file name that no other delivery anywhere has; as a UIDL it is short enough.

    Names sort in order of arrival, also while the clock stands still or goes back.
    """
    last_time[0] = max(last_time[0], time.time_ns() // 1000)
    seconds, micros = divmod(last_time[0], 1_000_000)
    name = f"{seconds:010d}.M{micros:06d}P{os.getpid()}Q{next(counter):08d}"
    sizes = f",S={octets},W={octets_on_wire}"
    return f"{name}.{host[: MAX_UID - 1 - len(name) - len(sizes)]}{sizes}"


ids = itertools.count(1)


def new_id() -> str:
    """Return a queue ID: hexadecimal, and unique on this machine."""
    return f"{time.time_ns() // 1000:X}{os.getpid():04X}{next(ids):03X}"


@functools.lru_cache(maxsize=8)
def mail_date(second: int) -> str:
    """Return a time as mail writes it (RFC 5322 3.3); cached, for many messages share a second."""
    import email.utils

    return email.utils.formatdate(second, localtime=True)


def count_messages(count: int) -> str:
    """Return `1 message`, `2 messages`, and so on."""
    return f"{count} message{'s' * (count != 1)}"


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write all of `data`; os.write() may stop half-way, for instance on a disk that fills up."""
    written = os.write(fd, data)
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


class Target(NamedTuple):
    """One file that a message becomes: `header_fields` stand before the message.

    A Maildir names its files itself (`name` is None); the queue's file is called by its queue ID.
    """

    folder: str
    header_fields: bytes
    name: str | None = None


class Delivery:
    """A message on its way to disk, one file per target; nothing shows before `commit`.

    The content goes into the first target's file in tmp/ as it arrives, the other files are copied
    from it.  Call `write` with the message's octets, then `commit`, and in the end `close`, which
    removes what was not committed.  `write` and `commit` may raise OSError.
    """

    def __init__(self, store: "Store", targets: Iterable[Target]):
        self.store = store
        self.targets = iter(targets)  # made one by one, for there may be thousands
        self.first = next(self.targets, None)
        self.buffer = bytearray()  # content that is not in a file yet
        self.size = 0  # octets of content
        self.tail = b""  # its last two octets
        self.fd: int | None = None  # of the first target's file
        self.pending: dict[str, str] = {}  # files in tmp/, and what each will be called
        self.orphan: str | None = None  # a queue's file whose entry is not in sight yet

    def write(self, block: bytes) -> None:
        """Add octets; beyond a small buffer they go to disk as they come."""
        self.buffer += block
        if len(self.buffer) >= BUFFER:
            self.flush()

    def flush(self) -> int:
        """Write what is buffered into the first target's file; return its descriptor."""
        data, self.buffer = self.buffer, bytearray()
        self.size += len(data)
        self.tail = (self.tail + data[-2:])[-2:]
        if self.fd is None:
            assert self.first
            self.fd = self.create(self.first.folder)
            data[:0] = self.first.header_fields
        write_all(self.fd, data)
        return self.fd

    def create(self, folder: str, path: str = "") -> int:
        """Create a file in a folder's tmp/ that will be called `path`; return its descriptor."""
        tmp = f"{folder}/tmp/{time.time_ns()}.{os.getpid()}.{next(counter)}"
        self.pending[tmp] = path
        try:
            return os.open(tmp, CREATE, 0o600)
        except FileNotFoundError:  # the first message, or somebody has removed the folder
            self.store.make_folder(folder)
            return os.open(tmp, CREATE, 0o600)

    def commit(
        self,
        entry: "QueueEntry | None" = None,
        published: Callable[[list[str]], None] | None = None,
    ) -> list[str]:
        """Put every file on disk, then into sight, the queue's entry last; return the paths.

        `published` is called with the paths once the messages are in sight and before the relay can
        take the queue's.  All files are written, synced and closed before the first one shows, so a
        full disk refuses the message whole, and Windows, which renames no open file, is content.  A
        failure between two renames leaves some recipients served although the client is told to try
        again: a message twice, never one lost.
        """
        paths = self.complete_files()
        if entry:
            self.write_entry(entry)
            self.orphan = f"{self.store.queue_folder}/{entry.id}"
        folders = {path.rpartition("/")[0]: True for path in paths}
        for folder in folders:
            self.store.make_durable(folder)
        self.publish(paths)
        for folder in folders:
            self.store.make_durable(folder)  # publish() makes it again when somebody has removed it
            self.store.sync_folder(folder)
        try:
            if published:
                published(paths)
        finally:
            if entry:
                self.publish_entry(entry)
            self.store.announce(queued=entry is not None)
        return paths

    def complete_files(self) -> list[str]:
        """Finish the first target's file and copy it for the others; return what they will be."""
        fd = self.flush()
        self.store.sync_file(fd)
        assert self.first
        [tmp] = self.pending
        self.pending[tmp] = self.path(self.first)
        for target in self.targets:
            os.lseek(fd, len(self.first.header_fields), os.SEEK_SET)
            content = iter(lambda: os.read(fd, BUFFER), b"")
            self.write_file(target.folder, self.path(target), [target.header_fields], content)
        self.close_file()
        return list(self.pending.values())

    def publish(self, paths: list[str]) -> None:
        """Rename files in tmp/ to what they will be called."""
        for tmp, path in list(self.pending.items()):
            if path in paths:
                self.store.rename(tmp, path)
                del self.pending[tmp]

    def write_entry(self, entry: "QueueEntry") -> None:
        """Write the queue's record of a message into tmp/."""
        path = self.store.entry_path(entry.id)
        self.write_file(self.store.queue_folder, path, [entry.to_json()])

    def publish_entry(self, entry: "QueueEntry") -> None:
        """Let the queue's record be seen, durably: from now on the relay may send the message."""
        self.publish([self.store.entry_path(entry.id)])
        self.orphan = None
        self.store.sync_folder(self.store.queue_folder)

    def path(self, target: Target) -> str:
        """Return what a target's file will be called, with its sizes if it is a Maildir's."""
        if target.name:
            return f"{target.folder}/{target.name}"
        octets = len(target.header_fields) + self.size
        missing = 2 if self.size and self.tail != b"\r\n" else 0  # POP3 adds the CRLF left out
        return f"{target.folder}/new/{unique_name(self.store.host, octets, octets + missing)}"

    def write_file(self, folder: str, path: str, *blocks: Iterable[bytes]) -> None:
        """Write and sync one more file."""
        fd = self.create(folder, path)
        try:
            for block in itertools.chain(*blocks):
                write_all(fd, block)
            self.store.sync_file(fd)
        finally:
            os.close(fd)

    def close_file(self) -> None:
        if self.fd is not None:
            fd, self.fd = self.fd, None
            os.close(fd)

    def close(self) -> None:
        """Let go of the files; what has not been committed is gone."""
        if self.fd is not None:
            with contextlib.suppress(OSError):
                self.close_file()
        for path in [*self.pending, *filter(None, [self.orphan])]:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self.pending, self.orphan = {}, None
        self.buffer = bytearray()


# ---------------------------------------------------------------- the spool


class Store:
    """The spool folder and who has a mailbox in it.

    `users` is the path of a users file, which is read again when it changes, or a mapping (see
    `Users.from_mapping`).  Without `sync` a message is acknowledged once the system has it, not the
    disk.  With `read_only` nothing is made or written.

    Methods that take an address resolve it as SMTP's RCPT does (tag, list, catch-all, local part
    alone) and raise ValueError when it reaches no mailbox.  The constructor raises ValueError (such
    as UsersError), TypeError, or OSError when the folder can't be made or written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        users: "str | os.PathLike[str] | Mapping[str, str | list[str]]",
        sync: bool = True,
        *,
        read_only: bool = False,
    ):
        if not isinstance(folder, str | bytes | os.PathLike):
            raise TypeError(f"folder: {folder!r} is not a path")
        if not os.fspath(folder):
            raise ValueError("the spool has no name")
        self.folder: str = os.path.abspath(os.fsdecode(folder))
        self.sync = sync
        self.host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"
        self.queue_folder = f"{self.folder}/queue"
        self.arrived = threading.Condition()
        self.arrivals = 0  # deliveries by this process
        self.queue_changed = threading.Event()
        self.durable: set[str] = set()  # folders whose names are on disk for certain
        self.measured: dict[str, tuple[tuple[int, int, int], int]] = {}  # path to version, size
        self.complaints: set[str] = set()  # lines of complain_once()
        self.catch_all: str | bool | None = None
        self.users_lock = threading.Lock()
        self.users_path: str | None = None
        if isinstance(users, str | bytes | os.PathLike):
            self.users_path = os.fsdecode(users)
            self.users_version = self.changed_version = self.version_of_users()
            self.changed_since = 0.0
        elif isinstance(users, Mapping):
            self.mapping: dict[str, Any] = dict(users)
        else:
            raise TypeError(f"users: {users!r} is neither a path nor a mapping")
        self.loaded = self.read_users()
        if not read_only:
            self.prepare()

    def __repr__(self) -> str:
        return f"<Store {self.folder} with {len(self.loaded.accounts)} accounts>"

    def prepare(self) -> None:
        """Make the folder, try to write into it, and remove what crashes left in tmp/ long ago."""
        make_private_folder(f"{self.queue_folder}/tmp")
        probe = f"{self.queue_folder}/tmp/{time.time_ns()}.{os.getpid()}.{next(counter)}"
        os.close(os.open(probe, CREATE, 0o600))
        os.unlink(probe)
        for name in os.listdir(self.folder):
            if "@" in name:  # a folder of another name is not ours
                self.remove_stale(f"{self.folder}/{name}/tmp")
        self.remove_stale(f"{self.queue_folder}/tmp")
        entries = set(self.queue_names())
        self.remove_stale(
            self.queue_folder, lambda name: re.fullmatch("[0-9A-F]+", name) and name not in entries
        )

    def remove_stale(self, folder: str, chosen: Callable[[str], object] = bool) -> None:
        """Remove the files in a folder that a crash left there long ago."""
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if chosen(entry.name) and entry.stat().st_mtime < time.time() - STALE_SECONDS:
                    os.unlink(entry.path)

    def complain_once(self, text: str, *values: object) -> None:
        """Log a fault that would otherwise be logged again and again."""
        line = text % values
        if line not in self.complaints and len(self.complaints) < 1000:
            self.complaints.add(line)
            log.error("%s", line)

    # ---- users

    @property
    def users(self) -> Users:
        """Who has a mailbox now.

        The users file is read again when it has changed and been the same for half a second, since
        many programs write in place.  A broken one changes nothing.
        """
        if self.users_path and (version := self.version_of_users()) != self.users_version:
            with self.users_lock:
                if self.has_settled(version):
                    self.try_to_reload(version)
        return self.loaded

    def version_of_users(self) -> tuple[int, int, int, int] | None:
        try:
            state = os.stat(self.users_path or "")
        except OSError:
            return None
        return *version_of(state), state.st_ino

    def has_settled(self, version: tuple[int, int, int, int] | None) -> bool:
        """Say whether a changed users file has stayed the same for a while."""
        if version != self.changed_version:
            self.changed_version, self.changed_since = version, clock()
        if version and time.time() - max(version[1:3]) / 1e9 > SETTLE_SECONDS:
            return True
        return clock() - self.changed_since >= SETTLE_SECONDS

    def try_to_reload(self, version: tuple[int, int, int, int] | None) -> None:
        if version == self.users_version:  # another thread was faster
            return
        try:
            self.reload_users()
        except UsersError as error:
            log.error("%s (the accounts stay as they were)", error)
        except OSError as error:  # it is read when it can be
            self.complain_once("%s (the accounts stay as they were)", error)
            return
        self.users_version = version

    def reload_users(self) -> None:
        """Read the users file once nobody writes into it (which takes half a second to see).

        Raises UsersError or OSError, and keeps the old accounts then.
        """
        if self.users_path:
            while not self.has_settled(self.version_of_users()):
                time.sleep(SETTLE_SECONDS / 10)
            self.users_version = self.version_of_users()
            self.loaded = self.read_users()
            log.info("%s read again: %d accounts", self.users_path, len(self.loaded.accounts))

    def read_users(self) -> Users:
        if self.users_path is not None:
            return Users.read(self.users_path, self.catch_all)
        return Users.from_mapping(self.mapping, self.catch_all)

    def set_catch_all(self, target: str | bool) -> None:
        """Deliver mail for every other address to an account (True: the first); or ValueError."""
        before, self.catch_all = self.catch_all, target
        try:
            self.loaded = self.read_users()
        except BaseException:
            self.catch_all = before
            raise

    def accounts_of(self, address: str) -> list[str]:
        """Return the accounts that mail for an address reaches; raise ValueError if it is none."""
        if not isinstance(address, str):
            raise TypeError(f"{address!r} is not an address")
        found = self.users.mailboxes(address)
        if not found:
            import difflib

            names = list(self.users.accounts.values())
            nearest = difflib.get_close_matches(address, names, 1, 0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else "; the accounts are:"
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            accounts = ", ".join(names[:10]) + more
            raise ValueError(f"{address!r} reaches no mailbox{hint} {accounts}")
        return found

    # ---- writing

    def mailbox(self, address: str) -> str:
        """Return the folder of an account."""
        return f"{self.folder}/{canonical(address)}"

    def mailbox_target(self, account: str, sender: str, recipient: str, received: str) -> Target:
        """Return a mailbox's copy of a message, with its trace fields (RFC 5321 4.4).

        `recipient` is the address that was given to RCPT, `received` this hop's own field.
        """
        fields = f"Return-Path: <{sender}>\r\nDelivered-To: {account}\r\n{received}"
        if account.lower() != recipient.lower():
            fields += f"X-Original-To: {recipient}\r\n"
        return Target(self.mailbox(account), fields.encode())

    def free_space(self) -> float:
        """Return how many octets the disk has room for."""
        import shutil

        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return float("inf")

    def rename(self, tmp: str, path: str) -> None:
        """Move a file from tmp/ to where it is a message."""
        try:
            os.replace(tmp, path)
        except FileNotFoundError:  # somebody has removed new/
            self.make_folder(os.path.dirname(os.path.dirname(tmp)))
            os.replace(tmp, path)

    def make_folder(self, folder: str) -> None:
        """Make a Maildir (or the queue's folder)."""
        for sub in ("tmp",) if folder == self.queue_folder else ("tmp", "new", "cur"):
            self.durable.difference_update((folder, f"{folder}/{sub}"))
            make_private_folder(f"{folder}/{sub}")

    def sync_file(self, fd: int) -> None:
        """Make a file's content durable."""
        if self.sync:
            os.fsync(fd)

    def sync_folder(self, folder: str) -> None:
        """Make the names in a folder durable, which syncing a file in it does not.

        Some file systems (shared folders of virtual machines) know no such thing: that is logged.
        """
        if not self.sync or os.name != "posix":
            return
        try:
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            above = not folder.startswith(self.folder)  # somebody else's, perhaps not to be read
            if error.errno not in NO_FOLDER_SYNC and not (above and error.errno == errno.EACCES):
                raise
            self.complain_once("%s can't be synced: %s", folder, error.strerror)

    def make_durable(self, folder: str) -> None:
        """Sync the name of a folder, and of those above it, unless this process has done so.

        Whoever made them may have failed to, or may be about to: a message is not safe before.
        """
        if not self.sync or folder in self.durable:
            return
        parent = os.path.dirname(folder)
        if folder != parent:
            self.make_durable(parent)
            self.sync_folder(parent)
            self.durable.add(folder)

    def announce(self, queued: bool) -> None:
        """Wake whoever waits for mail, and the relay if some of it is for other hosts."""
        with self.arrived:
            self.arrivals += 1
            self.arrived.notify_all()
        if queued:
            self.queue_changed.set()

    def measure(self, path: str) -> int | None:
        """Return the size on the wire of a file whose name does not tell it.

        None: it is not a message.  An unreadable file is one all the same: a client that
        synchronises by UIDL would take a missing one for deleted.
        """
        known = self.measured.get(path)
        try:
            if known and known[0] == version_of(os.stat(path)):
                return known[1]
            fd, state = open_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.complain_once("can't read %s: %s", path, error)
            return 0
        try:
            return self.measure_open(fd, state, path)
        except OSError as error:
            self.complain_once("can't read %s: %s", path, error)
            return state.st_size
        finally:
            os.close(fd)

    def measure_open(self, fd: int, state: os.stat_result, path: str) -> int:
        """Return the size on the wire of an open file, by reading it unless that is known."""
        known = self.measured.get(path)
        if known and known[0] == version_of(state):
            return known[1]
        blocks = to_crlf(functools.partial(os.read, fd), min(state.st_size + 2, BLOCK))
        size = sum(map(len, blocks))
        os.lseek(fd, 0, os.SEEK_SET)
        if len(self.measured) >= MAX_MEASURED:
            self.measured = {}
        self.measured[path] = version_of(state), size
        return size

    # ---- for tests and scripts

    def paths(self, address: str) -> list[str]:
        """Return the files of an address's messages, in order of arrival."""
        found = []
        for account in self.accounts_of(address):
            for folder in (f"{self.mailbox(account)}/new", f"{self.mailbox(account)}/cur"):
                with contextlib.suppress(FileNotFoundError), os.scandir(folder) as files:
                    found += [(f.name, f.path) for f in files if f.name[0] != "." and f.is_file()]
        return [path for _, path in sorted(found)]

    def messages(self, address: str) -> "list[EmailMessage]":
        """Return the messages of an address, in order of arrival.

        Each is parsed as far as it can be; one that can't be read is empty, with the error in its
        `defects`.
        """
        found = map(read_message, self.paths(address))
        return [message for message in found if message is not None]

    def wait(
        self,
        address: str,
        count: int = 1,
        timeout: float = 5,
        match: "Callable[[EmailMessage], object] | None" = None,
    ) -> "list[EmailMessage]":
        """Return the messages of an address once there are `count`.

        With `match` only those for which `match(message)` is true.  Raises TimeoutError, whose text
        says what is there, after `timeout` seconds.
        """
        if count < 1:
            raise ValueError(f"count: {count!r} is not a number above 0; see expect_none()")
        deadline, paths = clock() + timeout, []
        looked_at: dict[str, EmailMessage | None] = {}
        for paths in self.looks(address, timeout):
            if len(paths) >= count:
                found = select_messages(paths, looked_at, match, deadline)
                if len(found) >= count:
                    return found
        what = count_messages(count)
        if match:
            what += " that match" + "es" * (count == 1)
        raise TimeoutError(f"{address}: waited {timeout} s for {what}; {describe(paths)}")

    def expect_none(self, address: str, seconds: float) -> None:
        """Raise AssertionError when an address has or gets a message within `seconds`."""
        for paths in self.looks(address, seconds):
            if paths:
                raise AssertionError(f"{address}: no message was expected; {describe(paths)}")

    def looks(self, address: str, seconds: float) -> Iterator[list[str]]:
        """Yield an address's files, now and whenever there may be others, until time is over."""
        deadline = clock() + seconds
        while True:
            arrivals = self.arrivals
            yield self.paths(address)
            if clock() >= deadline:
                return
            with self.arrived:  # another process may deliver, and does not notify us
                if arrivals == self.arrivals:
                    self.arrived.wait(min(max(deadline - clock(), 0), POLL_SECONDS))

    def clear(self, address: str | None = None) -> None:
        """Delete the messages of one address, or of all mailboxes and the queue."""
        names = self.users.accounts.values() if address is None else [address]
        for path in itertools.chain.from_iterable(map(self.paths, names)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for name in self.queue_names() if address is None else []:
            self.dequeue(name)

    @contextlib.contextmanager
    def account(self) -> Iterator[tuple[str, str]]:
        """Give a fresh account for one test, as (address, password); then remove it and its mail.

        Raises ValueError unless the Store's users are a mapping.
        """
        if self.users_path is not None:
            raise ValueError("account() needs a Store whose users are a mapping")
        domain = min(self.loaded.domains, default="example.test")
        address, password = f"test-{os.urandom(6).hex()}@{domain}", os.urandom(9).hex()
        self.change_account(address, password)
        try:
            yield address, password
        finally:
            self.change_account(address, None)
            import shutil

            shutil.rmtree(self.mailbox(address), ignore_errors=True)
            self.durable.discard(self.mailbox(address))
            self.durable.discard(f"{self.mailbox(address)}/new")

    def change_account(self, address: str, password: str | None) -> None:
        """Make an account, or (None) remove it."""
        with self.users_lock:
            if password is None:
                del self.mapping[address]
            else:
                self.mapping[address] = password
            self.loaded = self.read_users()

    # ---- the relay's queue

    def queue_names(self) -> list[str]:
        """Return the IDs of the mail that waits for other hosts."""
        try:
            names = os.listdir(self.queue_folder)
        except FileNotFoundError:
            return []
        return [name[:-5] for name in names if name.endswith(".json") and name[0] != "."]

    def queued(self) -> "list[QueueEntry]":
        """Return the entries of the mail that waits for other hosts, oldest first."""
        found = [entry for name in self.queue_names() if (entry := self.readable_entry(name))]
        return sorted(found, key=lambda entry: (entry.arrival_time, entry.id))

    def entry_path(self, name: str) -> str:
        """Return the path of one queued message's entry."""
        return f"{self.queue_folder}/{name}.json"

    def entry(self, name: str) -> "QueueEntry | None":
        """Return the entry of one queued message; None: it is gone, or damaged, which is logged.

        Raises OSError when it can't be read just now.
        """
        path = self.entry_path(name)
        try:
            return QueueEntry.from_json(name, read_file(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.complain_once("%s: not an entry: %s", path, error)
            return None

    def readable_entry(self, name: str) -> "QueueEntry | None":
        """Return the same, and None for one that can't be read just now, which is logged once."""
        try:
            return self.entry(name)
        except OSError as error:
            self.complain_once("%s.json can't be read: %s", name, error)
            return None

    def entry_version(self, name: str) -> int | None:
        """Return what changes when an entry is saved, or None when it is gone."""
        try:
            return os.stat(self.entry_path(name)).st_mtime_ns
        except FileNotFoundError:
            return None

    def save_entry(self, entry: "QueueEntry") -> None:
        """Put a changed entry in place of the old one, durably."""
        with contextlib.closing(Delivery(self, [])) as delivery:
            delivery.write_entry(entry)
            delivery.publish_entry(entry)

    def dequeue(self, name: str) -> None:
        """Remove a message that no recipient waits for any more; a second call does no harm."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.entry_path(name))
        self.sync_folder(self.queue_folder)  # an entry without its message must not come back
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.queue_folder}/{name}")

    def lock_queue(self) -> int | None:
        """Return the descriptor that holds the queue's lock; None: another process works on it."""
        return take_lock(f"{self.queue_folder}/lock")

    def ask_for_start(self, node: str) -> None:
        """Ask whoever works on the queue to try a host or domain (`#` for all) now."""
        name = f"{time.time_ns()}.{os.getpid()}.{next(counter)}.start"
        tmp = f"{self.queue_folder}/tmp/{name}"
        fd = os.open(tmp, CREATE, 0o600)
        try:
            try:
                write_all(fd, node.encode())
            finally:
                os.close(fd)
            os.replace(tmp, f"{self.queue_folder}/{name}")  # nobody sees it before it is written
        except BaseException:
            os.unlink(tmp)
            raise
        self.queue_changed.set()

    def take_start_requests(self) -> list[str]:
        """Return, once, what `ask_for_start` was called with."""
        nodes = []
        for name in os.listdir(self.queue_folder):
            if name.endswith(".start"):
                path = f"{self.queue_folder}/{name}"
                try:
                    node = read_file(path).decode("utf-8", "replace")
                    os.unlink(path)
                    nodes.append(node)
                except OSError as error:
                    self.complain_once("%s: not a request to start: %s", path, error)
        return nodes


def make_private_folder(path: str) -> None:
    """Make a folder, and those above it, for its owner only."""
    if os.path.isdir(path):
        return
    if os.path.dirname(path) != path:
        make_private_folder(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None


def take_lock(path: str) -> int | None:
    """Return a descriptor that holds a file's lock until `unlock`; None: it is locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock(fd)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_file(path: str) -> tuple[int, os.stat_result]:
    """Open a file to be read; return its descriptor and state.

    Anything but a regular file (opening a FIFO would block) raises FileNotFoundError.
    """
    fd = os.open(path, os.O_RDONLY | BINARY | NONBLOCK)
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", path)
    except BaseException:
        os.close(fd)
        raise
    return fd, state


def read_file(path: str) -> bytes:
    """Return the content of a small file."""
    with open(open_file(path)[0], "rb") as file:
        return file.read()


def version_of(state: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file is written into: size, and times in nanoseconds."""
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


# ---------------------------------------------------------------- the queue's records


class QueuedRecipient:
    """One recipient of a queued message, and what the last attempt came to."""

    def __init__(self, address: str, notify: str | None = None, orcpt: str | None = None):
        self.address = address
        self.notify = notify  # RFC 3461 4.1: which reports the sender wants
        self.orcpt = orcpt  # RFC 3461 4.2
        self.attempts = 0
        self.next_try = 0.0  # seconds since 1970
        self.action = ""  # relayed, delayed, failed or delivered (RFC 3464 2.3.3)
        self.status = ""  # RFC 3463
        self.diagnostic = ""  # the next host's reply, or the fault
        self.remote = ""  # the next host, as reports name it
        self.warned = False  # whether a delay has been reported
        self.report_due = False
        self.due = 0.0  # when to try next, by our clock(); not kept on disk
        self.last_try = -1e9  # by our clock(); not kept on disk

    @property
    def domain(self) -> str:
        """The domain in its canonical form."""
        return canonical(self.address.rpartition("@")[2])

    @property
    def done(self) -> bool:
        """Whether the last attempt settled it: there is nothing more to send, only to report."""
        return self.action in ("relayed", "failed")

    def wants(self, event: str) -> bool:
        """Say whether a report about SUCCESS, FAILURE or DELAY is wanted; unasked: FAILURE."""
        return event in self.notify.upper().split(",") if self.notify else event == "FAILURE"


class QueueEntry:
    """A message for other hosts: its envelope, and the recipients that still wait.

    `waited` counts seconds that have passed for certain: the wall clock may be wrong, so only a
    limited part of what it says about the time between two runs of the server is believed.
    """

    def __init__(
        self,
        id: str,
        sender: str,
        parameters: Mapping[str, str | None],
        recipients: list[QueuedRecipient],
    ):
        self.id = id
        self.sender = sender
        self.parameters = dict(parameters)  # of MAIL
        self.recipients = recipients
        self.arrival_time = time.time()  # seconds since 1970
        self.waited = 0.0
        self.since = clock()  # from when on `waited` does not count yet

    def age(self) -> float:
        """Return for how many seconds the message has waited."""
        return self.waited + clock() - self.since

    def to_json(self) -> bytes:
        """Return what the queue keeps on disk."""
        import json

        memory_only = ("due", "last_try")
        recipients = [
            {name: value for name, value in vars(r).items() if name not in memory_only}
            for r in self.recipients
        ]
        record = {
            "id": self.id,
            "sender": self.sender,
            "arrival_time": self.arrival_time,
            "waited": self.age(),
            "saved": time.time(),
            "parameters": self.parameters,
            "recipients": recipients,
        }
        return json.dumps(record).encode()

    @classmethod
    def from_json(cls, name: str, text: bytes) -> "QueueEntry":
        """Read an entry; raise ValueError when it is damaged, or not that of the message `name`."""
        import json

        try:
            record = json.loads(text)
            entry = cls(record["id"], record["sender"], record["parameters"], [])
            entry.recipients = [recipient_from(fields) for fields in record["recipients"]]
            entry.arrival_time = float(record.get("arrival_time", entry.arrival_time))
            gap = time.time() - float(record.get("saved", 0.0))
            entry.waited = float(record.get("waited", 0.0)) + min(max(gap, 0.0), 4 * 3600)
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        texts = [entry.id, entry.sender, *entry.parameters, *entry.parameters.values()]
        if entry.id != name or not all(is_line(text) for text in texts if text is not None):
            raise ValueError("its fields are not those of this message")
        return entry


def recipient_from(record: Mapping[str, Any]) -> QueuedRecipient:
    """Read one recipient's record; raise ValueError or TypeError when it is damaged."""
    recipient = QueuedRecipient(record["address"])
    for name, default in vars(recipient).items():
        value = record.get(name, default)
        if default is None or isinstance(default, str):
            good = is_line(value) or (default is None and value is None)
        else:
            good = isinstance(value, int | float) and isinstance(value, bool) is (default is False)
        if not good:
            raise ValueError(f"bad recipient record: {name} is {value!r}")
        setattr(recipient, name, value)
    return recipient


def is_line(value: object) -> bool:
    """Say whether a value is a text of one line."""
    return isinstance(value, str) and value.isprintable()


# ---------------------------------------------------------------- what POP3 sees of a mailbox


PLAIN_UID = re.compile(rf"[!-~]{{1,{MAX_UID}}}")


class InUse(Exception):
    """Another session has the maildrop open."""


class Maildrop:
    """The messages of one mailbox as they were when it was opened, in order of arrival.

    Holds the mailbox's exclusive lock until close().  Attributes: `names` (of the files, up to a
    `:`) and `sizes` (octets on the wire, before dot-stuffing); a message keeps its index in both.
    The constructor raises InUse, or OSError.
    """

    def __init__(self, store: Store, address: str):
        self.store = store
        self.folder = store.mailbox(address)
        self.lock_fd = self.lock()
        try:
            self.take_snapshot()
        except BaseException:
            self.close()
            raise

    def lock(self) -> int | None:
        path = f"{self.folder}/pop3.lock"
        try:
            fd = take_lock(path)
        except FileNotFoundError:  # no mail yet, or somebody has removed the folder
            self.store.make_folder(self.folder)
            fd = take_lock(path)
        if fd is None:
            raise InUse
        return fd

    def take_snapshot(self) -> None:
        """List the messages with their sizes: from the name, or by looking into the file."""
        found = self.scan()
        names = sorted(found)
        sizes = [
            int(size)
            if (size := name.partition(",W=")[2]).isdecimal()
            else self.measure(name, found)
            for name in names
        ]
        self.names = [name for name, size in zip(names, sizes, strict=True) if size is not None]
        self.sizes = [size for size in sizes if size is not None]
        self.paths = list(map(found.__getitem__, self.names))

    def measure(self, name: str, found: dict[str, str]) -> int | None:
        """Return the size of a file whose name does not tell it, or None: it is not a message.

        When another program renames the file, its path in `found` is put right.
        """
        for _ in range(FOLLOWS):
            path = found[name]
            if (size := self.store.measure(path)) is not None:
                return size
            found.update(self.scan() | self.scan())
            if found[name] == path:
                break
        return None

    def scan(self) -> dict[str, str]:
        """Return the paths of the files in new/ and cur/ by their names up to a `:`."""
        found: dict[str, str] = {}
        for sub in ("new", "cur"):  # in this order, so that a file moved meanwhile is seen
            folder = f"{self.folder}/{sub}"
            with contextlib.suppress(FileNotFoundError):
                names = [name for name in os.listdir(folder) if name[0] != "."]
                found |= {name.partition(":")[0]: f"{folder}/{name}" for name in names}
        return found

    @functools.cached_property
    def uids(self) -> list[str]:
        """Every message's UIDL: its name, or a hash of it where it would not be a UIDL."""
        return [name if PLAIN_UID.fullmatch(name) else hash_of(name) for name in self.names]

    def find_again(self, indexes: Iterable[int]) -> list[int]:
        """Look for files that another program has moved or flagged; return those that are there.

        A listing can miss a file that is renamed at that moment; two in a row hardly do.
        """
        found = self.scan() | self.scan()
        present = [index for index in indexes if self.names[index] in found]
        for index in present:
            self.paths[index] = found[self.names[index]]
        return present

    def open(self, index: int) -> tuple[int, int]:
        """Open a message's file; return a descriptor and the message's size on the wire.

        That is not what `sizes` has when the file's name lies or somebody has written into it.
        Raises FileNotFoundError when the message is gone, or OSError.
        """
        for attempt in itertools.count(1):
            try:
                fd, state = open_file(self.paths[index])
                break
            except FileNotFoundError:
                if attempt == FOLLOWS or not self.find_again([index]):
                    raise
        if f",S={state.st_size}," in self.names[index]:
            return fd, self.sizes[index]
        try:
            return fd, self.store.measure_open(fd, state, self.paths[index])
        except BaseException:
            os.close(fd)
            raise

    def remove(self, indexes: Iterable[int]) -> int:
        """Delete messages for good; return how many could not be deleted.

        A message that is gone already is deleted.  Raises OSError when the folders can't be listed,
        or when the deletion can't be made durable.
        """
        left, failed, folders = list(indexes), 0, set()
        for _ in range(FOLLOWS):
            moved = []
            for index in left:
                try:
                    os.unlink(self.paths[index])
                    folders.add(os.path.dirname(self.paths[index]))
                    # A program that was killed while moving it to cur/ may have left it here, too.
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{self.folder}/new/{self.names[index]}")
                except FileNotFoundError:
                    moved.append(index)
                except OSError as error:
                    log.error("can't delete %s: %s", self.paths[index], error)
                    failed += 1
            left = self.find_again(moved) if moved else []
            if not left:
                break
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):  # somebody has removed all of it
                self.store.sync_folder(folder)
        return failed + len(left)

    def close(self) -> None:
        """Give the lock back."""
        if self.lock_fd is not None:
            fd, self.lock_fd = self.lock_fd, None
            unlock(fd)


def hash_of(text: str) -> str:
    """Return 64 printable characters that stand for a text."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------- the octets of a message


def newline_kinds(data: bytes) -> str | tuple[str, ...] | None:
    r"""Return which of "\n", "\r" and "\r\n" end lines: None, one, or in this order, a tuple.

    The decoder of universal newlines looks at each octet once, four times as fast as counting.
    """
    decoder = io.IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(data.decode("latin-1"), final=True)
    return decoder.newlines


LINE_ENDS = re.compile(rb"\r+\n?|\n")


class LineEnds:
    """Turns every line end into CRLF, block by block.

    Up to MAX_HELD CRs in front of an LF belong to it (some clients send CR CR LF); any other CR,
    and an LF alone, is a line end as well, and counts as `bare`.  Where blocks end does not matter.
    """

    def __init__(self) -> None:
        self.held = 0  # CRs at the end of the last block: an LF may follow
        self.bare = 0

    def feed(self, block: bytes) -> bytes:
        """Return a block with proper line ends; CRs at its end wait for what follows."""
        if self.held:
            block = b"\r" * self.held + block
            self.held = 0
        if block.endswith(b"\r"):
            self.held = min(len(block) - len(block.rstrip(b"\r")), MAX_HELD)
            block = block[: -self.held]
        if block.find(b"\r") < 0:
            proper = block.replace(b"\n", b"\r\n")
        elif (kinds := newline_kinds(block)) == "\r\n":
            return block
        elif kinds == ("\n", "\r\n"):
            proper = block.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        else:
            self.bare += block.count(b"\n") + block.count(b"\r") - 2 * block.count(b"\r\n")
            return LINE_ENDS.sub(proper_line_ends, block)
        self.bare += len(proper) - len(block)
        return proper

    def end(self) -> bytes:
        """Return what is still held back."""
        held, self.held = self.held, 0
        self.bare += held
        return b"\r\n" * held


def proper_line_ends(match: re.Match[bytes]) -> bytes:
    """Return the CRLFs for a run of CRs with or without an LF, or for an LF alone."""
    run = match[0]
    if run.endswith(b"\n"):
        return b"\r\n" * max(len(run) - MAX_HELD, 1)
    return b"\r\n" * len(run)


def to_crlf(read: Callable[[int], bytes], size: int = BLOCK) -> Iterator[bytes]:
    """Yield a message as it goes over the wire, in blocks of some `size` octets.

    Every line ends in CRLF.  `read(size)` returns the next octets of a file, fewer than `size` only
    at its end.
    """
    line_ends, last = LineEnds(), b"\n"
    while data := read(size):
        if block := line_ends.feed(data):
            last = block[-1:]
            yield block
        if len(data) < size:
            break
    if rest := line_ends.end():
        yield rest
    elif last != b"\n":
        yield b"\r\n"


# Header fields (RFC 5322 2.2); a name that is longer than a line may be is not one.
FIELD = rb"[!-9;-~]{1,998}[ \t]{0,998}:"
FIRST_LINE = re.compile(rb">?From |%b" % FIELD)  # mbox's separator counts as a field
NEXT_LINE = re.compile(rb"[ \t]|%b" % FIELD)
HEADER_LINES = re.compile(rb"(?:(?:[ \t]|%b)[^\n]*\n)*+" % FIELD)  # possessive: no memory
CUT_LINE = re.compile(rb"[!-9;-~]{0,998}[ \t]{0,998}\r?")  # which may yet become a field
RECEIVED = re.compile(rb"^received[ \t]*:", re.IGNORECASE | re.MULTILINE)


class HeaderScan:
    """Finds where a message's header ends, block by block, and counts its `Received` fields.

    A message without a header, or whose header runs into its text, gets the empty line that is
    missing before the first line that is neither a field nor a continuation (RFC 5322 2.1): what a
    student types behind DATA is the body.  A message that has a header stays octet for octet.
    """

    def __init__(self) -> None:
        self.held = b""  # the beginning of a line that may yet become a field
        self.begun = False  # whether there was a field
        self.in_line = False  # whether the last line of the header has not ended
        self.ended = False
        self.hops = 0

    def feed(self, block: bytes) -> bytes:
        """Return a block of CRLF lines with the empty line put in, if it is missing here."""
        if self.ended:
            return block
        block, self.held, at = self.held + block, b"", 0
        while self.in_line or (NEXT_LINE if self.begun else FIRST_LINE).match(block, at):
            if not self.in_line:
                self.begun = self.in_line = True
                self.hops += RECEIVED.match(block, at) is not None
            end = block.find(b"\n", at) + 1
            if not end:
                return block
            self.in_line = False
            lines = HEADER_LINES.match(block, end)
            assert lines
            self.hops += len(RECEIVED.findall(lines[0]))
            at = lines.end()
        if CUT_LINE.fullmatch(block, at):
            self.held = block[at:]
            return block[:at]
        self.ended = True
        if block.startswith(b"\r\n", at):
            return block
        return block[:at] + b"\r\n" + block[at:]

    def end(self) -> bytes:
        """Return what was held back, which is text."""
        return b"\r\n" + self.held if self.held else b""


# ---------------------------------------------------------------- messages for tests and people


@functools.lru_cache(maxsize=1)
def tolerant_policy() -> "EmailPolicy":
    """Return a policy of the email package for which no field is too bad or too long."""
    import email.policy

    class TolerantPolicy(email.policy.EmailPolicy):
        parse_fields = True  # as the parser builds a message it wants texts, and no more

        def header_fetch_parse(self, name: str, value: str) -> Any:
            if self.parse_fields and len(value) <= LONG_FIELD:
                with contextlib.suppress(Exception):
                    return super().header_fetch_parse(name, value)
            text = " ".join(value.split())
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            return text if self.parse_fields else text[:LONG_FIELD]

    return TolerantPolicy()


def parse_message(data: bytes) -> "EmailMessage":
    """Parse a message as far as it can be: whole, or its header, or just its text."""
    import email.message
    import email.parser

    policy = tolerant_policy()
    unparsed = policy.clone(parse_fields=False)  # type: ignore[call-arg]
    # The parser compares each line with the boundaries of all parts that it is in.
    comparisons = data.count(b"\n") * len(re.findall(rb"boundary", data, re.IGNORECASE))
    for headers_only in (False, True) if comparisons < MAX_COMPARISONS else (True,):
        with contextlib.suppress(Exception):  # the package raises all kinds of them
            parser = email.parser.BytesParser(policy=unparsed)
            message = parser.parse(io.BytesIO(data), headersonly=headers_only)  # CRLF becomes LF
            assert isinstance(message, email.message.EmailMessage)
            for part in message.walk():
                part.policy = policy
            return message
    message = email.message.EmailMessage(policy)
    message.set_payload(data.decode("utf-8", "replace"))
    return message


def read_message(path: str) -> "EmailMessage | None":
    """Return the message in a file, or None when it is gone."""
    try:
        with open(path, "rb") as file:
            return parse_message(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        message = parse_message(b"")
        message.defects.append(error)  # type: ignore[arg-type]
        return message


def select_messages(
    paths: list[str],
    looked_at: "dict[str, EmailMessage | None]",
    match: "Callable[[EmailMessage], object] | None",
    deadline: float,
) -> "list[EmailMessage]":
    """Return the messages that match; `looked_at` keeps what each path came to.

    With `match`, those not looked at before `deadline` are left out.
    """
    for path in paths:
        if path not in looked_at:
            if match and looked_at and clock() >= deadline:
                break
            message = read_message(path)
            if message is not None and match and not match(message):
                message = None
            looked_at[path] = message
    found = [looked_at.get(path) for path in paths]
    return [message for message in found if message is not None]


def describe(paths: list[str]) -> str:
    """Say in a few words which messages there are, the newest by their subjects."""
    if not paths:
        return "there is nothing"
    subjects = [repr(header_fields(path).get("subject", "")[:60]) for path in paths[-5:]]
    dots = "..., " if len(paths) > 5 else ""
    verb = "is" if len(paths) == 1 else "are"
    return f"there {verb} {count_messages(len(paths))}: {dots}{', '.join(subjects)}"


HEADER_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)\n?")


def header_fields(path: str) -> dict[str, str]:
    """Return a message's fields for people, by lower-case name, the first of each name."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        data = file.read(MAX_HEADER)
        fields, at = {}, 0
        while match := HEADER_FIELD.match(data, at):
            name = match[1].decode("ascii").lower()
            if name not in fields:
                fields[name] = printable_header(match[2].decode("utf-8", "replace"))
            at = match.end()
        return fields
    return {}


def printable_header(field: str) -> str:
    """Return a field in one line, decoded where it can be, without control characters.

    It is cut first: the time for decoding grows with the square of the length.
    """
    import email.header

    text = field[:500]
    with contextlib.suppress(Exception):  # the package raises all kinds of them
        text = str(email.header.make_header(email.header.decode_header(text)))
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Return a text with everything escaped that a terminal could obey, but for line ends."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------- the program


def show_accounts(store: Store, args: "Namespace") -> int:
    """Print each account with what is in its mailbox, and each list with its members."""
    rows = []
    for address in store.users.accounts.values():
        sizes = []
        for path in store.paths(address):
            with contextlib.suppress(FileNotFoundError):  # fetched meanwhile
                sizes.append(os.path.getsize(path))
        rows.append([address, count_messages(len(sizes)), f"{sum(sizes)} octets"])
    rows += [[name, f"= {', '.join(members)}"] for name, members in store.users.lists.values()]
    print_table(rows)
    return 0


def show_list(store: Store, args: "Namespace") -> int:
    """Print number, date, octets, sender and subject of each message."""
    rows = []
    for number, path in enumerate(store.paths(args.address), 1):
        with contextlib.suppress(FileNotFoundError):  # fetched meanwhile
            state, fields = os.stat(path), header_fields(path)
            sender = fields.get("from") or fields.get("return-path", "-")
            when = date_for_people(fields.get("date", ""), state.st_mtime)
            subject = fields.get("subject", "-")
            rows.append([str(number), when, str(state.st_size), sender, subject])
    print_table(rows)
    return 0


def date_for_people(field: str, arrived: float) -> str:
    """Return a Date field in this machine's time; without a good one, the time of arrival."""
    import email.utils

    with contextlib.suppress(Exception):
        arrived = email.utils.parsedate_to_datetime(field).timestamp()
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(arrived))


def print_table(rows: list[list[str]]) -> None:
    """Print rows with tabs between the columns, or on a terminal with columns that line up."""
    if not sys.stdout.isatty():
        for row in rows:
            print(*row, sep="\t")
        return
    widths: collections.Counter[int] = collections.Counter()
    for row in rows:
        for column, text in enumerate(row[:-1]):
            widths[column] = max(widths[column], width(text))
    for row in rows:
        cells = [text + " " * (widths[n] - width(text)) for n, text in enumerate(row[:-1])]
        print(*cells, row[-1], sep="  ")


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def path_of(store: Store, args: "Namespace") -> str:
    """Return the file of the message that the command line names; raise ValueError."""
    paths = store.paths(args.address)
    if not 1 <= args.number <= len(paths):
        there = f"{args.address} has {count_messages(len(paths))}"
        raise ValueError(f"{there}, there is no number {args.number}")
    return paths[int(args.number) - 1]


def show_message(store: Store, args: "Namespace") -> int:
    """Print one message for people, or with --raw its octets."""
    path = path_of(store, args)
    with open(path, "rb") as file:
        if args.raw and not sys.stdout.isatty():
            for block in to_crlf(file.read):
                sys.stdout.buffer.write(block.replace(b"\r\n", b"\n"))
            return 0
        data = file.read(MAX_SHOWN)
    if args.raw:
        print(printable(data.decode("utf-8", "replace").replace("\r\n", "\n")), end="")
    else:
        fields = header_fields(path)
        for name in ("from", "to", "cc", "date", "subject"):
            if name in fields:
                print(f"{name.capitalize()}: {fields[name]}")
        print("", *text_and_attachments(parse_message(data)), sep="\n")
    if (size := os.path.getsize(path)) > len(data):
        print(f"(cut here; the message has {size} octets, and --raw into a file gives all)")
    return 0


def text_and_attachments(message: "EmailMessage") -> Iterator[str]:
    """Yield the text of a message, the plain one where there are several, then its attachments."""
    body = None
    with contextlib.suppress(Exception):  # the package raises all kinds of them
        body = message.get_body(("plain", "html"))
    yield text_of(body or message)
    for part in leaves(message):
        if part is body or part is message:
            continue
        kind = part.get_content_type()
        if kind in ("message/delivery-status", "text/rfc822-headers"):
            yield f"\n{text_of(part)}"
        else:
            name = printable_header(str(part.get_filename("without a name")))
            octets = len(part.get_payload(decode=True) or bytes(part.get_payload(0)))
            yield f"[attachment: {name}, {kind}, {octets} octets]"


def leaves(part: Any) -> Iterator[Any]:
    """Yield the parts of a message that are not multiparts; an attached message is one of them."""
    if part.get_content_maintype() == "multipart" and part.is_multipart():
        for inner in part.get_payload():
            yield from leaves(inner)
    else:
        yield part


def text_of(part: Any) -> str:
    """Return a part's text without control characters, as far as it can be decoded."""
    octets = part.get_payload(decode=True)
    if octets is None:  # it consists of parts
        content = "\n".join(map(str, part.get_payload()))
    else:
        try:
            content = octets.decode(part.get_content_charset("utf-8"), "replace")
        except LookupError:
            content = octets.decode("utf-8", "replace")
    return printable(content.replace("\r\n", "\n").rstrip("\n"))


def wait_for_mail(store: Store, args: "Namespace") -> int:
    """Wait until a mailbox has `--count` messages and print them; return 1 if they don't come."""
    try:
        store.wait(args.address, count=args.count, timeout=args.timeout)
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return 1
    return show_list(store, args)


def clear_mail(store: Store, args: "Namespace") -> int:
    """Delete the messages of a mailbox, or of all and the queue."""
    store.clear(args.address)
    return 0


def show_queue(store: Store, args: "Namespace") -> int:
    """Print a line for each message that waits for another host."""
    now, rows = time.time(), []
    for entry in store.queued():
        due = min((r.next_try for r in entry.recipients), default=now) - now
        next_try = f"next try in {due:.0f} s" if due > 0 else "next try now"
        to = "to " + ", ".join(r.address for r in entry.recipients)
        said = next((r.diagnostic for r in entry.recipients if r.diagnostic), "-")
        age = f"{entry.age():.0f} s old"
        rows.append([entry.id, age, next_try, f"from <{entry.sender}>", to, said])
    print_table(rows)
    return 0


def print_hash(store: Store | None, args: "Namespace") -> int:
    """Print the hash of a new password, asked for twice from a person."""
    import getpass

    terminal = sys.stdin.isatty()
    password = getpass.getpass() if terminal else sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise ValueError("the password is empty")
    if terminal and getpass.getpass("Again: ") != password:
        raise ValueError("the two passwords differ")
    print(hash_password(password))
    return 0


COMMANDS: dict[str, tuple[Callable[[Any, Any], int], range, str]] = {
    "accounts": (show_accounts, range(1), "the accounts and lists, with what is in the mailboxes"),
    "list": (show_list, range(1, 2), "ADDRESS: date, octets, sender and subject of its messages"),
    "show": (show_message, range(2, 3), "ADDRESS N: message N for people; --raw: its octets"),
    "wait": (wait_for_mail, range(1, 2), "ADDRESS: until it has --count messages; status 1 if not"),
    "clear": (clear_mail, range(2), "[ADDRESS]: delete its messages, or all and the queue"),
    "queue": (show_queue, range(1), "the mail that waits for other hosts"),
    "hash": (print_hash, range(1), "the hash of a password, for users.txt"),
}


def seconds(text: str) -> float:
    """Read a time for argparse, which calls it by this function's name when it is not one."""
    if not (value := float(text)) >= 0:
        raise ValueError(text)
    return value


def parse_arguments(argv: list[str] | None) -> "Namespace":
    """Read the command line; end the program when it is wrong."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{self.prog}: {printable(message)} (--help shows the commands)\n")

    parser = Parser(
        prog=os.path.basename(sys.argv[0]),
        description="Look at the spool. It is not changed, but by clear.",
        epilog="\n".join(
            ["commands:", *(f"  {c:9} {text}" for c, (_, _, text) in COMMANDS.items())]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", nargs="?", metavar="COMMAND", help="see below")
    add(
        "words", nargs="*", metavar="ADDRESS", help="the mailbox, and for show the message's number"
    )
    add("--users", metavar="FILE", help="accounts (users.txt, else the one beside this program)")
    add("--spool", default="spool", metavar="DIR", help="where mail is kept (%(default)s)")
    add("--count", type=int, default=1, metavar="N", help="for wait: how many messages (1)")
    add("--timeout", type=seconds, default=60, metavar="SECONDS", help="for wait (%(default)s)")
    add("--raw", action="store_true", help="for show: the message as it is")
    args = parser.parse_intermixed_args(argv)
    if args.command is None:
        parser.print_help()
        sys.exit(2)
    take_words(parser, args)
    return args


def take_words(parser: "ArgumentParser", args: "Namespace") -> None:
    """Read address and number behind the command; end the program when they don't fit it."""
    if args.command not in COMMANDS:
        parser.error(f"{args.command} is not a command")
    _, counts, usage = COMMANDS[args.command]
    if len(args.words) not in counts:
        words = re.match(r"\[?[A-Z][A-Z \]]*(?=:)", usage)
        parser.error(f"write {args.command} {words[0] if words else ''}".rstrip())
    args.address, number = (*args.words, None, None)[:2]
    if number and not (number.isascii() and number.isdigit()):
        parser.error(f"{number} is not a message's number")
    args.number = int(number or 0)


def main(argv: list[str] | None = None) -> int:
    """Look at the spool from a shell; return the exit status."""
    open_standard_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    args = parse_arguments(argv)
    program, where = os.path.basename(sys.argv[0]), os.path.abspath(args.spool)
    try:
        store = None
        if args.command != "hash":
            store = Store(args.spool, users_file(args.users), read_only=True)
        if args.command not in ("hash", "wait"):  # mail, and its folder, may yet come
            os.listdir(where)
        status = COMMANDS[args.command][0](store, args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains
        return 1
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        hint = " (no spool: has the server run here?)" if error.filename == where else ""
        name = f"{error.filename}: " if error.filename else ""
        print(f"{program}: {name}{error.strerror}{hint}", file=sys.stderr)
        return 1


def open_standard_descriptors() -> None:
    """Open closed descriptors 0 to 2 on the null device: no other file must become stderr."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def users_file(named: str | None) -> str | dict[str, str]:
    """Return the users file to use: the one named, or here, or beside this program.

    Where only the modules are installed these are the demo accounts.
    """
    if named is not None:
        return named
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "users.txt")
    return next((path for path in ("users.txt", beside) if os.path.exists(path)), DEMO)


if __name__ == "__main__":
    sys.exit(main())
