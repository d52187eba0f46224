-- What is run: a job is one business operation, an LLM call is one attempt to have a model answer.

-- One rule for the ids of organizations, teams and groups. Collation "C" orders them alike on every server.
CREATE DOMAIN identifier AS text COLLATE "C"
    CONSTRAINT identifier_form CHECK (VALUE ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$');

-- What a caller keeps beside a record: a JSON object of at most 64 KiB.
CREATE DOMAIN metadata_object AS jsonb
    CONSTRAINT metadata_is_object CHECK (jsonb_typeof(VALUE) = 'object')
    CONSTRAINT metadata_size CHECK (octet_length(VALUE::text) <= 65536);

CREATE TABLE jobs (
    job_id           uuid            PRIMARY KEY DEFAULT gen_random_uuid(),
    job_type         text            NOT NULL DEFAULT 'completion',
    status           text            NOT NULL DEFAULT 'pending',
    external_task_id text,
    error_message    text,
    metadata         metadata_object NOT NULL DEFAULT '{}',
    created_at       timestamptz     NOT NULL DEFAULT now(),
    started_at       timestamptz,
    completed_at     timestamptz,
    CONSTRAINT jobs_status CHECK (status IN ('pending', 'in_progress', 'completed', 'failed', 'cancelled')),
    CONSTRAINT jobs_completed_at CHECK ((completed_at IS NULL) = (status IN ('pending', 'in_progress')))
);

-- Tokens are the provider's own count; cost_usd is NULL where no price is known, which is not 0.
CREATE TABLE llm_calls (
    call_id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id            uuid        NOT NULL REFERENCES jobs,
    resolved_model    text        NOT NULL,
    prompt_tokens     integer,
    completion_tokens integer,
    total_tokens      integer,
    cost_usd          numeric,
    latency_ms        integer     NOT NULL,
    error             text,
    created_at        timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT llm_calls_tokens CHECK (prompt_tokens >= 0 AND completion_tokens >= 0 AND total_tokens >= 0),
    -- 'NaN' is greater than every number, so a lower bound alone would let it in.
    CONSTRAINT llm_calls_cost CHECK (cost_usd >= 0 AND cost_usd < 'Infinity')
);

CREATE INDEX llm_calls_by_job ON llm_calls (job_id, call_id);

-- A finished job does not change its status again: it would be charged twice, or a charge would lose its reason. For
-- the same reason a job keeps its id, begins open, and is not deleted.
CREATE FUNCTION refuse_job_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        RAISE EXCEPTION 'a job begins open, not %', NEW.status
            USING ERRCODE = 'SL003', HINT = 'Insert it as pending or in_progress.';
    ELSIF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'job % is part of its team''s history: DELETE is refused', OLD.job_id
            USING ERRCODE = 'SL003', HINT = 'Cancel an open job by its status.';
    ELSIF OLD.job_id IS DISTINCT FROM NEW.job_id THEN
        RAISE EXCEPTION 'job % keeps its id', OLD.job_id USING ERRCODE = 'SL003', HINT = 'Start a new job.';
    END IF;
    RAISE EXCEPTION 'job % is % and does not change its status again', OLD.job_id, OLD.status
        USING ERRCODE = 'SL003', HINT = 'Start a new job.';
END
$$;

CREATE TRIGGER jobs_begin_open BEFORE INSERT ON jobs
    FOR EACH ROW WHEN (NEW.status NOT IN ('pending', 'in_progress')) EXECUTE FUNCTION refuse_job_change();
CREATE TRIGGER jobs_finish_once BEFORE UPDATE ON jobs
    FOR EACH ROW
    WHEN (
        (OLD.status IN ('completed', 'failed', 'cancelled') AND NEW.status IS DISTINCT FROM OLD.status)
        OR NEW.job_id IS DISTINCT FROM OLD.job_id
    )
    EXECUTE FUNCTION refuse_job_change();
CREATE TRIGGER jobs_stay BEFORE DELETE ON jobs
    FOR EACH ROW EXECUTE FUNCTION refuse_job_change();
