"""Virtual keys at a LiteLLM proxy: made there as the database says.

The database comes first: a key's value is made here, written encrypted, and then made at the proxy, so that whatever is
interrupted is mended by another run. The proxy knows a key by its token, the SHA-256 of its value; a key of this
database by its metadata. What is gone from the database is removed there.

What the proxy's API answers was seen at LiteLLM 1.108: null takes a limit away, what is not sent stays.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

from saasllm_cli import database
from saasllm_cli.database import Row
from saasllm_cli.encryption import credential_owner, decrypt
from saasllm_cli.errors import InvalidInput, NoAnswer, SaasllmError
from saasllm_cli.settings import settings

PREFIX = "sk-"  # or the proxy takes it for no key
SHORTEST_VALUE = 16
NO_MODELS = ["no-default-models"]  # an empty list would stand for all
FIELDS = (
    *("key_alias", "models", "max_budget", "budget_duration", "rpm_limit", "tpm_limit", "max_parallel_requests"),
    "blocked",
)
PAGE = 100  # the most that it lists
AT_ONCE = 8
ROUNDS = 5  # where others change a key at the same time
SECONDS = 10.0  # for an answer
EXPIRY_SECONDS = 120  # by which an expiry may differ: it is told as a duration
LONGEST_REASON = 300


class Refused(SaasllmError):
    """The proxy refuses a change of one key."""


@dataclass(slots=True)
class Difference:
    """Between the database and the proxy: what is, or is to be, done there (`create`, `update` of the `fields`,
    `delete`), and why it could not be."""

    action: str
    token: str
    key_id: int | None
    team_id: str | None
    key_alias: str | None
    fields: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def row(self) -> Row:
        row = asdict(self)
        del row["token"]
        return row


def new_value() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def token_of(value: str) -> str:
    """By which the proxy knows it."""
    return hashlib.sha256(value.encode()).hexdigest()


def require_proxy() -> None:
    """`InvalidInput` where none is set."""
    if settings().proxy_url is None:
        raise InvalidInput("no_proxy", "No LiteLLM proxy is set.", "Set SAASLLM_PROXY_URL to its URL.")


def master_key_of(db: database.Database) -> str:
    """`InvalidInput` where it is not set, or cannot be decrypted."""
    stored = db.maybe("credential.of", organization_id=None, team_id=None, provider="litellm_proxy")
    if stored is None:
        raise InvalidInput(
            "no_proxy_master_key",
            "The master key of the proxy is not set.",
            "Run: saasllm credential set --provider litellm_proxy",
        )
    return decrypt(stored["secret"], credential_owner(stored))


def sync(
    organization_id: str | None = None,
    team_id: str | None = None,
    gone: Iterable[str] = (),
    dry_run: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Difference]:
    """Makes the proxy as the database says, and tells what differed: all keys, or those of a team or an organization,
    and those that are `gone` from it, by their tokens.

    Raises `InvalidInput` where no proxy or no master key is set, `NoAnswer` where the proxy cannot be asked. A key that
    it refuses is told as a difference, with the reason.
    """
    require_proxy()
    with database.connect() as db:
        master_key = master_key_of(db)
        installation = str(db.one("key.installation")["installation_id"])
    is_whole = organization_id is team_id is None
    with _Proxy(master_key) as proxy:
        # What is there is read first: a key that is made meanwhile is written to the database before.
        there = proxy.keys() if is_whole else {}
        with database.connect() as db:
            wanted = db.many("key.wanted", organization_id=organization_id, team_id=team_id)
        if not is_whole:
            there = proxy.some([*(row["token"] for row in wanted), *gone])
            orphans = set(gone) & there.keys()
        else:
            ours = {token for token, key in there.items() if _installation(key) == installation}
            orphans = ours - {row["token"] for row in wanted}
        differences = [_gone(there[token]) for token in sorted(orphans)]
        differences += filter(None, (_difference(there.get(row["token"]), row) for row in wanted))
        if dry_run or not differences:
            return differences
        _mend(proxy, there, differences, {row["token"]: row for row in wanted}, on_progress)
    return differences


def _mend(
    proxy: "_Proxy",
    there: dict[str, Row],
    differences: list[Difference],
    wanted: dict[str, Row],
    on_progress: Callable[[str], None],
) -> None:
    """Does what is to be done, and again what others have changed in the database meanwhile: of two that mend the same
    key at once, the last one does so by what is there then."""
    todo = differences.copy()
    for _ in range(ROUNDS):
        proxy.apply(todo, there, wanted, on_progress)
        done = [each for each in todo if each.error is None and each.action != "delete"]
        if not done:
            return
        with database.connect() as db:
            rows = db.many("key.wanted_now", key_ids=[each.key_id for each in done])
        fresh = {row["token"]: row for row in rows}
        todo = []
        for each in done:
            made = wanted[each.token]
            now = _told(made) | {"token": each.token, "metadata": made["metadata"], "expires": made["expires_at"]}
            found = _difference(now, fresh[each.token]) if each.token in fresh else _gone(now)
            if found:
                todo.append(found)
        wanted |= fresh
        differences += todo


def _difference(there: Mapping[str, Any] | None, wanted: Row) -> Difference | None:
    told = {"token": wanted["token"], "key_id": wanted["key_id"], "team_id": wanted["team_id"]}
    if there is None:
        if wanted["expires_at"] is not None:  # it was replaced, and its value is not known any more
            return None
        return Difference("create", **told, key_alias=wanted["key_alias"])
    if changes := _changes(there, wanted):
        fields = sorted("expires" if name == "duration" else name for name in changes)
        return Difference("update", **told, key_alias=wanted["key_alias"], fields=fields)
    return None


def _gone(there: Mapping[str, Any]) -> Difference:
    metadata = there.get("metadata") or {}
    key_id, team_id = metadata.get("saasllm_key_id"), metadata.get("saasllm_team_id")
    return Difference(
        "delete",
        there["token"],
        key_id if isinstance(key_id, int) else None,
        team_id if isinstance(team_id, str) else None,
        there.get("key_alias"),
    )


def _changes(there: Mapping[str, Any], wanted: Row) -> Row:
    """What of a key is otherwise at the proxy, in the form in which it takes it."""
    new = _told(wanted)
    old = {**there, "models": sorted(there.get("models") or []), "blocked": bool(there.get("blocked"))}
    changes: Row = {name: new[name] for name in FIELDS if old.get(name) != new[name]}
    metadata = there.get("metadata") or {}
    if any(metadata.get(name) != value for name, value in wanted["metadata"].items()):
        changes["metadata"] = {**metadata, **wanted["metadata"]}  # it is replaced as a whole
    expires, expires_at = there.get("expires"), wanted["expires_at"]
    expires = datetime.fromisoformat(expires) if isinstance(expires, str) else expires
    is_same = expires is expires_at is None or (
        expires is not None and expires_at is not None and abs((expires - expires_at).total_seconds()) < EXPIRY_SECONDS
    )
    if not is_same:
        left = expires_at and max(1, round((expires_at - datetime.now(UTC)).total_seconds()))
        changes["duration"] = left and f"{left}s"
    return changes


def _told(wanted: Row) -> Row:
    told = {name: wanted[name] for name in FIELDS}
    for name, convert in (
        ("max_budget", float),
        ("rpm_limit", int),
        ("tpm_limit", int),
        ("max_parallel_requests", int),
    ):
        if told[name] is not None:
            told[name] = convert(told[name])
    return told | {"models": sorted(wanted["models"]) or NO_MODELS}


def _installation(key: Mapping[str, Any]) -> Any:
    metadata = key.get("metadata")
    return metadata.get("saasllm_installation") if isinstance(metadata, dict) else None


class _Proxy:
    """Its API, as far as it is used."""

    def __init__(self, master_key: str) -> None:
        self._http = httpx.Client(
            base_url=str(settings().proxy_url),
            headers={"Authorization": f"Bearer {master_key}"},
            timeout=SECONDS,
            trust_env=False,
            limits=httpx.Limits(max_connections=AT_ONCE),
        )
        self._away: NoAnswer | None = None

    def __enter__(self) -> "_Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def keys(self) -> dict[str, Row]:
        """All that it has, by their tokens. In their order, so that one that is made meanwhile moves no other."""
        found: dict[str, Row] = {}
        page = 1
        while True:
            told = self._list(page=page, size=PAGE, sort_by="token", sort_order="asc")
            found |= {key["token"]: key for key in told}
            if len(told) < PAGE:
                return found
            page += 1

    def some(self, tokens: list[str]) -> dict[str, Row]:
        """Those of them that it has."""
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return {key["token"]: key for told in threads.map(self._named, tokens) for key in told}

    def apply(
        self,
        differences: list[Difference],
        there: Mapping[str, Row],
        wanted: Mapping[str, Row],
        on_progress: Callable[[str], None],
    ) -> None:
        """Does what is to be done; what fails is told in each. Where the proxy is away, the rest is left."""

        def do(each: Difference) -> None:
            try:
                if self._away:
                    raise self._away
                self._do(each, there.get(each.token), wanted.get(each.token))
            except SaasllmError as error:
                if isinstance(error, NoAnswer):
                    self._away = error
                each.error = error.message

        with ThreadPoolExecutor(AT_ONCE) as threads:
            for number, _ in enumerate(threads.map(do, differences), 1):
                on_progress(f"{number} of {len(differences)} keys …")

    def _do(self, difference: Difference, there: Row | None, wanted: Row | None) -> None:
        match difference.action:
            case "delete":
                self._ask("/key/delete", {"keys": [difference.token]}, or_missing=True)
            case "create":
                assert wanted is not None
                self._create(wanted)
            case _:
                assert wanted is not None
                changes = _changes(there, wanted) if there else _told(wanted)
                self._ask("/key/update", {"key": difference.token, **changes})

    def _create(self, wanted: Row) -> None:
        with database.connect() as db:
            stored = db.maybe("key.secret", key_id=wanted["key_id"])
        if stored is None:  # it was deleted or replaced meanwhile
            return
        value = decrypt(stored["secret"], credential_owner(stored))
        try:
            self._ask("/key/generate", {"key": value, **_told(wanted), "metadata": wanted["metadata"]})
        except Refused:
            # Its own alias counts as another's, where another process has just made it.
            if not (made := self._named(wanted["token"])):
                raise
            if changes := _changes(made[0], wanted):
                self._ask("/key/update", {"key": wanted["token"], **changes})

    def _named(self, token: str) -> list[Row]:
        return self._list(key_hash=token, page=1, size=PAGE)

    def _list(self, **parameters: Any) -> list[Row]:
        told = self._ask("/key/list", parameters={**parameters, "return_full_object": "true"})
        keys = told.get("keys")
        if not isinstance(keys, list) or not all(isinstance(key, dict) and key.get("token") for key in keys):
            raise _away("it lists its keys as no LiteLLM proxy does")
        return keys

    def _ask(
        self, path: str, body: Row | None = None, parameters: Row | None = None, or_missing: bool = False
    ) -> Mapping[str, Any]:
        try:
            response = self._http.request("GET" if body is None else "POST", path, json=body, params=parameters)
        except httpx.TransportError as error:
            raise _away(str(error) or type(error).__name__) from None  # its request holds the master key
        if response.status_code == 404 and or_missing:
            return {}
        try:
            told = response.json()
        except ValueError:
            told = None
        if response.is_success and isinstance(told, dict):
            return told
        reason = f"{response.status_code} {_reason(told) or response.reason_phrase}"
        if response.status_code in (401, 403):
            raise _away(reason, "Correct its master key: saasllm credential set --provider litellm_proxy")
        if 400 <= response.status_code < 500 and path != "/key/list":
            raise Refused("proxy_refused", reason)
        raise _away(reason)


def _reason(told: Any) -> str:
    """What the proxy says is wrong: its own words, which repeat no key."""
    error = told.get("error", told.get("detail")) if isinstance(told, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or "").split())[:LONGEST_REASON]


def _away(reason: str, hint: str | None = None) -> NoAnswer:
    url = settings().proxy_url
    return NoAnswer("proxy_unavailable", f"The proxy at {url} cannot be used: {reason}.".replace("..", "."), hint)
