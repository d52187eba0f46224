-- What is left of each grant of credits: of each allocation, each adjustment upwards, and what a refund could give back
-- to none. It follows from the ledger; what computes it: sql/definitions/credit_grants.sql.

CREATE TABLE credit_grants (
    -- The transaction that brought it. No foreign key: a purge would look up each row of the ledger here.
    grant_id        bigint          PRIMARY KEY,
    team_id         identifier      NOT NULL REFERENCES teams ON DELETE CASCADE,
    category        credit_category NOT NULL DEFAULT 'paid',
    priority        integer         NOT NULL DEFAULT 50,
    created_at      timestamptz     NOT NULL,
    expires_at      timestamptz, -- or when it was revoked
    credits_amount  bigint          NOT NULL,
    credits_used    bigint          NOT NULL DEFAULT 0,
    credits_expired bigint          NOT NULL DEFAULT 0,
    credits_left    bigint          GENERATED ALWAYS AS (credits_amount - credits_used - credits_expired) STORED,
    last_used_no    bigint, -- the entry up to which it was found to be used
    CONSTRAINT credit_grants_used CHECK (credits_used >= 0),
    CONSTRAINT credit_grants_expired CHECK (credits_expired >= 0),
    CONSTRAINT credit_grants_left CHECK (credits_amount - credits_used >= credits_expired)
);

CREATE INDEX credit_grants_by_team ON credit_grants (team_id, grant_id);
CREATE INDEX credit_grants_open ON credit_grants (team_id) WHERE credits_left > 0;

-- What was used of which grant by the deductions up to an entry, since the last such: what usage by category is summed
-- up from. Within one of these spans, in the order of use_id. No grant means the overdraft.
CREATE TABLE credit_uses (
    use_id   bigint     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    team_id  identifier NOT NULL REFERENCES teams ON DELETE CASCADE,
    last_no  bigint     NOT NULL,
    grant_id bigint     REFERENCES credit_grants ON DELETE CASCADE,
    credits  bigint     NOT NULL,
    CONSTRAINT credit_uses_credits CHECK (credits > 0)
);

CREATE INDEX credit_uses_by_team ON credit_uses (team_id, last_no);
CREATE INDEX credit_uses_by_grant ON credit_uses (grant_id) WHERE grant_id IS NOT NULL; -- a purge looks there
