-- Manifests: what the files say is staged, compared with what is there, and written where it differs; each step for all
-- records at once. The staging tables are temporary, and end with the transaction: behind a pooler, the next
-- one may be in another session.

-- name: create_staged() :none
-- The records of the files: `fields` are those that a record gives, `source`, `document`, `section` and `place` tell
-- where it stands.
CREATE TEMPORARY TABLE staged (
    noun     text             NOT NULL,
    id       text COLLATE "C" NOT NULL,
    fields   jsonb            NOT NULL,
    source   integer          NOT NULL,
    document bigint           NOT NULL,
    section  text             NOT NULL,
    place    integer          NOT NULL
) ON COMMIT DROP;

-- name: create_change() :none
-- What is to be done: `create`, `update`, `delete`, `suspend`; or `differ`, which is told and not done. `before` and
-- `after` hold the fields that change, or all that are given.
CREATE TEMPORARY TABLE change (
    noun   text             NOT NULL,
    id     text COLLATE "C" NOT NULL,
    action text             NOT NULL,
    before jsonb,
    after  jsonb
) ON COMMIT DROP;

-- name: stage() :copy
COPY staged (noun, id, fields, source, document, section, place) FROM STDIN;

-- name: analyze_staged() :none
ANALYZE staged;

-- name: analyze_change() :none
ANALYZE change;

-- name: errors(row_limit) :many
-- What is wrong with the records beside one another and beside what is there: the `field` of a record, its `value`, and
-- where it stands.
WITH repeated AS (
    SELECT *
    FROM (
        SELECT s.*, row_number() OVER (PARTITION BY noun, id ORDER BY source, document, place) AS number FROM staged s
    ) AS numbered
    WHERE number > 1
),
team AS (
    SELECT s.*, s.fields ->> 'organization_id' AS organization_id, t.organization_id AS existing_organization_id
    FROM staged s
    LEFT JOIN teams t ON t.team_id = s.id
    WHERE s.noun = 'team'
),
-- What may be referred to, as one list: of two NOT EXISTS the planner thinks that the second is left with few rows.
known AS (
    SELECT noun, id FROM staged WHERE noun <> 'team'
    UNION ALL
    SELECT 'organization', organization_id FROM organizations
    UNION ALL
    SELECT 'group', group_name FROM model_groups
),
wanted AS (
    SELECT team.*, g.group_name, g.position - 1 AS position
    FROM team
    CROSS JOIN LATERAL jsonb_array_elements_text(team.fields -> 'model_groups')
        WITH ORDINALITY AS g (group_name, position)
)
-- UNION, since of the copies of a template all stand at its place.
SELECT source, document, section, place, 'repeated' AS error, NULL AS field, NULL::bigint AS position, id AS value
FROM repeated
UNION
SELECT source, document, section, place, 'metadata_too_large', 'metadata', NULL, NULL
FROM staged
WHERE octet_length((fields -> 'metadata')::text) > 65536
UNION
SELECT source, document, section, place, 'organization_not_found', 'organization_id', NULL, organization_id
FROM team
WHERE organization_id IS NOT NULL -- else it is told already
  AND NOT EXISTS (SELECT FROM known WHERE known.noun = 'organization' AND known.id = team.organization_id)
UNION
SELECT source, document, section, place, 'organization_differs', 'organization_id', NULL, existing_organization_id
FROM team
WHERE existing_organization_id <> organization_id
  AND EXISTS (SELECT FROM known WHERE known.noun = 'organization' AND known.id = team.organization_id)
UNION
SELECT source, document, section, place, 'group_not_found', 'model_groups', position, group_name
FROM wanted
WHERE NOT EXISTS (SELECT FROM known WHERE known.noun = 'group' AND known.id = wanted.group_name)
ORDER BY source, document, section, place
LIMIT %(row_limit)s;

-- name: staged_ids(noun) :many
-- What a reference may mean; another thousand ids would not make it clearer.
SELECT id FROM staged WHERE noun = %(noun)s ORDER BY id LIMIT 1000;

-- name: forget_changes() :none
TRUNCATE change;

-- name: compare() :none
-- The order of a team's groups does not count, and a schedule that is there already keeps its next_on.
INSERT INTO pg_temp.change (noun, id, action, before, after)
SELECT
    s.noun,
    s.id,
    CASE WHEN existing.record IS NULL THEN 'create' ELSE 'update' END,
    difference.before,
    CASE WHEN existing.record IS NULL THEN s.fields ELSE difference.after END
FROM staged s
LEFT JOIN organization_records o ON s.noun = 'organization' AND o.organization_id = s.id
LEFT JOIN model_group_records g ON s.noun = 'group' AND g.group_name = s.id
LEFT JOIN team_records t ON s.noun = 'team' AND t.team_id = s.id
CROSS JOIN LATERAL (SELECT coalesce(o.record, g.record, t.record) AS record) AS existing
LEFT JOIN LATERAL (
    SELECT jsonb_object_agg(field, old) AS before, jsonb_object_agg(field, new) AS after
    FROM (
        SELECT
            key AS field,
            existing.record -> key AS old,
            CASE
                WHEN key = 'model_groups'
                    THEN to_jsonb(ARRAY(SELECT jsonb_array_elements_text(value) COLLATE "C" ORDER BY 1))
                WHEN key = 'schedule' AND value ->> 'every' = existing.record -> key ->> 'every'
                    THEN value || jsonb_build_object('next_on', existing.record -> key -> 'next_on')
                ELSE value
            END AS new
        FROM jsonb_each(s.fields)
        WHERE key <> 'credits'
    ) AS compared
    WHERE old IS DISTINCT FROM new
) AS difference ON existing.record IS NOT NULL
WHERE existing.record IS NULL OR difference.after IS NOT NULL;

-- name: compare_credits() :none
-- A team is given its opening credits once; that they are others now is only told.
INSERT INTO pg_temp.change (noun, id, action, before, after)
SELECT
    noun, id, 'differ', jsonb_build_object('credits', t.record -> 'credits'),
    jsonb_build_object('credits', s.fields -> 'credits')
FROM staged s
JOIN team_records t ON t.team_id = s.id
WHERE s.noun = 'team' AND s.fields -> 'credits' <> t.record -> 'credits';

-- name: compare_pruned() :none
-- The teams of the organizations that are named, which are not named themselves: deleted, or with history suspended.
INSERT INTO pg_temp.change (noun, id, action, before, after)
SELECT
    'team', t.team_id, action, jsonb_build_object('organization_id', t.organization_id, 'status', t.status),
    CASE WHEN action = 'suspend' THEN jsonb_build_object('status', 'suspended') END
FROM staged s
JOIN teams t ON t.organization_id = s.id
CROSS JOIN LATERAL (
    SELECT
        CASE
            WHEN EXISTS (SELECT FROM credit_transactions WHERE team_id = t.team_id)
                OR EXISTS (SELECT FROM jobs WHERE team_id = t.team_id)
                THEN 'suspend'
            ELSE 'delete'
        END AS action
) AS due
WHERE s.noun = 'organization'
  AND NOT EXISTS (SELECT FROM staged named WHERE named.noun = 'team' AND named.id = t.team_id)
  AND NOT (action = 'suspend' AND t.status = 'suspended');

-- name: pruned() :one
-- The teams that are to go, and those that are to be suspended.
SELECT
    ARRAY(SELECT id FROM change WHERE action = 'delete' ORDER BY id) AS deleted,
    ARRAY(SELECT id FROM change WHERE action = 'suspend' ORDER BY id) AS suspended;

-- name: totals() :many
-- How many of each noun were named and what of them is to be done.
SELECT
    noun,
    count(*) FILTER (WHERE action = 'create') AS created,
    count(*) FILTER (WHERE action = 'update') AS changed,
    (SELECT count(*) FROM staged s WHERE s.noun = nouns.noun)
        - count(DISTINCT id) FILTER (WHERE action IN ('create', 'update', 'differ')) AS unchanged,
    count(*) FILTER (WHERE action = 'differ') AS differing,
    count(*) FILTER (WHERE action = 'suspend') AS suspended,
    count(*) FILTER (WHERE action = 'delete') AS deleted
FROM (VALUES (1, 'organization'), (2, 'group'), (3, 'team')) AS nouns (place, noun)
LEFT JOIN change USING (noun)
GROUP BY place, noun
ORDER BY place;

-- name: changes(row_limit) :many
SELECT noun, id, action, before, after
FROM change
ORDER BY CASE noun WHEN 'organization' THEN 1 WHEN 'group' THEN 2 ELSE 3 END, id, action DESC
LIMIT %(row_limit)s;

-- name: inactive_groups() :many
-- Those of the files that have no active model.
SELECT s.id AS group_name
FROM staged s
WHERE s.noun = 'group'
  AND NOT EXISTS (SELECT FROM model_group_models m WHERE m.group_name = s.id AND m.is_active)
ORDER BY s.id;

-- name: create_organizations() :none
INSERT INTO organizations (organization_id, name, status, metadata)
SELECT id, coalesce(after ->> 'name', id), coalesce(after ->> 'status', 'active'), coalesce(after -> 'metadata', '{}')
FROM change
WHERE noun = 'organization' AND action = 'create'
ORDER BY id;

-- name: update_organizations() :none
UPDATE organizations o
SET name = coalesce(after ->> 'name', o.name),
    status = coalesce(after ->> 'status', o.status),
    metadata = coalesce(after -> 'metadata', o.metadata),
    updated_at = now()
FROM change
WHERE noun = 'organization' AND action = 'update' AND o.organization_id = id;

-- name: create_groups() :none
WITH created AS (
    INSERT INTO model_groups (group_name, display_name, description, status)
    SELECT id, coalesce(after ->> 'display_name', id), after ->> 'description', coalesce(after ->> 'status', 'active')
    FROM change
    WHERE noun = 'group' AND action = 'create'
    ORDER BY id
)
INSERT INTO model_group_models (group_name, model_name, priority, is_active)
SELECT id, model.value ->> 'model_name', model.position - 1, (model.value -> 'is_active')::boolean
FROM change
CROSS JOIN LATERAL jsonb_array_elements(after -> 'models') WITH ORDINALITY AS model (value, position)
WHERE noun = 'group' AND action = 'create';

-- name: update_groups() :none
-- Models are inserted after those that the group had are gone, since one may be among both.
WITH updated AS (
    UPDATE model_groups g
    SET display_name = coalesce(after ->> 'display_name', g.display_name),
        description = CASE WHEN after ? 'description' THEN after ->> 'description' ELSE g.description END,
        status = coalesce(after ->> 'status', g.status),
        updated_at = now()
    FROM change
    WHERE noun = 'group' AND action = 'update' AND g.group_name = id
),
removed AS (
    DELETE FROM model_group_models m
    USING change
    WHERE noun = 'group' AND action = 'update' AND after ? 'models' AND m.group_name = id
    RETURNING 1
)
INSERT INTO model_group_models (group_name, model_name, priority, is_active)
SELECT id, model.value ->> 'model_name', model.position - 1, (model.value -> 'is_active')::boolean
FROM change
CROSS JOIN LATERAL jsonb_array_elements(after -> 'models') WITH ORDINALITY AS model (value, position)
WHERE noun = 'group' AND action = 'update' AND (SELECT count(*) FROM removed) >= 0;

-- name: create_teams() :none
INSERT INTO teams (team_id, organization_id, team_alias, status, metadata)
SELECT
    id, after ->> 'organization_id', coalesce(after ->> 'team_alias', id), coalesce(after ->> 'status', 'active'),
    coalesce(after -> 'metadata', '{}')
FROM change
WHERE noun = 'team' AND action = 'create'
ORDER BY id;

-- name: update_teams() :none
-- Also where only their groups change, as `team assign` does: so they are locked before these.
UPDATE teams t
SET team_alias = coalesce(after ->> 'team_alias', t.team_alias),
    status = coalesce(after ->> 'status', t.status),
    metadata = coalesce(after -> 'metadata', t.metadata),
    updated_at = now()
FROM change
WHERE noun = 'team' AND action IN ('update', 'suspend') AND t.team_id = id;

-- name: assign_groups() :none
WITH unassigned AS (
    DELETE FROM team_model_groups a
    USING change
    WHERE noun = 'team' AND action = 'update' AND a.team_id = id AND NOT after -> 'model_groups' ? a.group_name
)
INSERT INTO team_model_groups (team_id, group_name)
SELECT id, jsonb_array_elements_text(after -> 'model_groups')
FROM change
WHERE noun = 'team' AND action IN ('create', 'update')
ON CONFLICT (team_id, group_name) DO NOTHING;

-- name: open_credits() :none
INSERT INTO credit_transactions (
    team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, reason,
    idempotency_key
)
SELECT
    id, after ->> 'organization_id', 1, 'allocation', (after ->> 'credits')::bigint, 0, (after ->> 'credits')::bigint,
    'Opening credits', 'opening:' || id
FROM change
WHERE noun = 'team' AND action = 'create' AND (after ->> 'credits')::bigint > 0
ORDER BY id;

-- name: set_schedules() :none
-- As `credits schedule` does.
INSERT INTO credit_schedules (team_id, credits_amount, every, mode, credits_max, next_on)
SELECT
    id, s.credits_amount, s.every, s.mode, s.credits_max,
    coalesce(
        period_start(s.every, s.next_on),
        period_after(s.every, period_start(s.every, (now() AT TIME ZONE 'UTC')::date), 1)
    )
FROM change
CROSS JOIN LATERAL jsonb_to_record(after -> 'schedule')
    AS s (credits_amount bigint, every text, mode text, credits_max bigint, next_on date)
WHERE noun = 'team' AND action IN ('create', 'update') AND after -> 'schedule' <> 'null'
ORDER BY id
ON CONFLICT (team_id) DO UPDATE
SET credits_amount = excluded.credits_amount,
    mode = excluded.mode,
    credits_max = excluded.credits_max,
    next_on = CASE WHEN credit_schedules.every = excluded.every THEN credit_schedules.next_on ELSE excluded.next_on END,
    every = excluded.every,
    updated_at = now();

-- name: remove_schedules() :none
DELETE FROM credit_schedules s
USING change
WHERE noun = 'team' AND action = 'update' AND after -> 'schedule' = 'null' AND s.team_id = id;

-- name: delete_teams() :one
-- Says how many there were: fewer than were to be deleted where one has got history meanwhile.
WITH deleted AS (
    DELETE FROM teams t
    USING change
    WHERE noun = 'team'
      AND action = 'delete'
      AND t.team_id = id
      AND NOT EXISTS (SELECT FROM credit_transactions c WHERE c.team_id = t.team_id)
      AND NOT EXISTS (SELECT FROM jobs j WHERE j.team_id = t.team_id)
    RETURNING 1
)
SELECT count(*) AS deleted FROM deleted;
