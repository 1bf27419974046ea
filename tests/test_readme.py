"""README's promises: every block of it runs, every name and option in it exists."""

import configparser
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
from conversation import Line
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PORTS = ("1025", "1110", "2501", "2502", "2503")


def blocks(language, chapter=""):
    """Return the blocks of a language, of one chapter or of all."""
    text = README.partition(f"\n## {chapter}\n")[2].partition("\n## ")[0] if chapter else README
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def project(tmp_path):
    """A folder with the files of the project, and a `python` that is this one."""
    for path in [*ROOT.glob("*.py"), ROOT / "users.txt"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).symlink_to(sys.executable)
    return tmp_path


class Shell:
    """Runs README's commands on free ports: servers stay, the others have to succeed."""

    def __init__(self, folder):
        self.folder, self.servers = folder, []
        self.environment = {**os.environ, "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}
        self.ports = {}
        for port in PORTS:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.ports[port] = str(free.getsockname()[1])

    def here(self, text):
        return re.sub("|".join(PORTS), lambda match: self.ports[match[0]], text)

    def run(self, block):
        """Run a block; return what its last command prints."""
        commands = self.here(block.replace("\\\n", " ").replace("|\n", "| ")).strip().split("\n")
        output = ""
        for command in commands:
            if command.startswith(("python smtpd_simple.py", "python pop3d_simple.py")):
                # The servers of the first chapter take their ports by default.
                options = f" --port {self.ports['1025']}" if "--port" not in command else ""
                command = command.replace("--pop3", f"--pop3 {self.ports['1110']}") + options
                self.servers.append(
                    subprocess.Popen(
                        shlex.split(command),
                        cwd=self.folder,
                        env=self.environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                    )
                )
                while not (line := self.servers[-1].stdout.readline()).startswith("  by hand"):
                    assert line, command
            else:
                output = self.command(command)
        return output

    def command(self, command):
        options = {"cwd": self.folder, "env": self.environment, "text": True}
        result = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command],
            capture_output=True,
            timeout=30,
            **options,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout


@pytest.fixture
def shell(project):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    shell = Shell(project)
    yield shell
    for server in shell.servers:
        server.terminate()
        server.communicate(timeout=15)


def test_on_a_laptop(shell):
    start, _, *_ = blocks("sh")
    shell.run(start)
    [send_and_fetch] = blocks("sh", "On a laptop")
    assert "\nSubject: hello\n\nHi Alice.\n" in shell.run(send_and_fetch)
    [code] = blocks("python", "On a laptop")
    command = f"python -c {shlex.quote(shell.here(code))}"
    assert "Subject: hello\n" in shell.command(command)


def test_a_small_internet(shell):
    start, send = blocks("sh", "In a class")
    shell.run(start)
    assert "could not be delivered" in shell.run(send)


def dialogue(block):
    """Return the lines to type; in the Chinese chapter comments stand behind them."""
    lines = block.strip("\n").split("\n")
    return [re.sub(r" {2,}[^ -~].*", "", line) for line in lines]


def type_in(port, lines):
    """Type the lines of a dialogue; each command has to be accepted."""
    with Line("127.0.0.1", port) as client:
        replies = [client.reply()]
        in_data = False
        for line in lines:
            client.send(line + "\r\n")
            if in_data and line != ".":
                continue
            in_data = line == "DATA"
            replies.append(client.reply())
            many = line.split(" ")[0] in ("LIST", "UIDL", "TOP", "RETR")
            while many and client.readline() != ".":
                pass
    assert all(reply[:1] in "23+" for reply in replies), replies
    return replies


@pytest.mark.parametrize("chapter", ["In a class", "中文"])
def test_dialogues_to_type(store, smtp, pop3, chapter):
    send, *fetch = blocks("text", chapter)
    type_in(smtp.port, dialogue(send))
    assert len(store.messages("alice@example.test")) == 1
    for block in fetch:
        type_in(pop3.port, dialogue(block))
        assert store.messages("alice@example.test") == []


def test_the_chapter_for_test_suites(project):
    """Its blocks are a test module as they stand."""
    (project / "test_pasted.py").write_text("\n".join(blocks("python", "In a test suite")))
    (project / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_pasted.py"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=60)
    assert re.search(r"^1[0-9] passed", result.stdout, re.MULTILINE), result.stdout
    assert result.returncode == 0


def parse(argv):
    """Return the options of a command line of the SMTP program."""
    import startup_simple

    return startup_simple.parse_arguments(argv, "SMTP")


def test_the_systemd_unit():
    [unit] = blocks("ini")
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(unit)
    python, program, *argv = shlex.split(parser["Service"]["ExecStart"])
    assert (python, os.path.basename(program)) == ("/usr/bin/python3", "smtpd_simple.py")
    args = parse(argv)
    assert (args.pop3, args.tls_self_signed, args.hostname) == (1110, True, "mail.example.test")


def test_the_container_file():
    [text] = blocks("dockerfile")
    *files, folder = re.search(r"^COPY (.*)$", text, re.MULTILINE)[1].split()
    assert set(files) == {path.name for path in ROOT.glob("*.py")} | {"users.txt"}
    python, program, *argv = json.loads(re.search(r"^CMD (.*)$", text, re.MULTILINE)[1])
    assert (python, program) == ("python", f"{folder}smtpd_simple.py")
    assert parse(argv).host == "0.0.0.0"


def test_the_users_file_of_the_reference(tmp_path):
    from store import Users, hash_password

    text = blocks("text", "Reference")[0]
    path = tmp_path / "users.txt"
    path.write_text(text.replace("{SCRYPT}...", hash_password("x")) + "bob@example.test:builder\n")
    users = Users.read(str(path))
    assert users.mailboxes("staff@example.test") == ["alice@example.test", "bob@example.test"]
    assert users.mailboxes("x@else.test") == ["alice@example.test"]


def test_every_place_in_the_code_that_is_named_exists():
    places = re.findall(r"`(\w+)\.py: ([\w.]+)`", README)
    assert len(places) > 10
    for module, name in places:
        thing = __import__(module)
        for part in name.split("."):
            assert hasattr(thing, part), f"{module}.py: {name}"
            thing = getattr(thing, part)


def test_every_file_is_named():
    table = README.partition("## The files, in reading order")[2].partition("## ")[0]
    for path in ROOT.glob("*.py"):
        assert f"| `{path.name}` |" in table


def test_the_test_command_is_what_ci_runs():
    command = blocks("sh")[1].strip()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_it_is_not_too_long():
    assert README.count("\n") <= 450
