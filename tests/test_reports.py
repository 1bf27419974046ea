"""Delivery reports (RFC 3461, 3462, 3464), parsed back with the email package."""

import email.policy
import smtplib

import pytest
from helpers import FAST, Intercept, empty, pair, send_mail

from relay_simple import Relay, build_report, escape_address, unxtext
from smtpd_simple import SMTPServer
from store import QueuedRecipient, QueueEntry, Store


@pytest.fixture
def stores(tmp_path):
    a = Store(tmp_path / "a", {"alice@a.example": "wonderland", "anna@a.example": "x"}, sync=False)
    b = Store(tmp_path / "b", {"bob@b.example": "builder"}, sync=False)
    return a, b


CONTENT = "Subject: what came back\r\n\r\nthe text\r\n"


def fields(report):
    """Return the groups of fields of a report's second part, as dicts."""
    assert report.get_content_type() == "multipart/report"
    assert report.get_param("report-type") == "delivery-status"
    human, status, returned = report.get_payload()
    assert (human.get_content_type(), status.get_content_type()) == (
        "text/plain",
        "message/delivery-status",
    )
    assert returned.get_content_type() in ("message/rfc822", "text/rfc822-headers")
    return [dict(part.items()) for part in status.get_payload()]


def test_failure(stores):
    with pair(stores) as (a, _):
        send_mail(
            a,
            ["nobody@b.example"],
            CONTENT,
            True,
            ["ENVID=id+3D1"],
            ["ORCPT=rfc822;no+2Dbody@b.example"],
        )
        [report] = stores[0].wait("alice@a.example")
        assert empty(stores[0])
    assert report["Return-Path"] == "<>"
    assert report["To"] == "alice@a.example"
    assert report["Auto-Submitted"] == "auto-replied"
    about, one = fields(report)
    assert about["Reporting-MTA"] == "dns; a.example"
    assert about["Original-Envelope-Id"] == "id=1"
    assert one["Original-Recipient"] == "rfc822;no-body@b.example"
    assert one["Final-Recipient"] == "rfc822;nobody@b.example"
    assert one["Action"] == "failed"
    assert one["Status"] == "5.1.1"
    assert one["Remote-MTA"] == "dns; [127.0.0.1]"
    assert one["Diagnostic-Code"].startswith("smtp; 550 5.1.1")
    original = report.get_payload(2).get_payload(0)
    assert original["Subject"] == "what came back"
    assert "the text" in original.get_content()


def test_headers_only(stores):
    with pair(stores) as (a, _):
        send_mail(a, ["nobody@b.example"], CONTENT, True, ["RET=HDRS"])
        [report] = stores[0].wait("alice@a.example")
    assert report.get_payload(2).get_content_type() == "text/rfc822-headers"
    assert "what came back" in report.get_payload(2).as_string()
    assert "the text" not in report.as_string()


@pytest.mark.parametrize(
    ("notify", "wanted"), [("NEVER", 0), ("SUCCESS", 0), ("DELAY", 0), ("FAILURE", 1)]
)
def test_failure_is_reported_to_who_wants_it(stores, notify, wanted):
    with pair(stores) as (a, _):
        send_mail(a, ["nobody@b.example"], CONTENT, True, [], [f"NOTIFY={notify}"])
        assert empty(stores[0])
    assert len(stores[0].messages("alice@a.example")) == wanted


def test_nothing_is_reported_to_nobody(stores):
    with pair(stores) as (a, _), smtplib.SMTP(a.host, a.port) as client:
        client.login("alice", "wonderland")
        client.sendmail("", ["nobody@b.example", "bob@b.example"], CONTENT)
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert stores[0].messages("alice@a.example") == []


def test_delay(stores):
    """Once, for those who asked, while it goes on trying."""
    hook = Intercept(RCPT=["450 4.2.1 mailbox busy"] * 6)
    with pair(stores, {**FAST, "warn_after": 0.1}, {"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example"], CONTENT, True, [], ["NOTIFY=DELAY,FAILURE"])
        stores[1].wait("bob@b.example", timeout=10)
        assert empty(stores[0])
    [report] = stores[0].messages("alice@a.example")
    _, one = fields(report)
    assert one["Action"] == "delayed"
    assert one["Status"] == "4.2.1"
    assert "Will-Retry-Until" in one
    assert report.get_payload(2).get_content_type() == "text/rfc822-headers"


def test_no_delay_report_unasked(stores):
    hook = Intercept(RCPT=["450 4.2.1 mailbox busy"] * 3)
    with pair(stores, {**FAST, "warn_after": 0}, {"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example"], CONTENT)
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert stores[0].messages("alice@a.example") == []


def test_success_here(stores):
    with pair(stores) as (a, _):
        send_mail(a, ["anna@a.example"], CONTENT, True, [], ["NOTIFY=SUCCESS"])
        [report] = stores[0].wait("alice@a.example")
    _, one = fields(report)
    assert (one["Action"], one["Status"]) == ("delivered", "2.0.0")
    returned = report.get_payload(2).get_payload()
    assert "what came back" in returned
    assert "Delivered-To" not in returned  # whoever is behind a list
    assert len(stores[0].messages("anna@a.example")) == 1


def test_success_at_a_next_host_with_dsn_is_its_business(stores):
    """It gets NOTIFY passed on; this one is like us and writes only to its own, since nobody has logged in there."""
    with pair(stores) as (a, _):
        send_mail(a, ["bob@b.example"], CONTENT, True, [], ["NOTIFY=SUCCESS"])
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    assert stores[0].messages("alice@a.example") == []


def test_success_at_a_next_host_without_dsn_is_relayed(stores):
    hook = Intercept(EHLO=["500 5.5.1 what?"])
    with pair(stores, b_options={"intercept": hook}) as (a, _):
        send_mail(a, ["bob@b.example"], CONTENT, True, [], ["NOTIFY=SUCCESS"])
        [report] = stores[0].wait("alice@a.example")
    assert fields(report)[1]["Action"] == "relayed"


def test_a_report_that_cannot_be_delivered_goes_nowhere(stores, caplog):
    """Also one for nobody of our own domain, though there is a host for everything that is elsewhere."""
    hook = Intercept()
    with SMTPServer(("127.0.0.1", 0), stores[1], hostname="b.example", intercept=hook) as b:
        for way, sender in (("route", "someone@no.way.example"), ("relay", "typo@a.example")):
            to = f"127.0.0.1:{b.port}"
            options = {"route": {"b.example": to}} if way == "route" else {"relay": to}
            with (
                SMTPServer(("127.0.0.1", 0), stores[0], **options) as a,
                smtplib.SMTP(a.host, a.port) as client,
            ):
                client.login("alice", "wonderland")
                client.sendmail(sender, ["nobody@b.example"], CONTENT)
                assert empty(stores[0])
    assert caplog.text.count("dropped: no route") == 2
    assert [argument.split()[0] for verb, argument in hook.seen if verb == "MAIL"] == [
        "FROM:<someone@no.way.example>",
        "FROM:<typo@a.example>",
    ]


@pytest.mark.parametrize("hostname", ["mx.test", "a.example"])
def test_whom_our_postmaster_is(tmp_path, hostname):
    """The account of that very name, else the first postmaster, and no catch-all; VRFY says what RCPT does."""
    users = {
        "postmaster@b.example": "x",
        "postmaster@a.example": "x",
        "alice@a.example": "x",
        "*": "alice@a.example",
    }
    wanted = "postmaster@b.example" if hostname == "mx.test" else "postmaster@a.example"
    store = Store(tmp_path, users, sync=False)
    with SMTPServer(("127.0.0.1", 0), store, hostname=hostname) as smtp:
        with smtplib.SMTP(smtp.host, smtp.port) as client:
            assert client.verify(f"postmaster@{hostname}") == (250, f"2.1.5 <{wanted}>".encode())
            client.sendmail("", [f"postmaster@{hostname}"], CONTENT)
        assert smtp.relay.routing.mailboxes(f"postmaster@{hostname}") == [wanted]
    assert len(store.messages(wanted)) == 1


def test_a_report_for_our_own_postmaster_stays_here(stores):
    """Whom our reports are from: at RCPT, at VRFY and as the sender of what fails."""
    with SMTPServer(("127.0.0.1", 0), stores[1], hostname="b.example") as b:
        options = {"hostname": "mx.test", "relay": f"127.0.0.1:{b.port}"}
        with (
            SMTPServer(("127.0.0.1", 0), stores[0], **options) as a,
            smtplib.SMTP(a.host, a.port) as client,
        ):
            assert client.verify("Postmaster@MX.test") == (250, b"2.1.5 <alice@a.example>")
            assert client.verify("bob@mx.test")[0] == 252
            client.login("alice", "wonderland")
            client.sendmail("postmaster@mx.test", ["nobody@b.example"], CONTENT)
            [report] = stores[0].wait("alice@a.example")
    assert report["X-Original-To"] == "postmaster@mx.test"
    assert fields(report)[1]["Status"] == "5.1.1"


def test_what_others_say_stays_on_its_line():
    """A next host's reply and xtext can't add fields to a report."""
    relay = Relay(None, "a.example")
    recipient = QueuedRecipient("用户@b.example", orcpt="utf-8;用户@b.example")
    recipient.action, recipient.status = "failed", "5.0.0"
    recipient.diagnostic, recipient.remote = "550 no", "b.example"
    entry = QueueEntry("ABC", "alice@a.example", {"ENVID": "x+0D+0AEvil:+20yes"}, [recipient])
    text = build_report(relay, "R1", entry, [recipient], b"Subject: x\r\n\r\ny\r\n", True)
    report = email.message_from_bytes(text, policy=email.policy.default)
    about, one = fields(report)
    assert "Evil" not in about
    assert one["Final-Recipient"] == "utf-8;\\x{7528}\\x{6237}@b.example"
    assert not report.defects


def test_no_sender_can_make_a_report_tell_whose_mailbox_it_was(stores):
    stores[0].mapping["*@a.example"] = "anna@a.example"
    stores[0].change_account("carl@a.example", "x")
    with SMTPServer(("127.0.0.1", 0), stores[0]) as a, smtplib.SMTP(a.host, a.port) as client:
        client.login("alice", "wonderland")
        client.sendmail('"Received: "@a.example', ["x@a.example"], CONTENT, [], ["NOTIFY=SUCCESS"])
        report = stores[0].wait("anna@a.example", count=2)[1]
    assert report["Subject"] == "Your message was delivered"
    assert "Delivered-To" not in report.get_payload(2).get_payload()


def test_a_report_goes_as_the_8_bits_that_it_has(stores):
    hook = Intercept()
    with (
        pair(stores, b_options={"intercept": hook}) as (a, _),
        smtplib.SMTP(a.host, a.port) as client,
    ):
        client.login("alice", "wonderland")
        client.sendmail("bob@b.example", ["nobody@b.example"], "Subject: é\r\n\r\nö\r\n".encode())
        stores[1].wait("bob@b.example")
        assert empty(stores[0])
    [report] = [
        argument
        for verb, argument in hook.seen
        if verb == "MAIL" and argument.startswith("FROM:<>")
    ]
    assert "BODY=8BITMIME" in report
    assert stores[1].messages("bob@b.example")[0]["Content-Transfer-Encoding"] == "8bit"


@pytest.mark.parametrize(
    ("text", "wanted"), [("a+2Bb", "a+b"), ("a+0Ab", "a+0Ab"), ("", ""), ("+E9", "+E9")]
)
def test_unxtext(text, wanted):
    assert unxtext(text) == wanted


def test_escape_address():
    assert escape_address("a@b") == "a@b"
    assert escape_address("é@b") == "\\x{E9}@b"


@pytest.mark.parametrize("way", ["route", "relay"])
@pytest.mark.parametrize("login", [False, True])
def test_success_is_reported_to_strangers_along_an_explicit_route_only(stores, way, login):
    """A sender's address proves nothing: it must not make us write to just anybody."""
    with SMTPServer(("127.0.0.1", 0), stores[1], hostname="b.example") as b:
        to = f"127.0.0.1:{b.port}"
        options = {"route": {"b.example": to}} if way == "route" else {"relay": to}
        with SMTPServer(("127.0.0.1", 0), stores[0], hostname="a.example", **options) as a:
            with smtplib.SMTP(a.host, a.port) as client:
                if login:
                    client.login("alice", "wonderland")
                success = [[], ["NOTIFY=SUCCESS"]]
                client.sendmail("bob@b.example", ["anna@a.example"], CONTENT, *success)
            wanted = login or way == "route"
            assert len(stores[0].queued()) + len(stores[1].messages("bob@b.example")) == wanted
            assert empty(stores[0])
            assert len(stores[1].messages("bob@b.example")) == wanted


def test_no_line_is_longer_than_mail_may_have():
    relay = Relay(None, "a.example")
    recipient = QueuedRecipient("\u0101" * 60 + "@b.example", orcpt="utf-8;" + "\U0001f600" * 500)
    recipient.action, recipient.status, recipient.remote = "failed", "5.0.0", "b.example"
    recipient.diagnostic = "550 " + '"e\u00e9\U0001f600' * 400
    entry = QueueEntry("ABC", "alice@a.example", {}, [recipient])
    text = build_report(relay, "R1", entry, [recipient], b"Subject: x\r\n\r\ny\r\n", True)
    assert max(map(len, text.split(b"\r\n"))) <= 998
    _, one = fields(email.message_from_bytes(text, policy=email.policy.default))
    assert one["Final-Recipient"].endswith("@b.example")
