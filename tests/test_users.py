"""users.txt: what each line means, who gets what, and an error with a line number for each kind of mistake."""

import logging
import os
import poplib
import random
import smtplib
import threading
import time

import pytest

from pop3d_simple import POP3Server
from smtpd_simple import SMTPServer
from store import Store, Users, UsersError, canonical, hash_password

GOOD = """\
# comment

alice@example.test:wonderland
Bob.B@Example.TEST:with spaces : and = and #
carol@other.test: padded\t
staff@example.test = alice@example.test, bob.b@example.test
all@example.test=staff@example.test,carol@other.test
postmaster@other.test = carol@other.test
*@caught.test = alice@example.test
"""


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text(GOOD)
    return Users.read(str(path))


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("alice@example.test", ["alice@example.test"]),
        ("ALICE@EXAMPLE.TEST", ["alice@example.test"]),
        ("bob.b@example.test", ["Bob.B@Example.TEST"]),
        ("alice+tag@example.test", ["alice@example.test"]),
        ("alice+@example.test", ["alice@example.test"]),
        ("+alice@example.test", []),
        ("staff@example.test", ["alice@example.test", "Bob.B@Example.TEST"]),
        ("staff+x@example.test", ["alice@example.test", "Bob.B@Example.TEST"]),
        ("all@example.test", ["alice@example.test", "Bob.B@Example.TEST", "carol@other.test"]),
        ("anything@caught.test", ["alice@example.test"]),
        ("nobody@example.test", []),
        ("alice@other.test", []),
        ("alice@elsewhere.test", []),
        ("postmaster", ["carol@other.test"]),
        ("Postmaster@example.test", ["carol@other.test"]),
        ("postmaster@elsewhere.test", []),
        ("*@caught.test", ["alice@example.test"]),
        ("*", []),
        ("alice", ["alice@example.test"]),
        ("Alice+tag", ["alice@example.test"]),
        ("staff", ["alice@example.test", "Bob.B@Example.TEST"]),
        ("nobody", []),
        ("@example.test", []),
        ("", []),
    ],
)
def test_where_mail_goes(users, address, wanted):
    assert users.mailboxes(address) == wanted


def test_a_catch_all_for_everything():
    users = Users.from_mapping({"alice@a.test": "x", "bob@b.test": "y", "*": "alice@a.test"})
    assert users.mailboxes("x@y.test") == users.mailboxes("nobody@b.test") == ["alice@a.test"]
    assert users.mailboxes("bob@b.test") == ["bob@b.test"]
    assert users.mailboxes("nodomain") == ["alice@a.test"]
    assert users.mailboxes("bob") == ["bob@b.test"]
    assert users.mailboxes("") == []


def test_lists_of_lists_without_end():
    """A long chain, a ladder that doubles at each rung, and circles: each list is looked into once."""
    chain = {f"l{n}@x.test": [f"l{n + 1}@x.test"] for n in range(600)}
    assert Users.from_mapping({**chain, "l600@x.test": "pw"}).mailboxes("l0@x.test") == [
        "l600@x.test"
    ]
    ladder = {
        f"{side}{n}@x.test": [f"l{n + 1}@x.test", f"m{n + 1}@x.test"]
        for n in range(40)
        for side in "lm"
    }
    users = Users.from_mapping(
        {**ladder, "l40@x.test": "pw", "m40@x.test": ["l40@x.test", "l0@x.test"]}
    )
    assert users.mailboxes("m0@x.test") == ["l40@x.test"]


def test_a_name_of_a_thousand_labels_is_not_decoded(monkeypatch):
    """IDNA costs a millisecond a label or so: what can't be a domain is compared as it is."""
    for name in ("xn--mgba." * 400, "a@" + "xn--mgba." * 40):
        assert canonical(name) == name
    assert canonical("A@XN--FSQU00A.example") == "a@例子.example"


def test_postmaster_is_the_first_account_otherwise():
    assert Users.from_mapping({"z@a.test": "x", "a@a.test": "y"}).mailboxes("POSTMASTER") == [
        "z@a.test"
    ]


def test_passwords(users):
    check = users.check_password
    assert check("alice@example.test", b"wonderland") == "alice@example.test"
    assert check("alice", b"wonderland") == "alice@example.test"
    assert check("BOB.B", b"with spaces : and = and #") == "Bob.B@Example.TEST"
    assert check("carol", b" padded\t") == "carol@other.test"
    for name, password in (
        ("alice", b"x"),
        ("alice", b""),
        ("nobody", b"wonderland"),
        ("staff", b""),
        ("", b""),
        ("*", b""),
    ):
        assert check(name, password) is None


def test_a_login_without_domain_must_be_unambiguous():
    users = Users.from_mapping({"alice@a.test": "x", "alice@b.test": "x"})
    assert users.check_password("alice", b"x") is None
    assert users.check_password("alice@b.test", b"x") == "alice@b.test"


def test_hashes(monkeypatch):
    secret = hash_password("pass word")
    assert secret.startswith("{SCRYPT}")
    assert secret != hash_password("pass word")
    users = Users.from_mapping({"carol@a.test": secret, "dave@a.test": "plain"})
    assert users.check_password("carol", b"wrong") is None
    assert users.check_password("carol", b"pass word") == "carol@a.test"
    assert users.check_digest("carol", lambda password: "digest", "digest") is None
    assert users.check_digest("dave", lambda password: password.decode(), "PLAIN") == "dave@a.test"

    def no_scrypt(*_):
        raise AssertionError("a login that was right once costs no scrypt")

    monkeypatch.setattr("store.scrypt", no_scrypt)
    assert users.check_password("carol", b"pass word") == "carol@a.test"


def test_every_wrong_login_costs_the_same(monkeypatch):
    """With one hash in the file, an unknown name and a wrong plain password cost a scrypt, too."""
    users, count = (
        Users.from_mapping({"carol@a.test": hash_password("x"), "dave@a.test": "plain"}),
        [],
    )
    monkeypatch.setattr("store.scrypt", lambda password, salt: count.append(1) or b"")
    for name in ("carol", "dave", "nobody"):
        count.clear()
        assert users.check_password(name, b"wrong") is None
        assert len(count) == 1, name


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"alice", "neither"),
        (b"alice:x", "neither"),
        (b"alice@example.test", "neither"),
        (b"alice@example.test:", "no password"),
        (b"@example.test:x", "neither"),
        (b"a b@example.test:x", "neither"),
        (b"a/b@example.test:x", "character"),
        (b"a\\b@example.test:x", "character"),
        (b"../x@example.test:x", "character"),
        (b".alice@example.test:x", "dot"),
        (b"alice@.test:x", "dot"),
        (b"a\0b@example.test:x", "character"),
        (b"a\x1bb@example.test:x", "character"),
        (b"a" * 65 + b"@example.test:x", "longer"),
        (b"a@" + b"b" * 256 + b":x", "longer"),
        (b"a" * 64 + b"@" + b".".join([b"b" * 60] * 4) + b":x", "folder's name"),
        (b"caf\xe9@example.test:x", "UTF-8"),
        (b"carol@example.test:{SCRYPT}xyz", "hash"),
        (b"*@example.test:x", "catch-all"),
        (b"one@example.test:x\none@EXAMPLE.test:y", "twice"),
        (b"list@example.test =", "no members"),
        (b"carol:secret", "neither.*'carol' has no @domain"),
        (b"carol wonderland", "neither `address:password` nor `address = address, ...`$"),
        (b"list@example.test = first@example.test x@example.test", "put commas"),
        (b"list@example.test = nobody@example.test", "neither an account"),
        (b"list@example.test = list@example.test", "neither an account"),
        (
            b"one@example.test = two@example.test\ntwo@example.test = one@example.test",
            "neither an account",
        ),
    ],
)
def test_mistakes(tmp_path, line, fault):
    path = tmp_path / "users.txt"
    path.write_bytes(b"# first\nfirst@example.test:x\n" + line + b"\n")
    with pytest.raises(UsersError, match=fault) as error:
        Users.read(str(path))
    assert str(error.value).startswith((f"{path}:3: ", f"{path}:4: "))


def test_no_account_and_no_file(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("# nobody\n")
    with pytest.raises(UsersError, match="no account"):
        Users.read(str(path))
    with pytest.raises(FileNotFoundError):
        Users.read(str(tmp_path / "missing"))


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "users.txt"
    path.write_bytes(b"\xef\xbb\xbfalice@a.test:x\r\nbob@a.test:y\r\n")
    assert Users.read(str(path)).check_password("bob", b"y") == "bob@a.test"


@pytest.fixture
def settled(monkeypatch):
    """A clock of a file's changes that is always half a minute ahead."""
    real = time.time
    monkeypatch.setattr("store.time.time", lambda: real() + 30)


def test_the_file_is_read_again_when_it_changes(tmp_path, caplog, settled):
    """A broken new version is logged with its line, and the old one stays in force."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "users.txt"
    path.write_text("alice@a.test:one\n")
    store = Store(tmp_path / "spool", path)
    path.write_text("alice@a.test:two\n# longer\n")
    assert store.users.check_password("alice", b"two")
    path.write_text("alice@a.test:three\nbroken, and longer\n")
    assert store.users.check_password("alice", b"two")
    assert f"{path}:2: " in caplog.text
    caplog.clear()
    assert store.users.check_password("alice", b"two")
    assert caplog.text == ""
    os.unlink(path)
    assert store.users.check_password("alice", b"two")
    path.write_text("alice@a.test:four\n")
    assert store.users.check_password("alice", b"four")


def test_a_file_that_is_being_written_is_not_believed(tmp_path, monkeypatch):
    """Many programs write in place: half a file must not refuse known users."""
    path, now = tmp_path / "users.txt", [0.0]
    path.write_text("alice@a.test:one\nbob@a.test:two\n")
    store = Store(tmp_path / "spool", path)
    monkeypatch.setattr("store.clock", lambda: now[0])
    monkeypatch.setattr("store.time.time", lambda: 0.0)  # a file that seems to be of the future
    path.write_text("alice@a.test:one\n")
    for seconds, known in ((0, True), (0.4, True), (0.2, False)):
        now[0] += seconds
        assert bool(store.users.mailboxes("bob@a.test")) is known
    path.write_text("alice@a.test:one\nbob@a.test:tw")
    now[0] += 1
    assert store.users.check_password("bob", b"tw") is None


def test_a_file_that_cannot_be_read_is_logged_once(tmp_path, caplog, settled):
    path = tmp_path / "users.txt"
    path.write_text("alice@a.test:one\n")
    store = Store(tmp_path / "spool", path)
    os.unlink(path)
    path.mkdir()
    for _ in range(5):
        assert store.users.check_password("alice", b"one")
    assert caplog.text.count("stay as they were") == 1


SAME = {  # an account: other ways to write its address
    "info@straße.example": ["info@xn--strae-oqa.example", "INFO@XN--STRAE-OQA.example"],
    "a@bücher.example": ["a@xn--bcher-kva.example", "a@bu\u0308cher.example"],
    "a@xn--bcher-kva.example": ["a@bücher.example"],
    "jos\u00e9@a.test": ["jose\u0301@a.test", "JOS\u00c9@a.test"],
    "a@faß.test": ["a@xn--fa-hia.test"],
    "a@例子.example": ["a@xn--fsqu00a.example"],
    "a@σίσυφος.example": [f"a@xn--{'σίσυφος'.encode('punycode').decode()}.example"],
}


@pytest.mark.parametrize("account", SAME)
def test_one_account_however_it_is_written(account):
    """Case, normalisation form, U-labels and A-labels, IDNA 2008 names included."""
    users = Users.from_mapping({account: "x"})
    for address in SAME[account]:
        assert users.mailboxes(address) == [account], ascii(address)
        assert users.check_password(address, b"x") == account


def test_canonical_is_idempotent():
    """For every character, and for A-labels of any kind."""
    chance = random.Random(5)
    labels = ["".join(chance.choices("abcxyz019-", k=chance.randrange(12))) for _ in range(20_000)]
    addresses = [f"{chr(n)}x@{chr(n)}.test" for n in range(0x3000) if not 0xD800 <= n < 0xE000]
    for address in addresses + [f"a@xn--{label}.test" for label in labels]:
        once = canonical(address)
        assert canonical(once) == once, ascii(address)
        if "--" in address:
            assert not set(once.partition("@")[2]) & set("@/\\ "), ascii(address)


def test_accounts_that_are_one_account_are_refused():
    with pytest.raises(UsersError, match="twice"):
        Users.from_mapping({"jos\u00e9@a.test": "x", "jose\u0301@a.test": "y"})


def test_a_catch_all_by_option(tmp_path):
    """`* = ADDRESS` in other words: more exact lines win, a target that nobody has is an error."""
    store = Store(tmp_path, {"alice@a.test": "x", "bob@b.test": "y", "*@c.test": "bob@b.test"})
    store.set_catch_all(True)
    assert store.users.mailboxes("anything@else.test") == ["alice@a.test"]
    assert store.users.mailboxes("x@c.test") == ["bob@b.test"]
    store.set_catch_all("bob@b.test")
    assert store.users.mailboxes("anything@else.test") == ["bob@b.test"]
    with pytest.raises(UsersError, match=r"catch_all: nobody@a\.test is neither"):
        store.set_catch_all("nobody@a.test")
    assert store.users.mailboxes("anything@else.test") == ["bob@b.test"]


def test_a_reload_waits_until_the_file_is_written(tmp_path):
    """A signal may come while it is: half a file must not refuse known users."""
    path = tmp_path / "users.txt"
    path.write_text("alice@a.test:one\nbob@a.test:two\n")
    store = Store(tmp_path / "spool", path)
    path.write_text("alice@a.test:one\n")
    reload = threading.Thread(target=store.reload_users)
    reload.start()
    path.write_text("alice@a.test:one\nbob@a.test:two\ncarol@a.test:three\n")
    while reload.is_alive():
        assert store.users.mailboxes("bob@a.test")
    assert store.users.mailboxes("carol@a.test")


@pytest.mark.parametrize("hashed", [True, False])
def test_cram_md5_is_offered_where_it_can_work(tmp_path, hashed):
    password = hash_password("x") if hashed else "x"
    store = Store(tmp_path, {"alice@a.test": password})
    with (
        SMTPServer(("127.0.0.1", 0), store) as smtp,
        POP3Server(("127.0.0.1", 0), store) as pop3,
        smtplib.SMTP(smtp.host, smtp.port) as client,
    ):
        client.ehlo()
        assert ("CRAM-MD5" in client.esmtp_features["auth"]) is not hashed
        client.login("alice", "x")
        capa = poplib.POP3(pop3.host, pop3.port).capa()
        assert ("CRAM-MD5" in capa["SASL"]) is not hashed
