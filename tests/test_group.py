from collections.abc import Callable

import psycopg
from conftest import Result

Run = Callable[..., Result]
FIELDS = ["group_name", "display_name", "description", "status", "models", "created_at", "updated_at"]


def test_create_keeps_the_order_of_the_models(saasllm: Run) -> None:
    result = saasllm("group", "create", "G", "--model", "z/1", "--model", "a/2", "--display-name", "D", "-o", "json")
    assert result.status == 0
    assert list(result.data) == FIELDS
    assert result.data["models"] == [
        {"model_name": "z/1", "priority": 0, "is_active": True},
        {"model_name": "a/2", "priority": 1, "is_active": True},
    ]
    assert saasllm("group", "get", "G", "-o", "json").data == result.data
    assert saasllm("group", "list", "-o", "json").data == [result.data]


def test_if_not_exists_compares_the_models_in_order(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a", "--model", "b")
    assert saasllm("group", "create", "G", "--model", "a", "--model", "b").status == 4
    assert saasllm("group", "create", "G", "--model", "a", "--model", "b", "--if-not-exists").status == 0
    other = saasllm("group", "create", "G", "--model", "b", "--model", "a", "--if-not-exists", "-o", "json")
    assert (other.status, other.error["code"]) == (4, "group_differs")


def test_bad_models(saasllm: Run) -> None:
    assert saasllm("group", "create", "G").status == 2
    assert saasllm("group", "create", "G", "--model", "a b").status == 2
    twice = saasllm("group", "create", "G", "--model", "a", "--model", "a")
    assert twice.status == 2
    assert "--model a is given twice" in twice.err


def test_resolve(tenant: Run, sql: psycopg.Connection) -> None:
    tenant("group", "create", "Other", "--model", "x", "--model", "y")
    assert tenant("group", "resolve", "Other", "-o", "json").data == [
        {"model_name": "x", "priority": 0},
        {"model_name": "y", "priority": 1},
    ]
    assert tenant("group", "resolve", "Echo", "--team", "hr").status == 0
    assert tenant("group", "resolve", "Other", "--team", "hr", "-o", "json").error["code"] == "group_not_assigned"
    assert tenant("group", "resolve", "Other", "--team", "nobody").status == 3
    assert tenant("group", "resolve", "nothing").status == 3
    sql.execute("UPDATE model_group_models SET is_active = false WHERE model_name = 'x'")
    assert tenant("group", "resolve", "Other", "-o", "json").data == [{"model_name": "y", "priority": 1}]
    sql.execute("UPDATE model_group_models SET is_active = false WHERE model_name = 'y'")
    empty = tenant("group", "resolve", "Other", "-o", "json")
    assert (empty.status, empty.error["code"]) == (6, "no_active_model")
    sql.execute("UPDATE model_groups SET status = 'inactive' WHERE group_name = 'Other'")
    inactive = tenant("group", "resolve", "Other", "-o", "json")
    assert (inactive.status, inactive.error["code"]) == (6, "group_inactive")
