-- How much an organization, a team, or a team with one group may use. What counts and holds:
-- sql/definitions/limits.sql.

CREATE TABLE limits (
    limit_id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    organization_id identifier  REFERENCES organizations ON DELETE CASCADE,
    team_id         identifier  REFERENCES teams ON DELETE CASCADE,
    group_name      identifier  REFERENCES model_groups ON DELETE CASCADE,
    measure         text        NOT NULL,
    per             text        NOT NULL,
    amount          numeric     NOT NULL,
    is_hard         boolean     NOT NULL DEFAULT true,
    alerts          integer[]   NOT NULL DEFAULT '{}', -- in percent of the amount
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT limits_where CHECK (
        num_nonnulls(organization_id, team_id) = 1 AND (group_name IS NULL OR team_id IS NOT NULL)
    ),
    CONSTRAINT limits_measure CHECK (measure IN ('jobs', 'credits', 'tokens', 'cost_usd')),
    CONSTRAINT limits_per CHECK (per IN ('minute', 'hour', 'day', 'week', 'month', 'total', 'concurrent')),
    CONSTRAINT limits_concurrent CHECK (per <> 'concurrent' OR measure = 'jobs'),
    CONSTRAINT limits_amount CHECK (
        amount BETWEEN 0 AND 1000000000000000
        AND amount = CASE measure WHEN 'cost_usd' THEN round(amount, 9) ELSE round(amount) END
    ),
    CONSTRAINT limits_alerts CHECK (
        cardinality(alerts) <= 10 AND 1 <= ALL (alerts) AND 1000 >= ALL (alerts) AND array_position(alerts, NULL) IS NULL
    )
);

CREATE UNIQUE INDEX limits_once ON limits (
    coalesce(team_id, organization_id), (team_id IS NOT NULL), coalesce(group_name, ''), measure, per
);
CREATE INDEX limits_by_organization ON limits (organization_id) WHERE organization_id IS NOT NULL;
CREATE INDEX limits_by_team ON limits (team_id) WHERE team_id IS NOT NULL;
CREATE INDEX limits_by_group ON limits (group_name) WHERE group_name IS NOT NULL;

-- What counts towards a limit, a row a period: nothing has to be set back. Of a limit per minute or hour, whose window
-- slides, a row is a second or a minute of it. A job counts where it began.
CREATE TABLE limit_counters (
    limit_id     bigint      NOT NULL REFERENCES limits ON DELETE CASCADE,
    period_start timestamptz NOT NULL,
    used         numeric     NOT NULL DEFAULT 0,
    running      bigint      NOT NULL DEFAULT 0, -- jobs that are open
    reserved     bigint      NOT NULL DEFAULT 0, -- credits that those hold
    expected     numeric, -- what a job has used lately: NULL before one has ended
    PRIMARY KEY (limit_id, period_start),
    CONSTRAINT limit_counters_used CHECK (used >= 0 AND used < 'Infinity'),
    CONSTRAINT limit_counters_running CHECK (running >= 0),
    CONSTRAINT limit_counters_reserved CHECK (reserved >= 0),
    CONSTRAINT limit_counters_expected CHECK (expected >= 0 AND expected < 'Infinity'),
    CONSTRAINT limit_counters_time CHECK (period_start >= '1970-01-01' AND period_start < '9999-01-01')
) WITH (fillfactor = 50); -- every job updates a row twice
