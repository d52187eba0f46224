-- What is run: a job is one business operation, an LLM call is one attempt to have a model answer.

-- One rule for the ids of organizations, teams and groups. Collation "C" orders them alike on every server. (Not
-- '{0,127}': a bounded repetition takes a regular expression ten times as long.)
CREATE DOMAIN identifier AS text COLLATE "C"
    CONSTRAINT identifier_form CHECK (VALUE ~ '^[A-Za-z0-9][A-Za-z0-9._-]*$' AND length(VALUE) <= 128);

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

-- Lists are read page by page, each beginning behind the last row of the one before. Most jobs have succeeded, are of
-- the usual type and have no metadata: the indexes for the others hold only those, and cost little.
CREATE INDEX jobs_by_time ON jobs (created_at, job_id);
CREATE INDEX jobs_by_external_task ON jobs (external_task_id, created_at, job_id) WHERE external_task_id IS NOT NULL;
CREATE INDEX jobs_by_type ON jobs (job_type, created_at, job_id) WHERE job_type <> 'completion';
CREATE INDEX jobs_not_completed ON jobs (status, created_at, job_id) WHERE status IN ('failed', 'cancelled');
CREATE INDEX jobs_metadata ON jobs USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}';

-- Tokens are the provider's own count; cost_usd is NULL where no price is known, which is not 0.
CREATE TABLE llm_calls (
    call_id           bigint      GENERATED ALWAYS AS IDENTITY,
    job_id            uuid        NOT NULL REFERENCES jobs,
    resolved_model    text        NOT NULL,
    prompt_tokens     integer,
    completion_tokens integer,
    total_tokens      integer,
    cost_usd          numeric,
    latency_ms        integer     NOT NULL,
    error             text,
    created_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, call_id), -- a call is found by its job: one index for both
    CONSTRAINT llm_calls_tokens CHECK (prompt_tokens >= 0 AND completion_tokens >= 0 AND total_tokens >= 0),
    -- 'NaN' is greater than every number, so a lower bound alone would let it in.
    CONSTRAINT llm_calls_cost CHECK (cost_usd >= 0 AND cost_usd < 'Infinity'),
    -- A time that no client can read would make the lists with it unreadable, too.
    CONSTRAINT llm_calls_time CHECK (created_at >= '1970-01-01' AND created_at < '9999-01-01')
);
