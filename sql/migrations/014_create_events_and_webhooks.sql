-- What happens, and who is told of it. What writes it: sql/definitions/events.sql; what sends it:
-- sql/definitions/webhooks.sql.

-- Written in the transaction in which it happens. Nothing refers to a team or an organization: an event outlives what
-- it tells of, but for a purge.
CREATE TABLE events (
    event_id        uuid        PRIMARY KEY, -- of version 7: it grows with the time
    event_type      text        NOT NULL,
    organization_id identifier, -- none of what concerns no single one
    team_id         identifier,
    data            jsonb       NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    -- Whoever follows the events asks for those of transactions that had not ended when it asked last.
    transaction     xid8        NOT NULL DEFAULT pg_current_xact_id(),
    is_dispatched   boolean     NOT NULL DEFAULT false, -- to the webhooks that want it
    sequence_no     bigint, -- in its organization, without a gap, in the order in which they were dispatched
    CONSTRAINT events_type CHECK (event_type ~ '^[a-z_]+\.[a-z_]+$'),
    CONSTRAINT events_data CHECK (jsonb_typeof(data) = 'object' AND octet_length(data::text) <= 18000),
    CONSTRAINT events_time CHECK (created_at >= '1970-01-01' AND created_at < '9999-01-01')
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05); -- each is updated once, as it is dispatched

CREATE INDEX events_new ON events (event_id) WHERE NOT is_dispatched;
CREATE INDEX events_by_organization ON events (organization_id, event_id);
CREATE INDEX events_by_transaction ON events (transaction);

-- The last sequence_no of an organization. It stays when the organization is deleted, of which an event tells.
CREATE TABLE event_counters (
    organization_id identifier PRIMARY KEY,
    last_no         bigint     NOT NULL
) WITH (fillfactor = 50);

INSERT INTO duties (duty) VALUES ('dispatch');

-- Of which a team's credits.low tells: whenever they fall to one of these.
ALTER TABLE team_credits
    ADD COLUMN low_credits bigint[] NOT NULL DEFAULT '{}',
    ADD CONSTRAINT team_credits_low CHECK (
        cardinality(low_credits) <= 10 AND array_position(low_credits, NULL) IS NULL
        AND -1000000000000000 <= ALL (low_credits) AND 1000000000000000 >= ALL (low_credits)
    );

-- Which alerts of a limit were told in which period: of each amount, so that one that was changed is told again. No
-- foreign key: whoever removes the limit would wait for a job that counts towards it, and that job for him.
CREATE TABLE limit_alerts (
    limit_id     bigint      NOT NULL,
    period_start timestamptz NOT NULL,
    amount       numeric     NOT NULL,
    alert        integer     NOT NULL, -- in percent of it
    PRIMARY KEY (limit_id, period_start, amount, alert),
    CONSTRAINT limit_alerts_time CHECK (period_start >= '1970-01-01' AND period_start < '9999-01-01')
);

ALTER TABLE audit_log
    DROP CONSTRAINT audit_log_noun,
    ADD CONSTRAINT audit_log_noun CHECK (
        noun IN ('organization', 'team', 'group', 'assignment', 'schedule', 'model', 'price', 'limit', 'webhook')
    );

-- Where events are sent: those of an organization, or all.
CREATE TABLE webhooks (
    webhook_id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    organization_id identifier  REFERENCES organizations ON DELETE CASCADE,
    url             text        NOT NULL,
    event_types     text[]      NOT NULL,
    allow_http      boolean     NOT NULL DEFAULT false,
    allow_private   boolean     NOT NULL DEFAULT false, -- addresses that are not of the internet
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT webhooks_url CHECK (url ~ '^https?://[^[:space:][:cntrl:]]+$' AND length(url) <= 2000),
    CONSTRAINT webhooks_scheme CHECK (allow_http OR url LIKE 'https://%'),
    CONSTRAINT webhooks_event_types CHECK (
        cardinality(event_types) BETWEEN 1 AND 100 AND array_position(event_types, NULL) IS NULL
    )
);

CREATE UNIQUE INDEX webhooks_once ON webhooks (coalesce(organization_id, ''), url);

-- How it stands with each: apart from what it is, which is audited.
CREATE TABLE webhook_states (
    webhook_id      bigint      PRIMARY KEY REFERENCES webhooks ON DELETE CASCADE,
    disabled_at     timestamptz,
    disabled_reason text,
    failing_since   timestamptz, -- the first failure since something was delivered
    retry_at        timestamptz, -- before which its endpoint wants nothing
    CONSTRAINT webhook_states_reason CHECK (disabled_reason IN ('by_hand', 'failing', 'gone')),
    CONSTRAINT webhook_states_disabled CHECK ((disabled_at IS NULL) = (disabled_reason IS NULL)),
    CONSTRAINT webhook_states_times CHECK (
        disabled_at >= '1970-01-01' AND disabled_at < '9999-01-01'
        AND failing_since >= '1970-01-01' AND failing_since < '9999-01-01'
        AND retry_at >= '1970-01-01' AND retry_at < '9999-01-01'
    )
) WITH (fillfactor = 50);

-- What signs its deliveries, encrypted by a key that the database does not have. While one is being replaced, both do.
CREATE TABLE webhook_secrets (
    secret_id  bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    webhook_id bigint      NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    secret     text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    CONSTRAINT webhook_secrets_time CHECK (expires_at >= '1970-01-01' AND expires_at < '9999-01-01')
);

CREATE INDEX webhook_secrets_by_webhook ON webhook_secrets (webhook_id);

-- An event on its way to a webhook.
CREATE TABLE webhook_deliveries (
    delivery_id bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id    uuid        NOT NULL REFERENCES events ON DELETE CASCADE,
    webhook_id  bigint      NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    status      text        NOT NULL DEFAULT 'pending',
    attempts    integer     NOT NULL DEFAULT 0, -- since it was last begun from the start
    next_at     timestamptz DEFAULT now(), -- when it is tried; while it is, when somebody else may
    claimed_at  timestamptz, -- since when it is being tried
    claim_no    bigint      NOT NULL DEFAULT 0, -- of how often: who was too slow does not speak for it any more
    created_at  timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz,
    CONSTRAINT webhook_deliveries_once UNIQUE (event_id, webhook_id),
    CONSTRAINT webhook_deliveries_status CHECK (status IN ('pending', 'succeeded', 'failed')),
    CONSTRAINT webhook_deliveries_ended CHECK (
        (status = 'pending') = (ended_at IS NULL) AND (status = 'pending') = (next_at IS NOT NULL)
    ),
    CONSTRAINT webhook_deliveries_times CHECK (
        next_at >= '1970-01-01' AND next_at < '9999-01-01' AND claimed_at >= '1970-01-01' AND claimed_at < '9999-01-01'
        AND ended_at >= '1970-01-01' AND ended_at < '9999-01-01'
    )
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05);

CREATE INDEX webhook_deliveries_due ON webhook_deliveries (webhook_id, next_at) WHERE status = 'pending';
CREATE INDEX webhook_deliveries_by_webhook ON webhook_deliveries (webhook_id, delivery_id);

-- Each time that one was tried, and what came of it.
CREATE TABLE webhook_attempts (
    attempt_id   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    delivery_id  bigint      NOT NULL REFERENCES webhook_deliveries ON DELETE CASCADE,
    attempted_at timestamptz NOT NULL,
    duration_ms  integer     NOT NULL,
    status_code  integer, -- none where no answer came
    error        text, -- none where it was delivered
    answer       text, -- the beginning of it
    CONSTRAINT webhook_attempts_duration CHECK (duration_ms >= 0),
    CONSTRAINT webhook_attempts_time CHECK (attempted_at >= '1970-01-01' AND attempted_at < '9999-01-01')
);

CREATE INDEX webhook_attempts_by_delivery ON webhook_attempts (delivery_id);
