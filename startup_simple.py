"""What the two programs do at start and end: options, log, signals, processes.

Only their main() imports this module; a program that embeds the servers never does.  Read it in
this order: `run_program`, `serve`, `supervise`; then the options.
"""

import argparse
import contextlib
import io
import itertools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from lineserver import (
    STOP_TIMEOUT,
    VERSION,
    LineHandler,
    LineServer,
    clock,
    is_loopback,
    printable,
    show_address,
    timestamp,
)
from store import DEMO, Store, open_standard_descriptors, users_file

ENDING = {signal.SIGINT, signal.SIGTERM}
RELOAD: int = getattr(signal, "SIGHUP", -1)  # Windows has none
RESTART_PAUSE = 0.1  # seconds before a dead worker process is replaced
RETRY_PAUSE = 1  # seconds between two looks at the worker processes
THREAD_STACK = 256 * 1024  # octets: the depth of a session is known, and there may be thousands

MakeServers = Callable[[argparse.Namespace, Store, dict[str, Any]], list[LineServer]]


def run_program(args: argparse.Namespace, make_servers: MakeServers) -> int:
    """Open the listeners, serve until a signal; return the exit status.

    A fault is one line on stderr, and 2 (options, users file) or 1.
    """
    take_descriptors()
    try:
        store = Store(args.spool, users_file(args.users), sync=not getattr(args, "no_sync", False))
        servers = make_servers(args, store, server_options(args))
        serve(args, store, servers)
    except ValueError as error:
        text = re.sub("^[a-z_]+(?=:? )", lambda match: option_name(match[0], args), str(error))
        print(f"{args.program}: {printable(text)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError, MemoryError) as error:
        name = getattr(error, "filename", None)
        where = "" if name is None else f"{name or 'an empty name'}: "
        what = getattr(error, "strerror", None) or error
        print(f"{args.program}: {printable(f'{where}{what}')}", file=sys.stderr)
        return 1
    return 0


def option_name(keyword: str, args: argparse.Namespace) -> str:
    """Return the option that stands for a keyword of the servers, in their messages."""
    return f"--{keyword.replace('_', '-')}" if keyword in vars(args) else keyword


def serve(args: argparse.Namespace, store: Store, servers: list[LineServer]) -> None:
    """Announce the listeners and serve until SIGINT or SIGTERM."""
    log_to_stderr(servers)
    threading.stack_size(THREAD_STACK)
    warn_of_demo_passwords(store, servers)
    with contextlib.closing(Signals()) as signals:
        if args.processes > 1:
            supervise(args, signals, store, servers)
        else:
            pin_to_cpu(os.getpid())
            start(servers)
            announce(args, store, servers)
            serve_here(signals, store, servers)


# ---------------------------------------------------------------- options


class OptionParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (--help shows the options)\n")


def parse_arguments(argv: list[str] | None, protocol: str) -> argparse.Namespace:
    """Read the command line of the program for SMTP or POP3; end the program when it is wrong."""
    open_standard_descriptors()
    os.umask(0o077)
    smtp = protocol == "SMTP"
    program = os.path.basename(sys.argv[0]) or f"{protocol.lower()}d"
    about = (
        "A small mail server: SMTP in, POP3 out." if smtp else "A POP3 server on a Maildir spool."
    )
    parser = OptionParser(prog=program, description=about, allow_abbrev=False)
    add = parser.add_argument
    where = "address or name to listen on (%(default)s)"
    add("--host", default="127.0.0.1", metavar="H", help=where)
    port = 1025 if smtp else 1110
    add("--port", type=port_number, default=port, metavar="P", help="0: a free one (%(default)s)")
    if smtp:
        add_smtp_options(add)
    tls_port = "port for TLS from the first octet (%(const)s)"
    add("--pop3s-port", type=port_number, nargs="?", const=1995, metavar="P", help=tls_port)
    add("--users", metavar="FILE", help="accounts (users.txt, else the one beside this program)")
    add("--spool", default="spool", metavar="DIR", help="where mail is kept (%(default)s)")
    add("--hostname", metavar="NAME", help="our name in greetings and mail (this machine's)")
    add("--tls-cert", metavar="FILE", help="certificate (PEM) for TLS; needs --tls-key")
    add("--tls-key", metavar="FILE", help="the certificate's key (PEM)")
    add("--tls-self-signed", action="store_true", help="make a certificate with openssl, once")
    clear = "refuse everything except STARTTLS/STLS until the connection is encrypted"
    add("--require-tls", action="store_true", help=clear)
    sessions = "sessions at a time, for each process and port (%(default)s)"
    add("--max-connections", type=positive, default=1000, metavar="N", help=sessions)
    line = "time for a line to arrive (SMTP 300, POP3 600)"
    add("--timeout", type=positive, metavar="SECONDS", help=line)
    add("--processes", type=positive, default=1, metavar="N", help="worker processes (%(default)s)")
    add("--trace", action="store_true", help="show every line of every dialogue on stderr")
    add("--version", action="version", version=f"%(prog)s {VERSION}")
    args = parser.parse_args(argv)
    args.program = program
    check_options(parser, args)
    return args


def add_smtp_options(add: Callable[..., object]) -> None:
    """Add the options that only the SMTP program has."""
    tls_port = "port for SMTP with TLS from the first octet (%(const)s)"
    add("--smtps-port", type=port_number, nargs="?", const=1465, metavar="P", help=tls_port)
    pop3 = "serve POP3 as well (port %(const)s)"
    add("--pop3", type=port_number, nargs="?", const=1110, metavar="PORT", help=pop3)
    auth = "refuse MAIL, VRFY, EXPN and ETRN until the client has logged in"
    add("--require-auth", action="store_true", help=auth)
    catch_all = "deliver mail for every other address to ADDRESS (the first account)"
    add("--catch-all", nargs="?", const=True, metavar="ADDRESS", help=catch_all)
    any_login = "take every name and password at SMTP logins; for tests"
    add("--any-login", action="store_true", help=any_login)
    size = "octets of a message (%(default)s)"
    add("--size-limit", type=positive, default=102_400_000, metavar="BYTES", help=size)
    relay = "next host for mail to other domains, from users who have logged in"
    add("--relay", metavar="HOST[:PORT]", help=relay)
    route = "next host for one domain; may be repeated"
    add("--route", action="append", metavar="DOMAIN=HOST[:PORT]", help=route)
    intercept = "a file whose intercept(session, verb, argument) may answer"
    add("--intercept", metavar="FILE.py", help=intercept)
    add("--no-sync", action="store_true", help="acknowledge mail before it is on the disk")


def port_number(text: str) -> int:
    """Read a port for argparse."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{printable(text)} is not a port, 0 to 65535")
    return int(text)


def positive(text: str) -> int:
    """Read a number above zero for argparse; nine digits are enough for everything here."""
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        what = "a whole number above 0, of at most 9 digits"
        raise argparse.ArgumentTypeError(f"{printable(text)} is not {what}")
    return int(text)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error when options contradict each other."""
    has_cert = args.tls_cert is not None
    if has_cert != (args.tls_key is not None):
        parser.error("--tls-cert and --tls-key go together")
    if has_cert and args.tls_self_signed:
        parser.error("--tls-cert and --tls-self-signed exclude each other")
    ports = getattr(args, "smtps_port", None), args.pop3s_port
    if (args.require_tls or ports != (None, None)) and not (has_cert or args.tls_self_signed):
        parser.error("TLS needs --tls-cert and --tls-key, or --tls-self-signed")
    if getattr(args, "any_login", False) and (args.relay is not None or args.route):
        parser.error("--any-login excludes --relay and --route: anybody could send anywhere")
    if args.processes > 1 and not hasattr(os, "fork"):
        parser.error("--processes needs a system with fork()")


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keywords of a server class for the options that both programs have."""
    names = ["hostname", "tls_cert", "tls_key", "tls_self_signed", "require_tls", "max_connections"]
    options = {name: getattr(args, name) for name in [*names, "timeout", "trace"]}
    if getattr(args, "intercept", None) is not None:
        options["intercept"] = load_intercept(args.intercept)
    return options


def load_intercept(path: str) -> Callable[..., Any]:
    """Return the function `intercept` of a Python file; raise ValueError when there is none."""
    import runpy

    with open(path, "rb"):  # a file that can't be read is an OSError
        pass
    try:
        hook: Callable[..., Any] | None = runpy.run_path(path).get("intercept")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    if not callable(hook):
        raise ValueError(f"{path} defines no function intercept")
    return hook


# ---------------------------------------------------------------- the first lines


def announce(args: argparse.Namespace, store: Store, servers: list[LineServer]) -> None:
    """Print where each server listens, and commands to try that work with these options."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    for server in servers:
        print(f"{server.name} listening on {show_address(server.host, server.port)}")
    names = list(store.users.accounts.values())
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    accounts = f"{store.users_path or 'the demo accounts'}: {', '.join(names[:3])}{more}"
    rows = [("spool", store.folder), ("accounts", accounts)]
    if servers[0].tls_options.cert is not None:
        rows.append(("TLS", f"certificate {servers[0].tls_options.cert}"))
    demo = names[0] in store.users.with_demo_passwords()
    login = f" -u {names[0]}:{DEMO[names[0]]}" if demo else f" -u {names[0]}"
    tls = " --ssl-reqd --insecure" if args.require_tls else ""
    for server in servers:
        where = where_to_connect(server)
        if server.name == "SMTP":
            text = f"printf 'From: {names[0]}\\nTo: {names[0]}\\nSubject: hello\\n\\nHi.\\n'"
            envelope = f"--mail-from {names[0]} --mail-rcpt {names[0]}"
            options = tls + (login if args.require_auth else "")
            command = f"{text} | curl -sS --crlf smtp://{where} {envelope}{options} -T -"
            rows.append(("send", command))
        elif server.name == "POP3":
            rows.append(("read", f"curl -sS pop3://{where}/1{login}{tls}"))
    rows.append(("by hand", by_hand(args, servers[0])))
    print("\n".join(f"  {title:9} {text}" for title, text in rows), flush=True)


def by_hand(args: argparse.Namespace, server: LineServer) -> str:
    """Return how to type into a session, and how to end it."""
    command = f"telnet {where_to_connect(server).rpartition(':')[0].strip('[]')} {server.port}"
    if args.require_tls:
        protocol = server.name.lower()
        connect = f"-connect {where_to_connect(server)}"
        command = f"openssl s_client -quiet -starttls {protocol} {connect}"
    return f"{command}, then HELP (QUIT ends it; Ctrl-C here ends the server)"


def where_to_connect(server: LineServer) -> str:
    """Return the address of a server as a client on this machine uses it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    return show_address(host, server.port)


def warn_of_demo_passwords(store: Store, servers: list[LineServer]) -> None:
    """Warn, once, when others can reach a server whose passwords everybody knows."""
    open_to_all = [server for server in servers if not is_loopback(server.host)]
    if not open_to_all:
        return
    where = show_address(open_to_all[0].host, open_to_all[0].port)
    if demo := store.users.with_demo_passwords():
        text = "WARNING: %s is open to others, and everybody knows the password of %s: change it!"
        logging.warning(text, where, ", ".join(demo))
    if store.catch_all or any(getattr(server, "any_login", False) for server in servers):
        text = "WARNING: %s is open to others; --catch-all and --any-login are for tests"
        logging.warning(text, where)


# ---------------------------------------------------------------- the log


class StderrLog(logging.Handler):
    """Writes time and message to stderr, each line in one write."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self.line("%s", text)

    def line(self, text: str, *values: object) -> None:
        """Write one line.

        Has the signature of Logger.info(), and sessions call it directly: LogRecords would take up
        to a third of a POP3 session's time.
        """
        message = text % values if values else text
        octets = f"{timestamp(time.time())} {message}\n".encode("utf-8", "backslashreplace")
        try:
            os.write(2, octets)
        except OSError:  # nobody reads it any more
            return


def log_to_stderr(servers: list[LineServer]) -> None:
    """Send the log to stderr, that of the sessions directly."""
    log = StderrLog()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    for server in servers:
        server.log = log.line  # type: ignore[assignment]


# ---------------------------------------------------------------- what the system gives


def take_descriptors() -> None:
    """Raise the soft limit on open files: the usual 1024 are too few for two listeners."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # macOS takes no more than OPEN_MAX, even where the hard limit is infinite.
        wanted = 10_240 if hard == resource.RLIM_INFINITY else hard
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def pin_to_cpu(number: int) -> None:
    """Keep this process on one core, where the system allows it.

    Threads that share an interpreter lock lose half their speed when it travels between cores.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


# ---------------------------------------------------------------- signals


class Signals:
    """The signals that a program waits for, one after the other; none is lost.

    A handler in C writes each signal's number into a socket as it arrives.  Programs that a hook
    starts have their signals as usual, which blocked ones would not.
    """

    def __init__(self) -> None:
        self.reader, writer = socket.socketpair()
        writer.setblocking(False)
        self.writer = writer
        names = ("SIGINT", "SIGTERM", "SIGCHLD", "SIGHUP")  # Windows has the first two
        for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
            # Also where it was ignored (`nohup`, `&`): an ignored signal never reaches a handler.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self.terminal = next((fd for fd in range(3) if os.isatty(fd)), None)

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the next signal's number, or None after `seconds` without one."""
        self.reader.settimeout(seconds)
        try:
            number = self.reader.recv(1)[0]
        except TimeoutError:
            return None
        if number == RELOAD and self.terminal is not None and not os.isatty(self.terminal):
            return signal.SIGTERM  # our terminal was closed
        return number

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self.reader.close()
        self.writer.close()


def reload(store: Store, servers: list[LineServer]) -> None:
    """Read users file and certificates again; a broken one is logged and changes nothing."""
    done = True
    for read_again in [store.reload_users, *(server.reload for server in servers)]:
        try:
            read_again()
        except (OSError, ValueError, MemoryError) as error:
            logging.error("reload: %s", error)
            done = False
    if done:
        logging.info("reloaded")


# ---------------------------------------------------------------- processes


def start(servers: list[LineServer]) -> None:
    """Start all servers, or none; raise RuntimeError or MemoryError."""
    try:
        for server in servers:
            server.start()
    except BaseException:
        for server in servers:
            with contextlib.suppress(Exception):
                server.stop()
        raise


def serve_here(signals: Signals, store: Store, servers: list[LineServer]) -> None:
    """Serve in this process until a signal ends it."""
    while (number := signals.wait()) not in ENDING:
        if number == RELOAD:
            reload(store, servers)
    for server in servers:
        server.begin_stop()
    deadline = clock() + STOP_TIMEOUT
    for server in servers:
        server.stop(max(deadline - clock(), 0.1))


class Workers:
    """The worker processes, by process ID; each has an index, its core and its session numbers."""

    def __init__(self, store: Store, servers: list[LineServer], count: int):
        self.store = store
        self.servers = servers
        self.count = count
        self.pipe = os.pipe()  # the parent alone holds the end for writing
        self.serials = [itertools.count() for _ in range(count)]
        self.indexes: dict[int, int] = {}

    def start_missing(self) -> None:
        """Start the workers that are missing; without a process to be had try again later."""
        for index in set(range(self.count)) - set(self.indexes.values()):
            try:
                self.indexes[self.fork(index)] = index
            except (OSError, MemoryError) as error:
                logging.error("can't start a worker process: %s; trying again", error)
                return

    def fork(self, index: int) -> int:
        """Start one worker; return its process ID."""
        serial = next(self.serials[index])
        handled = {*ENDING, signal.SIGHUP}  # one that comes now must reach the right process
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        try:
            pid = os.fork()
        except BaseException:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
            raise
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
            return pid
        try:
            signals = Signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
            os.close(self.pipe[1])
            pin_to_cpu(os.getppid() + index)
            # Unique among the processes, and after one was replaced.
            first = 1 + index + serial * self.count * 1_000_000
            LineHandler.numbers = itertools.count(first, self.count)
            for server in self.servers:
                server.shares_listener = True
            threading.Thread(target=self.exit_with_parent, daemon=True).start()
            start(self.servers)
            serve_here(signals, self.store, self.servers)
        except BaseException:
            logging.exception("worker process %d", os.getpid())
            os._exit(1)
        os._exit(0)

    def exit_with_parent(self) -> None:
        """Wait for EOF on the pipe, which is the parent's death; then send ourselves SIGTERM."""
        os.read(self.pipe[0], 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def collect(self) -> None:
        """Forget the workers that have ended."""
        for pid in list(self.indexes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                logging.error("worker process %d ended (%d), another takes its place", pid, code)
                del self.indexes[pid]

    def send(self, number: int) -> None:
        for pid in self.indexes:
            os.kill(pid, number)

    def stop(self) -> None:
        """End all workers within a deadline."""
        self.send(signal.SIGTERM)
        deadline = clock() + STOP_TIMEOUT + 3
        while self.indexes:
            for pid in list(self.indexes):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del self.indexes[pid]
            if clock() > deadline:
                self.send(signal.SIGKILL)  # a process stopped by SIGSTOP ignores SIGTERM
            time.sleep(0.01)


def supervise(
    args: argparse.Namespace, signals: Signals, store: Store, servers: list[LineServer]
) -> None:
    """Keep worker processes serving the same listeners; replace those that die."""
    workers = Workers(store, servers, args.processes)
    workers.start_missing()
    if not workers.indexes:
        raise RuntimeError("no worker process could be started")
    announce(args, store, servers)
    while (number := signals.wait(RETRY_PAUSE)) not in ENDING:
        if number == RELOAD:
            workers.send(RELOAD)
        workers.collect()
        if len(workers.indexes) < args.processes:
            time.sleep(RESTART_PAUSE)  # don't restart a worker in a tight loop
            workers.start_missing()
    workers.stop()
