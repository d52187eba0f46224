import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from conftest import Result, start_process
from provider import Provider

from saasllm_cli import cli, database
from saasllm_cli.commands import group

Run = Callable[..., Result]
FIELDS = ["group_name", "display_name", "description", "status", "models", "price", "created_at", "updated_at"]


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


def models(run: Run, group: str) -> list[str]:
    return [model["model_name"] for model in run("group", "get", group, "-o", "json").data["models"]]


def test_update_leaves_what_is_not_given(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a", "--display-name", "D")
    changed = saasllm("group", "update", "G", "--description", "what for", "--status", "inactive", "-o", "json").data
    assert (changed["display_name"], changed["description"], changed["status"]) == ("D", "what for", "inactive")
    assert saasllm("group", "update", "nothing", "--description", "x").status == 3
    assert saasllm("group", "update", "G").status == 2


def test_set_models_replaces_all_in_order(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a", "--model", "b")
    changed = saasllm("group", "set-models", "G", "b", "c", "a", "-o", "json").data
    assert [(model["model_name"], model["priority"]) for model in changed["models"]] == [("b", 0), ("c", 1), ("a", 2)]
    assert saasllm("group", "set-models", "G", "b", "b").status == 2
    assert saasllm("group", "set-models", "G").status == 2
    assert saasllm("group", "set-models", "nothing", "a").status == 3
    assert models(saasllm, "G") == ["b", "c", "a"]


def test_a_reader_of_set_models_never_sees_half(saasllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two who change it all the time, one who reads."""
    saasllm("group", "create", "G", "--model", "ollama/a", "--model", "ollama/b", "--model", "ollama/c")
    both = (["ollama/a", "ollama/b", "ollama/c"], ["ollama/x", "ollama/a"])
    monkeypatch.setattr("saasllm_cli.commands.group.show", lambda *_: None)

    def change(turn: int) -> None:
        group.set_models("G", both[turn % 2], yes=True)

    with ThreadPoolExecutor(2) as threads, database.connect() as db:
        changes = [threads.submit(change, turn) for turn in range(60)]
        while not all(change.done() for change in changes):
            found = db.maybe("group.get", group_name="G")
            assert found
            assert [model["model_name"] for model in found["models"]] in both
        for done in changes:
            done.result()


def test_delete_refuses_a_group_in_use_unless_forced(tenant: Run) -> None:
    refused = tenant("group", "delete", "Echo", "--yes")
    assert refused.status == 4
    assert "1 team: hr" in refused.err
    assert tenant("group", "delete", "Echo").status == 2
    assert tenant("group", "delete", "Echo", "--yes", "--force").status == 0
    assert tenant("team", "get", "hr", "-o", "json").data["model_groups"] == ["Down"]
    assert tenant("group", "delete", "Echo", "--yes").status == 3


def test_several_are_deleted_or_none(tenant: Run) -> None:
    def there() -> list[str]:
        return [group["group_name"] for group in tenant("group", "list", "-o", "json").data]

    for name in ("A", "B", "C"):
        tenant("group", "create", name, "--model", "offline/echo")
    before = there()
    refused = tenant("group", "delete", "A", "No", "Echo", "Nix", "Down", "--yes")
    assert (refused.status, refused.err.splitlines()[0]) == (
        3,
        "Error: Group No, Nix not found. Group Down is assigned to 1 team: hr. Group Echo is assigned to 1 team: hr.",
    )
    assert tenant("group", "delete", "A", "No", "--yes", "--force").status == 3
    assert tenant("group", "delete", "A", "Echo", "--yes", "--if-exists").status == 4
    assert "given twice" in tenant("group", "delete", "A", "A", "--yes").err
    assert there() == before
    assert tenant("group", "delete", "A", "B", "--yes") == (0, "", "Deleted groups A, B.\n")
    done = tenant("group", "delete", "C", "Echo", "No", "--yes", "--force", "--if-exists")
    assert done == (0, "", "Group No not found.\nDeleted groups C, Echo.\n")
    assert there() == ["Down"]
    assert tenant("team", "get", "hr", "-o", "json").data["model_groups"] == ["Down"]
    again = tenant("group", "delete", "C", "No", "--if-exists")
    assert again == (0, "", "Group C, No not found.\nNothing was deleted.\n")


def test_of_two_who_delete_the_same_the_second_misses_it(tenant: Run, sql: psycopg.Connection) -> None:
    for name in ("A", "B"):
        tenant("group", "create", name, "--model", "offline/echo")
    with psycopg.connect(os.environ["SAASLLM_DATABASE_URL"]) as first:
        first.execute("DELETE FROM model_groups WHERE group_name = 'A'")
        second = start_process("group", "delete", "B", "A", "--yes")
        until = time.monotonic() + 20
        while not sql.execute("SELECT pid FROM pg_locks WHERE NOT granted").fetchone():
            assert time.monotonic() < until
            time.sleep(0.05)
    _, told = second.communicate()
    assert (second.returncode, "Group A not found." in told) == (3, True)
    assert tenant("group", "get", "B").status == 0


def test_a_deleted_group_stays_in_the_history(tenant: Run) -> None:
    job_id = tenant("job", "run", "--team", "hr", "--group", "Echo", "--prompt", "x", "-o", "json").data["job_id"]
    assert tenant("group", "delete", "Echo", "--yes", "--force").status == 0
    job = tenant("job", "get", job_id, "-o", "json").data
    assert (job["model_groups_used"], job["calls"][0]["model_group_used"]) == (["Echo"], "Echo")


def test_test_asks_each_model_and_charges_nobody(tenant: Run, provider: Provider) -> None:
    tenant("group", "create", "G", "--model", "openai/ok", "--model", "openai/status-503", "--model", "openai/slow")
    unasked = tenant("group", "test", "G", "-o", "json")
    assert (unasked.status, unasked.error["code"], provider.requests) == (2, "not_confirmed", [])
    result = tenant("group", "test", "G", "--yes", "--timeout", 5, "-o", "json")
    assert result.status == 9
    assert [row["answered"] for row in result.data] == [True, False, False]
    assert "503" in result.data[1]["error"]
    assert result.data[2]["latency_ms"] < 10_000
    assert len(provider.requests) == 3
    assert tenant("job", "list", "-o", "json").data == []


def test_test_of_offline_models_asks_nobody(tenant: Run) -> None:
    assert tenant("group", "test", "Echo", "-o", "json").data[0]["answered"]
    assert tenant("group", "test", "Down").status == 8
    assert tenant("group", "test", "nothing").status == 3


def test_a_model_that_litellm_does_not_list_is_a_warning(saasllm: Run) -> None:
    known = saasllm("group", "create", "G", "--model", "gpt-4o", "--model", "openai/gpt-4o", "--model", "ollama/mine")
    assert (known.status, known.err) == (0, "")
    for name, hint in (
        ("gpt-4oh", "Give the name as PROVIDER/MODEL"),
        ("openai/gpt-4oh", "Check the name; afterwards, run: saasllm group test G"),
        ("offline/eco", "The offline models are offline/echo and offline/fail."),
    ):
        misspelt = saasllm("group", "set-models", "G", "gpt-4o", name, "-o", "json")
        assert misspelt.status == 0
        assert f"does not know {name}. {hint}" in misspelt.err
        assert "does not know" not in saasllm("group", "set-models", "G", name, "gpt-4o").err, "it is not new"
    created = saasllm("group", "create", "H", "--model", "openai/gpt-4oh")
    assert (created.status, "run: saasllm group test H" in created.err) == (0, True)


def test_at_a_terminal_it_asks_before_an_unknown_model_is_live(
    saasllm: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saasllm("group", "create", "G", "--model", "gpt-4o")
    monkeypatch.setattr("saasllm_cli.commands.group.sys.stdin", Terminal())
    asked: list[str] = []

    def answer(question: str, **_: object) -> bool:
        asked.append(question)
        assert "does not know" in capfd.readouterr().err
        assert models_now() == ["gpt-4o"]
        return False

    def models_now() -> list[str]:
        with database.connect() as db:
            return [model["model_name"] for model in db.get("group", "G")["models"]]

    monkeypatch.setattr("saasllm_cli.commands.inputs.typer.confirm", answer)
    assert cli.run(["group", "set-models", "G", "a", "b"]) == 130
    assert cli.run(["group", "create", "H", "--model", "a"]) == 130
    assert cli.run(["group", "get", "H"]) == 3
    assert asked == ["Use them all the same?", "Use it all the same?"]
    assert models_now() == ["gpt-4o"]
    assert cli.run(["group", "set-models", "G", "a", "--yes"]) == 0
    assert cli.run(["group", "create", "H", "--model", "a", "--yes"]) == 0
    assert len(asked) == 2


class Terminal:
    def isatty(self) -> bool:
        return True


def test_whatever_leaves_a_group_without_an_active_model_says_so(saasllm: Run, home) -> None:
    told = "no model is active in G. Jobs are refused until you run: saasllm group update G --activate MODEL"
    saasllm("group", "create", "G", "--model", "gpt-4o", "--model", "gpt-4o-mini")
    assert told not in saasllm("group", "update", "G", "--deactivate", "gpt-4o").err
    assert told in saasllm("group", "set-models", "G", "gpt-4o").err
    assert told in saasllm("group", "update", "G", "--display-name", "x", "-o", "json").err
    assert told not in saasllm("group", "update", "G", "--activate", "gpt-4o").err
    (home / "g.yaml").write_text("model_groups: [{group_name: G, models: [{model_name: a, is_active: false}]}]")
    assert told not in saasllm("apply", "-f", "g.yaml", "--diff").err
    assert told in saasllm("apply", "-f", "g.yaml").err
    assert told in saasllm("apply", "-f", "g.yaml").err, "it stays so"
    (home / "g.yaml").write_text("model_groups: [{group_name: G, models: [a]}]")
    assert told not in saasllm("apply", "-f", "g.yaml").err


def test_one_model_is_passed_over_and_tried_again(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a", "--model", "b", "--model", "c")
    updated = saasllm("group", "update", "G", "--deactivate", "a", "--deactivate", "c", "-o", "json").data
    assert [(model["model_name"], model["is_active"]) for model in updated["models"]] == [
        ("a", False),
        ("b", True),
        ("c", False),
    ]
    assert [model["model_name"] for model in saasllm("group", "resolve", "G", "-o", "json").data] == ["b"]
    again = saasllm(
        "group", "update", "G", "--activate", "a", "--deactivate", "b", "--status", "inactive", "-o", "json"
    )
    assert [model["is_active"] for model in again.data["models"]] == [True, False, False]
    assert again.data["status"] == "inactive"
    changes = saasllm("audit", "list", "--group", "G", "-o", "json").data
    assert [change["action"] for change in changes] == ["update", "update", "create"]


def test_a_model_that_the_group_lacks_changes_nothing(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a")
    missing = saasllm(
        "group", "update", "G", "--deactivate", "a", "--activate", "x", "--status", "inactive", "-o", "json"
    )
    assert (missing.status, missing.error["code"]) == (3, "model_not_in_group")
    group = saasllm("group", "get", "G", "-o", "json").data
    assert (group["status"], group["models"][0]["is_active"]) == ("active", True)
    assert saasllm("group", "update", "G", "--deactivate", "a", "--activate", "a").status == 2
    assert saasllm("group", "update", "No", "--deactivate", "a", "-o", "json").error["code"] == "group_not_found"


def test_set_models_keeps_what_is_deactivated(saasllm: Run) -> None:
    saasllm("group", "create", "G", "--model", "a", "--model", "b")
    saasllm("group", "update", "G", "--deactivate", "a")
    changed = saasllm("group", "set-models", "G", "c", "a", "-o", "json").data
    assert [(model["model_name"], model["is_active"]) for model in changed["models"]] == [("c", True), ("a", False)]
    assert "c, a (inactive)" in saasllm("group", "list").out
    assert "no model is active" in saasllm("group", "update", "G", "--deactivate", "c").err


def test_deactivating_waits_for_the_models_that_are_set_at_once(saasllm: Run, sql: psycopg.Connection) -> None:
    saasllm("group", "create", "G", "--model", "a", "--model", "b")
    with ThreadPoolExecutor(1) as threads:
        with sql.transaction():
            sql.execute("SELECT FROM model_groups WHERE group_name = 'G' FOR NO KEY UPDATE")
            sql.execute("DELETE FROM model_group_models")
            sql.execute("INSERT INTO model_group_models (group_name, model_name, priority) VALUES ('G', 'a', 0)")
            waiting = threads.submit(saasllm, "group", "update", "G", "--deactivate", "a", "-o", "json")
            time.sleep(0.5)
        assert waiting.result(20).data["models"] == [{"model_name": "a", "priority": 0, "is_active": False}]
