"""What the two programs do at start and end: options, log, signals, processes; only their main() imports it."""

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time

from lineserver import STOPPING, VERSION, LineServer, is_loopback, show_address
from store import Store

ENDING = {signal.SIGINT, signal.SIGTERM}


# ---------------------------------------------------------------- the command line that both programs share


def option_parser(program: str, about: str, port: int, tls_ports: list[tuple[str, int]]):
    """Return an argparse parser with the options that both programs have."""
    import argparse

    parser = argparse.ArgumentParser(prog=program, description=about, allow_abbrev=False)
    parser.print_usage = lambda *_: None  # a mistake gets one line, which says what it is
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="H", help="where to listen (%(default)s)")
    add("--port", type=port_number, default=port, metavar="P", help="port; 0 takes a free one (%(default)s)")
    for flag, usual in tls_ports:
        add(flag, type=port_number, nargs="?", const=usual, metavar="P", help=f"TLS from the first byte ({usual})")
    add("--users", default=None, metavar="FILE", help="accounts (users.txt, else the one beside this program)")
    add("--spool", default="spool", metavar="DIR", help="where mail is kept (%(default)s)")
    add("--hostname", metavar="NAME", help="our name in the greeting and in mail (this machine's)")
    add("--tls-cert", metavar="FILE", help="certificate (PEM) for TLS; needs --tls-key")
    add("--tls-key", metavar="FILE", help="the certificate's key (PEM)")
    add("--tls-self-signed", action="store_true", help="make a certificate with the openssl program, once")
    add("--require-tls", action="store_true", help="nothing but the TLS upgrade works in clear")
    add("--max-connections", type=positive, default=1000, metavar="N", help="per process and port (%(default)s)")
    add("--timeout", type=positive, metavar="SECONDS", help="for a line to arrive (SMTP 300, POP3 600)")
    add("--processes", type=positive, default=1, metavar="N", help="that share the work, a core each (%(default)s)")
    add("--trace", action="store_true", help="show every line of every dialogue on stderr")
    add("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def port_number(text: str) -> int:
    """Read a port for argparse."""
    import argparse

    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


def positive(text: str) -> int:
    """Read a number above zero for argparse; nine digits are enough for everything that is counted here."""
    import argparse

    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0, of at most 9 digits")
    return int(text)


def check_options(parser, args) -> None:
    """End with a usage error when options contradict each other."""
    has_cert = args.tls_cert is not None
    if has_cert != (args.tls_key is not None):
        parser.error("--tls-cert and --tls-key go together")
    if has_cert and args.tls_self_signed:
        parser.error("--tls-cert and --tls-self-signed exclude each other")
    wants_tls = args.require_tls or any(getattr(args, f"{p}_port", None) is not None for p in ("smtps", "pop3s"))
    if wants_tls and not (has_cert or args.tls_self_signed):
        parser.error("TLS needs --tls-cert and --tls-key, or --tls-self-signed")
    if args.processes > 1 and not hasattr(os, "fork"):
        parser.error("--processes needs a system with fork()")


def shared_options(args) -> dict:
    """Return the keywords of a server class for the options that both programs have."""
    names = ["hostname", "tls_cert", "tls_key", "tls_self_signed", "require_tls", "max_connections", "timeout", "trace"]
    return {name: getattr(args, name) for name in names}


class StderrLog(logging.Handler):
    """Writes time and message to stderr, each line in one write."""

    def emit(self, record):
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self.line(text)

    def line(self, text: str, *values) -> None:
        """Write one line, as `Logger.info` would: sessions log here, three facts each, since a LogRecord for each and
        its way through `logging` would cost as much as a third of a POP3 session."""
        line = f"{clock(int(time.time()))} {text % values if values else text}\n".encode("utf-8", "replace")
        try:
            os.write(2, line)
        except OSError:  # nobody reads it any more
            return


@functools.lru_cache(maxsize=1)
def clock(second: int) -> str:
    """Return the time of day as the log shows it; it is the same for many lines."""
    return time.strftime("%H:%M:%S", time.localtime(second))


def log_to_stderr(servers: list[LineServer]) -> None:
    """Send the log to stderr, that of the servers' sessions on the short way."""
    log = StderrLog()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    for server in servers:
        server.log = log.line


def exit_status(program: str, serve) -> int:
    """Run `serve()` with all descriptors there are; return the exit status, after one line on stderr if it fails."""
    take_descriptors()
    try:
        return serve()
    except ValueError as error:  # a broken users file, options that don't fit
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename or 'an empty name'}: "
        what = f"{where}{error.strerror or error}"
        print(f"{program}: {what}", file=sys.stderr)
        return 1


def listen(make, address: tuple[str, int], *args, **options):
    """Make a server; an address that can't be had is an error that names it."""
    try:
        return make(address, *args, **options)
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), show_address(*address)) from None
        raise


def run(servers: list[LineServer], processes: int, notice: str) -> int:
    """Announce the listeners, serve until SIGINT or SIGTERM, and return the exit status."""
    log_to_stderr(servers)
    hold_signals()
    threading.stack_size(256 * 1024)  # the depth of a session is known, and there may be thousands
    announce(servers, notice)
    if processes == 1:
        hold_to_core(os.getpid())
        serve_here(servers)
    else:
        supervise(servers, processes)
    return 0


def take_descriptors() -> None:
    """Raise the soft limit on open files to the hard one: the usual 1024 are too few for two listeners' sessions."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def announce(servers: list[LineServer], notice: str) -> None:
    """Print where each server listens and what a newcomer wants to know, and warn of what everybody knows."""
    if demo := servers[0].store.users.with_demo_passwords():
        for server in servers:
            if not is_loopback(server.host):
                logging.warning(
                    "WARNING: %s is open to others, and everybody knows the password of %s: change it in users.txt!",
                    show_address(server.host, server.port),
                    ", ".join(demo),
                )
    for server in servers:
        print(f"{server.name} listening on {show_address(server.host, server.port)}")
    print(notice, flush=True)


def hold_signals() -> None:
    """Let the signals that wait_for_signal() knows wait for it, in all threads and processes that are started later.

    A handler would be too late for one that comes between a look and a wait, and its exception could come anywhere.
    """
    if hasattr(signal, "sigwait"):
        for number in (*ENDING, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # one that a shell has told us to ignore would not even wait
        signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, signal.SIGCHLD))


def wait_for_signal(numbers) -> int:
    """Return the first of some signals that comes."""
    if hasattr(signal, "sigwait"):
        return signal.sigwait(numbers)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
    return signal.SIGINT


def serve_here(servers: list[LineServer], parent: int | None = None) -> None:
    """Serve in this process until a signal comes, or until `parent`, a pipe to another process, is closed."""
    if parent is not None:
        threading.Thread(target=follow, args=(parent,), daemon=True).start()
    for server in servers:
        server.start()
    wait_for_signal(ENDING)
    for server in servers:
        server.begin_stop()
    deadline = time.monotonic() + STOPPING
    for server in servers:
        server.server_close(max(deadline - time.monotonic(), 0.1))


def hold_to_core(number: int) -> None:
    """Keep this process on one core, where the system can: threads that share an interpreter lock lose half their
    speed when it has to travel between cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def supervise(servers: list[LineServer], processes: int) -> None:
    """Keep `processes` copies of this process serving the same listeners; start again what dies."""
    alive, children = os.pipe(), {}
    while True:
        for index in set(range(processes)) - set(children.values()):
            children[start_child(servers, index, alive)] = index
        if wait_for_signal({*ENDING, signal.SIGCHLD}) in ENDING:
            break
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                logging.error("process %d ended (%d), another takes its place", pid, code)
                del children[pid]
        time.sleep(0.1)  # one that can't live must not keep us busy
    for pid in children:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOPPING + 3
    while children:
        children = {pid: index for pid, index in children.items() if not os.waitpid(pid, os.WNOHANG)[0]}
        if time.monotonic() > deadline:  # one that somebody has stopped would not hear anything else
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def start_child(servers: list[LineServer], index: int, alive: tuple[int, int]) -> int:
    """Fork a process that serves until it gets a signal or its parent is gone; return its id."""
    if pid := os.fork():
        return pid
    try:
        os.close(alive[1])
        hold_to_core(os.getppid() + index)
        for server in servers:
            server.shared = True
        serve_here(servers, alive[0])
    except BaseException:
        logging.exception("process %d", os.getpid())
        os._exit(1)
    os._exit(0)


def follow(pipe: int) -> None:
    """Wait until the parent, which alone holds the pipe's other end, is gone; then end as if told to."""
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def notice(store: Store, servers: list[LineServer]) -> str:
    """Return what a newcomer wants to know at the start."""
    names = list(store.users.accounts.values())
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    smtp, pop3 = servers[0], next((server for server in servers if server.name == "POP3"), None)
    accounts = f"{store.users_path or 'the demo accounts'}: {', '.join(names[:3])}{more}"
    lines = [f"  spool     {store.folder}", f"  accounts  {accounts}"]
    lines.append(f"  send      curl smtp://{show_address(smtp.host, smtp.port)} --crlf --mail-from me@example.test \\")
    lines.append(f"              --mail-rcpt {names[0]} --upload-file message.txt")
    if pop3:
        lines.append(f"  read      curl -u {names[0]} pop3://{show_address(pop3.host, pop3.port)}/1")
    lines.append(f"  watch     telnet {smtp.host} {smtp.port}, then HELP      (Ctrl-C ends the server)")
    return "\n".join(lines)


def load_intercept(path: str):
    """Return the function `intercept` of a Python file; raise ValueError when there is none."""
    import runpy

    with open(path, "rb"):  # what can't be read is no fault of what is in it
        pass
    try:
        hook = runpy.run_path(path).get("intercept")
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    if not callable(hook):
        raise ValueError(f"{path} defines no function intercept")
    return hook
