-- Teams, with what they may use and what they have left.

-- name: create(team_id, organization_id, team_alias, group_names, credits, category, priority, expires_at, expires_in, metadata) :one
-- The team, its groups and its opening credits with their ledger row, or none of it. Says whether the team was
-- created (not where the id is taken), what of the request is missing, and whether its credits would have expired.
WITH request AS (
    SELECT
        EXISTS (SELECT FROM organizations WHERE organization_id = %(organization_id)s) AS organization_exists,
        ARRAY(
            SELECT asked.group_name
            FROM unnest(%(group_names)s::text[]) AS asked (group_name)
            WHERE NOT EXISTS (SELECT FROM model_groups g WHERE g.group_name = asked.group_name)
        ) AS missing_groups,
        coalesce(%(expires_at)s::timestamptz <= clock_timestamp(), false)
            AND NOT EXISTS (SELECT FROM teams WHERE team_id = %(team_id)s) AS is_too_late
),
created AS (
    INSERT INTO teams (team_id, organization_id, team_alias, metadata)
    SELECT %(team_id)s, %(organization_id)s, %(team_alias)s, %(metadata)s
    FROM request
    WHERE organization_exists AND missing_groups = '{}' AND NOT is_too_late
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
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, category,
        priority, expires_at, reason, idempotency_key
    )
    SELECT
        team_id, organization_id, 1, 'allocation', %(credits)s::bigint, 0, %(credits)s::bigint, %(category)s,
        %(priority)s, coalesce(%(expires_at)s::timestamptz, clock_timestamp() + %(expires_in)s::interval),
        'Opening credits', 'opening:' || team_id
    FROM created
    WHERE %(credits)s::bigint > 0
)
SELECT
    EXISTS (SELECT FROM created) AS created,
    organization_exists,
    missing_groups,
    is_too_late
FROM request;

-- name: get(team_id) :maybe
-- With what a job of the usual type costs in each of its groups; NULL where no price says so.
SELECT
    d.*,
    (
        SELECT coalesce(
            json_agg(
                json_build_object(
                    'group_name', a.group_name,
                    'price', (
                        SELECT price_terms(p)
                        FROM price_of(d.team_id::text, d.organization_id::text, a.group_name::text, 'completion') p
                    )
                )
                ORDER BY a.group_name
            ),
            '[]'
        )
        FROM team_model_groups a
        WHERE a.team_id = d.team_id
    ) AS prices
FROM team_details d
WHERE team_id = %(team_id)s;

-- name: list(organization_id, status, group_name, metadata, search, sort, after, row_limit) :many
-- By the id, or by time where `sort` is newest or oldest; behind the row `after`. What is searched for is found first:
-- the planner cannot know how rare it is, and would walk along the order instead.
-- (`metadata <> '{}'` is the condition of the index.) A team of a suspended organization counts as suspended.
SELECT *
FROM team_details d
WHERE CASE %(status)s::text
      WHEN 'active' THEN status = 'active' AND organization_status = 'active'
      WHEN 'suspended' THEN status = 'suspended' OR organization_status = 'suspended'
      ELSE true
  END
  AND (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (
      %(group_name)s::text IS NULL
      OR EXISTS (SELECT FROM team_model_groups a WHERE a.team_id = d.team_id AND a.group_name = %(group_name)s)
  )
  AND (%(metadata)s::jsonb IS NULL OR (metadata @> %(metadata)s AND metadata <> '{}'))
  AND (
      %(search)s::text IS NULL
      OR team_id = ANY (
          ARRAY(SELECT team_id FROM teams WHERE search_vector(team_id, team_alias) @@ search_query(%(search)s))
      )
  )
  AND CASE
      WHEN %(after)s::text IS NULL THEN true
      WHEN %(sort)s::text = 'newest'
          THEN (created_at, team_id) < ((SELECT created_at FROM teams WHERE team_id = %(after)s), %(after)s)
      WHEN %(sort)s::text = 'oldest'
          THEN (created_at, team_id) > ((SELECT created_at FROM teams WHERE team_id = %(after)s), %(after)s)
      ELSE team_id > %(after)s
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'newest' THEN created_at END DESC,
    CASE WHEN %(sort)s::text = 'newest' THEN team_id END DESC,
    CASE WHEN %(sort)s::text = 'oldest' THEN created_at END,
    team_id
LIMIT %(row_limit)s;

-- name: opening_credits(team_id) :one
-- What the team was created with; 0 where nothing.
SELECT
    coalesce(c.credits_amount, 0) AS credits,
    coalesce(c.category, 'paid') AS category,
    coalesce(c.priority, 50) AS priority,
    c.expires_at,
    coalesce(c.created_at, t.created_at) AS granted_at
FROM teams t
LEFT JOIN credit_transactions c ON c.idempotency_key = 'opening:' || t.team_id
WHERE t.team_id = %(team_id)s;

-- name: update(team_id, team_alias, metadata, unset_metadata) :maybe
-- What is not given stays; metadata is merged, key by key.
UPDATE teams
SET team_alias = coalesce(%(team_alias)s, team_alias),
    metadata = (metadata || %(metadata)s::jsonb) - %(unset_metadata)s::text[],
    updated_at = now()
WHERE team_id = %(team_id)s
RETURNING team_id;

-- name: set_overdraft(team_id, credits_overdraft) :maybe
-- How far below zero the team may go, a number or 'unlimited'; unless its free credits are further down already. Says
-- whether it is set, and how far down they are.
WITH wanted AS (
    SELECT nullif(%(credits_overdraft)s::text, 'unlimited')::bigint AS credits
),
written AS (
    UPDATE team_credits c
    SET credits_overdraft = wanted.credits
    FROM wanted
    WHERE c.team_id = %(team_id)s
      AND coalesce(c.credits_remaining - c.credits_reserved + wanted.credits >= 0, true)
    RETURNING c.team_id
)
SELECT
    EXISTS (SELECT FROM written) AS is_set,
    c.credits_reserved - c.credits_remaining AS credits_below,
    c.credits_reserved
FROM team_credits c
WHERE c.team_id = %(team_id)s;

-- name: set_low_credits(team_id, low_credits) :maybe
UPDATE team_credits SET low_credits = %(low_credits)s::bigint[] WHERE team_id = %(team_id)s RETURNING team_id;

-- name: set_status(team_id, status) :maybe
-- And whether the team has keys at the proxy, which is then to know of it.
UPDATE teams t
SET updated_at = CASE WHEN status = %(status)s THEN updated_at ELSE now() END,
    status = %(status)s
WHERE team_id = %(team_id)s
RETURNING team_id, EXISTS (SELECT FROM proxy_keys k WHERE k.team_id = t.team_id) AS has_keys;

-- name: lock(team_id) :maybe
-- So that of two who change its groups at once the second sees what the first has done.
SELECT team_id FROM teams WHERE team_id = %(team_id)s FOR NO KEY UPDATE;

-- name: assign(team_id, group_names, is_replacing) :one
-- Lets the team use these groups, and where they replace, no others. Nothing is done where one of them is missing.
WITH missing AS (
    SELECT asked.group_name
    FROM unnest(%(group_names)s::text[]) AS asked (group_name)
    WHERE NOT EXISTS (SELECT FROM model_groups g WHERE g.group_name = asked.group_name)
),
target AS (
    UPDATE teams
    SET updated_at = now()
    WHERE team_id = %(team_id)s AND NOT EXISTS (SELECT FROM missing)
    RETURNING team_id
),
unassigned AS (
    DELETE FROM team_model_groups
    WHERE team_id IN (SELECT team_id FROM target)
      AND %(is_replacing)s
      AND group_name <> ALL (%(group_names)s::text[])
),
assigned AS (
    INSERT INTO team_model_groups (team_id, group_name)
    SELECT target.team_id, asked.group_name
    FROM target, unnest(%(group_names)s::text[]) AS asked (group_name)
    ON CONFLICT (team_id, group_name) DO NOTHING
)
SELECT ARRAY(SELECT group_name FROM missing) AS missing_groups;

-- name: unassign(team_id, group_names) :one
-- Takes these groups from the team; says which of them it did not have. Nothing is done where one of them is missing.
WITH missing AS (
    SELECT asked.group_name
    FROM unnest(%(group_names)s::text[]) AS asked (group_name)
    WHERE NOT EXISTS (SELECT FROM model_groups g WHERE g.group_name = asked.group_name)
),
unassigned AS (
    DELETE FROM team_model_groups
    WHERE team_id = %(team_id)s
      AND group_name = ANY (%(group_names)s::text[])
      AND NOT EXISTS (SELECT FROM missing)
    RETURNING group_name
)
SELECT
    ARRAY(SELECT group_name FROM missing) AS missing_groups,
    ARRAY(
        SELECT asked.group_name
        FROM unnest(%(group_names)s::text[]) AS asked (group_name)
        WHERE asked.group_name NOT IN (SELECT group_name FROM unassigned)
    ) AS not_assigned;

-- name: delete(team_id) :one
-- Deletes a team without history; says whether it did and what history there is.
WITH history AS (
    SELECT
        (SELECT count(*) FROM jobs WHERE team_id = %(team_id)s) AS jobs,
        (SELECT count(*) FROM credit_transactions WHERE team_id = %(team_id)s) AS transactions
),
deleted AS (
    DELETE FROM teams
    USING history
    WHERE team_id = %(team_id)s AND history.jobs = 0 AND history.transactions = 0
    RETURNING team_id
)
SELECT EXISTS (SELECT FROM deleted) AS deleted, jobs, transactions FROM history;

-- name: lock_to_purge(organization_id, team_id) :many
-- The team, or all teams of the organization, locked against every change; in the order in which all others lock too:
-- schedules, open jobs, balances, teams. No job begins and no credit moves until the end of the transaction. Before all
-- of them, what sums up their usage.
WITH asked AS (
    SELECT team_id FROM teams WHERE team_id = %(team_id)s OR organization_id = %(organization_id)s
),
usage AS (
    SELECT FROM usage_state FOR SHARE
),
schedule AS (
    SELECT team_id
    FROM credit_schedules
    WHERE team_id IN (SELECT team_id FROM asked) AND (SELECT count(*) FROM usage) >= 0
    ORDER BY team_id
    FOR UPDATE
),
open_job AS (
    SELECT job_id
    FROM jobs
    WHERE team_id IN (SELECT team_id FROM asked)
      AND status IN ('pending', 'in_progress')
      AND (SELECT count(*) FROM schedule) >= 0
    ORDER BY job_id
    FOR UPDATE
),
balance AS (
    SELECT team_id
    FROM team_credits
    WHERE team_id IN (SELECT team_id FROM asked) AND (SELECT count(*) FROM open_job) >= 0
    ORDER BY team_id
    FOR UPDATE
)
SELECT team_id
FROM teams
WHERE team_id IN (SELECT team_id FROM asked) AND (SELECT count(*) FROM balance) >= 0
ORDER BY team_id
FOR UPDATE;

-- name: history(organization_id, team_id, is_redacting) :one
-- How much a purge would remove now; no teams where there is no such team or organization.
WITH asked AS (
    SELECT team_id FROM teams WHERE team_id = %(team_id)s OR organization_id = %(organization_id)s
)
SELECT jsonb_build_object(
    'teams', (SELECT coalesce(jsonb_agg(team_id), '[]') FROM asked),
    'jobs', (SELECT count(*) FROM jobs WHERE team_id IN (SELECT team_id FROM asked)),
    'llm_calls', (SELECT count(*) FROM llm_calls WHERE team_id IN (SELECT team_id FROM asked)),
    'credit_transactions', (SELECT count(*) FROM credit_transactions WHERE team_id IN (SELECT team_id FROM asked)),
    'credits_remaining', (
        SELECT coalesce(sum(credits_remaining), 0) FROM team_credits WHERE team_id IN (SELECT team_id FROM asked)
    )
) || CASE
    WHEN %(is_redacting)s THEN jsonb_build_object(
        'audit_records', (
            SELECT count(*)
            FROM audit_log
            WHERE action <> 'purge'
              AND CASE
                  WHEN %(team_id)s::text IS NULL THEN organization_id = %(organization_id)s
                  ELSE team_id = %(team_id)s
                      AND organization_id = (SELECT organization_id FROM teams WHERE team_id = %(team_id)s)
              END
        )
    )
    ELSE '{}'
END AS removed;

-- name: purge(organization_id, team_id, is_redacting) :one
-- Deletes the team, or the organization with all its teams, and all their history. What is left is one record of it,
-- and what the audit log has of them; where it is redacted, without names and metadata.
WITH purged AS (
    SELECT t.team_id, t.organization_id, c.credits_remaining
    FROM teams t
    JOIN team_credits c USING (team_id)
    WHERE t.team_id = %(team_id)s OR t.organization_id = %(organization_id)s
),
calls AS (
    DELETE FROM llm_calls WHERE team_id IN (SELECT team_id FROM purged) RETURNING 1
),
others AS ( -- that somebody has recorded of its jobs under another team, and that would keep them
    DELETE FROM llm_calls l
    USING jobs j
    WHERE j.job_id = l.job_id AND j.team_id IN (SELECT team_id FROM purged) AND l.team_id <> j.team_id
),
transactions AS (
    DELETE FROM credit_transactions WHERE team_id IN (SELECT team_id FROM purged) RETURNING 1
),
finished AS (
    DELETE FROM jobs WHERE team_id IN (SELECT team_id FROM purged) RETURNING 1
),
told AS (
    DELETE FROM events
    WHERE organization_id = coalesce(%(organization_id)s::text, (SELECT min(organization_id) FROM purged))
      AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
),
redacted AS (
    UPDATE audit_log
    SET command = redacted_command(command),
        before = redacted_record(before),
        after = redacted_record(after)
    WHERE %(is_redacting)s
      AND action <> 'purge'
      AND organization_id = coalesce(%(organization_id)s::text, (SELECT min(organization_id) FROM purged))
      AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
    RETURNING 1
),
record AS (
    INSERT INTO audit_log (noun, action, organization_id, team_id, before)
    SELECT
        CASE WHEN %(team_id)s::text IS NULL THEN 'organization' ELSE 'team' END,
        'purge',
        coalesce(%(organization_id)s::text, min(organization_id)),
        %(team_id)s,
        jsonb_build_object(
            'teams', coalesce(jsonb_agg(team_id ORDER BY team_id), '[]'),
            'jobs', (SELECT count(*) FROM finished),
            'llm_calls', (SELECT count(*) FROM calls),
            'credit_transactions', (SELECT count(*) FROM transactions),
            'credits_remaining', coalesce(sum(credits_remaining), 0)
        ) || CASE
            WHEN %(is_redacting)s THEN jsonb_build_object('audit_records', (SELECT count(*) FROM redacted))
            ELSE '{}'
        END
    FROM purged
    RETURNING before
),
deleted AS ( -- behind the record, which tells only of what is there
    DELETE FROM teams WHERE team_id IN (SELECT team_id FROM purged) AND EXISTS (SELECT FROM record)
),
organization AS (
    DELETE FROM organizations WHERE organization_id = %(organization_id)s AND EXISTS (SELECT FROM record)
)
SELECT before AS removed FROM record;

-- name: complete(prefix) :many
-- The first ids that begin so, for a shell; '~' comes after every character of an id.
SELECT team_id AS id
FROM teams
WHERE team_id >= %(prefix)s AND team_id < %(prefix)s || '~'
ORDER BY team_id
LIMIT 100;

-- name: near(name) :many
-- Ids among which the one may be that was meant: those that begin alike, however many letters, and the first ones.
SELECT near.team_id AS id
FROM generate_series(1, length(%(name)s::text)) AS letters
CROSS JOIN LATERAL (
    SELECT team_id
    FROM teams
    WHERE team_id >= left(%(name)s::text, letters) AND team_id < left(%(name)s::text, letters) || '~'
    ORDER BY team_id
    LIMIT 20
) AS near
UNION
(SELECT team_id FROM teams ORDER BY team_id LIMIT 1000);
