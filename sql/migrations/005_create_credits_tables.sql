-- Credits: a ledger that only grows, the balances that follow from it, and schedules by which credits come by
-- themselves. What moves and guards them: sql/definitions/ledger.sql.

CREATE TABLE team_credits (
    team_id           identifier PRIMARY KEY REFERENCES teams ON DELETE CASCADE,
    credits_allocated bigint     NOT NULL DEFAULT 0,
    credits_used      bigint     NOT NULL DEFAULT 0,
    credits_reserved  bigint     NOT NULL DEFAULT 0,
    credits_remaining bigint     GENERATED ALWAYS AS (credits_allocated - credits_used) STORED,
    last_entry_no     bigint     NOT NULL DEFAULT 0,
    last_hold_no      bigint     NOT NULL DEFAULT 0, -- of the latest change of what is reserved
    credits_overdraft bigint     DEFAULT 0, -- how far below zero its free credits may go; NULL is without end
    -- Of its grants, as last_entry_no is of its ledger.
    credits_owed      bigint     NOT NULL DEFAULT 0, -- used beyond all of them: the next one pays it first
    next_expiry_at    timestamptz, -- when the next of them expires
    held_expired_at   timestamptz, -- when the last of those expired that open jobs still hold credits of
    CONSTRAINT team_credits_used CHECK (credits_used >= 0),
    CONSTRAINT team_credits_reserved CHECK (credits_reserved >= 0),
    CONSTRAINT team_credits_overdraft CHECK (credits_overdraft BETWEEN 0 AND 1000000000000000),
    CONSTRAINT team_credits_free CHECK (credits_allocated - credits_used >= credits_reserved - credits_overdraft)
) WITH (fillfactor = 50); -- every job updates its team's row twice: room on the page keeps those updates off the index

CREATE INDEX team_credits_by_expiry ON team_credits (next_expiry_at) WHERE next_expiry_at IS NOT NULL;

-- Credits are given away, included by a schedule, or paid for.
CREATE DOMAIN credit_category AS text
    CONSTRAINT credit_category_known CHECK (VALUE IN ('promotional', 'included', 'paid'));

CREATE TABLE credit_transactions (
    transaction_id   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    team_id          identifier  NOT NULL,
    organization_id  identifier  NOT NULL,
    entry_no         bigint      NOT NULL,
    job_id           uuid        REFERENCES jobs,
    transaction_type text        NOT NULL,
    credits_amount   bigint      NOT NULL,
    credits_before   bigint      NOT NULL,
    credits_after    bigint      NOT NULL,
    reason           text,
    idempotency_key  text,
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    source           text, -- where it comes from, such as the number of an invoice
    period           text, -- what it was granted for: 2026-11-22, 2026-W47 or 2026-11
    -- An allocation is a grant. Where this is not given, it is paid, of priority 50, and does not expire.
    category         credit_category,
    priority         integer, -- the lower is used first
    expires_at       timestamptz,
    grant_id         bigint, -- of an expiry: the transaction that granted what expires
    -- Who entered it, by which command and in which role, as in the audit log; of a deduction the role alone, for its
    -- job explains it.
    actor            text        DEFAULT coalesce(nullif(current_setting('saasllm.actor', true), ''), session_user),
    command          text        DEFAULT nullif(current_setting('saasllm.command', true), ''),
    role             text        NOT NULL DEFAULT session_user,
    CONSTRAINT credit_transactions_chain UNIQUE (team_id, entry_no),
    CONSTRAINT credit_transactions_team FOREIGN KEY (organization_id, team_id)
        REFERENCES teams (organization_id, team_id),
    CONSTRAINT credit_transactions_sum CHECK (credits_after = credits_before + credits_amount),
    CONSTRAINT credit_transactions_sign CHECK (
        CASE transaction_type
            WHEN 'allocation' THEN credits_amount > 0
            WHEN 'deduction' THEN credits_amount <= 0 -- of a job that is free, too: each has one
            WHEN 'refund' THEN credits_amount > 0
            WHEN 'expiry' THEN credits_amount <= 0 -- of a grant that is revoked, and which jobs hold all of
            WHEN 'adjustment' THEN credits_amount <> 0
            ELSE false
        END
    ),
    CONSTRAINT credit_transactions_names_job CHECK (
        (transaction_type IN ('deduction', 'refund')) = (job_id IS NOT NULL)
    ),
    CONSTRAINT credit_transactions_source CHECK (source <> '' AND length(source) <= 255),
    CONSTRAINT credit_transactions_grant CHECK (
        CASE transaction_type
            WHEN 'allocation' THEN
                grant_id IS NULL
                AND coalesce(priority BETWEEN 0 AND 100, true)
                AND coalesce(expires_at >= '1970-01-01' AND expires_at < '9999-01-01', true)
            ELSE
                (transaction_type = 'expiry') = (grant_id IS NOT NULL)
                AND num_nonnulls(category, priority, expires_at, period) = 0
        END
    )
);

-- A job is charged at most once, and given back at most once.
CREATE UNIQUE INDEX credit_transactions_once_a_job ON credit_transactions (job_id, transaction_type)
    WHERE job_id IS NOT NULL;
CREATE UNIQUE INDEX credit_transactions_idempotency_key ON credit_transactions (idempotency_key)
    WHERE idempotency_key IS NOT NULL;
-- A period is granted at most once.
CREATE UNIQUE INDEX credit_transactions_once_a_period ON credit_transactions (team_id, period)
    WHERE period IS NOT NULL;
-- What has expired of a grant.
CREATE INDEX credit_transactions_by_grant ON credit_transactions (grant_id) WHERE grant_id IS NOT NULL;
-- What a team was charged in a period.
CREATE INDEX credit_transactions_by_time ON credit_transactions (team_id, created_at);
-- The few entries that are no job's charge: what a report lists, however many jobs there were.
CREATE INDEX credit_transactions_not_deductions ON credit_transactions (team_id, created_at)
    WHERE transaction_type <> 'deduction';

-- What a team is granted for each day, ISO week or month, in UTC.
CREATE TABLE credit_schedules (
    team_id        identifier  PRIMARY KEY REFERENCES teams ON DELETE CASCADE,
    credits_amount bigint      NOT NULL,
    every          text        NOT NULL,
    mode           text        NOT NULL,
    credits_max    bigint,
    rollover       bigint, -- how much of what is left of a period lives one longer
    next_on        date        NOT NULL, -- the first day of the first period that was not granted yet
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT credit_schedules_amount CHECK (credits_amount BETWEEN 1 AND 1000000000000000),
    CONSTRAINT credit_schedules_every CHECK (every IN ('daily', 'weekly', 'monthly')),
    CONSTRAINT credit_schedules_mode CHECK (mode IN ('add', 'reset', 'top-up')),
    CONSTRAINT credit_schedules_max CHECK (credits_max IS NULL OR (mode = 'add' AND credits_max >= credits_amount)),
    CONSTRAINT credit_schedules_rollover CHECK (
        rollover IS NULL OR (mode = 'reset' AND rollover BETWEEN 1 AND credits_amount)
    ),
    CONSTRAINT credit_schedules_next_on CHECK (
        next_on >= '1970-01-01' AND next_on < '9999-01-01' -- a day that every client can read
        AND CASE every
            WHEN 'weekly' THEN EXTRACT(isodow FROM next_on) = 1
            WHEN 'monthly' THEN EXTRACT(day FROM next_on) = 1
            ELSE true
        END
    )
) WITH (fillfactor = 50); -- each allocation updates next_on: room on the page keeps that off the index
