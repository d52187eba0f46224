"""Look at everything that jobs and cron depend on."""

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import typer

from saasllm_cli import database, definitions, embedded, encryption, migrations
from saasllm_cli.commands.inputs import EVERY_ROW, counted, noun, some, some_rights
from saasllm_cli.errors import CheckFailed, DatabaseUnavailable, InvalidInput, SaasllmError, limit_owner, limit_words
from saasllm_cli.output import Row, print_answer, progress, show, timestamp
from saasllm_cli.settings import Format, settings

app = noun()

OLDEST_VERSION = 14
CLOCK_SECONDS = 2
FREE_BYTES = 2**30
UNPRICED_DAYS = 7
WAITING_MINUTES = 5
OK, WARNING, FAILED = "ok", "warning", "failed"
RIGHTS = {"run jobs": "may_run_jobs", "administer": "may_administer", "migrate": "may_migrate"}

Check = dict[str, Any]


@app.command(
    epilog="saasllm doctor -o json | jq -r '.[] | select(.status != \"ok\") | .hint'\n"
    "saasllm doctor -o prometheus > saasllm.prom.new; mv saasllm.prom.new saasllm.prom"
)
def doctor(
    output: Annotated[
        Literal["table", "json", "jsonl", "csv", "prometheus"] | None,
        typer.Option("--output", "-o", help="Output format (default: $SAASLLM_OUTPUT, else table)."),
    ] = None,
) -> None:
    """Check everything that jobs and cron depend on.

    Checks the database and its role, migrations, the ledger, leases, allocations, workers, limits, charges, webhooks,
    secrets and keys (never showing their values), prices of models and disk space, and says how to fix what is wrong.
    Changes nothing. Exit 9 if a check fails, 7 if the database cannot be used; warnings alone exit 0.

    With -o prometheus, prints what was found, and numbers of credits, jobs, queues, calls and webhooks, for
    node_exporter's textfile collector. A failed check and a database that cannot be used (saasllm_up is 0) are in it,
    too: move it into place whatever the exit status.
    """
    checks: list[Check] = []
    unusable: DatabaseUnavailable | None = None
    try:
        for check in _checks():
            checks.append(check)  # noqa: PERF402 # what was found until it failed is shown
    except DatabaseUnavailable as error:
        unusable = error
        if error.code not in ("migrations_pending", "database_newer"):  # which are told already
            checks.append(_check("database", FAILED, error.message, error.hint))
    finally:
        progress("")
    unread = None
    if output == "prometheus":
        unread = _print_numbers(checks, is_usable=unusable is None)
    else:
        show(checks, Format(output) if output else None, ("check", "status", "message"), further=_with_hint)
    if unusable is not None:
        raise unusable
    if failed := [check["check"] for check in checks if check["status"] == FAILED]:
        raise CheckFailed("doctor_failed", f"Failed: {', '.join(failed)}.", "The table says how to fix each.")
    if unread is not None:
        raise unread


def _print_numbers(checks: list[Check], is_usable: bool) -> SaasllmError | None:
    """Gives why there are none of the database, where the checks do not say so."""
    from saasllm_cli import metrics

    numbers, unread = None, None
    try:
        numbers = metrics.read() if is_usable else None
    except SaasllmError as error:
        unread = error
    print_answer(metrics.text(numbers, checks).rstrip("\n"))
    return unread


def _checks() -> Iterator[Check]:
    if settings().server_url is None:
        yield _disk()
    with database.connect_unmigrated() as db:
        server = db.one("doctor.server")  # it also brings along the connection's own settings
        yield from _server(db)
        states = migrations.status()
        if newer := [row["migration"] for row in states if row["status"] == "missing"]:
            message, hint = f"{database.where()} is newer than this program: {some(newer)}.", "Upgrade saasllm."
            yield _check("migrations", FAILED, message, hint)
            raise DatabaseUnavailable("database_newer", message, hint)
        if all(row["applied_at"] for row in states):  # else it lacks what is pending
            yield from _enforcement(db)
        unsound = [
            f"{row['migration']} {row['status']}" for row in states if row["status"] not in ("applied", "pending")
        ]
        if unsound:
            yield _check("migrations", FAILED, f"{some(unsound)}.", "See: saasllm migrate verify")
        elif pending := [row["migration"] for row in states if row["status"] == "pending"]:
            message = f"{len(pending)} pending, starting with {pending[0]}."
            yield _check("migrations", FAILED, message, "Run: saasllm migrate up")
            migrations.check(states)
        else:
            yield _check("migrations", OK, f"{len(states)} applied, none changed since.")
        yield _rights(db, server)
        yield from _others(db)
        if taken := [row["name"] for row in db.many("doctor.taken_ids")]:
            message = (
                f"The next IDs of {some(taken)} are taken: their sequences were left behind by a restore or a switch."
            )
            yield _check("ids", FAILED, message, "Run: saasllm migrate up")
        yield _ledger(db)
        yield from _overdue(db)
        yield _workers(db)
        yield _limits(db)
        yield _charges(db)
        yield from _webhooks(db)
        yield from _secrets(db)
        rows = db.many("doctor.models")
    models = [row["model_name"] for row in rows]
    yield _keys(models)
    yield _prices([row["model_name"] for row in rows if not row["is_priced"]])


def _server(db: database.Database) -> Iterator[Check]:
    before = datetime.now(UTC)
    began = time.perf_counter()
    server = db.one("doctor.server")
    latency = time.perf_counter() - began
    message = f"PostgreSQL {server['version']}, answers in {latency * 1000:.1f} ms."
    if server["major_version"] < OLDEST_VERSION:
        yield _check("database", FAILED, message, f"Use PostgreSQL {OLDEST_VERSION} or newer.")
    elif server["is_replica"]:
        yield _check("database", FAILED, f"{message} It is a replica.", f"Use the primary in {database.url_name()}.")
    else:
        yield _check("database", OK, message)
    offset = (server["clock"] - before).total_seconds() - latency / 2
    yield (
        _check("clock", OK, f"Differs from the database's by {abs(offset):.1f} s.")
        if abs(offset) <= CLOCK_SECONDS
        else _check(
            "clock",
            WARNING,
            f"Differs from the database's by {abs(offset):.0f} s.",
            "Synchronize both by NTP: leases use the database's clock, periods this one.",
        )
    )
    if server["replication_role"] != "origin":
        message = f"session_replication_role is {server['replication_role']}: the rules of the ledger are not enforced."
        yield _check("enforcement", FAILED, message, "Reset it for the role, the database and the server.")
    if server["not_durable"]:
        message = f"Off: {some(server['not_durable'])}. A crash can lose what was committed."
        yield _check("durability", WARNING, message, "Turn it on for the server, the database and the role.")


def _enforcement(db: database.Database) -> Iterator[Check]:
    if lacking := sorted(migrations.rules() - {row["rule"] for row in db.many("doctor.enforced")}):
        hint = "Create it again as sql/migrations has it, or enable it: ALTER TABLE ... ENABLE TRIGGER ALL"
        if all(rule.startswith("trigger ") for rule in lacking):
            hint = "Run: saasllm migrate up"
        yield _check("enforcement", FAILED, f"Missing or disabled: {some(lacking)}.", hint)


def _rights(db: database.Database, server: database.Row) -> Check:
    rights = db.one("doctor.rights", tables=definitions.relations())
    name = f"{server['role']}, a superuser" if server["is_superuser"] else server["role"]
    if rights["unreadable"]:
        message = f"{name}, cannot read {some(rights['unreadable'])}."
        return _check("role", FAILED, message, "Grant it, or use the role that migrated the database.")
    if server["is_superuser"] and settings().server_url is not None:
        message = f"{name}, which can switch off the rules of the ledger."
        return _check("role", WARNING, message, "Use a separate role that owns the tables of saasllm.")
    if creators := rights["may_create"]:
        message = f"{name}. {some(creators)} can create objects in the schema public, which could replace others."
        return _check(
            "role", WARNING, message, f"Run as its owner: REVOKE CREATE ON SCHEMA public FROM {', '.join(creators)}"
        )
    may = [what for what, right in RIGHTS.items() if rights[right]]
    return _check("role", OK, f"{name}; it may {', '.join(['read', *may])}.")


def _others(db: database.Database) -> Iterator[Check]:
    if rights := migrations.rights_of_others():
        message = f"Other roles have rights on saasllm's tables: {some_rights(rights)}."
        yield _check("rights", WARNING, message, "To revoke them, run: saasllm migrate up --revoke-others")
    others = db.one("doctor.others", tables=definitions.relations(), triggers=sorted(migrations.rules()))
    if others["triggers"]:
        message = f"Triggers of others: {some(others['triggers'])}."
        hint = "They act with the rights of whoever writes. Drop those that you do not know: DROP TRIGGER NAME ON TABLE"
        yield _check("triggers", WARNING, message, hint)
    if others["secured"]:
        message = f"Row-level security: {some(others['secured'])}. Roles that are subject to it are refused."
        hint = "ALTER TABLE ... DISABLE ROW LEVEL SECURITY, or give those roles BYPASSRLS."
        yield _check("row security", WARNING, message, hint)


def _ledger(db: database.Database) -> Check:
    progress("Verifying the ledger …")
    with db.whole():
        db.one("doctor.see_all")
        wrong = db.many("credits.verify", team_id=None)
    if wrong:
        teams = sorted({row["team_id"] for row in wrong})
        message = f"{counted(len(wrong), 'difference')} in {some(teams)}."
        return _check("ledger", FAILED, message, "See: saasllm credits verify")
    return _check("ledger", OK, "Ledger, balances and jobs agree.")


def _overdue(db: database.Database) -> Iterator[Check]:
    overdue = db.one("doctor.overdue")
    yield (
        _check(
            "leases",
            WARNING,
            f"{counted(overdue['expired_jobs'], 'expired job')}.",
            "Run from cron: saasllm job sweep",
        )
        if overdue["expired_jobs"]
        else _check("leases", OK, "No expired jobs.")
    )
    yield (
        _check(
            "allocations",
            WARNING,
            f"{counted(overdue['due_teams'], 'team')} due, the first since {overdue['due_since']}.",
            "Run from cron: saasllm credits allocate",
        )
        if overdue["due_teams"]
        else _check("allocations", OK, "No teams are due.")
    )


def _workers(db: database.Database) -> Check:
    if db.one("doctor.queue")["lacks_worker"]:
        message = "Jobs have been waiting for more than a minute, and no worker runs them."
        return _check("workers", WARNING, message, "Run: saasllm worker. See: saasllm worker list")
    return _check("workers", OK, "No jobs are waiting without a worker.")


def _limits(db: database.Database) -> Check:
    """At their lowest alert, else at 80 %."""
    if rows := db.many("doctor.limits"):
        used = [f"{limit_words(row)} for {limit_owner(row)} ({row['used_percent']} %)" for row in rows]
        message = f"Nearly or fully used: {some(used)}."
        return _check("limits", WARNING, message, "See: saasllm limit list. To raise one, run: saasllm limit set")
    return _check("limits", OK, "No limit is nearly used.")


def _charges(db: database.Database) -> Check:
    unpriced = db.one("doctor.unpriced", days=UNPRICED_DAYS)
    if unpriced["jobs"]:
        jobs = f"{counted(unpriced['jobs'], 'job')} of the last {UNPRICED_DAYS} days in {some(unpriced['teams'])}"
        unknown = f"the cost or tokens of {some(unpriced['model_names']) or 'their calls'} are unknown"
        message = f"{jobs}: {unknown}, so the price's minimum was charged."
        hint = "For the cost, run: saasllm model set MODEL --input-usd-per-million USD --output-usd-per-million USD"
        return _check("charges", WARNING, message, hint)
    return _check("charges", OK, f"What each job of the last {UNPRICED_DAYS} days costs is known.")


def _webhooks(db: database.Database) -> Iterator[Check]:
    if rows := db.many("doctor.webhooks"):
        told = [f"{row['webhook_id']} {row['status']} since {timestamp(row['since'])} ({row['url']})" for row in rows]
        hint = "See: saasllm webhook deliveries WEBHOOK. When its endpoint works, run: saasllm webhook test WEBHOOK"
        yield _check("webhooks", WARNING, f"Nothing arrives: {some(told)}.", hint)
    else:
        yield _check("webhooks", OK, "No webhook is failing.")
    if db.one("doctor.deliveries", minutes=WAITING_MINUTES)["lacks_deliverer"]:
        message = f"Events have been waiting to be delivered for more than {WAITING_MINUTES} minutes."
        hint = "Run: saasllm worker. Or from cron, each minute: saasllm webhook deliver"
        yield _check("deliveries", WARNING, message, hint)


def _secrets(db: database.Database) -> Iterator[Check]:
    """Whether this process can decrypt what is stored, and whether the proxy has the keys that it is to have."""
    state = db.one("doctor.secrets")
    if not state["may_read"]:
        return
    owners = [(row["secret"], encryption.webhook_owner(row)) for row in db.many("webhook.secrets")]
    rows = db.many("credential.secrets", after=0, row_limit=EVERY_ROW)
    owners += [(row["secret"], encryption.credential_owner(row)) for row in rows]
    if owners:
        yield _decryption(owners)
    if settings().proxy_url is not None or state["has_keys"]:
        yield _proxy()


def _decryption(owners: list[tuple[str, str]]) -> Check:
    try:
        encryption.require_master_key()
    except InvalidInput as error:
        message = f"Secrets cannot be decrypted here: no webhook is signed, no own key is used. {error.message}"
        return _check("master key", WARNING, message, error.hint)
    unreadable = []
    for secret, owner in owners:
        try:
            encryption.decrypt(secret, owner)
        except InvalidInput:
            unreadable.append(owner)
    if not unreadable:
        return _check("master key", OK, "It decrypts all secrets.")
    message = f"Cannot be decrypted: the secrets of {some(list(dict.fromkeys(unreadable)))}."
    hint = (
        "Add their key to SAASLLM_MASTER_KEYS. If it is lost, run: saasllm credential set, saasllm key rotate, "
        "saasllm webhook rotate"
    )
    return _check("master key", WARNING, message, hint)


def _proxy() -> Check:
    from saasllm_cli import proxy

    progress("Asking the proxy …")
    try:
        differences = proxy.sync(dry_run=True)
    except SaasllmError as error:
        return _check("proxy", WARNING, error.message, error.hint)
    if differences:
        message = (
            f"{counted(len(differences), 'key')} at the proxy differ{'s' * (len(differences) == 1)} from the database."
        )
        return _check("proxy", WARNING, message, "Run: saasllm key sync. See: saasllm key sync --dry-run")
    return _check("proxy", OK, "It has the same keys as the database.")


def _keys(models: list[str]) -> Check:
    called = [model for model in models if not model.startswith("offline/")]
    if not called:
        return _check("providers", OK, "No group uses a model that needs a key.")

    progress("Loading litellm …")
    from saasllm_cli.jobs import llm

    missing: dict[str, list[str]] = {}
    for model in called:
        if reason := llm.missing_key(model):
            missing.setdefault(reason, []).append(model)
    if missing:
        message = "; ".join(f"{reason} (for {some(names, 3)})" for reason, names in missing.items())
        return _check(
            "providers",
            WARNING,
            f"{message}.",
            "Set it where jobs run, or in .env. For a key of an organization's own, run: saasllm credential set",
        )
    return _check(
        "providers", OK, f"The keys for {counted(len(called), 'model')} are set; `saasllm group test` tries them."
    )


def _prices(models: list[str]) -> Check:
    """Of models without a price of our own."""
    from saasllm_cli.jobs.known_models import unpriced

    if names := unpriced(models):
        message = f"No known price: {some(names)}. The cost of such calls is not recorded."
        hint = f"Run: saasllm model set {names[0]} --input-usd-per-million USD --output-usd-per-million USD"
        return _check("prices", WARNING, message, hint)
    return _check("prices", OK, "The price of every model is known.")


def _disk() -> Check:
    folder = embedded.data_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    message = f"{free / 2**30:.1f} GiB free for the embedded PostgreSQL in {embedded.data_dir()}."
    if free < FREE_BYTES:
        return _check("disk", WARNING, message, "Free some space: without it, no job can be settled.")
    return _check("disk", OK, message)


def _with_hint(check: Row) -> Row:
    """In a table one text: most checks have no hint, and a column of it would take the room of what they say."""
    return {"message": " ".join(filter(None, (check["message"], check["hint"])))}


def _check(name: str, status: str, message: str, hint: str | None = None) -> Check:
    return {"check": name, "status": status, "message": message, "hint": hint}
