"""Plays back dialogues, such as those in the folder conversations/.

In a script `C: text` is sent with CRLF, `X: b"..."` sends exactly these octets (any Python expression), `S: pattern` is
what must come back (a shell pattern: `*` matches anything), `...` stands for any lines in between, `TLS` starts the
encryption, `EOF` wants the server to hang up.  A failure says which line of which script it was.

In a file each script begins with `== name`; a line `@NAME` puts in the script `== @NAME` of macros.txt.  `20 times:`
repeats the indented lines behind it, and `for each WORD of A B C:` repeats them with each value in place of WORD.
"""

import fnmatch
import re
import socket
import ssl
import textwrap
from pathlib import Path


class Mismatch(AssertionError):
    """The server said something else; the text shows the script up to that line."""


class Line:
    """A raw client: sends octets, reads lines, each read with a deadline."""

    def __init__(self, host, port, source=None, seconds=10):
        self.sock = socket.create_connection(
            (host, port), seconds, source_address=(source, 0) if source else None
        )
        self.file = self.sock.makefile("rb")

    def send(self, data):
        self.sock.sendall(
            data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
        )

    def readline(self):
        """Return the next line without its end; raise ConnectionError when the server has hung up."""
        line = self.file.readline()
        if not line:
            raise ConnectionError("hung up")
        assert line.endswith(b"\r\n"), f"a line without CRLF: {line!r}"
        return line[:-2].decode("utf-8", "surrogateescape")

    def reply(self):
        """Return a whole SMTP reply as one string."""
        lines = [self.readline()]
        while lines[-1][3:4] == "-":
            lines.append(self.readline())
        return "\n".join(lines)

    def ask(self, command):
        """Send one command, return the SMTP reply or the POP3 status line."""
        self.send(command + "\r\n")
        return self.reply()

    def at_end(self):
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True

    def start_tls(self, context=None):
        self.file.close()
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.file = self.sock.makefile("rb")

    def close(self):
        self.file.close()
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def scripts(file):
    """Return the scripts of a file in conversations/, by name."""
    folder = Path(__file__).parent / "conversations"
    texts = {}
    for path in (folder / "macros.txt", folder / file):
        pattern = r"^== (.+)\n((?:(?!== ).*\n?)*)"
        parts = re.findall(pattern, path.read_text("utf-8"), re.MULTILINE)
        texts |= {name: unroll(body.strip("\n")) for name, body in parts}

    def put_in(body):
        return re.sub(r"^@.+$", lambda match: put_in(texts[match[0]]), body, flags=re.MULTILINE)

    return {name: put_in(body) for name, body in texts.items() if not name.startswith("@")}


def unroll(body):
    """Write out what `20 times:` and `for each WORD of ...:` stand for."""

    def times(match):
        return int(match[1]) * (textwrap.dedent(match[2]).rstrip("\n") + "\n")

    def for_each(match):
        lines = textwrap.dedent(match[3]).rstrip("\n") + "\n"
        return "".join(re.sub(rf"\b{match[1]}\b", value, lines) for value in match[2].split())

    indented = r"((?:  .*(?:\n|$))+)"
    body = re.sub(rf"^([0-9]+) times:\n{indented}", times, body, flags=re.MULTILINE)
    return re.sub(rf"^for each (\w+) of (.+):\n{indented}", for_each, body, flags=re.MULTILINE)


def play(server, script, name="script"):
    """Play a script against a server; raise Mismatch at the first line that differs."""
    lines = [line for line in textwrap.dedent(script).strip("\n").split("\n") if line.strip()]
    with Line(server.host, server.port, seconds=15) as client:
        skipping = False
        for number, line in enumerate(lines):
            if line == "...":
                skipping = True
            elif line == "EOF":
                check(client.at_end(), name, lines, number, "the server did not hang up")
            elif line == "TLS":
                client.start_tls()
            elif line.startswith("C:"):
                client.send(line[3:] + "\r\n")
            elif line.startswith("X:"):
                client.send(eval(line[2:].strip(), {}))
            else:
                assert line.startswith("S:"), line
                expect(client, line[3:], skipping, name, lines, number)
                skipping = False


def expect(client, pattern, skipping, name, lines, number):
    seen = []
    while True:
        try:
            seen.append(client.readline())
        except (TimeoutError, ConnectionError) as error:
            seen.append(f"({error})")
            break
        if matches(seen[-1], pattern):
            return
        if not skipping or seen[-1] == ".":
            break
    check(False, name, lines, number, "the server said: " + "\n      ".join(seen[-5:]))


def matches(text, pattern):
    return re.fullmatch(fnmatch.translate(pattern), text) is not None


def check(good, name, lines, number, what):
    if not good:
        raise Mismatch(
            f"{name}, line {number + 1}\n" + "\n".join([*lines[: number + 1], f"  !! {what}"])
        )
