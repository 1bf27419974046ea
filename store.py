"""Everything on disk: users.txt, one Maildir per account, the relay's queue.

    spool/<address>/tmp,new,cur   one flat file per message, CRLF line ends, as sent behind our trace fields
    spool/<address>/pop3.lock     held by the one POP3 session that has the mailbox open
    spool/queue/                  mail on its way to other hosts: ID (the message) and ID.json (who still waits)

A delivery writes tmp/, syncs, renames into new/, syncs the folder, and only then is a message acknowledged; a crash
leaves files that nobody reads, or a message that comes twice, and loses none.  Writers need no lock (that is Maildir's
point), readers hold pop3.lock.  Names are `<seconds>.M<microseconds>P<pid>Q<counter>.<host>,S=<octets>,W=<octets>`.
S is the file's size and W its size on the wire, so a maildrop is opened by listing it; the name up to a `:` is the
UIDL.

This module knows no socket and no reply code; a full disk or a missing folder is an OSError.

    store = Store("spool", {"alice@example.test": "wonderland"})
    store.wait("alice@example.test")        # blocks until there is a message, returns [EmailMessage]

and, as a program: `python store.py accounts | list ADDRESS | show ADDRESS N | wait ADDRESS | hash | queue`.
"""

import binascii
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
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

BUFFER = 1 << 16  # octets of a message that are held in memory until they go to its file
BLOCK = 1 << 18  # octets of a file that are read at once
MAX_LOCAL, MAX_DOMAIN = 64, 255  # octets, RFC 5321 4.5.3.1.1 and 4.5.3.1.2
MAX_UID = 70  # octets, RFC 1939 7
BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # for what turns out to be no file
CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY
STALE = 36 * 3600  # seconds after which a file in tmp/ belongs to nobody, as Maildir has it
SCRYPT = {"n": 1 << 14, "r": 8, "p": 1}  # 16 MiB and some 40 ms a guess
SCRYPT_TURN = threading.Semaphore(2)  # at a time: a crowd of guesses must not take all memory
FOLLOWS = 20  # times that a file is looked for which another program renames again and again
MAX_MEASURED = 200_000  # files of other programs whose sizes are remembered, some 300 octets of memory each
DEMO = {"alice@example.test": "wonderland", "bob@example.test": "builder"}  # as shipped in users.txt

log = logging.getLogger("store")

try:
    import fcntl

    def lock(fd: int) -> None:
        """Take the lock of an open file, which ends with the file or its process; raise BlockingIOError if held."""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

except ImportError:  # Windows
    import msvcrt

    def lock(fd: int) -> None:
        """Take the lock of an open file, which ends with the file or its process; raise BlockingIOError if held."""
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from None


# ---------------------------------------------------------------- who has a mailbox here


class UsersError(ValueError):
    """A users file that can't be used; the text names file, line and fault."""


ENTRY = re.compile(r"\s*(\*|\*@[^\s:=@]+|[^\s:@]+@[^\s:=@]+)\s*([:=])(.*)", re.DOTALL)


def key(address: str) -> str:
    """Return what addresses are compared by: case does not count, and `xn--` domains are what they stand for."""
    address = address.lower()
    if "xn--" in address:
        local, at, domain = address.rpartition("@")
        if at and len(domain) <= MAX_DOMAIN:
            with contextlib.suppress(UnicodeError):
                address = local + at + domain.encode("ascii").decode("idna")
    return address


def bad_name(address: str) -> str | None:
    """Return why an address can't name a folder, or None when it can."""
    local, _, domain = address.rpartition("@")
    if any(c in "/\\" or not c.isprintable() or c.isspace() for c in address):
        return "has a character that no mailbox name may have"
    if local.startswith(".") or domain.startswith("."):
        return "begins with a dot"
    if len(local.encode()) > MAX_LOCAL or len(domain.encode()) > MAX_DOMAIN:
        return f"is longer than {MAX_LOCAL}@{MAX_DOMAIN} octets"
    return None


class Users:
    """The accounts, lists and catch-alls of one users file (or mapping), and the passwords.

    Attributes: `accounts` (key to address), `lists` (key to its address and members), `domains` (those named).
    """

    def __init__(self, entries: Iterator[tuple[str, str, str, str]]):
        """Take (where, name, ":" or "=", rest) for each line; raise UsersError."""
        self.accounts, self.lists, self.secrets, places = {}, {}, {}, {}
        for where, name, sign, rest in entries:
            if not name.startswith("*") and (fault := bad_name(name)):
                raise UsersError(f"{where}: {name!a} {fault}")
            if key(name) in places:
                raise UsersError(f"{where}: {name} is here twice")
            places[key(name)] = where
            if sign == "=":
                self.lists[key(name)] = (name, [m.strip() for m in rest.split(",") if m.strip()])
            elif name.startswith("*"):
                raise UsersError(f"{where}: {name} is a catch-all, not an account: write {name} = an account")
            else:
                self.add_account(where, name, rest)
        for name, (_, members) in self.lists.items():
            self.check_list(places[name], name, members)
        self.domains = {name.rpartition("@")[2] for name in [*self.accounts, *self.lists] if name != "*"}
        self.by_local_part = {}
        for name, address in self.accounts.items():
            self.by_local_part.setdefault(name.rpartition("@")[0], []).append(address)
        self.right = {}  # passwords that were right, by a keyed hash, so that polling does not cost a scrypt each time
        self.right_key = os.urandom(32)
        self.hashed = any(secret.startswith("{SCRYPT}") for secret in self.secrets.values())

    def add_account(self, where: str, name: str, secret: str) -> None:
        if not secret:
            raise UsersError(f"{where}: {name} has no password")
        if secret.startswith("{SCRYPT}") and parse_hash(secret) is None:
            raise UsersError(f"{where}: the hash of {name} is damaged; make one with: python store.py hash")
        self.accounts[key(name)] = name
        self.secrets[key(name)] = secret

    def check_list(self, where: str, name: str, members: list[str]) -> None:
        if not members:
            raise UsersError(f"{where}: {name} has no members")
        for member in members:
            if not self.expand(key(member)):
                hint = "; put commas between addresses" if " " in member else ""
                hint = hint if "@" in member else "; an account is written address:password"
                raise UsersError(f"{where}: {member} is neither an account nor a list that leads to one{hint}")

    @classmethod
    def read(cls, path: str) -> "Users":
        """Read a users file; raise UsersError (with the line's number) or OSError."""
        if not path:
            raise UsersError("the users file has no name")
        with open(path, "rb") as file:
            raw = file.read()

        def entries():
            for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
                where = f"{path}:{number}"
                try:
                    text = line.removesuffix(b"\r").decode()
                except UnicodeDecodeError:
                    raise UsersError(f"{where}: not UTF-8") from None
                if not text.strip() or text.lstrip().startswith("#"):
                    continue
                if not (match := ENTRY.fullmatch(text)):
                    name, sign, _ = text.replace("=", ":").partition(":")  # without a sign it may be a password
                    hint = f" ({name.strip()!a} has no @domain)" if sign and "@" not in name else ""
                    raise UsersError(f"{where}: neither `address:password` nor `address = address, ...`{hint}")
                yield where, *match.groups()

        users = cls(entries())
        if not users.accounts:
            raise UsersError(f"{path}: no account; write one as `address:password`")
        return users

    @classmethod
    def of(cls, mapping) -> "Users":
        """Take a mapping of address to password, and of list or catch-all to members; raise UsersError."""

        def entries():
            for name, value in mapping.items():
                if not isinstance(value, str):
                    yield "users", name, "=", ",".join(value)
                else:
                    yield "users", name, "=" if name.startswith("*") else ":", value

        for name in mapping:
            if not ENTRY.fullmatch(name + ":"):
                raise UsersError(f"users: {name!a} is not an address")
        return cls(entries())

    # ---- where mail for an address goes

    def mailboxes(self, address: str) -> list[str]:
        """Return the accounts that mail for `address` reaches, in order; none when the address is not ours."""
        name = key(address)
        local, _, domain = name.rpartition("@")
        if not (local and domain):
            return self.postmaster() if name == "postmaster" else []
        found = self.expand(name) or self.expand(f"{local.partition('+')[0]}@{domain}")
        if not found and local == "postmaster" and domain in self.domains:
            found = self.postmaster()
        return found or self.expand(f"*@{domain}") or self.expand("*")

    def expand(self, name: str) -> list[str]:
        """Return the accounts behind one key, each once; a list that leads back to itself adds nothing."""
        found, seen, waiting = {}, set(), [name]
        while waiting:
            name = waiting.pop()
            if name in self.accounts:
                found[self.accounts[name]] = True
            elif name in self.lists and name not in seen:
                seen.add(name)
                waiting += map(key, reversed(self.lists[name][1]))
        return list(found)

    def postmaster(self) -> list[str]:
        """Return whom `<postmaster>` reaches, which must be somebody (RFC 5321 4.5.1): of that name, else the first."""
        named = [name for name in [*self.accounts, *self.lists] if name.startswith("postmaster@")]
        return self.expand(named[0]) if named else list(self.accounts.values())[:1]

    def is_local(self, domain: str) -> bool:
        """Say whether the users file names a domain."""
        return key("@" + domain)[1:] in self.domains

    def find(self, name: str) -> list[str]:
        """Return the accounts and lists that a name means; without a domain there may be several."""
        if name.startswith("*"):
            return []
        if "@" not in name:
            name = key(name)
            wanted, every = {name, name.partition("+")[0]} - {""}, [*self.accounts, *self.lists]
            found = [full for full in every if full.rpartition("@")[0] in wanted]
            return [self.written(full) for full in found] or self.mailboxes(name)
        return [self.written(key(name))] if key(name) in self.lists else self.mailboxes(name)[:1]

    def written(self, name: str) -> str:
        """Return an account or list as the users file writes it."""
        return self.accounts[name] if name in self.accounts else self.lists[name][0]

    def members(self, name: str) -> list[str] | None:
        """Return the members of a list, or None when there is no such list."""
        found = self.find(name)
        return self.lists[key(found[0])][1] if len(found) == 1 and key(found[0]) in self.lists else None

    # ---- passwords

    def with_demo_passwords(self) -> list[str]:
        """Return the accounts that still have the password which the project ships."""
        return [self.accounts[name] for name, secret in DEMO.items() if self.secrets.get(name) == secret]

    def login_address(self, name: str) -> str | None:
        """Return the account that a login names, with or without its domain, or None."""
        if "@" in name:
            return self.accounts.get(key(name))
        found = self.by_local_part.get(key(name), [])
        return found[0] if len(found) == 1 else None

    def check_password(self, name: str, password: bytes) -> str | None:
        """Return the account that a name and a password open, or None; a wrong name costs what a wrong one does."""
        import hmac

        address = self.login_address(name)
        secret = self.secrets[key(address)] if address else ""  # which nobody has
        if not secret.startswith("{SCRYPT}"):
            right = hmac.compare_digest(secret.encode(), password) and address is not None
            if not right and self.hashed:
                scrypt(password, b"as slow as the others")
            return address if right else None
        print_ = hmac.digest(self.right_key, password, "sha256")
        if hmac.compare_digest(self.right.get(address, b""), print_):
            return address
        salt, wanted = parse_hash(secret)
        if not hmac.compare_digest(scrypt(password, salt), wanted):
            return None
        self.right[address] = print_
        return address

    def check_digest(self, name: str, answer: Callable[[bytes], str], digest: str) -> str | None:
        """Return the account whose plain password makes `answer(password)` the digest (hashed ones never do)."""
        import hmac

        address = self.login_address(name)
        secret = self.secrets[key(address)] if address else "{SCRYPT}"  # which never answers right
        known = not secret.startswith("{SCRYPT}")
        right = hmac.compare_digest(answer(secret.encode()).encode(), digest.lower().encode("utf-8", "replace"))
        return address if right and known else None


def scrypt(password: bytes, salt: bytes) -> bytes:
    """Return the hash that users.txt keeps in place of a password."""
    import hashlib

    with SCRYPT_TURN:
        return hashlib.scrypt(password, salt=salt, maxmem=64 << 20, dklen=32, **SCRYPT)


def hash_password(password: str) -> str:
    """Return `{SCRYPT}...` for a users file."""
    salt = os.urandom(16)
    return "{SCRYPT}" + binascii.b2a_base64(salt + scrypt(password.encode(), salt), newline=False).decode()


def parse_hash(secret: str) -> tuple[bytes, bytes] | None:
    """Return salt and hash of `{SCRYPT}...`, or None when it is not whole."""
    try:
        raw = binascii.a2b_base64(secret.removeprefix("{SCRYPT}").strip().encode(), strict_mode=True)
    except ValueError:
        return None
    return (raw[:16], raw[16:]) if len(raw) == 48 else None


# ---------------------------------------------------------------- the spool


counter = itertools.count(1)


def unique(host: str, octets: int, octets_on_wire: int) -> str:
    """Return a Maildir file name that no other delivery anywhere has; as a UIDL it must not be over 70 octets."""
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    name, sizes = f"{seconds}.M{micros:06d}P{os.getpid()}Q{next(counter)}", f",S={octets},W={octets_on_wire}"
    return f"{name}.{host[: MAX_UID - 1 - len(name) - len(sizes)]}{sizes}"


ids = itertools.count(1)


def new_id() -> str:
    """Return what a message is called in replies, log and queue: hexadecimal, and unique on this machine."""
    return f"{time.time_ns() // 1000:X}{os.getpid() & 0xFFFF:04X}{next(ids) & 0xFFF:03X}"


def mail_date(seconds: float) -> str:
    """Return a time as mail writes it (RFC 5322 3.3), whatever the locale."""
    import email.utils

    return email.utils.formatdate(seconds, localtime=True)


def trace_fields(sender: str, mailbox: str, recipient: str, received: str) -> bytes:
    """Return what stands before a message in a mailbox; `received` is this hop's own field."""
    original = f"X-Original-To: {recipient}\r\n" if mailbox.lower() != recipient.lower() else ""
    return f"Return-Path: <{sender}>\r\nDelivered-To: {mailbox}\r\n{received}{original}".encode()


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; os.write() may stop half-way, on a disk that fills up for one."""
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

    The content goes into the first target's file in tmp/ as it arrives, the other files are copied from it.  Whoever
    makes a Delivery calls `write` with the message's octets, then `commit`, and in the end `close`, which removes what
    was not committed.  Each of them may raise OSError.
    """

    def __init__(self, store: "Store", targets: list[Target]):
        self.store = store
        self.targets = targets
        self.buffer = bytearray()  # content that is not in a file yet
        self.size = 0  # octets of content
        self.tail = b""  # its last two octets
        self.fd: int | None = None  # of the first target's file
        self.pending: dict[str, str] = {}  # files in tmp/, and what each will be called

    def write(self, block: bytes) -> None:
        """Add octets; beyond a small buffer they go to disk as they come."""
        self.buffer += block
        if len(self.buffer) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered into the first target's file."""
        data = bytes(self.buffer)
        self.buffer.clear()
        self.size += len(data)
        self.tail = (self.tail + data[-2:])[-2:]
        if self.fd is None:
            self.fd = self.create(self.targets[0].folder)
            data = self.targets[0].header_fields + data
        write_all(self.fd, data)

    def create(self, folder: str, path: str = "") -> int:
        """Create a file in a folder's tmp/ that will be called `path`; return its descriptor."""
        tmp = f"{folder}/tmp/{time.time_ns()}.{os.getpid()}.{next(counter)}"
        self.pending[tmp] = path
        try:
            return os.open(tmp, CREATE, 0o600)
        except FileNotFoundError:  # the first message, or somebody has removed the folder
            self.store.make_folder(folder)
            return os.open(tmp, CREATE, 0o600)

    def commit(self, entry: dict | None = None) -> list[str]:
        """Put every file on disk, then into sight, the queue's entry last; return the paths.

        All files are written, synced and closed before the first one shows, so a full disk refuses the message whole,
        and Windows, which renames no open file, is content.  A failure between two renames leaves some recipients
        served although the client is told to try again: a message twice, never one lost.
        """
        self.flush()
        self.store.sync_file(self.fd)
        [first] = self.pending
        self.pending[first] = self.path(self.targets[0])
        for target in self.targets[1:]:
            os.lseek(self.fd, len(self.targets[0].header_fields), os.SEEK_SET)
            content = iter(lambda: os.read(self.fd, BUFFER), b"")
            self.write_file(target.folder, self.path(target), itertools.chain([target.header_fields], content))
        self.close_file()
        if entry is not None:
            self.write_file(self.store.queue_folder, self.store.entry_path(entry["id"]), [json_of(entry)])
        paths = list(self.pending.values())
        for tmp, path in list(self.pending.items()):
            self.store.publish(tmp, path)
            del self.pending[tmp]
        for folder in dict.fromkeys(path.rpartition("/")[0] for path in paths):
            self.store.sync_folder(folder)
        self.store.announce(entry is not None)
        return paths

    def path(self, target: Target) -> str:
        """Return what a target's file will be called, with its sizes if it is a Maildir's."""
        if target.name:
            return f"{target.folder}/{target.name}"
        octets = len(target.header_fields) + self.size
        missing = 2 if self.size and self.tail != b"\r\n" else 0  # POP3 adds the CRLF that the sender left out
        return f"{target.folder}/new/{unique(self.store.host, octets, octets + missing)}"

    def write_file(self, folder: str, path: str, blocks: Iterable[bytes]) -> None:
        """Write and sync one more file."""
        fd = self.create(folder, path)
        try:
            for block in blocks:
                write_all(fd, block)
            self.store.sync_file(fd)
        finally:
            os.close(fd)

    def close_file(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def close(self) -> None:
        """Let go of the files; what has not been committed is gone."""
        self.close_file()
        for tmp in self.pending:
            with contextlib.suppress(OSError):
                os.unlink(tmp)
        self.pending = {}
        self.buffer.clear()


class Store:
    """The spool folder and who has a mailbox in it.

    `users` is the path of a users file, which is read again when it changes, or a mapping (see `Users.of`).  Without
    `sync` a message is acknowledged once the system has it, not the disk.  Raises ValueError (such as UsersError), or
    OSError when the folder can't be made or written.
    """

    def __init__(self, folder, users, sync: bool = True):
        if not os.fspath(folder):
            raise ValueError("the spool has no name")
        self.folder, self.sync = os.path.abspath(os.fspath(folder)), sync
        self.host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"
        self.queue_folder = f"{self.folder}/queue"
        self.arrived, self.queue_changed = threading.Condition(), threading.Event()
        self.users_lock, self.damaged = threading.Lock(), set()
        self.measured = {}  # sizes on the wire of other programs' files: path to (version_of, octets)
        self.users_path = self.users_seen = None
        if isinstance(users, str | os.PathLike):
            self.users_path = os.fspath(users)
            self.users_seen = self.users_stamp()
            self.loaded = Users.read(self.users_path)
        else:
            self.mapping = dict(users)
            self.loaded = Users.of(self.mapping)
        self.prepare()

    def prepare(self) -> None:
        """Make the folder, show that it can be written, and remove what crashes left in tmp/ long ago."""
        if not os.path.isdir(f"{self.queue_folder}/tmp"):
            self.make_folder(self.queue_folder)
        probe = f"{self.queue_folder}/tmp/{os.getpid()}.{next(counter)}"
        os.close(os.open(probe, CREATE, 0o600))
        os.unlink(probe)
        for name in os.listdir(self.folder):
            if "@" in name:  # a folder of another name is not ours
                self.remove_stale(f"{self.folder}/{name}/tmp")
        self.remove_stale(f"{self.queue_folder}/tmp")
        queued = set(self.queue_names())
        self.remove_stale(self.queue_folder, lambda name: name not in queued and re.fullmatch("[0-9A-F]+", name))

    def remove_stale(self, folder: str, chosen=lambda name: True) -> None:
        """Remove the files in a folder that a crash has left there long ago."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(folder):
                if chosen(entry.name) and entry.stat().st_mtime < time.time() - STALE:
                    os.unlink(entry.path)

    # ---- users

    @property
    def users(self) -> Users:
        """Who has a mailbox now: the users file is read again when it has changed; a broken one changes nothing."""
        if self.users_path and (stamp := self.users_stamp()) != self.users_seen:
            with self.users_lock:
                if stamp != self.users_seen:
                    try:
                        self.loaded = Users.read(self.users_path)
                        log.info("%s read again: %d accounts", self.users_path, len(self.loaded.accounts))
                    except (UsersError, OSError) as error:
                        log.error("%s (the accounts stay as they were)", error)
                        if stamp is not None and isinstance(error, OSError):
                            return self.loaded  # such as too many open files: it is read another time
                    self.users_seen = stamp
        return self.loaded

    def users_stamp(self):
        try:
            state = os.stat(self.users_path)
        except OSError:
            return None
        return state.st_mtime_ns, state.st_ctime_ns, state.st_size, state.st_ino

    # ---- writing

    def mailbox(self, address: str) -> str:
        """Return the folder of an account."""
        return f"{self.folder}/{key(address)}"

    def measure(self, path: str) -> int | None:
        """Return the size on the wire of a file whose name does not tell it; None: it is not a message.

        An unreadable file is a message all the same: a client that synchronises by UIDL would take a missing one for
        deleted.
        """
        with contextlib.suppress(OSError):
            known = self.measured.get(path)
            if known and known[0] == version_of(os.stat(path)):
                return known[1]
        try:
            fd, state = open_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.error("can't read %s: %s", path, error)
            return 0
        try:
            return self.measure_open(fd, state, path)
        except OSError as error:
            log.error("can't read %s: %s", path, error)
            return state.st_size
        finally:
            os.close(fd)

    def measure_open(self, fd: int, state: os.stat_result, path: str) -> int:
        """Return the size on the wire of an open file, by reading it unless that was done before."""
        known = self.measured.get(path)
        if known and known[0] == version_of(state):
            return known[1]
        size = wire_size(fd, state.st_size)
        os.lseek(fd, 0, os.SEEK_SET)
        if len(self.measured) >= MAX_MEASURED:
            self.measured = {}
        self.measured[path] = version_of(state), size
        return size

    def publish(self, tmp: str, path: str) -> None:
        """Move a file from tmp/ to where it is a message."""
        try:
            os.replace(tmp, path)
        except FileNotFoundError:  # somebody has removed new/
            self.make_folder(os.path.dirname(os.path.dirname(tmp)))
            os.replace(tmp, path)

    def make_folder(self, folder: str) -> None:
        """Make a Maildir (or the queue's folder), and see that it survives a crash."""
        for sub in ("tmp",) if folder == self.queue_folder else ("tmp", "new", "cur"):
            os.makedirs(f"{folder}/{sub}", mode=0o700, exist_ok=True)
        for path in (folder, self.folder, os.path.dirname(self.folder)):
            self.sync_folder(path)

    def sync_file(self, fd: int) -> None:
        """Make a file's content durable."""
        if self.sync:
            os.fsync(fd)

    def sync_folder(self, folder: str) -> None:
        """Make the names in a folder durable, which syncing a file in it does not."""
        if self.sync and os.name == "posix":
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def announce(self, queued: bool) -> None:
        """Wake whoever waits for mail, and the relay if some of it is for other hosts."""
        with self.arrived:
            self.arrived.notify_all()
        if queued:
            self.queue_changed.set()

    # ---- for tests and scripts

    def paths(self, address: str) -> list[str]:
        """Return the files of a mailbox's messages, oldest first."""
        found = []
        for sub in ("new", "cur"):
            with contextlib.suppress(FileNotFoundError), os.scandir(f"{self.mailbox(address)}/{sub}") as entries:
                found += [(e.name, e.path) for e in entries if not e.name.startswith(".") and e.is_file()]
        return [path for _, path in sorted(found)]

    def messages(self, address: str) -> list:
        """Return the messages of a mailbox, oldest first, as email.message.EmailMessage."""
        import email.policy

        found = []
        for path in self.paths(address):
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                found.append(email.message_from_binary_file(file, policy=email.policy.default))
        return found

    def wait(self, address: str, count: int = 1, timeout: float = 5, match: Callable | None = None) -> list:
        """Return the messages of a mailbox (for which `match(message)` is true) once there are `count`.

        Raises TimeoutError, whose text says what did arrive, after `timeout` seconds.
        """
        deadline, paths, every = time.monotonic() + timeout, None, []
        while True:
            with self.arrived:  # looking and waiting in one: what arrives in between is not missed
                while (now := self.paths(address)) == paths and (left := deadline - time.monotonic()) > 0:
                    self.arrived.wait(min(left, 0.1))  # another process may deliver, and it does not tell us
            if now != paths:
                paths, every = now, self.messages(address)
                found = [message for message in every if not match or match(message)]
                if len(found) >= count:
                    return found
            if time.monotonic() >= deadline:
                subjects = ", ".join(repr(message["Subject"]) for message in every) or "nothing"
                wanted = in_words(count) + (" that match" if match else "")
                raise TimeoutError(f"{address}: waited {timeout} s for {wanted}; there are: {subjects}")

    def expect_none(self, address: str, seconds: float) -> None:
        """Raise AssertionError when a mailbox has or gets a message within `seconds`."""
        try:
            [message, *_] = self.wait(address, timeout=seconds)
        except TimeoutError:
            return
        raise AssertionError(f"{address}: no message was expected, there is {message['Subject']!r}")

    def clear(self, address: str | None = None) -> None:
        """Delete the messages of one mailbox, or of all, and then the queue's as well."""
        for name in [address] if address else [name for name in os.listdir(self.folder) if "@" in name]:
            for path in self.paths(name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        for name in [] if address else self.queue_names():
            with contextlib.suppress(FileNotFoundError):
                self.unqueue(name)

    @contextlib.contextmanager
    def account(self) -> Iterator[tuple[str, str]]:
        """Give a fresh account, as (address, password), and take it away again with its mail; for mappings only."""
        if self.users_path:
            raise ValueError("account() needs a Store whose users are a mapping")
        domain = min(self.loaded.domains, default="example.test")
        address, password = f"test-{os.urandom(6).hex()}@{domain}", os.urandom(9).hex()
        self.change_accounts(address, password)
        try:
            yield address, password
        finally:
            self.change_accounts(address, None)
            self.clear(address)
            import shutil

            shutil.rmtree(self.mailbox(address), ignore_errors=True)

    def change_accounts(self, address: str, password: str | None) -> None:
        with self.users_lock:
            self.mapping.pop(address, None)
            if password:
                self.mapping[address] = password
            self.loaded = Users.of(self.mapping)

    # ---- the relay's queue

    def queued(self) -> list[dict]:
        """Return the entries of the mail that waits for other hosts, oldest first."""
        found = [self.entry(name) for name in self.queue_names()]
        return sorted((entry for entry in found if entry), key=lambda entry: (entry["arrived"], entry["id"]))

    def queue_names(self) -> list[str]:
        """Return the ids of the mail that waits for other hosts."""
        return [name.removesuffix(".json") for name in listing(self.queue_folder) if name.endswith(".json")]

    def entry_path(self, name: str) -> str:
        """Return the path of a message's queue entry."""
        return f"{self.queue_folder}/{name}.json"

    def entry(self, name: str) -> dict | None:
        """Return the queue's entry of one message, or None when it is gone (or is none of ours); OSError: who knows."""
        import json

        try:
            with open(self.entry_path(name), encoding="utf-8") as file:
                entry = json.load(file)
            if entry["id"] != name or not fits(entry, ENTRY_FIELDS):
                raise ValueError("its fields are not those of a message")
            if not all(fits(recipient, RECIPIENT_FIELDS) for recipient in entry["recipients"]):
                raise ValueError("its recipients are none")
            return entry
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if name not in self.damaged:  # once, the relay asks each second
                log.error("%s/%s.json: not an entry: %s", self.queue_folder, name, error)
                self.damaged.add(name)
            return None

    def queued_message(self, name: str):
        """Open one queued message."""
        return open(f"{self.queue_folder}/{name}", "rb", buffering=0)

    def save_entry(self, entry: dict) -> None:
        """Put a changed entry in place of the old one, durably."""
        with contextlib.closing(Delivery(self, [])) as delivery:
            path = self.entry_path(entry["id"])
            delivery.write_file(self.queue_folder, path, [json_of(entry)])
            [tmp] = delivery.pending
            os.replace(tmp, path)
            delivery.pending = {}
        self.sync_folder(self.queue_folder)

    def unqueue(self, name: str) -> None:
        """Remove a message that nobody waits for any more."""
        os.unlink(self.entry_path(name))
        self.sync_folder(self.queue_folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.queue_folder}/{name}")

    def lock_queue(self) -> int | None:
        """Return the descriptor that holds the queue's lock, or None when another process works on it."""
        return take_lock(f"{self.queue_folder}/lock")

    def ask_for_start(self, node: str) -> None:
        """Ask whoever works on the queue to try a host or domain (`#` for all) now."""
        name = f"{time.time_ns()}.{os.getpid()}.{next(counter)}.start"
        with open(f"{self.queue_folder}/tmp/{name}", "w", encoding="utf-8") as file:
            file.write(node)
        os.rename(file.name, f"{self.queue_folder}/{name}")  # nobody may see it before it is written
        self.queue_changed.set()

    def take_start_requests(self) -> list[str]:
        """Return, once, what `ask_for_start` has been called with."""
        nodes = []
        for name in listing(self.queue_folder):
            if name.endswith(".start"):
                path = f"{self.queue_folder}/{name}"
                with open(path, encoding="utf-8", errors="replace") as file:
                    nodes.append(file.read())
                os.unlink(path)
        return nodes


ENTRY_FIELDS = {"id": str, "sender": str, "arrived": int | float, "parameters": dict, "recipients": list}
RECIPIENT_FIELDS = {
    "address": str,
    "notify": str | None,
    "orcpt": str | None,
    "attempts": int,
    "next": int | float,
    "tried": int | float,
    "error": str,
    "warned": bool,
}


def fits(record: dict, fields: dict) -> bool:
    """Say whether what the queue has kept has these fields, of these types, and texts of one line each."""
    values = [record[name] for name in fields]
    texts = "".join(value for value in values if isinstance(value, str))
    return texts.isprintable() and all(map(isinstance, values, fields.values()))


def json_of(entry: dict) -> bytes:
    """Return a queue entry as its file keeps it."""
    import json

    return json.dumps(entry).encode()


def in_words(count: int) -> str:
    """Return `1 message`, `2 messages`, and so on."""
    return f"{count} message{'s' * (count != 1)}"


def listing(folder: str) -> list[str]:
    """Return the names in a folder that may be messages."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def take_lock(path: str) -> int | None:
    """Return a descriptor that holds a file's lock until it is closed, or None when somebody else does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock(fd)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


# ---------------------------------------------------------------- what POP3 sees of it


WIRE_SIZE = re.compile(r",W=([0-9]{1,18})(?:,|$)")
PLAIN_UID = re.compile(rf"[!-~]{{1,{MAX_UID}}}")


class InUse(Exception):
    """Another session has the maildrop open."""


class Maildrop:
    """The messages of one mailbox as they were when it was opened, in order of arrival.

    Holds the mailbox's exclusive lock until close().  Attributes: `names` (the files' names up to a `:`) and `sizes`
    (octets on the wire, before dot-stuffing); a message keeps its index in both.  The constructor raises InUse, or
    OSError.
    """

    def __init__(self, store: Store, address: str):
        self.store = store
        self.folder = store.mailbox(address)
        lock_path = f"{self.folder}/pop3.lock"
        try:
            self.lock_fd = take_lock(lock_path)
        except FileNotFoundError:  # no mail yet, or somebody has removed the folder
            store.make_folder(self.folder)
            self.lock_fd = take_lock(lock_path)
        if self.lock_fd is None:
            raise InUse
        try:
            self.take_snapshot()
        except BaseException:
            self.close()
            raise

    def take_snapshot(self) -> None:
        """List the messages with their sizes: by the name where it has one, else by looking into the file."""
        self.names, self.paths, self.sizes = [], [], []
        for name, path in sorted(self.scan().items()):
            match = WIRE_SIZE.search(name)
            size = int(match[1]) if match else self.store.measure(path)
            if size is not None:
                self.names.append(name)
                self.paths.append(path)
                self.sizes.append(size)

    def scan(self) -> dict[str, str]:
        """Return the paths of the files in new/ and cur/ by their names up to a `:`, which never change."""
        found = {}
        for sub in ("new", "cur"):  # in this order, so that a file which is moved meanwhile is seen
            folder = f"{self.folder}/{sub}"
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(folder):
                    if not name.startswith("."):
                        found[name.partition(":")[0]] = f"{folder}/{name}"
        return found

    @functools.cached_property
    def uids(self) -> list[str]:
        """Every message's UIDL: its name up to the flags, or a hash where that would not be a UIDL."""
        return [name if PLAIN_UID.fullmatch(name) else hash_of(name) for name in self.names]

    def find_again(self, indexes: Iterable[int]) -> list[int]:
        """Look for files that another program has moved or flagged; return the indexes of those that are there.

        A listing can miss a file that is renamed at that moment; two in a row hardly do.
        """
        found = self.scan() | self.scan()
        present = [index for index in indexes if self.names[index] in found]
        for index in present:
            self.paths[index] = found[self.names[index]]
        return present

    def open(self, index: int) -> tuple[int, int]:
        """Open a message's file; return a descriptor and the message's size on the wire.

        That is not what `sizes` has when the file's name lies or somebody has written into it.  Raises
        FileNotFoundError when the message is gone, or OSError.
        """
        for _ in range(FOLLOWS):
            try:
                fd, state = open_file(self.paths[index])
                break
            except FileNotFoundError:
                if not self.find_again([index]):
                    raise
        else:
            raise FileNotFoundError(errno.ENOENT, "moves all the time", self.paths[index])
        if f",S={state.st_size}," in self.names[index]:
            return fd, self.sizes[index]
        try:
            return fd, self.store.measure_open(fd, state, self.paths[index])
        except OSError:
            os.close(fd)
            raise

    def remove(self, indexes: Iterable[int]) -> int:
        """Delete messages for good; return how many could not be deleted (those that are gone already don't count).

        Raises OSError when the folders can't be listed, or when the deletion can't be made durable.
        """
        left, failed, folders = list(indexes), 0, set()
        for _ in range(FOLLOWS):
            moved = []
            for index in left:
                try:
                    os.unlink(self.paths[index])
                    folders.add(os.path.dirname(self.paths[index]))
                except FileNotFoundError:
                    moved.append(index)
                except OSError as error:
                    log.error("can't delete %s: %s", self.paths[index], error)
                    failed += 1
            left = self.find_again(moved) if moved else []
            if not left:
                break
        for folder in folders:
            self.store.sync_folder(folder)
        return failed + len(left)

    def close(self) -> None:
        """Give the lock back."""
        if self.lock_fd is not None:
            os.close(self.lock_fd)
            self.lock_fd = None


def open_file(path: str) -> tuple[int, os.stat_result]:
    """Open a file to be read; return its descriptor and state.

    Anything but a regular file (opening a FIFO would block) raises FileNotFoundError.
    """
    fd = os.open(path, os.O_RDONLY | BINARY | NONBLOCK)
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "not a file", path)
    return fd, state


def wire_size(fd: int, octets: int) -> int:
    """Read an open file of so many octets and return its size on the wire."""
    return sum(map(len, wire(functools.partial(os.read, fd), min(octets + 2, BLOCK))))


def line_ends(data: bytes) -> str | tuple | None:
    r"""Return which of "\n", "\r" and "\r\n" ends lines: none, one, or a tuple of several.

    Universal newlines' decoder looks at each octet once, four times as fast as counting the three.
    """
    look = io.IncrementalNewlineDecoder(None, False)
    look.decode(data.decode("latin-1"), final=True)
    return look.newlines


def version_of(state: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file is written into."""
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def hash_of(text: str) -> str:
    """Return 64 printable characters that stand for a text."""
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def wire(read: Callable[[int], bytes], size: int = BLOCK) -> Iterator[bytes]:
    """Yield a message as it goes over the wire, in blocks of some `size` octets: every line ends in CRLF.

    `read(size)` returns the next octets of a file, fewer than `size` only at its end.
    """
    held, end = b"", b"\n"
    while data := read(size):
        short = len(data) < size
        data = held + data
        held = b"\r" if data.endswith(b"\r") else b""  # its LF may come with the next block
        data = data.removesuffix(b"\r")
        if data.find(b"\r") < 0:
            data = data.replace(b"\n", b"\r\n")
        elif line_ends(data) != "\r\n":
            data = data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        if data:
            end = data[-1:]
            yield data
        if short:
            break
    if held or end != b"\n":
        yield b"\r\n"


# ---------------------------------------------------------------- the command line


def show_accounts(store: Store, args) -> int:
    """Print each account with what is in its mailbox, and each list with its members."""
    for address in store.users.accounts.values():
        sizes = []
        for path in store.paths(address):
            with contextlib.suppress(FileNotFoundError):  # fetched meanwhile
                sizes.append(os.path.getsize(path))
        print(f"{address}\t{in_words(len(sizes))}\t{sum(sizes)} octets")
    for name, members in store.users.lists.values():
        print(f"{name}\t= {', '.join(members)}")
    return 0


def show_list(store: Store, args) -> int:
    """Print a line for each message of a mailbox."""
    import email.parser

    for number, path in enumerate(store.paths(args.address), 1):
        try:
            with open(path, "rb") as file:
                message = email.parser.BytesHeaderParser().parse(file)
        except FileNotFoundError:  # fetched meanwhile
            continue
        print(number, *(for_people(message.get(field, "-")) for field in ("Date", "From", "Subject")), sep="\t")
    return 0


def for_people(field) -> str:
    """Return a header field in one line, decoded where it can be, with nothing in it that a terminal would obey."""
    import email.header

    text = str(field)
    with contextlib.suppress(Exception):  # the package raises all kinds of them at what strangers send
        text = str(email.header.make_header(email.header.decode_header(text)))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def show_message(store: Store, args) -> int:
    """Print one message, with the line ends of this system."""
    paths = store.paths(args.address)
    if not 1 <= args.number <= len(paths):
        raise ValueError(f"{args.address} has {len(paths)} messages, there is no number {args.number}")
    with open(paths[args.number - 1], "rb") as file:
        for block in wire(file.read):
            sys.stdout.buffer.write(block.replace(b"\r\n", b"\n"))
    return 0


def wait_for_mail(store: Store, args) -> int:
    """Wait until a mailbox has a message; return 0, or 1 when none came."""
    try:
        store.wait(args.address, timeout=args.timeout)
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return 1
    return show_list(store, args)


def show_queue(store: Store, args) -> int:
    """Print a line for each message that waits for another host."""
    now = time.time()
    for entry in store.queued():
        waiting = entry["recipients"]
        age, due = now - entry["arrived"], min((r["next"] for r in waiting), default=now) - now
        next_try = f"next try in {due:.0f} s" if due > 0 else "next try now"
        people = f"from <{entry['sender']}>", "to " + ", ".join(r["address"] for r in waiting)
        error = next((r["error"] for r in waiting if r["error"]), "-")
        print(entry["id"], f"{age:.0f} s old", next_try, *people, error, sep="\t")
    return 0


def ask_password() -> str:
    """Read a new password, twice from a person; raise ValueError when it is empty or not the same."""
    import getpass

    secret = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if not secret:
        raise ValueError("an empty password is none")
    if sys.stdin.isatty() and getpass.getpass("Again: ") != secret:
        raise ValueError("the two passwords differ")
    return secret


def seconds(text: str) -> float:
    """Read a time for argparse, which calls it by this function's name when it is none."""
    if not (value := float(text)) >= 0:
        raise ValueError(text)
    return value


WORDS = {"accounts": show_accounts, "list": show_list, "show": show_message, "wait": wait_for_mail, "queue": show_queue}


def main(argv: list[str] | None = None) -> int:
    """Look at the spool from a shell; return the exit status."""
    import argparse

    parser = argparse.ArgumentParser(prog="store.py", description="Look at the spool.", allow_abbrev=False)
    parser.print_usage = lambda *_: None  # a mistake gets one line, which says what it is
    add = parser.add_argument
    add("--users", metavar="FILE", help="accounts (users.txt, else the one beside this program)")
    add("--spool", default="spool", metavar="DIR", help="where mail is kept (%(default)s)")
    add("--timeout", type=seconds, default=60, metavar="SECONDS", help="how long `wait` waits (%(default)s)")
    meanings = "accounts: accounts and lists; list: date, sender, subject of a mailbox's mail; show: one message; wait:"
    meanings += " until there is mail; queue: mail for other hosts; hash: a password's hash for users.txt"
    add("word", choices=[*WORDS, "hash"], help=meanings)
    add("address", nargs="?", help="for list, show and wait: the mailbox")
    add("number", nargs="?", type=int, help="for show: which message, 1 is the oldest")
    args = parser.parse_intermixed_args(argv)
    if (args.address is not None) + (args.number is not None) != {"list": 1, "wait": 1, "show": 2}.get(args.word, 0):
        parser.error("list ADDRESS, show ADDRESS N, wait ADDRESS; accounts, hash and queue take nothing")
    try:
        if args.word == "hash":
            print(hash_password(ask_password()))
            return 0
        store = Store(args.spool, users_file(args.users))
        if args.address is not None:
            args.address = store.users.login_address(args.address)
            if not args.address:
                raise ValueError("there is no such account; `accounts` shows them")
        return WORDS[args.word](store, args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 1
    except ValueError as error:
        print(f"store.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"store.py: {error.filename or args.spool}: {error.strerror}", file=sys.stderr)
        return 1


def users_file(named: str | None) -> str | dict[str, str]:
    """Return the users file to use: the one named, else the one here, else the one beside this program, else (where
    only the modules are installed) the demo accounts."""
    if named is not None:
        return named
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "users.txt")
    return next((path for path in ("users.txt", beside) if os.path.exists(path)), DEMO)


if __name__ == "__main__":
    sys.exit(main())
