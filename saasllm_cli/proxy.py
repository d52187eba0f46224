"""Virtual keys at a LiteLLM proxy: made there as the database says.

The database comes first: a key's value is made here, written encrypted, and then made at the proxy, so that whatever is
interrupted is mended by another run. The proxy knows a key by its token, the SHA-256 of its value; a key of this
database by its metadata. What is gone from the database is removed there.

What the proxy's API answers was seen at LiteLLM 1.108: null takes a limit away, what is not sent stays.
"""

import hashlib
import json
import re
import secrets
import time
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
from saasllm_cli.rules import KEY_PREFIX
from saasllm_cli.settings import settings

NO_MODELS = ["no-default-models"]  # an empty list would stand for all
FIELDS = (
    *("key_alias", "models", "max_budget", "budget_duration", "rpm_limit", "tpm_limit", "max_parallel_requests"),
    "blocked",
)
PAGE = 100  # the most that it lists
AT_ONCE = 8
ROUNDS = 5  # where others change a key at the same time
SECONDS = 10.0  # for an answer
CHANGE_SECONDS, SYNC_SECONDS = 30.0, 60.0  # in which it is told what it can be; the rest is left to the next sync
LARGEST_ANSWER = 100_000_000  # bytes
EXPIRY_SECONDS = 120  # by which an expiry may differ: it is told as a duration
LONGEST_REASON = 300
NOT_OURS = "is not marked as one of this database, so it is left there"
NO_LIST = "it lists its keys as no LiteLLM proxy does"


class Refused(SaasllmError):
    """The proxy refuses a change of one key."""


class Missing(Refused):
    """It does not have the key."""


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
    return KEY_PREFIX + secrets.token_urlsafe(32)


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

    def wanted() -> dict[str, Row]:
        with database.connect() as db:
            rows = db.many("key.wanted", organization_id=organization_id, team_id=team_id)
        return {row["token"]: row for row in rows}

    is_whole = organization_id is team_id is None
    seconds = SYNC_SECONDS if is_whole else CHANGE_SECONDS
    with _Proxy(master_key, installation, seconds) as proxy:
        tokens = _suspects(proxy.keys(), wanted(), installation) if is_whole else {*wanted(), *gone}
        if not tokens:
            return []
        # Much may have been changed while pages were read, and one that is removed moves another to a page before:
        # those that seem to differ are asked for again.
        there = proxy.some(tokens)
        rows = {token: row for token, row in wanted().items() if token in tokens}
        differences = [_gone(there[token]) for token in sorted(there.keys() - rows.keys())]
        differences += filter(None, (_difference(there.get(token), row) for token, row in rows.items()))
        if dry_run or not differences:
            return differences
        _mend(proxy, there, differences, rows, on_progress)
    return differences


def _suspects(there: dict[str, Row], wanted: dict[str, Row], installation: str) -> set[str]:
    """Those of ours that are not as they are wanted. What is there is read first: a key that is made meanwhile is
    written to the database before."""
    ours = {token for token, key in there.items() if _is_of(key, installation)}
    return (ours - wanted.keys()) | {token for token, row in wanted.items() if _difference(there.get(token), row)}


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
            there[each.token] = now
            found = _difference(now, fresh[each.token]) if each.token in fresh else _gone(now)
            if found:
                todo.append(found)
        wanted |= fresh
        differences += todo


def _difference(there: Mapping[str, Any] | None, wanted: Row) -> Difference | None:
    told = {"token": wanted["token"], "key_id": wanted["key_id"], "team_id": wanted["team_id"]}
    if there is None:
        return Difference("create", **told, key_alias=wanted["key_alias"])
    if changes := _changes(there, wanted):
        fields = sorted("expires" if name == "duration" else name for name in changes)
        return Difference("update", **told, key_alias=wanted["key_alias"], fields=fields)
    return None


def _is_of(key: Mapping[str, Any], installation: str) -> bool:
    return bool(key["metadata"].get("saasllm_installation") == installation)


def _gone(there: Mapping[str, Any]) -> Difference:
    metadata = there["metadata"]
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
    changes: Row = {name: new[name] for name in FIELDS if there.get(name) != new[name]}
    metadata = there["metadata"]
    if any(metadata.get(name) != value for name, value in wanted["metadata"].items()):
        changes["metadata"] = {**metadata, **wanted["metadata"]}  # it is replaced as a whole
    expires, expires_at = there["expires"], wanted["expires_at"]
    is_same = expires is expires_at is None or (
        expires is not None and expires_at is not None and abs((expires - expires_at).total_seconds()) < EXPIRY_SECONDS
    )
    if not is_same:
        changes["duration"] = _duration(expires_at)
    return changes


def _duration(expires_at: datetime | None) -> str | None:
    """Until then."""
    return f"{max(1, round((expires_at - datetime.now(UTC)).total_seconds()))}s" if expires_at else None


def _told(wanted: Row) -> Row:
    told = {name: wanted[name] for name in FIELDS}
    for name in ("max_budget", "rpm_limit", "tpm_limit", "max_parallel_requests"):
        if told[name] is not None:
            told[name] = float(told[name]) if name == "max_budget" else int(told[name])
    return told | {"models": sorted(wanted["models"]) or NO_MODELS}


def _read(key: Any) -> Row:
    """A key as the proxy lists it, so that it can be compared; `ValueError` and its like where it is none."""
    models, metadata, expires = key.get("models") or [], key.get("metadata") or {}, key.get("expires")
    if not isinstance(key["token"], str) or not isinstance(metadata, dict):
        raise ValueError
    expires = expires and datetime.fromisoformat(expires)
    read = {"metadata": metadata, "expires": expires and (expires if expires.tzinfo else expires.replace(tzinfo=UTC))}
    return {**key, **read, "models": sorted(map(str, models)), "blocked": bool(key.get("blocked"))}


class _Proxy:
    """Its API, as far as it is used."""

    def __init__(self, master_key: str, installation: str, seconds: float) -> None:
        self._master_key = master_key
        self._installation = installation
        self._until = time.monotonic() + seconds
        try:
            self._http = httpx.Client(
                base_url=str(settings().proxy_url),
                headers={"Authorization": f"Bearer {master_key}"},
                timeout=SECONDS,
                verify=httpx.create_ssl_context(),  # also by SSL_CERT_FILE, for an authority of one's own
                trust_env=False,
                limits=httpx.Limits(max_connections=AT_ONCE),
            )
        except httpx.InvalidURL as error:
            raise InvalidInput(
                "invalid_setting", f"Setting SAASLLM_PROXY_URL is invalid: {error}.", "Correct it."
            ) from None
        self._failures = 0
        self._away: NoAnswer | None = None  # why nothing more is asked

    def __enter__(self) -> "_Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def keys(self) -> dict[str, Row]:
        """All that it has, by their tokens. In their order, so that one that is made meanwhile moves no other."""
        found: dict[str, Row] = {}
        page, last = 1, ""
        while True:
            told = self._list(page=page, size=PAGE, sort_by="token", sort_order="asc")
            tokens = [key["token"] for key in told]
            found |= zip(tokens, told, strict=True)
            if len(told) < PAGE:
                return found
            if tokens[-1] <= last:  # it would go on forever
                raise _away(NO_LIST)
            page, last = page + 1, tokens[-1]

    def some(self, tokens: Iterable[str]) -> dict[str, Row]:
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
        """Does what is to be done; what fails is told in each."""

        def do(each: Difference) -> None:
            try:
                self._do(each, there.get(each.token), wanted.get(each.token))
            except SaasllmError as error:
                each.error = error.message

        with ThreadPoolExecutor(AT_ONCE) as threads:
            for number, _ in enumerate(threads.map(do, differences), 1):
                on_progress(f"{number} of {len(differences)} keys …")

    def _do(self, difference: Difference, there: Row | None, wanted: Row | None) -> None:
        match difference.action:
            case "delete":
                if there and not _is_of(there, self._installation):
                    raise Refused("not_ours", f"its key {there.get('key_alias')} {NOT_OURS}")
                self._ask("/key/delete", {"keys": [difference.token]}, or_missing=True)
            case "create":
                assert wanted is not None
                self._create(wanted)
            case _:
                assert wanted is not None
                if there and not _is_of(there, self._installation):
                    self._value(wanted)
                changes = _changes(there, wanted) if there else _told(wanted)
                try:
                    self._ask("/key/update", {"key": difference.token, **changes})
                except Missing:  # it was removed meanwhile, here too or only there
                    self._create(wanted)

    def _create(self, wanted: Row) -> None:
        value = self._value(wanted)
        if value is None:  # it was deleted meanwhile
            return
        try:
            body = {"key": value, **_told(wanted), "metadata": wanted["metadata"]}
            self._ask("/key/generate", body | {"duration": _duration(wanted["expires_at"])})
        except Refused:
            # Its own alias counts as another's, where another process has just made it.
            if not (made := self._named(wanted["token"])):
                raise
            if changes := _changes(made[0], wanted):
                self._ask("/key/update", {"key": wanted["token"], **changes})

    def _value(self, wanted: Row) -> str | None:
        """The value of a key, which proves that it is ours: whoever can write to the database can name any token there,
        or any value that is stored."""
        with database.connect() as db:
            stored = db.maybe("key.secret", key_id=wanted["key_id"])
        if stored is None:
            return None
        value = decrypt(stored["secret"], credential_owner(stored))
        if token_of(value) != wanted["token"]:
            raise Refused("not_ours", f"the token of {wanted['key_alias']} in the database is not that of its value")
        return value

    def _named(self, token: str) -> list[Row]:
        told = self._list(key_hash=token, page=1, size=PAGE)
        if any(key["token"] != token for key in told):
            raise _away(NO_LIST)
        return told

    def _list(self, **parameters: Any) -> list[Row]:
        told = self._ask("/key/list", parameters={**parameters, "return_full_object": "true"})
        try:
            return [_read(key) for key in told["keys"]]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _away(NO_LIST) from None

    def _ask(
        self, path: str, body: Row | None = None, parameters: Row | None = None, or_missing: bool = False
    ) -> Mapping[str, Any]:
        if self._away is None and time.monotonic() > self._until:
            self._away = _away("it takes too long")
        if self._away:
            raise self._away
        try:
            response, content = self._sent(path, body, parameters)
        except (httpx.RequestError, UnicodeError) as error:  # the second where the name can be none of a host
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
            self._away = _away(self._masked(reason, body))
            raise self._away from None  # its request holds the master key
        try:
            told = json.loads(content)
        except (ValueError, RecursionError):
            told = None
        status = response.status_code
        if response.is_success and isinstance(told, dict):
            return told
        if status == 404 and or_missing:
            return {}
        reason = f"{status} {self._masked(_reason(told), body) or response.reason_phrase}".strip()
        if status in (401, 403):
            self._away = _away(reason, "Correct its master key: saasllm credential set --provider litellm_proxy")
            raise self._away
        if 400 <= status < 500 and path != "/key/list":
            raise (Missing if status == 404 else Refused)("proxy_refused", reason)
        away = _away("it does not answer as a LiteLLM proxy does" if response.is_success else reason)
        self._failures += 1
        if self._failures >= AT_ONCE:  # it is not about one key
            self._away = away
        raise away

    def _sent(self, path: str, body: Row | None, parameters: Row | None) -> tuple[httpx.Response, bytes]:
        """What it answers, in bounded time and size."""
        until = time.monotonic() + SECONDS
        content = bytearray()
        method = "GET" if body is None else "POST"
        with self._http.stream(method, path, json=body, params=parameters) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST_ANSWER or time.monotonic() > until:
                    raise httpx.ReadTimeout("its answer does not end")
        return response, bytes(content)

    def _masked(self, text: str, body: Row | None) -> str:
        """Without what it was sent, and cut."""
        for secret in (self._master_key, (body or {}).get("key")):
            text = text.replace(secret, "***") if secret else text
        return text[:LONGEST_REASON]


def _reason(told: Any) -> str:
    """What the proxy says is wrong, in its own words."""
    error = told.get("error", told.get("detail")) if isinstance(told, dict) else None
    text = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(text or "").split())


def _away(reason: str, hint: str | None = None) -> NoAnswer:
    url = settings().proxy_url
    return NoAnswer("proxy_unavailable", f"The proxy at {url} cannot be used: {reason}.".replace("..", "."), hint)
