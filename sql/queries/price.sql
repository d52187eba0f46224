-- Prices of jobs, in versions: what is current has no closed_at.

-- name: lock(organization_id, team_id, group_name, job_type) :maybe
-- The current price of exactly this scope, which nobody else changes until the end of the transaction.
SELECT price_id
FROM job_prices
WHERE closed_at IS NULL
  AND coalesce(team_id, organization_id, '') = coalesce(%(team_id)s::text, %(organization_id)s::text, '')
  AND (team_id IS NOT NULL) = (%(team_id)s::text IS NOT NULL)
  AND coalesce(group_name, '') = coalesce(%(group_name)s::text, '')
  AND coalesce(job_type, '') = coalesce(%(job_type)s::text, '')
FOR NO KEY UPDATE;

-- name: set(current_id, organization_id, team_id, group_name, job_type, credits, credits_per_usd, markup_percent, credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens, minimum, maximum, hold) :one
-- Closes the current version, where the scope has one, and adds the new one; the same again is no change. Nothing is
-- done where what the price is for is missing. The group is locked against its deletion, which closes the prices that
-- it has.
WITH model_group AS (
    SELECT group_name FROM model_groups WHERE group_name = %(group_name)s FOR KEY SHARE
),
request AS (
    SELECT
        CASE
            WHEN %(organization_id)s::text IS NOT NULL
                AND NOT EXISTS (SELECT FROM organizations WHERE organization_id = %(organization_id)s)
                THEN 'organization'
            WHEN %(team_id)s::text IS NOT NULL AND NOT EXISTS (SELECT FROM teams WHERE team_id = %(team_id)s)
                THEN 'team'
            WHEN %(group_name)s::text IS NOT NULL AND NOT EXISTS (SELECT FROM model_group)
                THEN 'group'
        END AS missing,
        EXISTS (
            SELECT
            FROM job_prices
            WHERE price_id = %(current_id)s
              AND (
                  credits, credits_per_usd, markup_percent, credits_per_1000_prompt_tokens,
                  credits_per_1000_completion_tokens, minimum, maximum, hold
              ) IS NOT DISTINCT FROM (
                  %(credits)s::bigint, %(credits_per_usd)s::numeric, %(markup_percent)s::numeric,
                  %(credits_per_1000_prompt_tokens)s::numeric, %(credits_per_1000_completion_tokens)s::numeric,
                  %(minimum)s::bigint, %(maximum)s::bigint, %(hold)s::bigint
              )
        ) AS is_same
),
closed AS (
    UPDATE job_prices
    SET closed_at = greatest(created_at, now())
    FROM request
    WHERE price_id = %(current_id)s AND missing IS NULL AND NOT is_same
    RETURNING closed_at
),
added AS (
    INSERT INTO job_prices (
        organization_id, team_id, group_name, job_type, credits, credits_per_usd, markup_percent,
        credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens, minimum, maximum, hold, created_at
    )
    SELECT
        %(organization_id)s, %(team_id)s, %(group_name)s, %(job_type)s, %(credits)s, %(credits_per_usd)s,
        %(markup_percent)s, %(credits_per_1000_prompt_tokens)s, %(credits_per_1000_completion_tokens)s, %(minimum)s,
        %(maximum)s, %(hold)s,
        coalesce((SELECT closed_at FROM closed), now()) -- behind the other, as there is one current version
    FROM request
    WHERE missing IS NULL AND NOT is_same
    RETURNING price_id
)
SELECT missing, coalesce((SELECT price_id FROM added), %(current_id)s::bigint) AS price_id FROM request;

-- name: get(price_id) :one
SELECT
    price_id, organization_id, team_id, group_name, job_type, credits, credits_per_usd, markup_percent,
    credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens, minimum, maximum, hold, created_at, closed_at
FROM job_prices
WHERE price_id = %(price_id)s;

-- name: list(organization_id, team_id, group_name, job_type, is_closed_wanted, after, row_limit) :many
-- By the number, so that a later version comes later; behind the price `after`. Those of an organization are also those
-- of its teams.
SELECT
    price_id, organization_id, team_id, group_name, job_type, credits, credits_per_usd, markup_percent,
    credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens, minimum, maximum, hold, created_at, closed_at
FROM job_prices
WHERE (%(is_closed_wanted)s::boolean OR closed_at IS NULL)
  AND (
      %(organization_id)s::text IS NULL
      OR organization_id = %(organization_id)s
      OR team_id IN (SELECT team_id FROM teams WHERE organization_id = %(organization_id)s)
  )
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(group_name)s::text IS NULL OR group_name = %(group_name)s)
  AND (%(job_type)s::text IS NULL OR job_type = %(job_type)s)
  AND (%(after)s::bigint IS NULL OR price_id > %(after)s)
ORDER BY price_id
LIMIT %(row_limit)s;

-- name: resolve(team_id, group_name, job_type) :one
-- The price that holds for a job of the team, and why; without one a job costs one credit. Or which record is missing.
SELECT
    CASE
        WHEN t.team_id IS NULL THEN 'team'
        WHEN asked.group_name IS NOT NULL AND g.group_name IS NULL THEN 'group'
    END AS missing,
    CASE
        WHEN p.price_id IS NULL THEN 'default'
        WHEN p.team_id IS NOT NULL THEN 'team'
        WHEN p.organization_id IS NOT NULL THEN 'organization'
        ELSE 'everywhere'
    END AS source,
    CASE
        WHEN p.job_type IS NOT NULL THEN 'job type'
        WHEN p.group_name IS NOT NULL THEN 'group'
        ELSE 'every job'
    END AS covers,
    p.price_id,
    p.organization_id,
    p.team_id,
    p.group_name,
    p.job_type,
    coalesce(p.credits, 1) AS credits,
    coalesce(p.credits_per_usd, 0) AS credits_per_usd,
    coalesce(p.markup_percent, 0) AS markup_percent,
    coalesce(p.credits_per_1000_prompt_tokens, 0) AS credits_per_1000_prompt_tokens,
    coalesce(p.credits_per_1000_completion_tokens, 0) AS credits_per_1000_completion_tokens,
    coalesce(p.minimum, 0) AS minimum,
    p.maximum,
    coalesce(p.hold, 1) AS hold,
    p.created_at
FROM (VALUES (%(team_id)s::text, %(group_name)s::text)) AS asked (team_id, group_name)
LEFT JOIN teams t ON t.team_id = asked.team_id
LEFT JOIN model_groups g ON g.group_name = asked.group_name
LEFT JOIN LATERAL price_of(t.team_id::text, t.organization_id::text, asked.group_name, %(job_type)s) p ON true;

-- name: remove(price_id) :none
UPDATE job_prices SET closed_at = greatest(created_at, now()) WHERE price_id = %(price_id)s;

-- name: complete_job_type(prefix) :many
-- The first types of jobs that have a price, and begin so, for a shell.
SELECT DISTINCT job_type AS id
FROM job_prices
WHERE closed_at IS NULL AND starts_with(job_type, %(prefix)s)
ORDER BY id
LIMIT 100;
