"""Applies manifests: what the files say is staged, compared with what is there, and written where it differs; all in
one transaction of the caller's."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta

from saasllm_cli.database import NEAR, Database, Row, Rows
from saasllm_cli.errors import Conflict, InvalidFiles, InvalidInput
from saasllm_cli.jobs.providers import PROXY, has_address
from saasllm_cli.manifests.definitions import SECTIONS, TOO_LARGE, in_order, value_of
from saasllm_cli.manifests.read import MOST_ERRORS, Record, Source, did_you_mean, invalid, records
from saasllm_cli.rules import last_four

WAIT_SECONDS = 3600
TOLD_EVERY = 1000  # records
MOST_RESOLVED = 32  # names at once
EVERY_CHANGE = 10**18
GRACE = timedelta(hours=24)  # in which a key that is replaced still works
Values = list[tuple[Row, str]]  # of credentials and keys, which are to be set
# In this order: what is referred to comes first, and teams are locked by their update before their groups change.
WRITES = (
    "apply.create_organizations",
    "apply.update_organizations",
    "apply.create_groups",
    "apply.update_groups",
    "apply.create_teams",
    "apply.update_teams",
    "apply.assign_groups",
    "apply.open_credits",
    "apply.remove_schedules",
    "apply.set_schedules",
    "apply.set_prices",
    "apply.update_webhooks",
    "apply.create_webhooks",
)

# What jobs wait for, too. One that begins or ends locks the table of jobs, then its team's balance, then the counters
# of limits. A limit that is new locks that table until the commit, for it counts what runs: were a balance locked
# before, a job could have the table and wait for the balance, while we wait for the table. So the table comes first,
# then the balances, then the limits. Where limits only go, the table is locked, too: their counters go with them, and
# not in the order in which a job locks some of these. All of it comes late, as jobs stand still from then on. What
# stands above locks nothing that a job waits for: of a team, a job needs only its key.
WRITES_BESIDE_JOBS = ("apply.set_bounds", "apply.remove_limits", "apply.set_limits")


def stage(db: Database, sources: list[Source], on_progress: Callable[[str], None]) -> None:
    """Reads the files into the transaction's staging tables. Raises `InvalidFiles` with all that is wrong in them."""
    db.one("lock.stay")
    db.none("apply.create_staged")
    db.none("apply.create_change")
    db.copy("apply.stage", _counted(records(sources), on_progress))
    db.none("apply.analyze_staged")
    if any(source.errors for source in sources):
        # Where not all was read, what is missing may stand there.
        if all(source.is_whole for source in sources) and sum(len(source.errors) for source in sources) <= MOST_ERRORS:
            _compare_references(db, sources)
        raise _invalid(sources)
    on_progress("Comparing …")


def _invalid(sources: list[Source]) -> InvalidFiles:
    return invalid([error for source in sources for error in source.errors])


def _counted(staged: Iterator[Record], on_progress: Callable[[str], None]) -> Iterator[Record]:
    for number, record in enumerate(staged, start=1):
        yield record
        if number % TOLD_EVERY == 0:
            on_progress(f"{number:,} records read …")


def compare(db: Database, sources: list[Source], is_pruning: bool) -> Values:
    """Finds what differs from what was staged, and gives the values that do: they stand nowhere else. Raises
    `InvalidFiles` where a record does not fit the others, or what is there."""
    db.none("apply.forget_changes")
    if _compare_references(db, sources):
        raise _invalid(sources)
    db.none("apply.compare")
    db.none("apply.compare_credits")
    if is_pruning:
        db.none("apply.compare_pruned")
    db.none("apply.analyze_change")
    _refuse_private_targets(db, sources)
    values = _compare_values(db, sources)
    if any(source.errors for source in sources):
        raise _invalid(sources)
    return values


def _refuse_private_targets(db: Database, sources: list[Source]) -> None:
    """Webhooks that are new, and lead where events may not be sent. A name that cannot be resolved now is checked when
    something is sent there."""
    targets = db.many("apply.webhook_targets")
    if not targets:
        return
    with ThreadPoolExecutor(MOST_RESOLVED) as threads:
        found = list(threads.map(_why_private, [row["url"] for row in targets]))
    for row, why in zip(targets, found, strict=True):
        if why is not None:
            message = f"{why}: give a URL on the internet or, if you mean it, set allow_private: true"
            sources[row["source"]].refuse(row["document"], (row["section"], row["place"], "url"), message)


def _why_private(url: str) -> str | None:
    from saasllm_cli.webhooks.addresses import Forbidden, resolve, target

    with suppress(OSError):
        try:
            resolve(target(url, allow_http=True), allow_private=False)
        except Forbidden as error:
            return str(error)
    return None


def _compare_values(db: Database, sources: list[Source]) -> Values:
    """The values of credentials and keys that are to be set: of those that are new, of those of which a variable holds
    another than is stored, and of those that are sent elsewhere, which is what a value is bound to."""
    values: Values = []
    differing: list[tuple[str, str, str, str]] = []
    rows = db.many("apply.credential_values")
    stored = _stored_values(db, [row["credential_id"] for row in rows if row["credential_id"] is not None])
    for row in rows:
        is_new, old = row["credential_id"] is None, stored.get(row["credential_id"])
        value = value_of(row["from_env"]) if row["from_env"] else old
        if value is None and is_new and row["noun"] == "key":
            value = _new_key()
        if value is None:
            why = "it is new" if is_new else "what is stored cannot be decrypted"
            _refuse_value(row, sources, f"{why}: name the environment variable that holds the key")
            continue
        if row["api_base"] is None and not has_address(row["provider"]):
            message = f"models of {row['provider']} have no address that is known: give it as api_base"
            sources[row["source"]].refuse(row["document"], (row["section"], row["place"]), message)
        if not is_new and value != old:
            before = "stored" if old is not None else "cannot be decrypted"
            differing.append((row["noun"], row["id"], before, f"from {row['from_env']}"))
        elif row["action"] is None:
            continue
        values.append((row, value))
    _refuse_taken_keys(db, sources, values)
    if differing:
        nouns, ids, before_, after = map(list, zip(*differing, strict=True))
        db.none("apply.change_values", nouns=nouns, ids=ids, before=before_, after=after)
    return values


def _stored_values(db: Database, credential_ids: list[int]) -> dict[int, str]:
    """What can be decrypted of them."""
    if not credential_ids:
        return {}
    from saasllm_cli.encryption import credential_owner, decrypt, require_master_key

    require_master_key()
    found = {}
    for row in db.many("credential.secrets_of", credential_ids=credential_ids):
        with suppress(InvalidInput):
            found[row["credential_id"]] = decrypt(row["secret"], credential_owner(row))
    return found


def _new_key() -> str:
    from saasllm_cli.proxy import new_value

    return new_value()


def _refuse_taken_keys(db: Database, sources: list[Source], values: Values) -> None:
    """A key is one team's, and not again after it was replaced."""
    keys = [(row, value) for row, value in values if row["noun"] == "key"]
    if not keys:
        return
    from saasllm_cli.proxy import token_of

    tokens = [token_of(value) for _, value in keys]
    taken = {row["token"] for row in db.many("apply.keys_with", tokens=tokens)}
    for (row, _), token in zip(keys, tokens, strict=True):
        if token in taken and token != row["token"]:
            _refuse_value(row, sources, f"{row['from_env']} holds a key that is or was another one already")
        taken.add(token)


def _refuse_value(row: Row, sources: list[Source], message: str) -> None:
    sources[row["source"]].refuse(row["document"], (row["section"], row["place"], "from_env"), message)


def _compare_references(db: Database, sources: list[Source]) -> bool:
    """Whether something is wrong with the staged records beside one another, or beside what is there; the sources know
    it then."""
    rows = db.many("apply.errors", row_limit=MOST_ERRORS + 1)
    for row in rows:
        path = ("section", "place", "field", "position", "part")
        steps = tuple(row[step] for step in path if row[step] is not None)
        sources[row["source"]].refuse(row["document"], steps, _message(db, row["error"], row["value"]))
    return bool(rows)


def _message(db: Database, error: str, value: str) -> str:
    match error:
        case "repeated":
            return f"{value} is defined more than once"
        case "organization_differs":
            return f"the team belongs to organization {value}, which cannot be changed"
        case "metadata_too_large":
            return TOO_LARGE
        case "credential_is_key":
            return f"the {PROXY} credential of team {value} is its key: give it in keys"
        case "key_is_credential":
            hint = f"saasllm credential remove --team {value} --provider {PROXY}"
            return f"team {value} has a {PROXY} credential of its own: to use a key of ours instead, run: {hint}"
        case "price_given_twice":
            return f"{value} has a price of its own in the files: give only one of the two"
        case "overdraft_too_low":
            return f"the team is {value} credits below zero already: its overdraft must be at least {value}"
    noun = error.removesuffix("_not_found")
    known = [row["id"] for row in (*db.many("apply.staged_ids", noun=noun), *db.many(NEAR[noun], name=value))]
    return f"{noun} {value} not found in the files or in the database" + did_you_mean(value, known)


def write(
    db: Database,
    sources: list[Source],
    to_prune: Row | None,
    on_wait: Callable[[], None],
    on_progress: Callable[[str], None],
) -> list[Row]:
    """Compares and writes what differs, all or nothing, and gives the totals; of two at once, the second waits until
    the first is committed.

    `to_prune` are the teams that the files do not name and that may go: the `deleted` and the `suspended`. Raises
    `Conflict` where these are others by now.
    """

    def work() -> list[Row]:
        values = compare(db, sources, is_pruning=to_prune is not None)
        if to_prune is not None and db.one("apply.pruned") != to_prune:
            raise _changed_meanwhile("The teams to be pruned", "Check them again with --diff --prune.")
        on_progress("Writing …")
        for name in WRITES:
            db.none(name)
        _make_secrets(db)
        _set_values(db, values)
        if expired := expired_credits(db):
            db.one("credits.expire", team_ids=expired, is_listing=False)
        if db.one("apply.limits")["are_changed"]:
            db.none("apply.lock_jobs")
        for name in WRITES_BESIDE_JOBS:
            db.none(name)
        if to_prune is not None and db.one("apply.delete_teams")["deleted"] != len(to_prune["deleted"]):
            raise _changed_meanwhile("The teams to be pruned", "Check them again with --diff --prune.")
        return db.many("apply.totals")

    busy = Conflict("apply_running", "Another `saasllm apply` has been running for an hour.", "Try again later.")
    db.hold("apply", busy, WAIT_SECONDS, on_wait)
    return db.transaction(work)


def _make_secrets(db: Database) -> None:
    if created := new_webhooks(db):
        from saasllm_cli.webhooks.secret import add_secret

        for webhook_id in created:
            add_secret(db, webhook_id, timedelta())


def _set_values(db: Database, values: Values) -> None:
    """As `credential set`, `key create` and `key rotate` do."""
    if not values:
        return
    from saasllm_cli.encryption import credential_owner, encrypt

    for row, value in values:
        owner = {name: row[name] for name in ("organization_id", "team_id", "provider", "api_base")}
        bound = owner
        if owner["team_id"] is not None:
            bound = owner | {"organization_id": db.get("team", owner["team_id"])["organization_id"]}
        told = {"last_four": last_four(value), "secret": encrypt(value, credential_owner(bound))}
        if row["noun"] == "credential":
            is_set = db.one("credential.set", **owner, **told)["credential_id"] is not None
        else:
            is_set = _set_key(db, row, value, told)
        if not is_set:
            raise _changed_meanwhile("Credentials or keys", "Run it again.")


def _set_key(db: Database, row: Row, value: str, told: Row) -> bool:
    """Whether it is done: not where the team has a key by now, or has none any more."""
    from saasllm_cli.proxy import token_of

    key = {"team_id": row["team_id"], "token": token_of(value)}
    if row["token"] is None:
        return db.one("key.create", **key, **told)["key_id"] is not None
    if row["token"] != key["token"]:
        return db.maybe("key.rotate", **key, **told, grace=GRACE) is not None
    # The same one, which cannot be decrypted.
    return bool(db.many("apply.replace_secret", credential_id=row["credential_id"], secret=told["secret"]))


def new_webhooks(db: Database) -> list[int]:
    return [row["webhook_id"] for row in db.many("apply.new_webhooks")]


def expired_credits(db: Database) -> list[str]:
    """The new teams whose opening credits have expired already: what was exported may be older than they."""
    return [row["team_id"] for row in db.many("apply.expired_credits")]


def _changed_meanwhile(what: str, hint: str) -> Conflict:
    return Conflict("changed_meanwhile", f"{what} have changed in the meantime; nothing was changed.", hint)


def changes(db: Database, limit: int = EVERY_CHANGE) -> Rows:
    """What differs, or differed before it was written: `noun`, `id`, `action`, and the fields `before` and `after`."""
    definitions = {noun: definition for noun, definition, _ in SECTIONS.values()}
    rows = db.stream("apply.changes", limit=limit)

    def ordered(change: Row) -> Row:
        fields = {name: change[name] for name in ("before", "after") if change[name] is not None}
        return change | {name: in_order(value, definitions[change["noun"]]) for name, value in fields.items()}

    return Rows(map(ordered, rows), lambda: rows.fields, limit)
