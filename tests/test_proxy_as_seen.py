"""What a LiteLLM proxy answers, asked of the double on loopback, and of a real one where there is one."""

import secrets
from typing import Any, NamedTuple

import httpx
import pytest
from llm_proxy import ANSWER, LLMProxy, Running, token_of

MASTER = "{master}"
FULL: dict[str, Any] = {
    "models": ["fake", "other"],
    "max_budget": 10,
    "budget_duration": "1mo",
    "rpm_limit": 5,
    "tpm_limit": 1000,
    "max_parallel_requests": 2,
    "metadata": {"installation": "i", "nested": {"team": [1, None]}},
}
NONE: dict[str, Any] = {"max_budget": None, "budget_duration": None, **dict.fromkeys(("rpm_limit", "tpm_limit"))}
NONE |= {"max_parallel_requests": None}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
NEW = {"key": "{key}", "key_alias": "{alias}", "models": ["fake"]}
OURS = "GET /key/list?team_id={alias}"
LISTED = "GET /key/list?key_hash={token}&return_full_object=true"
ALIAS_TAKEN = {"error": {"type": "bad_request_error", "param": "key_alias", "code": "400"}}
NO_SUCH_KEY = {"error": {"type": "not_found_error", "param": "key", "code": "404"}}
NO_KEYS_FOUND = {"error": {"message": "{{'error': 'No keys found'}}", "code": "404"}}
BLOCKED = {"error": {"type": "auth_error", "param": "None", "code": "401"}}
NOT_IN_DATABASE = {"error": {"type": "token_not_found_in_db", "param": "key", "code": "401"}}
DENIED = {"error": {"type": "key_model_access_denied", "param": "model", "code": "403"}}
THROTTLED = {"error": {"type": "throttling_error", "code": "429"}}


class Step(NamedTuple):
    """A request and what it is answered: the fields that matter, `...` for any."""

    line: str
    body: Any = None
    status: int = 200
    answer: Any = None
    by: str | None = MASTER


def generate(status: int = 200, answer: Any = None, **further: Any) -> Step:
    return Step("POST /key/generate", NEW | further, status, answer)


def update(status: int = 200, answer: Any = None, key: str = "{token}", **changes: Any) -> Step:
    return Step("POST /key/update", {"key": key, **changes}, status, answer)


def do(verb: str, status: int = 200, answer: Any = None, key: str = "{token}") -> Step:
    return Step(f"POST /key/{verb}", {"key": key}, status, answer)


def delete(*keys: str, status: int = 200, answer: Any = None) -> Step:
    return Step("POST /key/delete", {"keys": keys}, status, answer)


def chat(status: int = 200, answer: Any = None, by: str | None = "{key}", **further: Any) -> Step:
    return Step("POST /v1/chat/completions", CHAT | further, status, answer, by)


def listed(**fields: Any) -> Step:
    return Step(LISTED, None, 200, {"keys": [fields], "total_count": 1})


GONE = Step(LISTED, None, 200, {"keys": [], "total_count": 0, "total_pages": 0})
OK = {"choices": [{"message": {"role": "assistant", "content": ANSWER}}], "usage": {"total_tokens": 30}}
SHOWN = {"token": "{token}", "key_alias": "{alias}", "spend": 0, "blocked": None, "expires": None}

CASES: dict[str, list[Step]] = {
    "a key of our own value": [
        generate(200, {"key": "{key}", "token": "{token}", "key_alias": "{alias}", "expires": None} | FULL, **FULL),
        listed(**SHOWN | FULL),
        Step("GET /key/info?key={token}", None, 200, {"info": {"key_alias": "{alias}", "status": "active"} | FULL}),
        chat(200, OK),
    ],
    "without limits": [generate(200, SHOWN | NONE, **NONE, duration=None), listed(**SHOWN | NONE)],
    "blocked and ending from the beginning": [
        generate(200, {"blocked": True, "expires": ..., "duration": None}, blocked=True, duration="86400s"),
        listed(blocked=True, expires=...),
        chat(401, BLOCKED),
    ],
    "the same key again changes nothing": [
        generate(**FULL),
        generate(400, ALIAS_TAKEN),
        generate(200, {"key_alias": "{alias}-2", "rpm_limit": 9}, key_alias="{alias}-2", rpm_limit=9),
        listed(**SHOWN | FULL),
    ],
    "another key of the same alias": [generate(), generate(400, ALIAS_TAKEN, key="{other}")],
    "an alias": [
        generate(
            200,
            {"key_alias": "{alias} a/b:c.d-e@f_..é日本" + "x" * 300},
            key_alias="{alias} a/b:c.d-e@f_..é日本" + "x" * 300,
        ),
        update(200, {"key_alias": "{alias}"}, key_alias="{alias}"),
        update(200, {"key_alias": "{alias}"}, key_alias="{alias}"),
        update(400, ALIAS_TAKEN, key_alias="a\tb"),
        update(400, ALIAS_TAKEN, key_alias="a/../b"),
        generate(key="{other}", key_alias="{alias}-other"),
        update(400, ALIAS_TAKEN, key_alias="{alias}-other"),
        listed(key_alias="{alias}"),
        update(200, {"key_alias": None}, key_alias=None),
    ],
    "what is refused": [
        generate(400, {"error": {"param": None}}, key="no-{key}"),
        generate(400, {"error": {"param": None}}, key="sk-short"),
        generate(400, {"error": {"type": "internal_server_error"}}, max_budget=-1),
        generate(400, {"error": {"type": "internal_server_error"}}, budget_duration="1y"),
        generate(500, {"error": {"message": "Invalid duration format"}}, duration="-1"),
        generate(422, {"detail": [{"loc": ["body", "rpm_limit"]}]}, rpm_limit="abc"),
        generate(422, {"detail": [{"loc": ["body", "models"]}]}, models="fake"),
        generate(422, {"detail": [{"loc": ["body", "metadata"]}]}, metadata="text"),
        GONE,
    ],
    "durations of budgets": [
        generate(max_budget=1, budget_duration="1d"),
        *(update(200, {"budget_duration": duration}, budget_duration=duration) for duration in ("7d", "30d", "1mo")),
        update(400, {"error": {"type": "auth_error"}}, budget_duration="xx"),
    ],
    "null is none, and what is not said stays": [
        generate(**FULL, blocked=False, duration="1h"),
        update(200, {"key": "{token}", "token": "{token}", "rpm_limit": 6, "tpm_limit": 1000}, rpm_limit=6),
        listed(**FULL | {"rpm_limit": 6, "blocked": False, "expires": ...}),
        update(200, NONE, **NONE),
        listed(**FULL | NONE | {"blocked": False, "expires": ...}),
        update(200, {"expires": None}, duration=None),
        update(200, {"expires": ...}, duration="1h"),
        update(200, {"expires": ...}, duration=""),
        listed(expires=...),
        update(200, {"expires": None}, duration="-1"),
        update(400, {"error": {"type": "auth_error"}}, duration="xx"),
        update(200, {"metadata": {"b": 2}}, metadata={"b": 2}),
        update(200, {"metadata": {}}, metadata={}),
        update(200, {"models": []}, models=[]),
        update(400, models=None),
        update(200, {"blocked": None}, blocked=None),
        listed(models=[], metadata={}, blocked=None, expires=None),
        update(422, {"detail": [{"loc": ["body", "rpm_limit"]}]}, rpm_limit="abc"),
        update(),
    ],
    "an update of one that is not there": [
        update(404, NO_SUCH_KEY, rpm_limit=1),
        update(404, NO_SUCH_KEY, key="{key}", rpm_limit=1),
        Step("POST /key/update", {"rpm_limit": 1}, 422),
    ],
    "an update by alias": [
        generate(),
        Step("POST /key/update", {"key_alias": "{alias}", "rpm_limit": 4}),
        listed(rpm_limit=4),
    ],
    "blocked and let in again": [
        generate(),
        do("block", 200, {"token": "{token}", "blocked": True}),
        do("block", 200, {"blocked": True}),
        listed(blocked=True),
        Step("GET /key/info?key={token}", None, 200, {"info": {"status": "revoked"}}),
        chat(401, BLOCKED),
        do("unblock", 200, {"blocked": False}),
        do("unblock", 200, {"blocked": False}),
        chat(),
        do("block", key="{key}"),
        chat(401, BLOCKED),
        update(200, {"blocked": False}, blocked=False),
        chat(),
        update(200, {"blocked": True}, blocked=True),
        chat(401, BLOCKED),
    ],
    "one to block that is not there": [
        do("block", 404, NO_SUCH_KEY),
        do("unblock", 404, NO_SUCH_KEY),
        Step("POST /key/block", {}, 422),
    ],
    "deleted": [
        generate(**FULL),
        delete("{token}", answer={"deleted_keys": ["{token}"]}),
        delete("{token}", status=404, answer=NO_KEYS_FOUND),
        GONE,
        chat(401, NOT_IN_DATABASE),
        update(404, NO_SUCH_KEY, rpm_limit=1),
        do("block", 404, NO_SUCH_KEY),
        Step("GET /key/info?key={token}", None, 200, {"info": {"status": "deleted", "key_alias": "{alias}"}}),
        generate(),
        listed(**SHOWN | NONE | {"models": ["fake"], "metadata": {}}),
    ],
    "an unknown one is deleted as well, where one is known": [
        generate(),
        delete("{token}", "{other_token}", answer={"deleted_keys": ["{token}", "{other_token}"]}),
        delete("{token}", "{other_token}", status=404, answer=NO_KEYS_FOUND),
        Step("POST /key/delete", {"keys": []}, 422),
        Step("POST /key/delete", {}, 422),
    ],
    "deleted by alias": [
        generate(),
        Step("POST /key/delete", {"key_aliases": ["{alias}"]}, 200, {"deleted_keys": ["{alias}"]}),
        Step("POST /key/delete", {"key_aliases": ["{alias}"]}, 404, NO_KEYS_FOUND),
        GONE,
    ],
    "expired": [
        generate(duration="0s"),
        chat(401, {"error": {"type": "expired_key", "code": "401"}}),
        listed(key_alias="{alias}", expires=...),
        Step("GET /key/info?key={token}", None, 200, {"info": {"status": "expired"}}),
        generate(400, ALIAS_TAKEN, key="{other}"),
        generate(200, key_alias="{alias}-2", duration="1h"),
        chat(401, {"error": {"type": "expired_key"}}),
        do("block"),
        do("unblock"),
        update(200, {"expires": None}, duration=None),
        chat(),
        update(duration="0s"),
        chat(401, {"error": {"type": "expired_key"}}),
    ],
    "unknown to info": [
        Step("GET /key/info?key={token}", None, 404, NO_SUCH_KEY),
        Step("GET /key/info", None, 404, NO_SUCH_KEY),
    ],
    "pages": [
        generate(team_id="{alias}"),
        generate(team_id="{alias}", key="{other}", key_alias="{alias}-other"),
        Step(f"{OURS}&size=1", None, 200, {"keys": ["{other_token}"], "current_page": 1, "total_pages": 2}),
        Step(f"{OURS}&size=1&page=2", None, 200, {"keys": ["{token}"], "current_page": 2}),
        Step(f"{OURS}&sort_by=key_alias&sort_order=asc", None, 200, {"keys": ["{token}", "{other_token}"]}),
        Step("GET /key/list?page=9999&size=100", None, 200, {"keys": [], "current_page": 9999}),
        Step("GET /key/list?key_alias={alias}", None, 200, {"keys": ["{token}"], "total_pages": 1}),
        Step("GET /key/list?sort_by=token&sort_order=asc", None, 200, {"keys": ...}),
        Step("GET /key/list?sort_by=zzz", None, 400),
        Step("GET /key/list?size=101", None, 422, {"detail": [{"type": "less_than_equal", "loc": ["query", "size"]}]}),
        Step("GET /key/list?page=0", None, 422, {"detail": [{"loc": ["query", "page"]}]}),
        Step("GET /key/list?page=abc", None, 422, {"detail": [{"type": "int_parsing"}]}),
    ],
    "who asks": [
        generate(),
        *(
            Step(line, {} if "POST" in line else None, 401, answer, by)
            for line in ("GET /key/list", "POST /key/generate", "POST /key/delete", "GET /key/info?key={token}")
            for by, answer in (
                ("{other}", NOT_IN_DATABASE),
                ("wrong", {"error": {"type": "auth_error", "param": "None"}}),
                (None, {"error": {"message": "Authentication Error, No api key passed in.", "type": "auth_error"}}),
            )
        ),
        *(
            Step(f"POST /key/{verb}", {"key": "{token}"}, 401, {"error": {"type": "auth_error"}}, "{key}")
            for verb in ("generate", "update", "block", "unblock", "delete")
        ),
        Step("GET /key/list", None, 403, {"error": {"param": "user_id"}}, "{key}"),
        Step("GET /key/info", None, 200, {"info": {"key_alias": "{alias}"}}, "{key}"),
        Step("POST /key/block", b"{bad", 422, {"detail": [{"type": "json_invalid"}]}),
        Step("POST /key/block", b"[]", 500),
        Step("POST /key/nothing", {}, 404, {"detail": "Not Found"}),
        Step("GET /health/readiness", None, 200, {"status": "healthy", "db": "connected"}, None),
    ],
    "calls": [
        generate(),
        chat(200, OK),
        Step("POST /chat/completions", CHAT, 200, OK, "{key}"),
        chat(200, OK, by=MASTER),
        chat(403, DENIED, model="other"),
        chat(401, NOT_IN_DATABASE, by="{other}"),
        chat(401, {"error": {"type": "auth_error"}}, by=None),
        chat(400, {"error": {"type": "invalid_request_error"}}, by=MASTER, model="other"),
        update(models=["no-default-models"]),
        chat(403, DENIED),
        update(models=["fake", "other"]),
        chat(400, {"error": {"type": "invalid_request_error"}}, model="other"),
        update(models=[]),
        chat(200, OK),
        Step("POST /v1/chat/completions", {"model": "fake"}, 400, {"error": {"param": "messages"}}, "{key}"),
    ],
    "limits of calls": [
        generate(rpm_limit=1),
        chat(),
        chat(429, THROTTLED),
        update(rpm_limit=None),
        chat(),
        update(rpm_limit=0),
        chat(429, THROTTLED),
        update(rpm_limit=None, tpm_limit=1),
        chat(429, THROTTLED),
        update(tpm_limit=None, max_parallel_requests=0),
        chat(429, THROTTLED),
        update(max_parallel_requests=None, max_budget=0),
        chat(422, {"error": {"type": "budget_exceeded", "code": "422"}}),
        update(max_budget=1, spend=5),
        chat(422, {"error": {"type": "budget_exceeded"}}),
        update(max_budget=6),
        chat(),
    ],
}


@pytest.fixture(params=["llm_proxy", "real_llm_proxy"], ids=["double", "real"])
def proxy(request: pytest.FixtureRequest) -> LLMProxy | Running:
    running: LLMProxy | Running = request.getfixturevalue(request.param)
    return running


@pytest.mark.parametrize("case", CASES)
def test_a_proxy_answers_as_seen(case: str, proxy: LLMProxy | Running) -> None:
    words = {name: f"sk-{secrets.token_urlsafe(24)}" for name in ("key", "other")}
    words |= {"token": token_of(words["key"]), "other_token": token_of(words["other"])}
    words |= {"alias": f"seen-{secrets.token_hex(6)}", "master": proxy.master_key}
    alone = httpx.Limits(max_keepalive_connections=0)  # a connection is cut after some of the mistakes
    with httpx.Client(base_url=proxy.url, timeout=60, limits=alone) as client:
        try:
            for number, step in enumerate(CASES[case]):
                answer = send(client, said(step, words))
                assert answer.status_code == step.status, (number, step, answer.text)
                difference = lacking(said(step.answer, words), answer.json())
                assert not difference, (number, step.line, difference)
        finally:
            keys = [words["token"], words["other_token"]]
            client.post("/key/delete", json={"keys": keys}, headers={"Authorization": f"Bearer {proxy.master_key}"})


def send(client: httpx.Client, step: Step) -> httpx.Response:
    method, path = step.line.split(" ", 1)
    headers = {"Authorization": f"Bearer {step.by}"} if step.by else {}
    if isinstance(step.body, bytes):
        headers["Content-Type"] = "application/json"
        return client.request(method, path, content=step.body, headers=headers)
    return client.request(method, path, json=step.body, headers=headers)


def said(value: Any, words: dict[str, str]) -> Any:
    """With the keys and names of this test."""
    match value:
        case str():
            return value.format_map(words)
        case dict():
            return {name: said(part, words) for name, part in value.items()}
        case Step():
            return Step(*(said(part, words) for part in value))
        case list() | tuple():
            return [said(part, words) for part in value]
    return value


def lacking(wanted: Any, got: Any, place: str = "answer") -> str:
    """Where `got` has not what is wanted; it may have more."""
    if wanted is ... and got is not None:
        return ""
    if isinstance(wanted, dict) and wanted and isinstance(got, dict):
        parts = (lacking(part, got.get(name), f"{place}.{name}") for name, part in wanted.items())
        return next((part for part in parts if part), "")
    if isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        parts = (lacking(*pair, f"{place}[]") for pair in zip(wanted, got, strict=True))
        return next((part for part in parts if part), "")
    return "" if wanted == got or (wanted is None and place == "answer") else f"{place}: {got!r}, not {wanted!r}"


def test_the_double_fails_on_demand(llm_proxy: LLMProxy) -> None:
    master = {"Authorization": f"Bearer {llm_proxy.master_key}"}

    def make(alias: str) -> int:
        with httpx.Client(timeout=0.3) as client:
            return client.post(f"{llm_proxy.url}/key/generate", json={"key_alias": alias}, headers=master).status_code

    llm_proxy.fail("status-503", "/key/generate", times=1)
    assert [make("a"), make("a")] == [503, 200]
    llm_proxy.fail("cut", times=1)
    llm_proxy.fail("lost", times=1)
    llm_proxy.fail("slow-0.01", times=1)
    llm_proxy.fail("status-500", "/v1")
    with pytest.raises(httpx.RemoteProtocolError):
        make("b")
    with pytest.raises(httpx.RemoteProtocolError):
        make("c")
    assert make("d") == 200
    llm_proxy.fail("hang", times=1)
    with pytest.raises(httpx.ReadTimeout):
        make("e")
    assert {row["key_alias"] for row in llm_proxy.keys.values()} == {"a", "c", "d"}
    assert [request.body["key_alias"] for request in llm_proxy.requests] == ["a", "a", "b", "c", "d", "e"]
    assert {request.authorization for request in llm_proxy.requests} == {master["Authorization"]}


def test_the_double_is_away_and_comes_back_with_its_keys(llm_proxy: LLMProxy) -> None:
    headers = {"Authorization": f"Bearer {llm_proxy.master_key}"}
    with httpx.Client(base_url=llm_proxy.url, headers=headers, timeout=5) as client:
        key = client.post("/key/generate", json={"models": ["fake"]}).json()["key"]
        llm_proxy.stop()
        with pytest.raises(httpx.TransportError):
            client.get("/key/list")
        llm_proxy.start()
        assert client.get("/key/list").json()["keys"] == [token_of(key)]
        answer = client.post("/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {key}"})
        assert answer.json()["usage"]["total_tokens"] == 30
    assert llm_proxy.asked("/chat")[0].messages == CHAT["messages"]
    assert llm_proxy.asked("/chat")[0].authorization == f"Bearer {key}"
