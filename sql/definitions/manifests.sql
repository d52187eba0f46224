-- The records as a manifest has them, each as one JSON object.

-- What a price says, without what has its default.
CREATE FUNCTION price_record(price job_prices) RETURNS jsonb
LANGUAGE sql STABLE PARALLEL SAFE
RETURN jsonb_strip_nulls(
    jsonb_build_object(
        -- A job that is free costs 0 credits.
        'credits', CASE
            WHEN price.credits > 0
                OR num_nonnulls(
                    nullif(price.credits_per_usd, 0), nullif(price.credits_per_1000_prompt_tokens, 0),
                    nullif(price.credits_per_1000_completion_tokens, 0), nullif(price.minimum, 0)
                ) = 0
                THEN price.credits
        END,
        'credits_per_usd', nullif(trim_scale(price.credits_per_usd), 0),
        'markup_percent', nullif(trim_scale(price.markup_percent), 0),
        'credits_per_1000_prompt_tokens', nullif(trim_scale(price.credits_per_1000_prompt_tokens), 0),
        'credits_per_1000_completion_tokens', nullif(trim_scale(price.credits_per_1000_completion_tokens), 0),
        'minimum', nullif(price.minimum, 0),
        'maximum', price.maximum,
        'hold', nullif(price.hold, greatest(price.credits, price.minimum))
    )
);

-- Limits, in the same way.
CREATE VIEW limit_records AS
SELECT
    organization_id,
    team_id,
    group_name,
    measure,
    per,
    jsonb_strip_nulls(
        jsonb_build_object(
            'group_name', group_name, 'measure', measure, 'per', per, 'amount', trim_scale(amount),
            'is_hard', nullif(is_hard, true),
            'alerts', CASE
                WHEN alerts <> '{}' THEN (SELECT jsonb_agg(DISTINCT alert ORDER BY alert) FROM unnest(alerts) AS alert)
            END
        )
    ) AS record
FROM limits;

CREATE VIEW organization_records AS
SELECT
    organization_id,
    jsonb_build_object(
        'organization_id', organization_id, 'name', name, 'status', status, 'own_keys_only', own_keys_only,
        'price', (
            SELECT price_record(p)
            FROM job_prices p
            WHERE closed_at IS NULL
              AND team_id IS NULL
              AND coalesce(team_id, organization_id, '') = o.organization_id
              AND coalesce(group_name, '') = ''
              AND coalesce(job_type, '') = ''
        ),
        'limits', (
            SELECT coalesce(jsonb_agg(record ORDER BY measure, per), '[]')
            FROM limit_records l
            WHERE l.organization_id = o.organization_id
        ),
        'metadata', metadata
    ) AS record
FROM organizations o;

CREATE VIEW model_group_records AS
SELECT
    g.group_name,
    jsonb_build_object(
        'group_name', g.group_name, 'display_name', g.display_name, 'description', g.description, 'status', g.status,
        'price', (
            SELECT price_record(p)
            FROM job_prices p
            WHERE closed_at IS NULL
              AND coalesce(team_id, organization_id, '') = ''
              AND coalesce(group_name, '') = g.group_name
        ),
        'models', m.models
    ) AS record
FROM model_groups g
CROSS JOIN LATERAL (
    SELECT coalesce(
        jsonb_agg(jsonb_build_object('model_name', model_name, 'is_active', is_active) ORDER BY priority), '[]'
    ) AS models
    FROM model_group_models
    WHERE group_name = g.group_name
) m;

-- A time, in the form in which files and answers have it.
CREATE FUNCTION rfc_3339(moment timestamptz) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS') || CASE
    WHEN date_trunc('second', moment) <> moment THEN to_char(moment, '.US')
    ELSE ''
END || 'Z';

-- When credits expire that a file lets expire so, 90d after they are granted or at a time.
CREATE FUNCTION time_of_expiry(expires text, granted_at timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE
    WHEN expires ~ '^[0-9]+[smhdw]$' THEN granted_at + expires::interval
    ELSE expires::timestamptz
END;

-- With the credits that the team was opened with, which are not what it has.
CREATE VIEW team_records AS
SELECT
    t.team_id,
    t.organization_id,
    jsonb_build_object(
        'team_id', t.team_id, 'organization_id', t.organization_id, 'team_alias', t.team_alias, 'status', t.status,
        'model_groups', ARRAY(
            SELECT group_name FROM team_model_groups WHERE team_id = t.team_id ORDER BY group_name
        ),
        'credits', opening.record,
        'overdraft', (
            SELECT coalesce(to_jsonb(credits_overdraft), '"unlimited"') FROM team_credits WHERE team_id = t.team_id
        ),
        'low_credits', ARRAY(
            SELECT DISTINCT threshold
            FROM team_credits c
            CROSS JOIN LATERAL unnest(c.low_credits) AS threshold
            WHERE c.team_id = t.team_id
            ORDER BY threshold DESC
        ),
        'schedule', (
            SELECT jsonb_build_object(
                'credits_amount', credits_amount, 'every', every, 'mode', mode, 'credits_max', credits_max,
                'rollover', rollover, 'next_on', next_on
            )
            FROM credit_schedules
            WHERE team_id = t.team_id
        ),
        'price', (
            SELECT price_record(p)
            FROM job_prices p
            WHERE closed_at IS NULL
              AND team_id IS NOT NULL
              AND coalesce(team_id, organization_id, '') = t.team_id
              AND coalesce(group_name, '') = ''
              AND coalesce(job_type, '') = ''
        ),
        'limits', (
            SELECT coalesce(jsonb_agg(record ORDER BY group_name COLLATE "C" NULLS FIRST, measure, per), '[]')
            FROM limit_records l
            WHERE l.team_id = t.team_id
        ),
        'metadata', t.metadata
    ) AS record,
    opening.record AS credits,
    opening.granted_at
FROM teams t
CROSS JOIN LATERAL (
    SELECT
        CASE
            WHEN c.category <> 'paid' OR c.priority <> 50 OR c.expires_at IS NOT NULL THEN jsonb_strip_nulls(
                jsonb_build_object(
                    'amount', c.credits_amount,
                    'category', nullif(c.category::text, 'paid'),
                    'priority', nullif(c.priority, 50),
                    'expires', rfc_3339(c.expires_at)
                )
            )
            ELSE to_jsonb(coalesce(c.credits_amount, 0))
        END AS record,
        c.created_at AS granted_at
    FROM (SELECT) AS team
    LEFT JOIN credit_transactions c ON c.idempotency_key = 'opening:' || t.team_id AND c.team_id = t.team_id
) AS opening;

-- Those of whole organizations, groups and teams stand in their records: they are short. One of a group that is not
-- there holds for no job, and could not be applied.
CREATE VIEW price_records AS
SELECT
    coalesce('team_id=' || team_id, 'organization_id=' || organization_id, 'everywhere')
        || coalesce(' group_name=' || group_name, ' job_type=' || job_type, '') AS id,
    organization_id,
    team_id,
    job_type IS NULL AND num_nonnulls(organization_id, team_id, group_name) = 1 AS is_short,
    jsonb_strip_nulls(
        jsonb_build_object(
            'organization_id', organization_id, 'team_id', team_id, 'group_name', group_name, 'job_type', job_type
        )
    ) || price_record(p) AS record
FROM job_prices p
WHERE closed_at IS NULL
  AND (group_name IS NULL OR EXISTS (SELECT FROM model_groups g WHERE g.group_name = p.group_name));

-- Without their secrets, and without what has come of them.
CREATE VIEW webhook_records AS
SELECT
    coalesce('organization_id=' || organization_id || ' ', '') || 'url=' || url AS id,
    organization_id,
    jsonb_strip_nulls(
        jsonb_build_object(
            'organization_id', organization_id, 'url', url,
            'event_types', ARRAY(SELECT DISTINCT event_type COLLATE "C" FROM unnest(event_types) AS event_type ORDER BY 1),
            'allow_http', allow_http, 'allow_private', allow_private
        )
    ) AS record
FROM webhooks;

-- Without their values. What a team's key at the proxy is, is no credential of its own.
CREATE VIEW credential_records AS
SELECT
    coalesce('team_id=' || team_id || ' ', 'organization_id=' || organization_id || ' ', '') || 'provider=' || provider
        AS id,
    organization_id,
    team_id,
    credential_id,
    jsonb_strip_nulls(
        jsonb_build_object(
            'organization_id', CASE WHEN team_id IS NULL THEN organization_id END, 'team_id', team_id
        )
    ) || jsonb_build_object('provider', provider, 'api_base', api_base) AS record
FROM credentials c
WHERE removed_at IS NULL AND NOT EXISTS (SELECT FROM proxy_keys k WHERE k.credential_id = c.credential_id);

CREATE VIEW key_records AS
SELECT team_id AS id, credential_id, token, jsonb_build_object('team_id', team_id) AS record
FROM proxy_keys
WHERE expires_at IS NULL;
