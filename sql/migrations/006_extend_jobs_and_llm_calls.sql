-- A job belongs to a team, holds one of its credits under a lease, and knows which groups it used.

ALTER TABLE jobs
    ADD COLUMN team_id           identifier NOT NULL,
    ADD COLUMN organization_id   identifier NOT NULL,
    ADD COLUMN model_groups_used text[]     NOT NULL DEFAULT '{}',
    ADD COLUMN credit_applied    boolean    NOT NULL DEFAULT false,
    ADD COLUMN lease_expires_at  timestamptz,
    ADD COLUMN idempotency_key   text,
    ADD COLUMN request_hash      text,
    ADD CONSTRAINT jobs_team FOREIGN KEY (organization_id, team_id) REFERENCES teams (organization_id, team_id),
    -- Without a lease an open job would hold its credit for ever.
    ADD CONSTRAINT jobs_lease CHECK ((lease_expires_at IS NOT NULL) = (status IN ('pending', 'in_progress'))),
    ADD CONSTRAINT jobs_credit_applied CHECK (credit_applied = (status = 'completed')),
    ADD CONSTRAINT jobs_request_hash CHECK ((idempotency_key IS NULL) = (request_hash IS NULL));

CREATE INDEX jobs_by_team ON jobs (team_id, created_at, job_id);
CREATE INDEX jobs_by_organization ON jobs (organization_id, created_at, job_id);
CREATE INDEX jobs_by_time ON jobs (created_at, job_id);
CREATE INDEX jobs_open ON jobs (team_id, lease_expires_at) WHERE status IN ('pending', 'in_progress');
-- A key whose job failed or was cancelled is free again.
CREATE UNIQUE INDEX jobs_idempotency_key ON jobs (idempotency_key)
    WHERE idempotency_key IS NOT NULL AND status NOT IN ('failed', 'cancelled');

ALTER TABLE llm_calls
    ADD COLUMN team_id          identifier NOT NULL REFERENCES teams,
    ADD COLUMN model_group_used identifier NOT NULL, -- the name: it outlives a group that is deleted
    ADD COLUMN attempt          integer    NOT NULL,
    ADD COLUMN purpose          text,
    ADD CONSTRAINT llm_calls_attempt CHECK (attempt >= 1);


-- A job completes together with its charge, and stays with its team.

CREATE FUNCTION require_charge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (
        SELECT
        FROM ONLY public.credit_transactions
        WHERE job_id = NEW.job_id AND transaction_type = 'deduction' AND team_id = NEW.team_id
    ) THEN
        RAISE EXCEPTION 'job % completes only together with its deduction', NEW.job_id
            USING ERRCODE = 'SL003', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_complete_with_charge AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (NEW.status = 'completed' AND OLD.status <> 'completed') EXECUTE FUNCTION require_charge();

CREATE FUNCTION refuse_other_team() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'job % stays with team %', OLD.job_id, OLD.team_id
        USING ERRCODE = 'SL003', HINT = 'Start a new job for the other team.';
END
$$;

CREATE TRIGGER jobs_stay_with_team BEFORE UPDATE ON jobs
    FOR EACH ROW
    WHEN ((OLD.team_id, OLD.organization_id) IS DISTINCT FROM (NEW.team_id, NEW.organization_id))
    EXECUTE FUNCTION refuse_other_team();
