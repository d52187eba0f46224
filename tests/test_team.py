import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from conftest import Result

from saasllm_cli import database
from saasllm_cli.commands import team
from saasllm_cli.jobs import runner
from saasllm_cli.jobs.calls import CallRequest

Run = Callable[..., Result]
FIELDS = [
    *("team_id", "organization_id", "team_alias", "status", "organization_status", "model_groups"),
    *("credits_allocated", "credits_used", "credits_reserved", "credits_remaining", "credits_overdraft"),
    *("low_credits", "metadata", "created_at", "updated_at", "schedule", "prices"),
]


def test_create_with_groups_and_opening_credits(tenant: Run) -> None:
    shown = tenant("team", "get", "hr", "-o", "json")
    assert list(shown.data) == FIELDS
    assert shown.data["model_groups"] == ["Down", "Echo"]
    assert (shown.data["credits_allocated"], shown.data["credits_remaining"]) == (10, 10)
    (entry,) = tenant("credits", "transactions", "hr", "-o", "json").data
    assert (entry["transaction_type"], entry["credits_before"], entry["credits_after"]) == ("allocation", 0, 10)


def test_create_without_credits_has_an_empty_ledger(tenant: Run) -> None:
    assert tenant("team", "create", "it", "--org", "acme", "-o", "json").data["credits_remaining"] == 0
    assert tenant("credits", "transactions", "it", "-o", "json").data == []


def test_what_is_missing_is_named_and_nothing_is_made(tenant: Run) -> None:
    organization = tenant("team", "create", "it", "--org", "nobody", "-o", "json")
    assert (organization.status, organization.error["code"]) == (3, "organization_not_found")
    groups = tenant("team", "create", "it", "--org", "acme", "--group", "No", "--group", "Echo", "-o", "json")
    assert (groups.status, groups.error["code"]) == (3, "group_not_found")
    assert "No" in groups.error["message"]
    assert "Echo" not in groups.error["message"]
    assert tenant("team", "get", "it").status == 3


def test_if_not_exists_compares_groups_and_opening_credits(tenant: Run) -> None:
    same = ("team", "create", "hr", "--org", "acme", "--if-not-exists", "-o", "json")
    tenant("credits", "add", "hr", 5)
    assert tenant(*same, "--credits", 10, "--group", "Down", "--group", "Echo").data["credits_remaining"] == 15
    assert tenant(*same, "--credits", 15).error["code"] == "team_differs"
    assert tenant(*same, "--group", "Echo").error["code"] == "team_differs"
    assert tenant("team", "create", "hr", "--org", "acme").status == 4
    assert len(tenant("credits", "transactions", "hr", "-o", "json").data) == 2


def test_opening_credits_that_end(tenant: Run) -> None:
    create = ("team", "create", "it", "--org", "acme", "-o", "json")
    terms = ("--category", "promotional", "--priority", 0)
    refused = [
        tenant(*create, *options)
        for options in (terms[:2], terms[2:], ("--expires", "90d"), (*terms, "--credits", 0))  # of which credits?
    ]
    assert {result.status for result in refused} == {2}
    assert "require --credits" in refused[0].err
    past = tenant(*create, "--credits", 5, "--expires", "2026-01-01")
    assert (past.status, past.error["message"]) == (2, "--expires 2026-01-01T00:00:00Z is in the past.")
    for number in (-1, 101, "x"):
        assert tenant(*create, "--credits", 5, "--priority", number).status == 2
    assert tenant(*create, "--credits", 5, "--category", "included").status == 2  # that is what a schedule grants
    assert tenant("team", "get", "it").status == 3
    assert tenant("team", "create", "it", "--org", "no", "--credits", 5, "--expires", "2026-01-01").status == 3

    assert tenant(*create, "--credits", 5, *terms, "--expires", "90d").data["credits_remaining"] == 5
    (grant,) = tenant("credits", "grants", "it", "-o", "json").data
    assert [grant[field] for field in ("category", "priority", "credits_left")] == ["promotional", 0, 5]
    created, expires = (datetime.fromisoformat(grant[field]) for field in ("created_at", "expires_at"))
    assert abs(expires - created - timedelta(days=90)) < timedelta(seconds=1)

    same = (*create, "--if-not-exists", "--credits", 5)
    at = (expires + timedelta(seconds=30)).isoformat()
    for options in ((), terms, ("--expires", "90d"), ("--expires", at), (*terms, "--expires", grant["expires_at"])):
        assert tenant(*same, *options).status == 0, options
    for options, field in (
        (("--category", "paid"), "category"),
        (("--priority", 50), "priority"),
        (("--expires", "91d"), "expires_at"),
        (("--expires", "2026-01-01"), "expires_at"),
    ):
        differs = tenant(*same, *options)
        assert (differs.status, differs.error["code"]) == (4, "team_differs")
        assert differs.error["message"].endswith(f"values for: {field}.")
    opened = (*create[:2], "hr", *create[3:], "--if-not-exists", "--credits", 10)  # with what does not expire
    assert [tenant(*opened, *terms[:1], "paid").status, tenant(*opened, "--expires", "90d").status] == [0, 4]
    tenant("team", "create", "empty", "--org", "acme")
    assert "credits, expires_at" in tenant(*create[:2], "empty", *same[3:], "--expires", "90d").error["message"]


def test_a_team_that_is_there_may_have_had_credits_that_have_expired(tenant: Run) -> None:
    """A script that is run again does not fail because a time has passed."""
    soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    create = ("team", "create", "it", "--org", "acme", "--credits", 5, "--expires", soon, "-o", "json")
    assert tenant(*create).status == 0
    time.sleep(1.1)
    assert tenant(*create, "--if-not-exists").data["credits_remaining"] == 0
    assert tenant(*create).error["code"] == "team_exists"


def test_overdraft(tenant: Run) -> None:
    """What a team may use beyond what it has; less than it uses is refused with how much it lacks."""
    assert tenant("team", "update", "hr", "--overdraft", 5, "-o", "json").data["credits_overdraft"] == 5
    check = ("credits", "check", "hr", "-o", "json", "--need")
    assert [tenant(*check, need).status for need in (15, 16)] == [0, 5]
    assert "15 free credits, its overdraft included" in tenant(*check, 16).err
    tenant("price", "set", "--job-type", "dear", "--credits", 16)
    refused = tenant("job", "run", "--team", "hr", "--group", "Echo", "--job-type", "dear", "--prompt", "x")
    assert "hr has 15 free credits, its overdraft included, and the job needs 16: 10 remaining" in refused.err
    tenant("credits", "adjust", "hr", -13, "--reason", "x")
    job_run = ("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x")
    assert [tenant(*job_run).status for _ in range(3)] == [0, 0, 5]
    below = [row["team_id"] for row in tenant("credits", "check", "--below", 1, "-o", "json").data]
    assert below == ["hr"]
    lower = tenant("team", "update", "hr", "--overdraft", "02", "--alias", "x", "-o", "json")
    assert (lower.status, lower.error["code"]) == (4, "overdraft_in_use")
    assert lower.error["message"] == "Team hr uses 5 of its overdraft: 3 more than 2."
    assert lower.error["hint"] == "Run: saasllm credits add hr 3"
    tenant("credits", "add", "hr", 3)
    tenant("job", "create", "--team", "hr")
    assert (
        "uses 3 of its overdraft (its running jobs reserve 1): 1 more than 2."
        in tenant(*("team", "update", "hr", "--overdraft", 2)).err
    )
    unlimited = tenant("team", "update", "hr", "--overdraft", "unlimited", "-o", "json").data
    assert (unlimited["credits_overdraft"], unlimited["team_alias"]) == (None, "hr")
    assert tenant(*check, 10**15).status == 0
    assert tenant("credits", "check", "--below", 10, "-o", "json").data == []
    assert "unlimited" in tenant("team", "get", "hr").out
    assert "unlimited" in tenant("credits", "balance", "hr").out
    assert tenant(*job_run).status == 0
    assert tenant("team", "update", "hr", "--overdraft", "x").status == 2
    assert tenant("team", "update", "no", "--overdraft", "1").status == 3
    records = tenant("audit", "list", "-o", "json").data
    changed = [row["after"] for row in records if "credits_overdraft" in (row["after"] or ())]
    assert changed == [{"credits_overdraft": None}, {"credits_overdraft": 5}]
    assert tenant("credits", "verify").status == 0


def test_overdraft_of_a_new_team(tenant: Run) -> None:
    create = ("team", "create", "it", "--org", "acme", "-o", "json")
    assert tenant(*create, "--overdraft", 7).data["credits_overdraft"] == 7
    same = (*create, "--if-not-exists", "--overdraft")
    assert [tenant(*same, overdraft).status for overdraft in (7, 8, "unlimited")] == [0, 4, 4]
    tenant("team", "update", "it", "--overdraft", "unlimited")
    assert [tenant(*same, overdraft).status for overdraft in (7, "unlimited")] == [4, 0]
    assert tenant(*create, "--if-not-exists").status == 0
    assert tenant("team", "create", "x", "--org", "no", "--overdraft", 7).status == 3


def test_list_by_organization(tenant: Run) -> None:
    tenant("org", "create", "other")
    tenant("team", "create", "it", "--org", "other")
    assert [team["team_id"] for team in tenant("team", "list", "-o", "json").data] == ["hr", "it"]
    assert [team["team_id"] for team in tenant("team", "list", "--org", "other", "-o", "json").data] == ["it"]


def test_bad_credits(tenant: Run) -> None:
    for number in ("-1", "1.5", "many", "9" * 30):
        result = tenant("team", "create", "it", "--org", "acme", "--credits", number)
        assert result.status == 2
        assert "--credits" in result.err


def groups(run: Run) -> list[str]:
    return list(run("team", "get", "hr", "-o", "json").data["model_groups"])


def test_update_merges(tenant: Run) -> None:
    changed = tenant("team", "update", "hr", "--alias", "Human", "--metadata", '{"a": 1, "b": 2}', "-o", "json").data
    assert (changed["team_alias"], changed["metadata"]) == ("Human", {"a": 1, "b": 2})
    assert tenant("team", "update", "hr", "--unset-metadata", "a", "-o", "json").data["metadata"] == {"b": 2}
    assert tenant("team", "update", "nobody", "--alias", "x").status == 3
    assert tenant("team", "update", "hr").status == 2


def test_assign_adds_and_replaces(tenant: Run) -> None:
    tenant("group", "create", "Third", "--model", "a")
    assert tenant("team", "assign", "hr", "Third", "Echo", "-o", "json").data["model_groups"] == [
        "Down",
        "Echo",
        "Third",
    ]
    assert tenant("team", "assign", "hr", "Third", "Echo", "--replace").status == 0
    assert groups(tenant) == ["Echo", "Third"]
    missing = tenant("team", "assign", "hr", "Down", "No", "--replace", "-o", "json")
    assert (missing.status, missing.error["code"]) == (3, "group_not_found")
    assert groups(tenant) == ["Echo", "Third"]
    assert tenant("team", "assign", "nobody", "Echo", "-o", "json").error["code"] == "team_not_found"


def test_of_two_who_replace_at_once_one_wins(tenant: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saasllm_cli.commands.team.show", lambda *_: None)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            list(threads.map(lambda name: team.assign("hr", [name], replace=True), ["Echo", "Down"]))
            with database.connect() as db:
                assert db.found("team.get", "team", "hr", team_id="hr")["model_groups"] in (["Echo"], ["Down"])


def test_unassign(tenant: Run) -> None:
    for verb in ("assign", "unassign"):
        refused = tenant("team", verb, "hr", "Echo", "No", "-o", "json")
        assert (refused.status, refused.error["message"]) == (3, "Group No not found.")
        assert tenant("team", "get", "hr", "-o", "json").data["model_groups"] == ["Down", "Echo"]
    tenant("group", "create", "Other", "--model", "offline/echo")
    result = tenant("team", "unassign", "hr", "Echo", "Other", "-o", "json")
    assert (result.status, result.data["model_groups"]) == (0, ["Down"])
    assert result.err == "Was not assigned: Other.\n"
    assert tenant("team", "unassign", "nobody", "Echo").status == 3


def test_suspended_it_begins_no_jobs_and_what_runs_finishes(tenant: Run) -> None:
    job_id = runner.new_job_id()
    asked = runner.JobRequest("hr", CallRequest("Echo", [{"role": "user", "content": "x"}], 5))
    runner._begin(job_id, asked)
    assert tenant("team", "suspend", "hr", "-o", "json").data["status"] == "suspended"
    refused = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json")
    assert (refused.status, refused.error["code"]) == (6, "team_suspended")
    assert runner._settle(job_id, "completed", None, [], 5)["settled"]
    assert tenant("team", "resume", "hr", "-o", "json").data["status"] == "active"
    assert tenant("team", "get", "hr", "-o", "json").data["credits_remaining"] == 9


def test_delete_only_without_history(tenant: Run) -> None:
    tenant("team", "create", "new", "--org", "acme", "--group", "Echo")
    assert tenant("team", "delete", "new").status == 2
    assert tenant("team", "delete", "new", "--yes").status == 0
    assert tenant("team", "delete", "new", "--yes").status == 3
    gone = tenant("team", "delete", "new", "--if-exists")
    assert gone == (0, "", "Team new not found. Nothing was deleted.\n")
    assert tenant("team", "delete", "new", "--yes", "--if-exists", "--profile", "no").status == 3
    assert tenant("team", "delete", "hr", "--yes", "--if-exists").status == 4
    used = tenant("team", "delete", "hr", "--yes")
    assert used.status == 4
    assert "0 jobs and 1 ledger entry." in used.err
    assert tenant("team", "get", "hr").status == 0


def test_a_team_of_a_suspended_organization_says_so(tenant: Run) -> None:
    tenant("org", "create", "other")
    tenant("team", "create", "theirs", "--org", "other")
    tenant("team", "create", "it", "--org", "acme")
    tenant("team", "suspend", "it")

    def found(status: str, *options: object) -> list[str]:
        return [team["team_id"] for team in tenant("team", "list", "--status", status, *options, "-o", "json").data]

    assert (found("suspended"), found("active")) == (["it"], ["hr", "theirs"])
    assert tenant("org", "suspend", "acme").status == 0
    assert (found("suspended"), found("active")) == (["hr", "it"], ["theirs"])
    assert found("suspended", "--sort", "newest", "--limit", 1) == ["it"]
    team = tenant("team", "get", "hr", "-o", "json").data
    assert (team["status"], team["organization_status"]) == ("active", "suspended")
    assert "organization_status  suspended" in tenant("team", "get", "hr").out
    assert "suspended" in tenant("team", "list", "--org", "acme").out.splitlines()[1]
    tenant("org", "resume", "acme")
    assert tenant("team", "get", "hr", "-o", "json").data["organization_status"] == "active"
