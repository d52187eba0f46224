-- A job belongs to a team, holds credits of it under a lease, and knows which groups it used.

ALTER TABLE jobs
    ADD COLUMN team_id           identifier NOT NULL,
    ADD COLUMN organization_id   identifier NOT NULL,
    ADD COLUMN model_groups_used text[]     NOT NULL DEFAULT '{}',
    ADD COLUMN price_ids         bigint[]   NOT NULL DEFAULT '{}', -- of the groups, one for each; NULL is one credit
    ADD COLUMN lease_expires_at  timestamptz,
    -- What it has reserved. The changes of what a team has reserved are numbered: that with which the job began, the
    -- last one by which it came to hold more, and that with which it ended without being charged.
    ADD COLUMN credits_held      bigint     NOT NULL DEFAULT 1,
    ADD COLUMN credits_raised    bigint,
    ADD COLUMN hold_no           bigint     NOT NULL,
    ADD COLUMN raise_no          bigint,
    ADD COLUMN release_no        bigint,
    -- What it has cost, and what of that its team could not pay; by which of its prices, and whether that was to count
    -- something of which nobody knows how much it was.
    ADD COLUMN credits_charged   bigint,
    ADD COLUMN credits_short     bigint     NOT NULL DEFAULT 0,
    ADD COLUMN price_id          bigint,
    ADD COLUMN is_unpriced       boolean    NOT NULL DEFAULT false,
    ADD COLUMN idempotency_key   text,
    ADD COLUMN request_hash      text,
    ADD COLUMN is_queued         boolean    NOT NULL DEFAULT false, -- workers run it: see 013_create_job_queue.sql
    ADD CONSTRAINT jobs_team FOREIGN KEY (organization_id, team_id) REFERENCES teams (organization_id, team_id),
    -- Without a lease an open job would hold its credit for ever.
    ADD CONSTRAINT jobs_lease CHECK ((lease_expires_at IS NOT NULL) = (status IN ('pending', 'in_progress'))),
    ADD CONSTRAINT jobs_credits CHECK (
        credits_held >= 0
        AND credits_short >= 0
        AND (credits_charged IS NOT NULL) = (status = 'completed')
        AND credits_charged BETWEEN 0 AND credits_held
    ),
    ADD CONSTRAINT jobs_release CHECK ((release_no IS NOT NULL) = (status IN ('failed', 'cancelled'))),
    ADD CONSTRAINT jobs_request_hash CHECK ((idempotency_key IS NULL) = (request_hash IS NULL)),
    -- A time that no client can read would make the lists with it unreadable, too.
    ADD CONSTRAINT jobs_times CHECK (
        created_at >= '1970-01-01' AND created_at < '9999-01-01'
        AND started_at >= '1970-01-01' AND started_at < '9999-01-01'
        AND completed_at >= '1970-01-01' AND completed_at < '9999-01-01'
        AND lease_expires_at >= '1970-01-01' AND lease_expires_at < '9999-01-01'
    );

CREATE INDEX jobs_by_team ON jobs (team_id, created_at, job_id);
CREATE INDEX jobs_by_organization ON jobs (organization_id, created_at, job_id);
CREATE INDEX jobs_open ON jobs (team_id, lease_expires_at) WHERE status IN ('pending', 'in_progress');
CREATE INDEX jobs_by_release ON jobs (team_id, release_no) WHERE release_no IS NOT NULL;
CREATE INDEX jobs_by_raise ON jobs (team_id, raise_no) WHERE raise_no IS NOT NULL AND completed_at IS NULL;
-- What has ended lately: few of a big table's pages hold it. (The last ones are read in any case, until they are
-- summarized.)
CREATE INDEX jobs_by_end ON jobs USING brin (completed_at) WITH (autosummarize = on);
CREATE INDEX jobs_unpriced ON jobs (created_at) WHERE is_unpriced;
-- A key whose job failed or was cancelled is free again.
CREATE UNIQUE INDEX jobs_idempotency_key ON jobs (idempotency_key)
    WHERE idempotency_key IS NOT NULL AND status NOT IN ('failed', 'cancelled');

-- A call belongs to a job (a foreign key), and that to a team (another): its own team is not checked again.
ALTER TABLE llm_calls
    ADD COLUMN team_id          identifier NOT NULL,
    ADD COLUMN model_group_used identifier NOT NULL, -- the name: it outlives a group that is deleted
    ADD COLUMN attempt          integer    NOT NULL,
    ADD COLUMN purpose          text,
    ADD COLUMN finish_reason    text, -- why the model stopped: length and content_filter where the answer is not whole
    -- What was asked and answered, as far as the settings of the runner say that it is kept: nothing by default.
    ADD COLUMN prompt           text,
    ADD COLUMN answer           text,
    ADD CONSTRAINT llm_calls_attempt CHECK (attempt >= 1);

-- What a team has called in a period.
CREATE INDEX llm_calls_by_team ON llm_calls (team_id, created_at);

-- Jobs that were refused at their beginning, counted: a client that asks again and again fills no table.
CREATE TABLE job_refusals (
    refusal_id bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    team_id    identifier  NOT NULL REFERENCES teams ON DELETE CASCADE,
    group_name identifier  REFERENCES model_groups ON DELETE CASCADE, -- none of a job whose calls were to follow
    reason     text        NOT NULL,
    hour       timestamptz NOT NULL DEFAULT date_trunc('hour', now(), 'UTC'),
    refusals   bigint      NOT NULL DEFAULT 1,
    first_at   timestamptz NOT NULL DEFAULT now(),
    last_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT job_refusals_reason CHECK (
        reason IN (
            'organization_suspended', 'team_suspended', 'group_not_assigned', 'group_inactive', 'no_active_model',
            'limit_reached', 'insufficient_credits'
        )
    ),
    CONSTRAINT job_refusals_number CHECK (refusals >= 1),
    CONSTRAINT job_refusals_times CHECK (first_at >= '1970-01-01' AND last_at >= first_at AND last_at < '9999-01-01')
);

CREATE UNIQUE INDEX job_refusals_once_an_hour ON job_refusals (team_id, hour, reason, coalesce(group_name, ''));
CREATE INDEX job_refusals_by_group ON job_refusals (group_name);
