"""The keys of every command's JSON, so that no script of a user breaks unnoticed."""

from collections.abc import Callable
from typing import Any

import psycopg
import reference
from conftest import Result

ORGANIZATION = ["organization_id", "name", "status", "own_keys_only", "metadata", "created_at", "updated_at"]
JOB_PRICE = [
    *("price_id", "organization_id", "team_id", "group_name", "job_type", "credits", "credits_per_usd"),
    *("markup_percent", "credits_per_1000_prompt_tokens", "credits_per_1000_completion_tokens", "minimum", "maximum"),
    "hold",
]
GROUP = [
    *("group_name", "display_name", "description", "status"),
    {"models": [["model_name", "priority", "is_active"]]},
    *("price", "created_at", "updated_at"),
]
PRICED_GROUP = [{"price": JOB_PRICE} if name == "price" else name for name in GROUP]
PRICE = [
    *("input_usd_per_million", "output_usd_per_million", "cache_read_usd_per_million", "cache_write_usd_per_million"),
    "reasoning_usd_per_million",
]
MODEL = ["model_name", {"prices": [["source", *PRICE]]}]
CREDITS = ["credits_allocated", "credits_used", "credits_reserved", "credits_remaining", "credits_overdraft"]
TEAM = [
    *("team_id", "organization_id", "team_alias", "status", "organization_status", "model_groups", *CREDITS),
    *("low_credits", "metadata", "created_at", "updated_at", "schedule"),
]
TEAM_WITH_PRICES = [*TEAM, "prices"]
LIMIT = [
    *("limit_id", "organization_id", "team_id", "group_name", "measure", "per", "amount", "is_hard", "alerts"),
    *("used", "running", "counted", "used_percent", "alert_reached", "room_at", "created_at", "updated_at"),
]
SCHEDULE = ["credits_amount", "every", "mode", "credits_max", "rollover", "next_on"]
REFUSED = ["team_id", "period", "reason"]
ENTRY = [
    *("transaction_id", "team_id", "organization_id", "job_id", "transaction_type"),
    *("credits_amount", "credits_before", "credits_after", "category", "priority", "expires_at", "grant_id"),
    *("reason", "source", "actor", "role", "command", "created_at"),
]
GRANT = [
    *("grant_id", "team_id", "category", "priority", "credits_amount", "credits_used", "credits_expired"),
    *("credits_left", "created_at", "expires_at", "period", "reason", "source"),
]
JOB = [
    *("job_id", "team_id", "organization_id", "job_type", "status", "model_groups_used", "external_task_id"),
    *("credits_held", "credits_charged", "credits_short", "credit_applied", "price_id", "is_unpriced"),
    *("error_message", "metadata", "is_queued", "created_at", "started_at", "completed_at", "lease_expires_at"),
]
CALL = [
    *("call_id", "job_id", "model_group_used", "resolved_model", "attempt", "prompt_tokens", "completion_tokens"),
    *("total_tokens", "cost_usd", "latency_ms", "purpose", "finish_reason", "error", "created_at", "credential_id"),
    *("prompt", "answer"),
]
ANSWER = [
    *("job_id", "status", "content", "tool_calls", "finish_reason", "resolved_model", "prompt_tokens"),
    "completion_tokens",
    *("total_tokens", "cost_usd", "latency_ms", "attempts"),
]
CHARGED_ANSWER = [*ANSWER, "credits_charged", "credits_short", "is_unpriced", "credits_remaining"]
CHARGED_JOB = [*JOB, "charged_by"]
JOBS_USED = [
    *("jobs", "jobs_completed", "jobs_failed", "jobs_cancelled", "jobs_open", "jobs_unpriced", "credits_charged"),
    "credits_short",
]
CREDITS_USED = [
    *("credits_added", "credits_deducted", "credits_refunded", "credits_net", "credits_adjusted", "credits_expired"),
]
CALLS_USED = [
    *("calls", "failed_calls", "prompt_tokens", "completion_tokens", "total_tokens", "cost_usd", "unpriced_calls"),
]
USED = [*JOBS_USED, *CREDITS_USED, *CALLS_USED, "margin_usd"]
USAGE = [
    *("organization_id", "since", "until", *USED),
    {"credits_by_category": ["paid", "included", "promotional", "overdraft"]},
    {"months": [["month", *USED]]},
    {"days": [["day", *USED]]},
    {"job_types": [["job_type", *JOBS_USED, "margin_usd"]]},
    {"models": [["resolved_model", *CALLS_USED]]},
]
BALANCES = ["credits_opening", "credits_closing"]
NAMES = ["organization_id", "organization_name"]
REPORT = [
    *("made_at", *NAMES, "team_id", "team_alias", "since", "until", *BALANCES, *USED),
    {"credits_by_category": ["paid", "included", "promotional", "overdraft"]},
    {"months": [["month", *USED, "credits_balance"]]},
    {"days": [["day", *USED, "credits_balance"]]},
    {"job_types": [["job_type", *JOBS_USED, "margin_usd"]]},
    {"models": [["resolved_model", *CALLS_USED]]},
]
USED_BY_TEAM = {"teams": [["team_id", "team_alias", *NAMES, *BALANCES, *USED]]}
CATEGORIES = {"categories": [["category", "credits_added", "credits_deducted", "credits_expired"]]}
LEDGER = [
    *("day", "transaction_id", "team_id", "team_alias", "created_at", "transaction_type", "credits_amount"),
    *("credits_after", "category", "expires_at", "job_id", "source", "reason"),
]
WEBHOOK = [
    *("webhook_id", "organization_id", "url", "event_types", "status", "disabled_reason", "disabled_at"),
    *("failing_since", "retry_at", "allow_http", "allow_private", "created_at", "updated_at"),
]
DELIVERY = [
    *("delivery_id", "webhook_id", "event_id", "event_type", "organization_id", "status", "attempts", "attempted_at"),
    *("duration_ms", "status_code", "error", "answer", "next_at", "created_at", "ended_at"),
]
CREDENTIAL = [
    *("credential_id", "organization_id", "team_id", "provider", "api_base", "last_four", "created_at", "used_at"),
    "is_decryptable",
]
KEY = ["key_id", "team_id", "organization_id", "key_alias", "last_four", "status", "created_at", "expires_at"]
EVENT = ["event_id", "event_type", "organization_id", "team_id", "sequence_no", "data", "created_at"]
MIGRATION = ["migration", "status"]
PROFILE = ["profile", "is_used", "protected", "database_url", "password_file", "data_dir"]

# What is typed, in this order, and the keys that come: of one thing a list, of many a list in a list.
COMMANDS: dict[str, list[Any]] = {
    "migrate status": [[*MIGRATION, "applied_at"]],
    "migrate verify": [[*MIGRATION, "applied_at"]],
    "org create o": ORGANIZATION,
    "org get o": ORGANIZATION,
    "org list": [ORGANIZATION],
    "org update o --name x": ORGANIZATION,
    "org suspend o": ORGANIZATION,
    "org resume o": ORGANIZATION,
    "group create g --model offline/echo": GROUP,
    "group get g": GROUP,
    "group list": [GROUP],
    "group update g --display-name x": GROUP,
    "group set-models g offline/echo": GROUP,
    "group resolve g": [["model_name", "priority"]],
    "group test g": [["model_name", "answered", "latency_ms", "error"]],
    "model set m --input-usd-per-million 1 --output-usd-per-million 2": MODEL,
    "model get m": MODEL,
    "model list": [["model_name", *PRICE, "created_at", "updated_at"]],
    "team create t --org o --credits 5": TEAM_WITH_PRICES,
    "team get t": TEAM_WITH_PRICES,
    "team list": [TEAM],
    "team update t --alias x": TEAM_WITH_PRICES,
    "price set --group g --credits-per-usd 100 --markup 30": [*JOB_PRICE, "created_at", "closed_at"],
    "price list": [[*JOB_PRICE, "created_at", "closed_at"]],
    "team assign t g": [*TEAM, {"prices": [["group_name", {"price": JOB_PRICE}]]}],
    "price resolve --team t --group g": ["source", "covers", *JOB_PRICE, "created_at"],
    "group list --search g": [PRICED_GROUP],
    "team unassign t g": TEAM_WITH_PRICES,
    "team suspend t": TEAM_WITH_PRICES,
    "team resume t": TEAM_WITH_PRICES,
    "limit set --team t --measure jobs --per day --amount 5": LIMIT,
    "limit get --team t --measure jobs --per day": LIMIT,
    "limit list": [LIMIT],
    "credits balance t": ["team_id", "organization_id", *CREDITS, "credits_expiring", "next_expiry_at"],
    "credits add t 5": ENTRY,
    "credits adjust t -1 --reason x": ENTRY,
    "credits grants t": [GRANT],
    "credits revoke 3 --reason x": ENTRY,
    "credits check t --need 1": ["team_id", "organization_id", *CREDITS, "credits_free"],
    "credits transactions t": [ENTRY],
    "credits schedule t --amount 5 --every monthly --mode add --starts 2026-01-01": [
        *("team_id", "organization_id", *SCHEDULE)
    ],
    "credits allocate --as-of 2026-01-01": [
        *("as_of", "granted", "full", "credits_granted", "credits_expired"),
        {"skipped": [REFUSED]},
        "failed",
    ],
    "credits forecast": [
        [
            *("team_id", "organization_id", "credits_remaining", "credits_overdraft", "credits_expiring"),
            *("next_expiry_at", "credits_per_day", "days_left", "runs_out_on", "next_on", "next_amount"),
        ]
    ],
    "job create --team hr": CHARGED_JOB,
    "job call JOB --group Echo --prompt x": [*ANSWER, "lease_expires_at"],
    "job complete JOB": CHARGED_JOB,
    "job create --team hr --job-type a": CHARGED_JOB,
    "job fail JOB": CHARGED_JOB,
    "job create --team hr --job-type b": CHARGED_JOB,
    "job cancel JOB": CHARGED_JOB,
    "job batch /dev/null --out out.jsonl --team hr --group Echo": [
        *("completed", "failed", "skipped", "cost_usd", "credits_charged", "credits_short", "unpriced"),
        *("is_out_of_credits", "limit_reached", "models", "passed_over", "not_sent"),
        *("unsettled", "unsettled_error", "answered_elsewhere"),
    ],
    "job sweep": ["swept", "requeued"],
    "job run --team hr --group Echo --prompt x": CHARGED_ANSWER,
    "job submit --team hr --group Echo --prompt x": CHARGED_JOB,
    "job wait JOB": CHARGED_ANSWER,
    "job result JOB": CHARGED_ANSWER,
    "worker list": [
        [
            *("worker_id", "host", "pid", "status", "running", "running_groups", "concurrency", "team_id"),
            *("organization_id", "group_name", "started_at", "seen_at"),
        ]
    ],
    "job get JOB": [*CHARGED_JOB, {"calls": [CALL]}],
    "job list": [JOB],
    "job list --refused": [
        ["refusal_id", "team_id", "organization_id", "group_name", "reason", "refusals", "first_at", "last_at"]
    ],
    "job costs JOB": [
        *("job_id", *CALLS_USED, "credits_charged", "credits_refunded", "credits_short", "price_id", "charged_by"),
        *("is_unpriced", "margin_usd", {"models": [["resolved_model", *CALLS_USED]]}),
    ],
    "job annotate JOB --metadata a=b": CHARGED_JOB,
    "credits refund --job JOB": ENTRY,
    "team usage hr": ["team_id", *USAGE],
    "org usage acme": [*USAGE, {"teams": [["team_id", *USED]]}],
    "team usage hr --by month": [["team_id", "organization_id", "month", *USED]],
    "team usage hr --by day": [["team_id", "organization_id", "day", *USED]],
    "team usage hr --by job_type": [["team_id", "organization_id", "job_type", *JOBS_USED, "margin_usd"]],
    "team usage hr --by model": [["team_id", "organization_id", "resolved_model", *CALLS_USED]],
    "org usage acme --by category": [["organization_id", "category", "credits_deducted"]],
    "org usage acme --by team": [["organization_id", "team_id", *USED]],
    "report": [*REPORT, USED_BY_TEAM, {"organizations": [[*NAMES, *BALANCES, *USED]]}, CATEGORIES],
    "report --org acme": [*REPORT, USED_BY_TEAM, CATEGORIES, {"ledger": [LEDGER]}, "ledger_more"],
    "report --team hr": [*REPORT, CATEGORIES, {"ledger": [LEDGER]}, "ledger_more"],
    "event list": [EVENT],
    "event get EVENT": EVENT,
    "webhook create --url http://127.0.0.1:9 --event all --allow-http --allow-private": [*WEBHOOK, "secret"],
    "webhook get 1": WEBHOOK,
    "webhook list": [WEBHOOK],
    "webhook update 1 --event credits.low": WEBHOOK,
    "webhook test 1": DELIVERY,
    "webhook deliveries 1": [DELIVERY],
    "webhook deliveries --attempts-of 1": [
        ["attempt_id", "delivery_id", "attempted_at", "duration_ms", "status_code", "error", "answer"]
    ],
    "webhook replay 1 --since 1h": ["webhook_id", "deliveries"],
    "webhook deliver": ["succeeded", "failed", "given_up", "events_removed"],
    "webhook rotate 1": ["webhook_id", "secret", "previous_secret_expires_at"],
    "credential set --provider litellm_proxy --from-env MASTER": CREDENTIAL,
    "credential set --org o --provider openai --api-base URL --from-env VALUE": CREDENTIAL,
    "credential list": [CREDENTIAL],
    "credential test --org o --provider openai --model openai/ok --yes": [
        *("credential_id", "model_name", "answered", "latency_ms", "error")
    ],
    "credential rewrap": ["rewrapped", "unchanged", "failed"],
    "key create hr": [*KEY, "key"],
    "key list": [KEY],
    "key rotate hr": [*KEY, "key", "previous_key_expires_at"],
    "key block hr": KEY,
    "key unblock hr": KEY,
    "key sync": [["action", "key_id", "team_id", "key_alias", "fields", "error"]],
    "audit list": [
        [
            *("audit_id", "created_at", "actor", "role", "command", "noun", "action"),
            *("organization_id", "team_id", "group_name", "before", "after"),
        ]
    ],
    "export": [
        {"organizations": [["organization_id", "name", "status", "own_keys_only", "price", "limits", "metadata"]]},
        {"model_groups": [["group_name", "display_name", "description", "status", "price", "models"]]},
        {
            "teams": [
                [
                    *("team_id", "organization_id", "team_alias", "status", "model_groups", "credits", "overdraft"),
                    *("low_credits", "schedule", "price", "limits", "metadata"),
                ]
            ]
        },
        "prices",
        {"webhooks": [["url", "event_types", "allow_http", "allow_private"]]},
        {"credentials": [["organization_id", "provider", "api_base"]]},
        {"keys": [["team_id"]]},
    ],
    "apply -f file.yaml": [
        {"totals": [["noun", "created", "changed", "unchanged", "differing", "suspended", "deleted"]]},
        {"changes": [["noun", "id", "action", "before", "after"]]},
    ],
    "usage": [["organization_id", "organization_name", *USED]],
    "doctor": [["check", "status", "message", "hint"]],
    "db status": ["server", "url", "is_running", "version", "data_dir", "pid"],
    "credits verify": [["team_id", "problem", "transaction_id", "job_id", "expected", "found"]],
    "migrate reset --confirm DATABASE": [MIGRATION],
    "migrate up": [MIGRATION],
    "migrate adopt": [MIGRATION],
    "profile add p --database-url postgresql:///p": PROFILE,
    "profile list": [PROFILE],
    "profile show p": PROFILE,
}

# So that they have something to do.
BEFORE = {
    "credits allocate --as-of 2026-01-01": "UPDATE teams SET status = 'suspended' WHERE team_id = 't'",
    "job list --refused": "INSERT INTO job_refusals (team_id, reason) VALUES ('hr', 'team_suspended')",
    "key sync": "UPDATE proxy_keys SET is_blocked = true",
    "worker list": "INSERT INTO workers (host, pid, concurrency) VALUES ('here', 1, 1)",
    "credits verify": "SET session_replication_role = replica; UPDATE team_credits SET credits_used = 1",
    "migrate up": "DROP SCHEMA public CASCADE; CREATE SCHEMA public",
    "migrate adopt": "DROP TABLE saasllm_migrations",
}


def keys(data: Any, like: list[Any]) -> list[Any]:
    """The keys of one thing or many, with those of the things in it where they are to be compared, too."""
    if like and isinstance(like[0], list):
        return [keys(data[0], like[0])]
    nested = {name: below for item in like if isinstance(item, dict) for name, below in item.items()}
    return [{name: keys(value, nested[name])} if name in nested else name for name, value in data.items()]


DIFFERS = ("credits verify", "webhook test 1", "key sync")


def test_the_keys_of_every_command(
    tenant: Callable[..., Result], names: dict[str, str], sql: psycopg.Connection
) -> None:
    for command, expected in COMMANDS.items():
        if command in BEFORE:
            sql.execute(BEFORE[command])
        words = [names.get(word, word) for word in command.split()]
        result = tenant(*words, "-o", "json")
        assert result.status == (9 if command in DIFFERS else 0), (command, result.err)
        assert keys(result.data, expected) == expected, command
        if command.startswith(("job run", "job create", "job submit")):
            names["JOB"] = result.data["job_id"]
        if command == "event list":
            names["EVENT"] = result.data[0]["event_id"]
        if command.startswith("job submit"):
            assert tenant("worker", "--once").status == 0


def test_no_command_is_forgotten() -> None:
    typed = {" ".join(word for word in command.split()[:2] if not word.startswith("-")) for command in COMMANDS}
    data = {words for words, command in reference.commands() if "output" in {param.name for param in command.params}}
    assert typed == data
