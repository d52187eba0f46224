-- What was used on each day, summed up hour by hour, and in each month, once that is over. What keeps it so:
-- sql/definitions/usage.sql.
--
-- None of these has a primary key, as only one transaction at a time writes sums; so what replicates them goes by whole
-- rows.

-- A row for each team and type of job. cost_usd is of the priced_calls, and margin_usd of the jobs that have one (NULL
-- where none has).
CREATE TABLE usage_days (
    day               date       NOT NULL, -- in UTC; of a month its first
    is_month          boolean    NOT NULL,
    team_id           identifier NOT NULL REFERENCES teams ON DELETE CASCADE,
    job_type          text       NOT NULL, -- '' of credits that moved for no job
    jobs              bigint     NOT NULL,
    jobs_completed    bigint     NOT NULL,
    jobs_failed       bigint     NOT NULL,
    jobs_cancelled    bigint     NOT NULL,
    jobs_open         bigint     NOT NULL,
    jobs_unpriced     bigint     NOT NULL,
    credits_charged   bigint     NOT NULL,
    credits_short     bigint     NOT NULL,
    credits_added     bigint     NOT NULL,
    credits_deducted  bigint     NOT NULL,
    credits_refunded  bigint     NOT NULL,
    credits_adjusted  bigint     NOT NULL,
    credits_expired   bigint     NOT NULL,
    calls             bigint     NOT NULL,
    failed_calls      bigint     NOT NULL,
    priced_calls      bigint     NOT NULL,
    unpriced_calls    bigint     NOT NULL,
    prompt_tokens     bigint     NOT NULL,
    completion_tokens bigint     NOT NULL,
    total_tokens      bigint     NOT NULL,
    cost_usd          numeric    NOT NULL,
    margin_usd        numeric
);

CREATE INDEX usage_days_by_team ON usage_days (team_id, day);
CREATE INDEX usage_days_by_month ON usage_days (day) WHERE is_month;
CREATE INDEX usage_days_by_day ON usage_days USING brin (day) WITH (pages_per_range = 16);
ALTER TABLE usage_days REPLICA IDENTITY FULL;

-- The calls of a day by the group that was asked and the model that was called, too.
CREATE TABLE usage_models (
    day               date       NOT NULL,
    is_month          boolean    NOT NULL,
    team_id           identifier NOT NULL REFERENCES teams ON DELETE CASCADE,
    job_type          text       NOT NULL,
    group_name        identifier NOT NULL,
    resolved_model    text       NOT NULL,
    calls             bigint     NOT NULL,
    failed_calls      bigint     NOT NULL,
    priced_calls      bigint     NOT NULL,
    unpriced_calls    bigint     NOT NULL,
    prompt_tokens     bigint     NOT NULL,
    completion_tokens bigint     NOT NULL,
    total_tokens      bigint     NOT NULL,
    cost_usd          numeric    NOT NULL
);

CREATE INDEX usage_models_by_team ON usage_models (team_id, day);
CREATE INDEX usage_models_by_month ON usage_models (day) WHERE is_month;
CREATE INDEX usage_models_by_day ON usage_models USING brin (day) WITH (pages_per_range = 16);
ALTER TABLE usage_models REPLICA IDENTITY FULL;

-- Of which teams something of a day has changed that was an hour old: of these, what was summed up does not count.
CREATE TABLE usage_changes (
    team_id identifier NOT NULL,
    day     date       NOT NULL
);

ALTER TABLE usage_changes REPLICA IDENTITY FULL;

-- Until when everything is summed up, and until when it is to be next, as soon as every transaction has ended that was
-- there when that was noted.
CREATE TABLE usage_state (
    is_only      boolean     PRIMARY KEY DEFAULT true,
    summed_until timestamptz NOT NULL DEFAULT '1970-01-01Z',
    next_until   timestamptz NOT NULL DEFAULT '1970-01-01Z',
    next_noted   xid8        NOT NULL DEFAULT '0',
    CONSTRAINT usage_state_is_only CHECK (is_only)
);

INSERT INTO usage_state DEFAULT VALUES;

-- What came within a time, of all teams: it lies together. (Their last pages are in the index as they are filled.)
CREATE INDEX llm_calls_by_time ON llm_calls USING brin (created_at)
    WITH (pages_per_range = 32, autosummarize = on);
CREATE INDEX credit_transactions_by_day ON credit_transactions USING brin (created_at)
    WITH (pages_per_range = 32, autosummarize = on);

INSERT INTO duties (duty) VALUES ('usage');
