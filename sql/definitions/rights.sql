-- What the roles may do. `saasllm migrate up` runs this at its end, each time, where the roles are there and its own
-- owns the tables, and revokes what is not said here. What others may do it only names, until it is told to revoke it.
--
-- A user is made of one of them:  CREATE ROLE app LOGIN PASSWORD '…' IN ROLE saasllm_runner;

GRANT USAGE ON SCHEMA public TO saasllm_admin, saasllm_runner, saasllm_readonly;

-- All of them look at everything.
GRANT SELECT ON
    saasllm_migrations, saasllm_definitions, organizations, model_groups, model_group_models, teams, team_model_groups,
    team_credits, credit_transactions, credit_grants, credit_uses, credit_schedules, jobs, job_refusals, llm_calls,
    audit_log, model_prices, job_prices, limits, limit_counters, organization_details, model_group_details,
    team_details, credit_details, job_details, job_refusal_details, llm_call_details, organization_records,
    model_group_records, team_records, price_records, limit_records, purges_of_transaction, checked_balances,
    current_balances, callable_groups, limit_details, margin_parts, job_queue, job_answers, workers, duties,
    worker_details, events, event_counters, limit_alerts, webhooks, webhook_states, webhook_deliveries,
    webhook_attempts, webhook_details, webhook_delivery_details, webhook_records, credentials, credential_details,
    proxy_keys, key_details, team_limits, wanted_keys, installation, credential_records, key_records,
    usage_days, usage_models, usage_changes, usage_state, call_usage, usage_entries, changed_days,
    changed_months
TO saasllm_admin, saasllm_runner, saasllm_readonly;
-- But at secrets, even encrypted, only who signs or calls models by them.
GRANT SELECT (secret_id, webhook_id, created_at, expires_at) ON webhook_secrets TO saasllm_readonly;
GRANT SELECT (credential_id) ON credential_secrets TO saasllm_readonly;
GRANT SELECT ON webhook_secrets, credential_secrets TO saasllm_admin, saasllm_runner;

-- saasllm_runner runs jobs: it reserves credits, enters what jobs cost, and counts them, also those that were refused.
-- It moves balances only as the ledger says, and the ledger takes nothing else from whoever may not change teams.
GRANT INSERT (
    job_id, team_id, organization_id, job_type, status, external_task_id, model_groups_used, metadata, started_at,
    lease_expires_at, idempotency_key, request_hash, hold_no, price_ids, credits_held, is_queued
) ON jobs TO saasllm_runner;
GRANT UPDATE (
    status, started_at, completed_at, error_message, lease_expires_at, model_groups_used, metadata, price_ids,
    credits_held, credits_charged, credits_short, price_id, is_unpriced
) ON jobs TO saasllm_runner;
GRANT INSERT (team_id, group_name, reason, refusals) ON job_refusals TO saasllm_runner;
GRANT UPDATE (refusals, last_at) ON job_refusals TO saasllm_runner;
GRANT INSERT (
    job_id, team_id, model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens,
    cost_usd, latency_ms, purpose, finish_reason, error, prompt, answer, credential_id, created_at
) ON llm_calls TO saasllm_runner;
GRANT INSERT (
    team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before, credits_after, reason,
    grant_id, actor, command
) ON credit_transactions TO saasllm_runner;
GRANT UPDATE (
    credits_allocated, credits_used, credits_reserved, last_entry_no, last_hold_no, credits_owed, next_expiry_at,
    held_expired_at
) ON team_credits TO saasllm_runner;
GRANT UPDATE (credits_used, credits_expired, last_used_no) ON credit_grants TO saasllm_runner;
GRANT INSERT (team_id, last_no, grant_id, credits) ON credit_uses TO saasllm_runner;
GRANT INSERT, UPDATE, DELETE ON limit_counters, workers TO saasllm_runner;
GRANT INSERT, DELETE ON job_queue, job_answers TO saasllm_runner;
GRANT UPDATE (state, worker_id, losses) ON job_queue TO saasllm_runner;
GRANT UPDATE (next_at, done_at, worker_id) ON duties TO saasllm_runner;
-- It sums up what was used.
GRANT INSERT, DELETE ON usage_days, usage_models, usage_changes TO saasllm_runner;
GRANT UPDATE (summed_until, next_until, next_noted) ON usage_state TO saasllm_runner;
-- It tells what has happened, and sends it to webhooks, but does not say to which.
GRANT INSERT (event_id, event_type, organization_id, team_id, data) ON events TO saasllm_runner;
GRANT UPDATE (is_dispatched, sequence_no) ON events TO saasllm_runner;
GRANT DELETE ON events TO saasllm_runner;
GRANT INSERT, UPDATE ON event_counters TO saasllm_runner;
GRANT INSERT, DELETE ON limit_alerts TO saasllm_runner;
GRANT UPDATE (disabled_at, disabled_reason, failing_since, retry_at) ON webhook_states TO saasllm_runner;
GRANT INSERT, UPDATE ON webhook_deliveries TO saasllm_runner;
GRANT UPDATE (updated_at) ON webhooks TO saasllm_runner; -- to lock them, while it makes their deliveries
GRANT INSERT ON webhook_attempts TO saasllm_runner;

-- saasllm_admin does all but change the schema. The ledger and the audit log only grow: what leaves them, leaves with
-- its whole team.
GRANT INSERT, UPDATE, DELETE ON
    organizations, model_groups, model_group_models, model_prices, job_prices, limits, limit_counters, teams,
    team_model_groups, team_credits, credit_grants, credit_uses, credit_schedules, jobs, job_refusals, llm_calls,
    job_queue, job_answers, workers, duties, events, event_counters, limit_alerts, webhooks, webhook_states,
    webhook_secrets, webhook_deliveries, webhook_attempts, credentials, credential_secrets, proxy_keys, usage_days,
    usage_models, usage_changes
TO saasllm_admin;
GRANT UPDATE (summed_until, next_until, next_noted) ON usage_state TO saasllm_admin;
-- Not the number, the time and the role of an entry, which the database gives it.
GRANT INSERT (
    team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before, credits_after, reason,
    idempotency_key, source, period, category, priority, expires_at, grant_id, actor, command
) ON credit_transactions TO saasllm_admin;
GRANT DELETE ON credit_transactions TO saasllm_admin;
GRANT INSERT (noun, action, organization_id, team_id, group_name, before, after) ON audit_log TO saasllm_admin;
-- What of it a purge redacts, and nothing else.
GRANT UPDATE (command, before, after) ON audit_log TO saasllm_admin;
