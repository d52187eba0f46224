-- What the roles may do. `saasllm migrate up` runs this at its end, where the roles are there and its own owns the
-- tables; it is safe to run again.
--
-- A user is made of one of them:  CREATE ROLE app LOGIN PASSWORD '…' IN ROLE saasllm_runner;

GRANT USAGE ON SCHEMA public TO saasllm_admin, saasllm_runner, saasllm_readonly;

-- All of them look at everything.
GRANT SELECT ON
    saasllm_migrations, organizations, model_groups, model_group_models, teams, team_model_groups, team_credits,
    credit_transactions, credit_schedules, jobs, llm_calls, audit_log,
    organization_details, model_group_details, team_details, credit_details, job_details, llm_call_details,
    organization_records, model_group_records, team_records
TO saasllm_admin, saasllm_runner, saasllm_readonly;

-- saasllm_runner runs jobs: it reserves credits, and enters what jobs cost.
GRANT INSERT ON jobs, llm_calls, credit_transactions TO saasllm_runner;
GRANT UPDATE (
    status, started_at, completed_at, credit_applied, error_message, lease_expires_at, model_groups_used, metadata
) ON jobs TO saasllm_runner;
GRANT UPDATE (credits_reserved) ON team_credits TO saasllm_runner;

-- saasllm_admin does all but change the schema. The ledger and the audit log have rules of their own.
GRANT INSERT, UPDATE, DELETE ON
    organizations, model_groups, model_group_models, teams, team_model_groups, team_credits, credit_schedules, jobs,
    llm_calls
TO saasllm_admin;
GRANT INSERT, DELETE ON credit_transactions TO saasllm_admin;
GRANT INSERT ON audit_log TO saasllm_admin;
