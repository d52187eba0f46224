"""Webhooks: where events are sent."""

import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from saasllm_cli import database
from saasllm_cli.commands.event import A_TYPE, complete_type, event_type
from saasllm_cli.commands.inputs import (
    AN_ORGANIZATION,
    AfterNumber,
    IfExists,
    IfNotExists,
    Limit,
    OrgFilter,
    Output,
    Since,
    TimeOrder,
    Verbose,
    Yes,
    confirm_delete,
    counted,
    lasting,
    missing_allowed,
    moment,
    noun,
    number,
    require,
    require_some,
    same_or_conflict,
    unique,
)
from saasllm_cli.database import Row
from saasllm_cli.errors import CheckFailed, Conflict, Interrupted, InvalidInput, not_found
from saasllm_cli.output import note, progress, remark, show, timestamp, waiting
from saasllm_cli.settings import Format, settings

if TYPE_CHECKING:
    from saasllm_cli.webhooks.deliverer import Summary

app = noun()

ALL = "all"
LONGEST_UNDER_WAY = 60.0
COLUMNS = ("webhook_id", "status", "organization_id", "url", "event_types", "failing_since")


def subscribed_type(value: str) -> str:
    return value if value == ALL else event_type(value)


def _complete_subscribed(incomplete: str) -> list[str]:
    return [*complete_type(incomplete), *[ALL] * ALL.startswith(incomplete)]


A_WEBHOOK: dict[str, Any] = {"metavar": "WEBHOOK", "parser": number}
WebhookId = Annotated[int, typer.Argument(**A_WEBHOOK, show_default=False, help="Webhook ID.")]
A_SUBSCRIPTION: dict[str, Any] = {
    "metavar": "TYPE|all",
    "parser": subscribed_type,
    "autocompletion": _complete_subscribed,
}
ALLOW_HTTP = "Allow http:// URLs, whose deliveries anyone on the way can read."
ALLOW_PRIVATE = "Allow addresses that are not on the internet, such as localhost."


@app.command(
    epilog="saasllm webhook create --org org_acme_corp --url https://acme.example/hooks "
    "--event job.completed --event credits.low\n"
    "saasllm webhook create --url https://ops.example/saasllm --event all"
)
def create(
    url: Annotated[str, typer.Option("--url", metavar="URL", show_default=False, help="Where to send events.")],
    event: Annotated[
        list[str], typer.Option("--event", **A_SUBSCRIPTION, show_default=False, help="Event type to send; repeatable.")
    ],
    org: Annotated[
        str | None,
        typer.Option("--org", **AN_ORGANIZATION, help="Send only events of this organization (default: of all)."),
    ] = None,
    allow_http: Annotated[bool, typer.Option("--allow-http", help=ALLOW_HTTP)] = False,
    allow_private: Annotated[bool, typer.Option("--allow-private", help=ALLOW_PRIVATE)] = False,
    if_not_exists: IfNotExists = False,
    output: Output = None,
) -> None:
    """Create a webhook, and show its secret once.

    Deliveries are signed as Standard Webhooks specify: give the secret to whoever verifies them. It is stored
    encrypted with the master key in SAASLLM_MASTER_KEYS or SAASLLM_MASTER_KEY_FILE.

    Deliveries are made by `saasllm worker` and `saasllm webhook deliver`. What happened before the webhook was created
    is not sent.
    """
    from saasllm_cli import encryption
    from saasllm_cli.webhooks.secret import add_secret

    given = {"event_types": _subscription(event), "allow_http": allow_http, "allow_private": allow_private}
    encryption.require_master_key()
    url = _checked(url, allow_http, allow_private)

    def work() -> tuple[Row, str | None]:
        created = db.one("webhook.create", organization_id=org, url=url, **given)
        if not created["organization_exists"]:
            raise not_found("organization", str(org))
        if created["webhook_id"] is None:
            return db.found("webhook.named", "webhook", url, organization_id=org, url=url), None
        secret, _ = add_secret(db, created["webhook_id"], timedelta())
        return db.get("webhook", created["webhook_id"]), secret

    with database.connect() as db:
        webhook, secret = db.transaction(work)
    if secret is None:
        if not if_not_exists:
            raise _exists(webhook)
        same_or_conflict("webhook", f"{webhook['webhook_id']} for {url}", webhook, given, if_not_exists)
        show(webhook, output)
        return
    show({**webhook, "secret": secret}, output)
    note("Save the secret: it is not shown again.")


@app.command(epilog="saasllm webhook get 3")
def get(webhook_id: WebhookId, output: Output = None) -> None:
    """Show a webhook."""
    with database.connect() as db:
        webhook = db.get("webhook", webhook_id)
    show(webhook, output)


@app.command("list", epilog="saasllm webhook list --org org_acme_corp")
def list_(
    org: OrgFilter = None,
    event: Annotated[str | None, typer.Option("--event", **A_TYPE, help="Filter by event type.")] = None,
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List webhooks."""
    with database.connect() as db:
        webhooks = db.stream(
            "webhook.list", {"organization": org}, organization_id=org, event_type=event, after=after, limit=limit
        )
        show(webhooks, output, COLUMNS, essential=("webhook_id", "status", "url"))


@app.command(
    epilog="saasllm webhook update 3 --event job.completed --event job.failed\nsaasllm webhook update 3 --enable"
)
def update(
    webhook_id: WebhookId,
    url: Annotated[str | None, typer.Option("--url", metavar="URL", help="New URL.")] = None,
    event: Annotated[
        list[str],
        typer.Option(
            "--event", **A_SUBSCRIPTION, help="New event type to send, replacing all earlier ones; repeatable."
        ),
    ] = [],
    allow_http: Annotated[bool | None, typer.Option("--allow-http/--no-allow-http", help=ALLOW_HTTP)] = None,
    allow_private: Annotated[
        bool | None, typer.Option("--allow-private/--no-allow-private", help=ALLOW_PRIVATE)
    ] = None,
    enable: Annotated[bool | None, typer.Option("--enable/--disable", help="Resume or stop sending events.")] = None,
    output: Output = None,
) -> None:
    """Update a webhook, or disable or enable it.

    While a webhook is disabled, nothing is sent to it. Enabled again, it gets what was waiting, and new events; for
    those in between, see `saasllm webhook replay`.
    """
    changes = {
        "url": url,
        "event_types": _subscription(event) or None,
        "allow_http": allow_http,
        "allow_private": allow_private,
    }
    require_some({**changes, "enable": enable})
    with database.connect() as db:
        before = db.get("webhook", webhook_id)
    if (url, allow_http, allow_private) != (None, None, None):
        new = before | {name: value for name, value in changes.items() if value is not None}
        checked = _checked(new["url"], new["allow_http"], new["allow_private"])
        changes["url"] = None if url is None else checked

    def work() -> Row:
        if changes["url"] not in (None, before["url"]):
            named = {"organization_id": before["organization_id"], "url": changes["url"]}
            if other := db.maybe("webhook.named", **named):
                raise _exists(other)
        db.found("webhook.update", "webhook", str(webhook_id), webhook_id=webhook_id, **changes)
        if enable is False:
            db.maybe("webhook.disable", webhook_id=webhook_id)
        return (db.maybe("webhook.enable", webhook_id=webhook_id) if enable else None) or {}

    with database.connect() as db:
        enabled = db.transaction(work)
        webhook = db.get("webhook", webhook_id)
    show(webhook, output)
    if enabled:
        _tell_missed(webhook_id, enabled["missed_since"])


@app.command(epilog="saasllm webhook delete 3 --yes")
def delete(webhook_id: WebhookId, if_exists: IfExists = False, yes: Yes = False) -> None:
    """Delete a webhook and its deliveries, sent or not."""
    with missing_allowed(if_exists):
        require("webhook", str(webhook_id))
        confirm_delete(f"webhook {webhook_id}", yes)
        with database.connect() as db:
            db.found("webhook.delete", "webhook", str(webhook_id), webhook_id=webhook_id)
        note(f"Deleted webhook {webhook_id}.", webhook_id=webhook_id)


@app.command(epilog="saasllm webhook test 3")
def test(webhook_id: WebhookId, output: Output = None) -> None:
    """Send a test event now, and show what the endpoint answers.

    Sends the event webhook.test, once. If the webhook was disabled because of failures, a test that succeeds enables
    it again.
    """
    import asyncio

    from saasllm_cli.webhooks import deliverer
    from saasllm_cli.webhooks.attempt import require_secrets

    def work() -> Row:
        lease = {"lease_seconds": deliverer.LEASE_SECONDS}
        delivery = db.found("webhook.test", "webhook", str(webhook_id), webhook_id=webhook_id, **lease)
        require_secrets(delivery)
        return delivery

    with database.connect() as db:
        webhook = db.get("webhook", webhook_id)
        delivery = db.transaction(work)
    with waiting("Sending …"):
        result = asyncio.run(deliverer.attempt_once(delivery))
    enabled = None
    with database.connect() as db:
        deliverer.record(db, [result])
        shown = db.found("webhook.delivery", "webhook", str(webhook_id), delivery_id=delivery["delivery_id"])
        if result["error"] is None and webhook["disabled_reason"] not in (None, "by_hand"):
            enabled = db.maybe("webhook.enable", webhook_id=webhook_id)
    show(shown, output)
    if result["error"] is not None:
        raise CheckFailed(
            "webhook_test_failed",
            f"The test event was not delivered: {result['error']}.",
            "Correct the endpoint, or the webhook: saasllm webhook update --help",
            webhook_id=webhook_id,
        )
    if enabled:
        note(f"Webhook {webhook_id} is enabled again.", webhook_id=webhook_id)
        _tell_missed(webhook_id, enabled["missed_since"])


@app.command(epilog="saasllm webhook rotate 3 --keep 48h -o json | jq -r .secret")
def rotate(
    webhook_id: WebhookId,
    keep: Annotated[
        timedelta,
        typer.Option(parser=lasting, metavar="TIME", help="How long the previous secret signs as well: 24h, 7d."),
    ] = "24h",  # type: ignore[assignment] # as it would be typed
    output: Output = None,
) -> None:
    """Replace a webhook's secret, and show the new one once.

    Until --keep is over, deliveries are signed with both secrets, so that their receiver can switch at any time. The
    new secret is shown as soon as no delivery without its signature is on its way.
    """
    from saasllm_cli.webhooks.secret import add_secret

    with database.connect() as db:
        db.get("webhook", webhook_id)
        secret, expires_at = db.transaction(lambda: add_secret(db, webhook_id, keep))
        until = time.monotonic() + LONGEST_UNDER_WAY
        with waiting("Waiting for deliveries that are on their way …"):
            time.sleep(0.5)  # those that were just begun are told of by now
            before = db.one("db.clock")["now"]
            while time.monotonic() < until:
                if not db.one("webhook.is_under_way", webhook_id=webhook_id, before=before)["is_under_way"]:
                    break
                time.sleep(0.2)
    show({"webhook_id": webhook_id, "secret": secret, "previous_secret_expires_at": expires_at}, output)
    note("Save the secret: it is not shown again.")


@app.command(
    epilog="saasllm webhook deliveries 3 --status failed --since 7d\nsaasllm webhook deliveries --attempts-of 1207"
)
def deliveries(
    webhook_id: Annotated[
        int | None, typer.Argument(**A_WEBHOOK | {"metavar": "[WEBHOOK]"}, help="Webhook ID (default: of all).")
    ] = None,
    status: Annotated[Literal["pending", "succeeded", "failed"] | None, typer.Option(help="Filter by status.")] = None,
    event: Annotated[str | None, typer.Option("--event", **A_TYPE, help="Filter by event type.")] = None,
    attempts_of: Annotated[
        int | None,
        typer.Option("--attempts-of", parser=number, metavar="DELIVERY", help="List the attempts of one delivery."),
    ] = None,
    since: Since = None,
    sort: TimeOrder = "newest",
    after: AfterNumber = None,
    limit: Limit = 100,
    output: Output = None,
) -> None:
    """List deliveries, each with its last attempt.

    A failed attempt is repeated up to nine times within about three days. After that, the delivery has failed.
    """
    with database.connect() as db:
        if attempts_of is not None:
            db.found("webhook.delivery", "delivery", str(attempts_of), delivery_id=attempts_of)
            attempts = db.many("webhook.attempts", delivery_id=attempts_of)
            show(attempts, output, ("attempted_at", "duration_ms", "status_code", "error", "answer"))
            return
        found = db.stream(
            "webhook.deliveries",
            {"webhook": webhook_id},
            webhook_id=webhook_id,
            status=status,
            event_type=event,
            since=since,
            sort=sort,
            after=after,
            limit=limit,
        )
        columns = (
            *("delivery_id", "webhook_id", "status", "event_type", "attempts", "status_code", "error"),
            *("attempted_at", "next_at", "event_id"),
        )
        show(found, output, columns, essential=("delivery_id", "status", "event_type", "error", "status_code"))


@app.command(epilog="saasllm webhook replay 3 --since 2026-11-20")
def replay(
    webhook_id: WebhookId,
    since: Annotated[
        datetime,
        typer.Option(
            "--since",
            parser=moment,
            metavar="WHEN",
            show_default=False,
            help="Start of what was missed: 7d (7 days ago), 2026-11-01 or an RFC 3339 time.",
        ),
    ],
    output: Output = None,
) -> None:
    """Send again what a webhook has missed.

    That is every event of its types that was not delivered: those given up, those waiting for another attempt, and
    those that happened while it was disabled. They keep their IDs, and are sent by `saasllm worker` or
    `saasllm webhook deliver`.
    """
    with database.connect() as db:
        webhook = db.get("webhook", webhook_id)
        replayed = db.one("webhook.replay", webhook_id=webhook_id, since=since)
    show({"webhook_id": webhook_id, **replayed}, output)
    if webhook["status"] == "disabled":
        note(f"Webhook {webhook_id} is disabled. To send them, run: saasllm webhook update {webhook_id} --enable")


@app.command(epilog="saasllm webhook deliver")
def deliver(verbose: Verbose = False, output: Output = None) -> None:
    """Send what is due now, and remove old events.

    Run it from cron every minute if no `saasllm worker` runs: if nothing is due, it prints nothing. Several may run at
    once. When an endpoint fails, what else is due there waits for the next run.
    """
    import signal

    from saasllm_cli.jobs.session import Session
    from saasllm_cli.jobs.signals import signals
    from saasllm_cli.webhooks.deliverer import Deliverer, prune

    with Session() as session:
        deliverer = Deliverer(session.ask, note, _progress, is_once=True)
        is_interrupted = False

        def stop(*_: object) -> None:
            nonlocal is_interrupted
            is_interrupted = True
            deliverer.stop()

        with signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM), stop)), waiting("Sending …"):
            deliverer.run()
        pruned = 0 if is_interrupted else session.ask(prune)
    done = deliverer.summary
    counts = {"succeeded": done.succeeded, "failed": done.failed, "given_up": done.given_up, "events_removed": pruned}
    if (output or settings().output) is not Format.TABLE:
        show(counts, output)
    elif any(counts.values()):
        note(
            f"{done.succeeded} delivered, {done.failed} to be retried, {done.given_up} given up; "
            f"{counted(pruned, 'old event')} removed."
        )
    elif not is_interrupted:
        remark("Nothing is due.", verbose)
    if is_interrupted:
        raise Interrupted("interrupted", "Interrupted. The next run sends the rest.")


def _progress(done: "Summary", under_way: int) -> None:
    progress(f"{under_way} on their way · {done.succeeded} delivered, {done.failed + done.given_up} failed")


def _exists(webhook: Row) -> Conflict:
    webhook_id = webhook["webhook_id"]
    return Conflict(
        "webhook_exists",
        f"Webhook {webhook_id} for {webhook['url']} already exists.",
        f"To change it, run: saasllm webhook update {webhook_id}",
        webhook_id=webhook_id,
    )


def _subscription(event: list[str]) -> list[str]:
    types = sorted(unique(event, "--event"))
    if ALL in types and len(types) > 1:
        raise InvalidInput("usage", "--event all includes every other type.", "Give it alone.")
    return types


def _checked(url: str, allow_http: bool, allow_private: bool) -> str:
    """The URL, normalized, if events may be sent there."""
    from saasllm_cli.webhooks.addresses import Forbidden, resolve, target

    try:
        parsed = target(url, allow_http)
    except ValueError as error:
        raise InvalidInput("invalid_url", f"Invalid URL: {error}.", "Correct it, or see --help.") from None
    try:
        resolve(parsed, allow_private)
    except Forbidden as error:
        raise InvalidInput(
            "private_address",
            f"Invalid URL: {error}.",
            "Give a URL on the internet or, if you mean it, add --allow-private.",
        ) from None
    except OSError as error:
        note(f"Warning: {parsed.host} cannot be resolved now: {error.strerror or error}.")
    return str(parsed)


def _tell_missed(webhook_id: int, since: datetime) -> None:
    since = since - timedelta(seconds=1)  # to the second, as a command takes it
    note(
        "To send what it has missed, run: "
        f"saasllm webhook replay {webhook_id} --since {timestamp(since.replace(microsecond=0))}"
    )
