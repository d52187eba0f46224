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

-- name: list(status, row_limit) :many
SELECT *
FROM model_group_details
WHERE (%(status)s::text IS NULL OR status = %(status)s)
ORDER BY group_name
LIMIT %(row_limit)s;

-- name: resolve(group_name, team_id) :maybe
-- What a job of the group would try, in order; with a team, also whether it may use the group.
SELECT
    g.group_name,
    g.status,
    t.team_id,
    a.group_name IS NOT NULL AS is_assigned,
    (
        SELECT coalesce(
            json_agg(json_build_object('model_name', m.model_name, 'priority', m.priority) ORDER BY m.priority),
            '[]'
        )
        FROM model_group_models m
        WHERE m.group_name = g.group_name AND m.is_active
    ) AS models
FROM model_groups g
LEFT JOIN teams t ON t.team_id = %(team_id)s
LEFT JOIN team_model_groups a ON a.team_id = t.team_id AND a.group_name = g.group_name
WHERE g.group_name = %(group_name)s;
