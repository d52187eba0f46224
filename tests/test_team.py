from collections.abc import Callable

from conftest import Result

Run = Callable[..., Result]
FIELDS = [
    *("team_id", "organization_id", "team_alias", "status", "model_groups"),
    *("credits_allocated", "credits_used", "credits_reserved", "credits_remaining"),
    *("metadata", "created_at", "updated_at"),
]


def test_create_with_groups_and_opening_credits(tenant: Run) -> None:
    team = tenant("team", "get", "hr", "-o", "json")
    assert list(team.data) == FIELDS
    assert team.data["model_groups"] == ["Down", "Echo"]
    assert (team.data["credits_allocated"], team.data["credits_remaining"]) == (10, 10)
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
