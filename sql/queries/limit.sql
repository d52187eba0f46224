-- Limits, with how it stands with each.

-- name: set(organization_id, team_id, group_name, measure, per, amount, is_hard, alerts) :one
-- The whole limit, in the place of the one that there was; the same again is no change. Says what of the request is
-- missing: then nothing is done.
WITH request AS (
    SELECT
        %(organization_id)s::text IS NULL
            OR EXISTS (SELECT FROM organizations WHERE organization_id = %(organization_id)s) AS organization_exists,
        %(team_id)s::text IS NULL OR EXISTS (SELECT FROM teams WHERE team_id = %(team_id)s) AS team_exists,
        %(group_name)s::text IS NULL
            OR EXISTS (SELECT FROM model_groups WHERE group_name = %(group_name)s) AS group_exists
),
written AS (
    INSERT INTO limits AS l (organization_id, team_id, group_name, measure, per, amount, is_hard, alerts)
    SELECT
        %(organization_id)s, %(team_id)s, %(group_name)s, %(measure)s, %(per)s, %(amount)s, %(is_hard)s,
        %(alerts)s::integer[]
    FROM request
    WHERE organization_exists AND team_exists AND group_exists
    ON CONFLICT (coalesce(team_id, organization_id), (team_id IS NOT NULL), coalesce(group_name, ''), measure, per)
    DO UPDATE
    SET amount = excluded.amount,
        is_hard = excluded.is_hard,
        alerts = excluded.alerts,
        updated_at = now()
    WHERE (l.amount, l.is_hard, l.alerts) IS DISTINCT FROM (excluded.amount, excluded.is_hard, excluded.alerts)
)
SELECT * FROM request;

-- name: get(organization_id, team_id, group_name, measure, per) :maybe
SELECT
    limit_id, organization_id, team_id, group_name, measure, per, amount, is_hard, alerts, trim_scale(used) AS used,
    running, trim_scale(counted) AS counted, used_percent, alert_reached, room_at, created_at, updated_at
FROM limit_details
WHERE (organization_id, team_id, group_name)
      IS NOT DISTINCT FROM (%(organization_id)s::text, %(team_id)s::text, %(group_name)s::text)
  AND measure = %(measure)s
  AND per = %(per)s;

-- name: list(organization_id, team_id, group_name, measure, above, after, row_limit) :many
-- By the id; behind the limit `after`. An organization's are also those of its teams. Of `above` percent and more are
-- those of which so much is used.
SELECT
    limit_id, organization_id, team_id, group_name, measure, per, amount, is_hard, alerts, trim_scale(used) AS used,
    running, trim_scale(counted) AS counted, used_percent, alert_reached, room_at, created_at, updated_at
FROM limit_details
WHERE (
      %(organization_id)s::text IS NULL
      OR organization_id = %(organization_id)s
      OR team_id IN (SELECT t.team_id FROM teams t WHERE t.organization_id = %(organization_id)s)
  )
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(group_name)s::text IS NULL OR group_name = %(group_name)s)
  AND (%(measure)s::text IS NULL OR measure = %(measure)s)
  AND (%(above)s::integer IS NULL OR counted * 100 >= amount * %(above)s::integer)
  AND (%(after)s::bigint IS NULL OR limit_id > %(after)s)
ORDER BY limit_id
LIMIT %(row_limit)s;

-- name: remove(organization_id, team_id, group_name, measure, per) :maybe
DELETE FROM limits
WHERE (organization_id, team_id, group_name)
      IS NOT DISTINCT FROM (%(organization_id)s::text, %(team_id)s::text, %(group_name)s::text)
  AND measure = %(measure)s
  AND per = %(per)s
RETURNING limit_id;
