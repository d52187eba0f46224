-- Teams, with what they may use and what they have left.

-- name: create(team_id, organization_id, team_alias, group_names, credits, metadata) :one
-- The team, its groups and its opening credits with their ledger row, or none of it. Says whether the team was
-- created (not where the id is taken) and what of the request is missing.
WITH request AS (
    SELECT
        EXISTS (SELECT FROM organizations WHERE organization_id = %(organization_id)s) AS organization_exists,
        ARRAY(
            SELECT asked.group_name
            FROM unnest(%(group_names)s::text[]) AS asked (group_name)
            WHERE NOT EXISTS (SELECT FROM model_groups g WHERE g.group_name = asked.group_name)
        ) AS missing_groups
),
created AS (
    INSERT INTO teams (team_id, organization_id, team_alias, metadata)
    SELECT %(team_id)s, %(organization_id)s, %(team_alias)s, %(metadata)s
    FROM request
    WHERE organization_exists AND missing_groups = '{}'
    ON CONFLICT (team_id) DO NOTHING
    RETURNING team_id, organization_id
),
assigned AS (
    INSERT INTO team_model_groups (team_id, group_name)
    SELECT created.team_id, asked.group_name
    FROM created, unnest(%(group_names)s::text[]) AS asked (group_name)
),
opening AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after,
        reason, idempotency_key
    )
    SELECT
        team_id, organization_id, 1, 'allocation', %(credits)s::bigint, 0, %(credits)s::bigint,
        'Opening credits', 'opening:' || team_id
    FROM created
    WHERE %(credits)s::bigint > 0
)
SELECT
    EXISTS (SELECT FROM created) AS created,
    organization_exists,
    missing_groups
FROM request;

-- name: get(team_id) :maybe
SELECT * FROM team_details WHERE team_id = %(team_id)s;

-- name: list(organization_id, status, row_limit) :many
SELECT *
FROM team_details
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)
ORDER BY team_id
LIMIT %(row_limit)s;

-- name: opening_credits(team_id) :one
-- What the team was created with; 0 where nothing.
SELECT coalesce(sum(credits_amount), 0)::bigint AS credits
FROM credit_transactions
WHERE idempotency_key = 'opening:' || %(team_id)s::text;
