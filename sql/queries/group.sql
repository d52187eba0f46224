-- Model groups and their models.

-- name: create(group_name, display_name, description, model_names) :one
-- Whether the group was created: it is not where the name is taken. The order of the models is their priority.
WITH created AS (
    INSERT INTO model_groups (group_name, display_name, description)
    VALUES (%(group_name)s, %(display_name)s, %(description)s)
    ON CONFLICT (group_name) DO NOTHING
    RETURNING group_name
),
models AS (
    INSERT INTO model_group_models (group_name, model_name, priority)
    SELECT created.group_name, model.name, model.position - 1
    FROM created, unnest(%(model_names)s::text[]) WITH ORDINALITY AS model (name, position)
)
SELECT EXISTS (SELECT FROM created) AS created;

-- name: get(group_name) :maybe
SELECT * FROM model_group_details WHERE group_name = %(group_name)s;

-- name: list(status, search, sort, after, row_limit) :many
-- By the id, or by time where `sort` is newest or oldest; behind the row `after`. What is searched for is found first:
-- the planner cannot know how rare it is, and would walk along the order instead.
SELECT *
FROM model_group_details
WHERE (%(status)s::text IS NULL OR status = %(status)s)
  AND (
      %(search)s::text IS NULL
      OR group_name = ANY (
          ARRAY(
              SELECT group_name
              FROM model_groups
              WHERE search_vector(group_name, display_name) @@ search_query(%(search)s)
          )
      )
  )
  AND CASE
      WHEN %(after)s::text IS NULL THEN true
      WHEN %(sort)s::text = 'newest'
          THEN (created_at, group_name)
              < ((SELECT created_at FROM model_groups WHERE group_name = %(after)s), %(after)s)
      WHEN %(sort)s::text = 'oldest'
          THEN (created_at, group_name)
              > ((SELECT created_at FROM model_groups WHERE group_name = %(after)s), %(after)s)
      ELSE group_name > %(after)s
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'newest' THEN created_at END DESC,
    CASE WHEN %(sort)s::text = 'newest' THEN group_name END DESC,
    CASE WHEN %(sort)s::text = 'oldest' THEN created_at END,
    group_name
LIMIT %(row_limit)s;

-- name: resolve(group_name, team_id) :one
-- What a job of the group would try, in order, or the one reason why it may not; the team is asked for where it is
-- given.
SELECT
    CASE
        WHEN t.team_id IS NULL AND asked.team_id IS NOT NULL THEN 'team_not_found'
        WHEN g.group_name IS NULL THEN 'group_not_found'
        WHEN o.status <> 'active' THEN 'organization_suspended'
        WHEN t.status <> 'active' THEN 'team_suspended'
        WHEN t.team_id IS NOT NULL AND a.group_name IS NULL THEN 'group_not_assigned'
        WHEN g.status <> 'active' THEN 'group_inactive'
        WHEN m.models IS NULL THEN 'no_active_model'
    END AS refusal,
    t.organization_id,
    m.models
FROM (VALUES (%(team_id)s::text, %(group_name)s::text)) AS asked (team_id, group_name)
LEFT JOIN teams t ON t.team_id = asked.team_id
LEFT JOIN organizations o ON o.organization_id = t.organization_id
LEFT JOIN model_groups g ON g.group_name = asked.group_name
LEFT JOIN team_model_groups a ON a.team_id = t.team_id AND a.group_name = g.group_name
CROSS JOIN LATERAL (
    SELECT json_agg(json_build_object('model_name', model_name, 'priority', priority) ORDER BY priority) AS models
    FROM model_group_models
    WHERE group_name = g.group_name AND is_active
) m;

-- name: update(group_name, display_name, description, status, activated, deactivated) :one
-- What is not given stays. Nothing is done where the group lacks one of the models that are to be (de)activated.
WITH missing AS (
    SELECT asked.model_name
    FROM unnest(%(activated)s::text[] || %(deactivated)s::text[]) AS asked (model_name)
    WHERE NOT EXISTS (
        SELECT FROM model_group_models m WHERE m.group_name = %(group_name)s AND m.model_name = asked.model_name
    )
),
updated AS (
    UPDATE model_groups
    SET display_name = coalesce(%(display_name)s, display_name),
        description = coalesce(%(description)s, description),
        status = coalesce(%(status)s, status),
        updated_at = now()
    WHERE group_name = %(group_name)s AND NOT EXISTS (SELECT FROM missing)
    RETURNING group_name
),
models AS (
    UPDATE model_group_models
    SET is_active = (model_name = ANY (%(activated)s::text[]))
    WHERE group_name IN (SELECT group_name FROM updated)
      AND model_name = ANY (%(activated)s::text[] || %(deactivated)s::text[])
)
SELECT ARRAY(SELECT model_name FROM missing) AS missing_models;

-- name: lock(group_name) :maybe
-- So that of two who change its models at once the second sees what the first has done: within one statement it would
-- not, for a statement sees what was there when it began.
SELECT group_name FROM model_groups WHERE group_name = %(group_name)s FOR NO KEY UPDATE;

-- name: set_models(group_name, model_names) :one
-- Puts these models, in their order, in the place of all that the group has. The new ones are inserted after the old
-- ones are gone, since a model may be in both; then it stays active or inactive as it was.
WITH changed AS (
    UPDATE model_groups SET updated_at = now() WHERE group_name = %(group_name)s
),
removed AS (
    DELETE FROM model_group_models WHERE group_name = %(group_name)s RETURNING model_name, is_active
),
inserted AS (
    INSERT INTO model_group_models (group_name, model_name, priority, is_active)
    SELECT %(group_name)s, model.name, model.position - 1, coalesce(removed.is_active, true)
    FROM unnest(%(model_names)s::text[]) WITH ORDINALITY AS model (name, position)
    LEFT JOIN removed ON removed.model_name = model.name
    WHERE (SELECT count(*) FROM removed) >= 0
    RETURNING model_name
)
SELECT count(*) AS models FROM inserted;

-- name: existing(group_names) :many
SELECT group_name FROM model_groups WHERE group_name = ANY (%(group_names)s::text[]);

-- name: delete(group_names, unassign, if_exists) :one
-- Deletes groups that no team uses, or unassigns them first. All or none: nothing is done where one is used or missing,
-- but where only those that exist are meant. Says which are deleted, which are missing, and which are used by whom.
-- Of two who delete the same at once the second waits, and then misses what the first has deleted.
WITH present AS (
    SELECT group_name
    FROM model_groups
    WHERE group_name = ANY (%(group_names)s::text[])
    ORDER BY group_name
    FOR UPDATE
),
missing AS (
    SELECT asked.group_name
    FROM unnest(%(group_names)s::text[]) AS asked (group_name)
    WHERE asked.group_name NOT IN (SELECT group_name FROM present)
),
target AS (
    SELECT group_name FROM present WHERE %(if_exists)s OR NOT EXISTS (SELECT FROM missing)
),
users AS (
    SELECT group_name, team_id FROM team_model_groups WHERE group_name IN (SELECT group_name FROM present)
),
unassigned AS (
    DELETE FROM team_model_groups
    WHERE group_name IN (SELECT group_name FROM target) AND %(unassign)s
    RETURNING team_id
),
deleted AS (
    DELETE FROM model_groups
    WHERE group_name IN (SELECT group_name FROM target)
      AND (SELECT count(*) FROM unassigned) = (SELECT count(*) FROM users)
    RETURNING group_name
)
SELECT
    ARRAY(SELECT group_name::text FROM deleted ORDER BY group_name) AS deleted,
    ARRAY(SELECT group_name FROM missing) AS missing,
    ARRAY(
        SELECT json_build_object('group_name', group_name, 'teams', json_agg(team_id ORDER BY team_id))
        FROM users
        WHERE NOT %(unassign)s
        GROUP BY group_name
        ORDER BY group_name
    ) AS used;

-- name: complete(prefix) :many
-- The first ids that begin so, for a shell; '~' comes after every character of an id.
SELECT group_name AS id
FROM model_groups
WHERE group_name >= %(prefix)s AND group_name < %(prefix)s || '~'
ORDER BY group_name
LIMIT 100;

-- name: near(name) :many
-- Ids among which the one may be that was meant: those that begin alike, however many letters, and the first ones.
SELECT near.group_name AS id
FROM generate_series(1, length(%(name)s::text)) AS letters
CROSS JOIN LATERAL (
    SELECT group_name
    FROM model_groups
    WHERE group_name >= left(%(name)s::text, letters) AND group_name < left(%(name)s::text, letters) || '~'
    ORDER BY group_name
    LIMIT 20
) AS near
UNION
(SELECT group_name FROM model_groups ORDER BY group_name LIMIT 1000);
