from collections.abc import Callable

import pytest
from conftest import Result

Run = Callable[..., Result]
FIELDS = ["organization_id", "name", "status", "own_keys_only", "metadata", "created_at", "updated_at"]


def test_create_shows_the_organization(saasllm: Run) -> None:
    result = saasllm("org", "create", "acme", "--name", "ACME", "--metadata", "plan=pro", "-o", "json")
    assert result.status == 0
    assert list(result.data) == FIELDS
    assert (result.data["name"], result.data["status"], result.data["metadata"]) == ("ACME", "active", {"plan": "pro"})
    assert saasllm("org", "get", "acme", "-o", "json").data == result.data


def test_name_is_the_id_by_default(saasllm: Run) -> None:
    assert saasllm("org", "create", "acme", "-o", "json").data["name"] == "acme"


def test_metadata_of_options_and_object_is_merged(saasllm: Run) -> None:
    result = saasllm("org", "create", "a", "--metadata", "k=v=w", "--metadata", '{"n": {"m": [1, null]}}', "-o", "json")
    assert result.data["metadata"] == {"k": "v=w", "n": {"m": [1, None]}}


def test_numbers_in_metadata_stay_exact(saasllm: Run) -> None:
    text = '{"a": 12345678901234567890.5, "b": 0.10}'
    result = saasllm("org", "create", "acme", "--metadata", text, "-o", "jsonl")
    assert f'"metadata": {text}' in result.out
    assert saasllm("org", "create", "acme", "--metadata", text, "--if-not-exists").status == 0


def test_create_twice_is_a_conflict(saasllm: Run) -> None:
    saasllm("org", "create", "acme")
    result = saasllm("org", "create", "acme", "-o", "json")
    assert (result.status, result.out, result.error["code"]) == (4, "", "organization_exists")


def test_if_not_exists_compares_only_what_is_given(saasllm: Run) -> None:
    first = saasllm("org", "create", "acme", "--name", "ACME", "--metadata", "a=b", "-o", "json")
    again = saasllm("org", "create", "acme", "--if-not-exists", "-o", "json")
    assert (again.status, again.data) == (0, first.data)
    same = saasllm("org", "create", "acme", "--name", "ACME", "--metadata", "a=b", "--if-not-exists")
    assert same.status == 0
    other = saasllm("org", "create", "acme", "--name", "Other", "--if-not-exists", "-o", "json")
    assert (other.status, other.error["code"]) == (4, "organization_differs")
    assert "name" in other.error["message"]


def test_list_is_sorted_filtered_and_bounded(saasllm: Run) -> None:
    for name in ("b", "a", "c"):
        saasllm("org", "create", name)
    short = saasllm("org", "list", "--limit", 2, "-o", "json")
    assert [organization["organization_id"] for organization in short.data] == ["a", "b"]
    assert short.err == "Showing the first 2; use --after for the next ones, or --limit for more.\n"
    rest = saasllm("org", "list", "--limit", 2, "--after", "b", "-o", "json")
    assert ([organization["organization_id"] for organization in rest.data], rest.err) == (["c"], "")
    assert saasllm("org", "list", "--limit", 3).err == ""
    assert saasllm("org", "list", "--status", "suspended", "-o", "json").data == []


def test_unknown_organization(saasllm: Run) -> None:
    result = saasllm("org", "get", "nobody", "-o", "json")
    assert (result.status, result.error["code"]) == (3, "organization_not_found")
    assert "nobody" in result.error["message"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a b"], "ORG"),
        ([""], "ORG"),
        (["-x"], "-x"),
        (["_a"], "ORG"),
        (["ä"], "ORG"),
        (["a" * 129], "ORG"),
        (["a\n"], "ORG"),
        (["a", "--name", ""], "--name"),
        (["a", "--name", "x\x1b[31m"], "--name"),
        (["a", "--metadata", "novalue"], "--metadata"),
        (["a", "--metadata", "=v"], "--metadata"),
        (["a", "--metadata", "{"], "--metadata"),
        (["a", "--metadata", '{"a": NaN}'], "--metadata"),
        (["a", "--metadata", '{"a": "\\u0000"}'], "metadata"),
        (["a", "--metadata", '{"a": "\\ud800"}'], "metadata"),
        (["a", "--metadata", '{"a": 1, "a": 2}'], "--metadata"),
        (["a", "--metadata", '{"a": ' + "[" * 40 + "]" * 40 + "}"], "--metadata"),
        (["a", "--metadata", "[1]"], "--metadata"),
        (["a", "--metadata", "k=1", "--metadata", "k=2"], "--metadata"),
        (["a", "--metadata", "k=" + "x" * 70_000], "metadata"),
        (["a", "--metadata", "k=\udcff"], "metadata"),
        ([], "ORG"),
        (["a", "-o", "xml"], "--output"),
    ],
)
def test_bad_input_is_one_error_that_names_the_field(saasllm: Run, arguments: list[str], named: str) -> None:
    result = saasllm("org", "create", *arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("Error: ")
    assert named in result.err
    assert saasllm("org", "list", "-o", "json").data == []


def test_update_merges(saasllm: Run) -> None:
    saasllm("org", "create", "acme", "--metadata", "a=1", "--metadata", "b=2")
    changed = saasllm(
        "org", "update", "acme", "--name", "New", "--metadata", "b=3", "--unset-metadata", "a", "-o", "json"
    )
    assert (changed.data["name"], changed.data["metadata"]) == ("New", {"b": "3"})
    same = saasllm("org", "update", "acme", "--name", "New", "-o", "json").data
    assert (same["name"], same["metadata"]) == ("New", {"b": "3"})
    assert same["updated_at"] > changed.data["created_at"]
    assert saasllm("org", "update", "nobody", "--name", "x").status == 3
    assert saasllm("org", "update", "acme").status == 2


def test_suspended_its_teams_begin_no_jobs(tenant: Run) -> None:
    job = ("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json")
    assert tenant("org", "suspend", "acme", "-o", "json").data["status"] == "suspended"
    assert tenant("org", "suspend", "acme").status == 0
    assert tenant(*job).error["code"] == "organization_suspended"
    assert tenant("org", "resume", "acme", "-o", "json").data["status"] == "active"
    assert tenant(*job).status == 0
    assert tenant("org", "suspend", "nobody").status == 3


def test_delete_only_without_teams_and_only_when_meant(tenant: Run) -> None:
    tenant("org", "create", "empty")
    unasked = tenant("org", "delete", "empty", "-o", "json")
    assert unasked.status == 2, "delete prints no data"
    assert "--yes" in tenant("org", "delete", "empty").err
    assert tenant("org", "get", "empty").status == 0
    assert tenant("org", "delete", "empty", "--yes").status == 0
    assert tenant("org", "get", "empty").status == 3
    assert tenant("org", "delete", "empty", "--yes").status == 3
    gone = tenant("org", "delete", "empty", "--if-exists")
    assert gone == (0, "", "Organization empty not found. Nothing was deleted.\n")
    used = tenant("org", "delete", "acme", "--yes")
    assert used.status == 4
    assert "1 team" in used.err
