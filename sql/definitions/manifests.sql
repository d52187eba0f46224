-- The records as a manifest has them, each as one JSON object.

CREATE VIEW organization_records AS
SELECT
    organization_id,
    jsonb_build_object('organization_id', organization_id, 'name', name, 'status', status, 'metadata', metadata)
        AS record
FROM organizations;

CREATE VIEW model_group_records AS
SELECT
    g.group_name,
    jsonb_build_object(
        'group_name', g.group_name, 'display_name', g.display_name, 'description', g.description, 'status', g.status,
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
        'credits', coalesce(
            (
                SELECT credits_amount
                FROM credit_transactions
                WHERE idempotency_key = 'opening:' || t.team_id AND team_id = t.team_id
            ),
            0
        ),
        'schedule', (
            SELECT jsonb_build_object(
                'credits_amount', credits_amount, 'every', every, 'mode', mode, 'credits_max', credits_max,
                'next_on', next_on
            )
            FROM credit_schedules
            WHERE team_id = t.team_id
        ),
        'metadata', t.metadata
    ) AS record
FROM teams t;
