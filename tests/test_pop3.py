"""POP3 by the clauses of RFC 1939 and its extensions (2449, 2595, 3206, 5034, 6856): a conversation for each rule."""

import contextlib
import errno
import itertools
import os
import poplib
import shutil
import threading

import pytest
from conversation import Line, play, scripts

from pop3d_simple import Disconnect, POP3Server

SCRIPTS = scripts("pop3.txt")


@pytest.fixture
def three(store, deliver):
    store.mapping["carol@example.test"] = " two words "
    store.change_account("dave@example.test", "x")
    for n in range(3):
        deliver(b"Subject: %d\r\n\r\nhello\r\n" % n)


@pytest.mark.parametrize("name", SCRIPTS)
def test_rule(pop3, three, name):
    play(pop3, SCRIPTS[name], name)


def login(pop3, user="alice", password="wonderland"):
    client = poplib.POP3(pop3.host, pop3.port, timeout=10)
    client.user(user)
    client.pass_(password)
    return client


def test_quit_deletes_and_nothing_else_does(pop3, store, three):
    """6: marks are carried out at QUIT in TRANSACTION; a lost connection forgets them."""
    client = login(pop3)
    client.dele(1)
    client.close()
    assert len(store.messages("alice@example.test")) == 3
    client = login_when_free(pop3)
    client.dele(1)
    client.dele(3)
    client.quit()
    assert [m["Subject"] for m in store.messages("alice@example.test")] == ["1"]


def login_when_free(pop3):
    """Log in as soon as the session that was dropped has given back its lock."""
    while True:
        try:
            return login(pop3)
        except poplib.error_proto as error:
            if "[IN-USE]" not in str(error):
                raise


def test_a_timeout_deletes_nothing_and_says_nothing(store, three):
    with (
        POP3Server(("127.0.0.1", 0), store, timeout=0.3) as pop3,
        Line(pop3.host, pop3.port) as client,
    ):
        client.readline()
        client.ask("USER alice")
        client.ask("PASS wonderland")
        assert client.ask("DELE 1").startswith("+OK")
        assert client.at_end()
    assert len(store.messages("alice@example.test")) == 3


def test_one_session_at_a_time(pop3, three):
    client = login(pop3)
    with pytest.raises(poplib.error_proto, match=r"\[IN-USE\]"):
        login(pop3)
    client.quit()
    login(pop3).quit()


def test_numbers_never_change(pop3, store, three, deliver):
    """The maildrop is a snapshot: what arrives meanwhile is not seen, what is deleted keeps its number."""
    client = login(pop3)
    first = client.uidl()[1]
    deliver(b"Subject: new\r\n\r\n")
    client.dele(1)
    assert client.stat()[0] == 2
    assert client.uidl()[1] == first[1:]
    assert b"Subject: 2" in client.retr(3)[1]
    client.quit()
    client = login(pop3)
    assert client.stat()[0] == 3
    assert [line.split()[1] for line in client.uidl()[1]][:2] == [
        line.split()[1] for line in first[1:]
    ]
    client.quit()


def test_uidl_is_stable_unique_and_short(pop3, store, three):
    with open(f"{store.mailbox('alice@example.test')}/new/{'long name ' * 12}", "wb") as file:
        file.write(b"Subject: foreign\n\n")
    client = login(pop3)
    uids = [line.split(b" ", 1)[1] for line in client.uidl()[1]]
    client.quit()
    assert len(set(uids)) == 4
    assert all(1 <= len(uid) <= 70 and all(0x21 <= c <= 0x7E for c in uid) for uid in uids)
    client = login(pop3)
    assert [line.split(b" ", 1)[1] for line in client.uidl()[1]] == uids
    client.quit()


def test_a_message_that_vanished(pop3, store, three):
    client = login(pop3)
    paths = store.paths("alice@example.test")
    os.unlink(paths[0])
    cur = paths[1].replace("/new/", "/cur/") + ":2,S"
    os.rename(paths[1], cur)
    with pytest.raises(poplib.error_proto, match="gone"):
        client.retr(1)
    assert b"Subject: 1" in client.retr(2)[1]  # another program has marked it as read
    client.dele(1)
    client.dele(2)
    client.quit()
    assert [m["Subject"] for m in store.messages("alice@example.test")] == ["2"]


FOREIGN = {
    "LF line ends": (b"Subject: x\n\n.dot\nend\n", b"Subject: x\r\n\r\n.dot\r\nend\r\n"),
    "CRLF line ends": (b"Subject: x\r\n\r\nend\r\n", b"Subject: x\r\n\r\nend\r\n"),
    "mixed": (b"Subject: x\r\n\nend\n", b"Subject: x\r\n\r\nend\r\n"),
    "no line end at the end": (b"Subject: x\n\nend", b"Subject: x\r\n\r\nend\r\n"),
    "large": (b"x\n" * 100_000, b"x\r\n" * 100_000),
    "empty": (b"", b""),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize(
    "file", ["new/1700000000.1_2.host", "cur/1700000000.M1P2.host,S=20:2,RS", "new/strange name"]
)
def test_files_of_other_programs(pop3, store, name, file):
    """Other names, flags and line ends: served as the wire wants it, with the size that is sent, twice the same."""
    content, wanted = FOREIGN[name]
    store.make_folder(store.mailbox("alice@example.test"))
    with open(f"{store.mailbox('alice@example.test')}/{file}", "wb") as out:
        out.write(content)
    for _ in range(2):
        client = login(pop3)
        assert client.stat() == (1, len(wanted))
        assert b"".join(line + b"\r\n" for line in client.retr(1)[1]) == wanted
        client.quit()


def test_remembered_sizes_are_not_trusted_over_the_file(pop3, store):
    folder = store.mailbox("alice@example.test")
    store.make_folder(folder)
    for clock, content in enumerate(
        (b"a\nb\n", b"a\nb\n", b"a\nb\nc\n", b"abc\nd\n"), 1_700_000_000
    ):
        with open(f"{folder}/new/foreign", "wb") as out:
            out.write(content)
        os.utime(f"{folder}/new/foreign", (clock, clock))
        client = login(pop3)
        assert client.stat() == (1, len(content) + content.count(b"\n"))
        client.quit()


LIES = {
    "x,S=3,W=4": b"a\nb\nc\n",
    "x,S=6,W=100": b"a\nb\nc",
    "x,S=9,W=999999999999999999": b"a\n",
    "x,S=99,W=0:2,S": b"a\r\nb\r\n",
}


@pytest.mark.parametrize("name", LIES)
def test_retr_says_the_size_that_it_sends(pop3, store, name):
    """Also of files whose names lie, and of those that somebody has written into after the login."""
    folder = store.mailbox("alice@example.test")
    store.make_folder(folder)
    for file in (f"{folder}/new/{name}", f"{folder}/new/z"):
        with open(file, "wb") as out:
            out.write(LIES[name])
    client = login(pop3)
    with open(f"{folder}/new/z", "ab") as out:
        out.write(b"more\n")
    for number, content in ((1, LIES[name]), (2, LIES[name] + b"more\n")):
        reply, lines, _ = client.retr(number)
        wire = b"".join(line + b"\r\n" for line in lines)
        assert wire.split() == content.split()
        assert reply == b"+OK %d octets" % len(wire)
    client.quit()


def test_what_is_no_file_is_no_message(pop3, store, three):
    """A FIFO keeps nobody waiting, whatever its name says; a folder and a loop of links are as good as gone."""
    folder = store.mailbox("alice@example.test")
    os.mkfifo(f"{folder}/new/fifo")
    os.mkfifo(f"{folder}/new/fifo,S=1,W=5")
    os.mkdir(f"{folder}/new/folder,S=1,W=5")
    client = login(pop3)
    assert client.stat()[0] == 5
    for number in (4, 5):
        with pytest.raises(poplib.error_proto, match="gone"):
            client.retr(number)
    client.quit()


def test_a_file_that_cannot_be_read_is_there_all_the_same(pop3, store, three, monkeypatch, caplog):
    """To a client that keeps in step by UIDL, what is not listed has been deleted."""
    folder, real = store.mailbox("alice@example.test"), os.open
    with open(f"{folder}/new/foreign", "wb") as out:
        out.write(b"abc\n")

    def unreadable(path, *args, **kwargs):
        if str(path).endswith("foreign"):
            raise OSError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", unreadable)
    client = login(pop3)
    assert client.stat()[0] == 4
    with pytest.raises(poplib.error_proto, match=r"\[SYS/TEMP\]"):
        client.retr(4)
    client.quit()
    assert "can't read" in caplog.text


def test_a_client_that_leaves_at_retr_leaves_no_descriptor(pop3, store, deliver):
    """Whether the line breaks at the reply to RETR or behind it."""
    deliver(b"Subject: x\r\n\r\n" + b"0123456789abcde\r\n" * 8000)
    opened = []

    def lost(data):
        raise Disconnect("lost")

    with Line(pop3.host, pop3.port) as client:
        client.send("USER alice\r\nPASS wonderland\r\n")
        assert [client.readline()[:3] for _ in range(3)] == ["+OK"] * 3
        [session] = pop3.sessions
        real = session.maildrop.open
        session.maildrop.open = lambda index: opened.append(real(index)) or opened[-1]
        session.write = lost
        client.send("RETR 1\r\n")
        assert client.at_end()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0][0])


def test_many_messages_that_have_been_moved(pop3, store):
    """Another program takes them from new/ to cur/ while they are marked: they go, and the folder is listed once."""
    folder = store.mailbox("alice@example.test")
    store.make_folder(folder)
    for n in range(50):
        with open(f"{folder}/new/{n}", "wb") as out:
            out.write(b"x\n")
    client = login(pop3)
    for n in range(50):
        client.dele(n + 1)
        os.rename(f"{folder}/new/{n}", f"{folder}/cur/{n}:2,S")
    client.quit()
    assert os.listdir(f"{folder}/cur") == []


def test_utf8_of_poplib(pop3, store, deliver):
    deliver("Subject: Grüße\r\n\r\n用户\r\n".encode())
    client = poplib.POP3(pop3.host, pop3.port, timeout=10)
    client.utf8()
    client.user("alice")
    client.pass_("wonderland")
    assert "用户".encode() in client.retr(1)[1]
    client.quit()


@contextlib.contextmanager
def flagging(folder):
    """Another program that sets and takes flags of all the files in cur/ for as long as this is open."""
    done = threading.Event()

    def rename():
        while not done.is_set():
            for name in os.listdir(f"{folder}/cur"):
                base, _, flags = name.partition(":")
                with contextlib.suppress(FileNotFoundError):
                    os.rename(
                        f"{folder}/cur/{name}",
                        f"{folder}/cur/{base}:2,{'' if flags == '2,S' else 'S'}",
                    )

    thread = threading.Thread(target=rename)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def torn(monkeypatch, *looks):
    """Let listings of cur/ be torn, each by one of these functions of the sorted names; the rest are whole."""
    real, left = os.listdir, iter(looks)

    def listdir(path):
        names = sorted(real(path))
        return next(left, list)(names) if str(path).endswith("/cur") else names

    monkeypatch.setattr(os, "listdir", listdir)


@pytest.fixture
def flagged(store):
    """Two messages in cur/; returns the folder."""
    folder = f"{store.mailbox('alice@example.test')}/cur"
    store.make_folder(store.mailbox("alice@example.test"))
    for name in ("a,S=3,W=3:2,", "b,S=3,W=3:2,"):
        with open(f"{folder}/{name}", "wb") as out:
            out.write(b"x\r\n")
    return folder


def test_a_moved_file_that_one_listing_misses(pop3, flagged, monkeypatch):
    """RETR and QUIT look twice before they say that a message is gone."""
    client = login(pop3)
    for name in os.listdir(flagged):
        os.rename(f"{flagged}/{name}", f"{flagged}/{name}S")
    torn(monkeypatch, lambda n: [])
    assert client.retr(1)[1] == [b"x"]
    os.rename(f"{flagged}/a,S=3,W=3:2,S", f"{flagged}/a,S=3,W=3:2,FS")
    client.dele(1)
    torn(monkeypatch, lambda n: [])
    client.quit()
    assert os.listdir(flagged) == ["b,S=3,W=3:2,S"]


def test_messages_are_found_while_another_program_flags_them(pop3, store):
    """Each once, under its own UIDL, at every login; RETR and DELE find them, and QUIT leaves none behind."""
    folder, count = store.mailbox("alice@example.test"), 300
    store.make_folder(folder)
    wanted = [f"17000{n:05}.M1P1Q1.h,S=6,W=6" for n in range(count)]
    for name in wanted:
        with open(f"{folder}/cur/{name}:2,", "wb") as out:
            out.write(b"abcd\r\n")
    with flagging(folder):
        for _ in range(20):
            client = login(pop3)
            assert [line.split()[1].decode() for line in client.uidl()[1]] == wanted
            client.quit()
        client = login(pop3)
        for number in range(1, count + 1):
            assert client.retr(number)[1] == [b"abcd"]
            client.dele(number)
        client.quit()
    assert os.listdir(f"{folder}/cur") == []


def test_what_is_renamed_for_ever_is_not_said_to_be_gone(pop3, store, monkeypatch):
    folder = store.mailbox("alice@example.test")
    store.make_folder(folder)
    with open(f"{folder}/cur/x:2,", "wb") as out:
        out.write(b"abc\n")
    real, flags = os.unlink, itertools.cycle([":2,S", ":2,"])

    def unlink(path, *args, **kwargs):
        if "/cur/" in str(path):
            os.rename(
                f"{folder}/cur/{os.listdir(f'{folder}/cur')[0]}", f"{folder}/cur/x{next(flags)}"
            )
        return real(path, *args, **kwargs)

    client = login(pop3)
    client.dele(1)
    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(poplib.error_proto, match=r"\[SYS/TEMP\] 1 message could not be deleted"):
        client.quit()
    client.close()
    monkeypatch.undo()
    assert len(store.paths("alice@example.test")) == 1


def test_a_folder_that_is_taken_away_takes_its_messages_along(pop3, store, three):
    client = login(pop3)
    client.dele(1)
    shutil.rmtree(f"{store.mailbox('alice@example.test')}/new")
    with pytest.raises(poplib.error_proto, match="gone"):
        client.retr(2)
    assert client.quit().startswith(b"+OK")


def test_a_folder_that_cannot_be_synced_ends_the_session(pop3, store, three, monkeypatch):
    """QUIT ends it whatever happens (RFC 1939 6): -ERR, the line is closed, and the mailbox is free."""

    def sync_folder(folder):
        raise OSError(errno.EIO, "Input/output error")

    client = login(pop3)
    client.dele(1)
    monkeypatch.setattr(store, "sync_folder", sync_folder)
    with pytest.raises(poplib.error_proto, match=r"\[SYS/TEMP\]"):
        client.quit()
    monkeypatch.undo()
    assert client.file.read() == b""
    client.close()
    assert login(pop3).stat()[0] == 2


def test_the_mailbox_is_free_before_the_good_bye_has_been_read(pop3, store, three):
    """Who is thrown out and does not close his end keeps nobody else waiting."""
    with Line(pop3.host, pop3.port) as client:
        client.send(b"USER alice\r\nPASS wonderland\r\n" + b"NONSENSE\r\n" * 20 + b"more\r\n")
        while not client.readline().startswith("-ERR too many errors"):
            pass
        assert login(pop3).stat()[0] == 3


def test_quit_says_what_could_not_be_deleted(pop3, store, three, monkeypatch):
    client = login(pop3)
    client.dele(1)
    real = os.unlink

    def unlink(path, *args, **kwargs):
        if "/new/" in str(path):
            raise OSError(30, "Read-only file system")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(poplib.error_proto, match=r"\[SYS/TEMP\]"):
        client.quit()
    client.close()
    monkeypatch.undo()
    assert len(store.messages("alice@example.test")) == 3


def test_a_message_that_is_moved_while_we_look_is_there_once(pop3, store, three):
    """Another program renames it from new/ to cur/ between our two looks."""
    old = store.paths("alice@example.test")[1]
    os.link(old, old.replace("/new/", "/cur/") + ":2,S")
    client = login(pop3)
    assert len(client.uidl()[1]) == 3
    assert sorted(line.split()[0] for line in client.list()[1]) == [b"1", b"2", b"3"]
    client.quit()


def test_messages_that_others_remove_end_no_session(store, pop3, deliver):
    """Not the client's error, however many: it can still say QUIT, and what it marked is deleted."""
    paths = [deliver() for _ in range(30)]
    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask("USER alice")
        client.ask("PASS wonderland")
        client.ask("DELE 1")
        for path in paths[1:]:
            os.unlink(path)
        for n in range(2, 31):
            assert client.ask(f"RETR {n}").startswith(f"-ERR message {n} is gone")
        assert client.ask("QUIT").startswith("+OK")
    assert store.paths("alice@example.test") == []


def test_a_message_that_cannot_be_read(store, pop3, deliver, monkeypatch):
    """It is refused before +OK; behind that there is no way to say so."""
    deliver(b"Subject: x\r\n\r\n" + b"long\r\n" * 100_000)
    real, path = os.read, store.paths("alice@example.test")[0]

    def read(fd, size):
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, size)

    with Line(pop3.host, pop3.port) as client:
        client.readline()
        client.ask("USER alice")
        client.ask("PASS wonderland")
        monkeypatch.setattr(os, "read", read)
        for _ in range(25):
            assert client.ask("RETR 1").startswith("-ERR [SYS/TEMP]")
        assert client.ask("NOOP") == "+OK"


@pytest.mark.parametrize("name", ["1.foreign", "1.M1P1Q1.host,S=26,W=26"])
def test_a_message_that_is_flagged_while_the_mailbox_is_opened(store, pop3, monkeypatch, name):
    """Another program renames it behind the listing, and then from where the listing has it."""
    folder, real, moves = (
        store.mailbox("alice@example.test"),
        os.listdir,
        ["cur/{}:2,S", "cur/{}:2,"],
    )
    store.make_folder(folder)
    path = [f"{folder}/new/{name}"]
    with open(path[0], "wb") as file:
        file.write(b"Subject: hi\r\n\r\nhello\r\n")

    def listdir(where):
        found = real(where)
        if str(where).startswith(folder) and moves:
            os.rename(path[0], f"{folder}/{moves[-1].format(name)}")
            path[0] = f"{folder}/{moves.pop().format(name)}"
        return found

    monkeypatch.setattr(os, "listdir", listdir)
    client = poplib.POP3(pop3.host, pop3.port)
    client.user("alice")
    client.pass_("wonderland")
    assert client.stat()[0] == 1
    assert b"".join(client.retr(1)[1]) == b"Subject: hihello"
    client.dele(1)
    client.quit()
    assert store.paths("alice@example.test") == []


def test_a_message_that_a_crash_has_left_twice(store, pop3, deliver):
    """A mover that links and then unlinks was killed: one message, and it goes whole."""
    path = deliver()
    os.link(path, path.replace("/new/", "/cur/") + ":2,S")
    client = poplib.POP3(pop3.host, pop3.port)
    client.user("alice")
    client.pass_("wonderland")
    assert client.stat()[0] == 1
    client.dele(1)
    client.quit()
    assert store.paths("alice@example.test") == []
