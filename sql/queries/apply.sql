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
    SELECT noun, id FROM staged WHERE noun IN ('organization', 'group', 'team')
    UNION ALL
    SELECT 'team', team_id FROM teams
    UNION ALL
    SELECT 'organization', organization_id FROM organizations
    UNION ALL
    SELECT 'group', group_name FROM model_groups
),
wanted AS (
    SELECT source, document, section, place, 'model_groups' AS field, g.position - 1 AS position, NULL AS part,
        'group' AS noun, g.group_name AS id
    FROM team
    CROSS JOIN LATERAL jsonb_array_elements_text(team.fields -> 'model_groups')
        WITH ORDINALITY AS g (group_name, position)
    UNION ALL
    SELECT source, document, section, place, 'limits', l.position - 1, 'group_name', 'group', l.value ->> 'group_name'
    FROM team
    CROSS JOIN LATERAL jsonb_array_elements(team.fields -> 'limits') WITH ORDINALITY AS l (value, position)
    UNION ALL
    SELECT source, document, section, place, field, NULL, NULL, split_part(field, '_', 1), value
    FROM staged
    CROSS JOIN LATERAL jsonb_each_text(fields) AS f (field, value)
    WHERE noun IN ('price', 'webhook', 'credential', 'key') AND field IN ('organization_id', 'team_id', 'group_name')
    UNION ALL
    SELECT source, document, section, place, 'organization_id', NULL, NULL, 'organization', organization_id
    FROM team
)
-- UNION, since of the copies of a template all stand at its place.
SELECT
    source, document, section, place, 'repeated' AS error, NULL AS field, NULL::bigint AS position, NULL AS part,
    id AS value
FROM repeated
UNION
SELECT source, document, section, place, 'metadata_too_large', 'metadata', NULL, NULL, NULL
FROM staged
WHERE octet_length((fields -> 'metadata')::text) > 65536
UNION
SELECT source, document, section, place, wanted.noun || '_not_found', field, position, part, wanted.id
FROM wanted
WHERE wanted.id IS NOT NULL -- else it is told already, or there is none
  AND NOT EXISTS (SELECT FROM known WHERE known.noun = wanted.noun AND known.id = wanted.id)
UNION
SELECT source, document, section, place, 'organization_differs', 'organization_id', NULL, NULL, existing_organization_id
FROM team
WHERE existing_organization_id <> organization_id
  AND EXISTS (SELECT FROM known WHERE known.noun = 'organization' AND known.id = team.organization_id)
UNION
SELECT p.source, p.document, p.section, p.place, 'price_given_twice', NULL, NULL, NULL, s.noun || ' ' || s.id
FROM staged p
CROSS JOIN LATERAL (
    SELECT min(noun) AS noun, min(id) AS id
    FROM (
        VALUES ('organization', p.fields ->> 'organization_id'), ('team', p.fields ->> 'team_id'),
            ('group', p.fields ->> 'group_name')
    ) AS whose (noun, id)
    WHERE id IS NOT NULL AND NOT p.fields ? 'job_type'
    HAVING count(*) = 1 -- else it is for less than what has a short form
) AS whole
JOIN staged s ON s.noun = whole.noun AND s.id = whole.id AND s.fields ? 'price'
WHERE p.noun = 'price'
UNION
SELECT source, document, section, place, 'credential_is_key', NULL, NULL, NULL, fields ->> 'team_id'
FROM staged s
WHERE noun = 'credential'
  AND fields ->> 'provider' = 'litellm_proxy'
  AND (
      EXISTS (SELECT FROM key_records k WHERE k.id = s.fields ->> 'team_id')
      OR EXISTS (SELECT FROM staged k WHERE k.noun = 'key' AND k.id = s.fields ->> 'team_id')
  )
UNION
SELECT source, document, section, place, 'key_is_credential', NULL, NULL, NULL, id
FROM staged s
WHERE noun = 'key'
  AND EXISTS (
      SELECT FROM credential_records c WHERE c.team_id = s.id AND c.record ->> 'provider' = 'litellm_proxy'
  )
UNION
SELECT
    source, document, section, place, 'overdraft_too_low', 'overdraft', NULL, NULL,
    (c.credits_reserved - c.credits_remaining)::text
FROM team
JOIN team_credits c ON c.team_id = team.id
WHERE c.credits_reserved - c.credits_remaining > CASE
    WHEN jsonb_typeof(team.fields -> 'overdraft') = 'number' THEN (team.fields ->> 'overdraft')::bigint
END
ORDER BY source, document, section, place
LIMIT %(row_limit)s;

-- name: staged_ids(noun) :many
-- What a reference may mean; another thousand ids would not make it clearer.
SELECT id FROM staged WHERE noun = %(noun)s ORDER BY id LIMIT 1000;

-- name: forget_changes() :none
TRUNCATE change;

-- name: compare() :none
-- The order of a team's groups and of limits does not count, a schedule that is there already keeps its next_on, and
-- what a price does not say any more has its default.
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
LEFT JOIN price_records p ON s.noun = 'price' AND p.id = s.id
LEFT JOIN webhook_records w ON s.noun = 'webhook' AND w.id = s.id
LEFT JOIN credential_records c ON s.noun = 'credential' AND c.id = s.id
LEFT JOIN key_records k ON s.noun = 'key' AND k.id = s.id
CROSS JOIN LATERAL (
    SELECT coalesce(o.record, g.record, t.record, p.record, w.record, c.record, k.record) AS record
) AS existing
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
                WHEN key = 'limits' THEN (
                    SELECT coalesce(
                        jsonb_agg(
                            l
                            ORDER BY l ->> 'group_name' COLLATE "C" NULLS FIRST, l ->> 'measure', l ->> 'per'
                        ),
                        '[]'
                    )
                    FROM jsonb_array_elements(value) AS l
                )
                ELSE value
            END AS new
        FROM jsonb_each(
            CASE
                WHEN s.noun = 'price' THEN (
                    SELECT jsonb_object_agg(name, NULL::text) || s.fields FROM jsonb_object_keys(existing.record) AS name
                )
                ELSE s.fields
            END
        )
        WHERE (key <> 'credits' OR s.noun <> 'team') AND key <> 'from_env'
    ) AS compared
    WHERE old IS DISTINCT FROM new
) AS difference ON existing.record IS NOT NULL
WHERE existing.record IS NULL OR difference.after IS NOT NULL;

-- name: compare_credits() :none
-- A team is given its opening credits once; that they are others now is only told. They expire as the file says where
-- that is at the same minute.
INSERT INTO pg_temp.change (noun, id, action, before, after)
SELECT noun, id, 'differ', jsonb_build_object('credits', t.credits), jsonb_build_object('credits', given.credits)
FROM staged s
JOIN team_records t ON t.team_id = s.id
CROSS JOIN LATERAL (SELECT s.fields -> 'credits' AS credits) AS given
WHERE s.noun = 'team'
  AND CASE
      WHEN abs(
          EXTRACT(
              epoch FROM time_of_expiry(given.credits ->> 'expires', t.granted_at)
              - (t.credits ->> 'expires')::timestamptz
          )
      ) <= 60
          THEN jsonb_set(given.credits, '{expires}', t.credits -> 'expires')
      ELSE given.credits
  END <> t.credits;

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
FROM unnest(ARRAY['organization', 'group', 'team', 'price', 'webhook', 'credential', 'key'])
    WITH ORDINALITY AS nouns (noun, place)
LEFT JOIN change USING (noun)
GROUP BY place, noun
ORDER BY place;

-- name: changes(row_limit) :many
SELECT noun, id, action, before, after
FROM change
ORDER BY
    array_position(ARRAY['organization', 'group', 'team', 'price', 'webhook', 'credential', 'key'], noun),
    id,
    action DESC
LIMIT %(row_limit)s;

-- name: inactive_groups() :many
-- Those of the files that have no active model.
SELECT s.id AS group_name
FROM staged s
WHERE s.noun = 'group'
  AND NOT EXISTS (SELECT FROM model_group_models m WHERE m.group_name = s.id AND m.is_active)
ORDER BY s.id;

-- name: expired_credits() :many
-- The new teams whose opening credits have expired already.
SELECT id AS team_id
FROM change
WHERE noun = 'team'
  AND action = 'create'
  AND time_of_expiry(after -> 'credits' ->> 'expires', clock_timestamp()) <= clock_timestamp()
ORDER BY id;

-- name: create_organizations() :none
INSERT INTO organizations (organization_id, name, status, own_keys_only, metadata)
SELECT
    id, coalesce(after ->> 'name', id), coalesce(after ->> 'status', 'active'),
    coalesce((after -> 'own_keys_only')::boolean, false), coalesce(after -> 'metadata', '{}')
FROM change
WHERE noun = 'organization' AND action = 'create'
ORDER BY id;

-- name: update_organizations() :none
UPDATE organizations o
SET name = coalesce(after ->> 'name', o.name),
    status = coalesce(after ->> 'status', o.status),
    own_keys_only = coalesce((after -> 'own_keys_only')::boolean, o.own_keys_only),
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
    team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, category,
    priority, expires_at, reason, idempotency_key
)
SELECT
    id, after ->> 'organization_id', 1, 'allocation', amount, 0, amount, coalesce(given ->> 'category', 'paid'),
    coalesce((given ->> 'priority')::integer, 50), time_of_expiry(given ->> 'expires', clock_timestamp()),
    'Opening credits', 'opening:' || id
FROM change
CROSS JOIN LATERAL (SELECT after -> 'credits' AS given) AS credits
CROSS JOIN LATERAL (SELECT coalesce(given -> 'amount', given)::bigint AS amount) AS number
WHERE noun = 'team' AND action = 'create' AND amount > 0
ORDER BY id;

-- name: set_schedules() :none
-- As `credits schedule` does.
INSERT INTO credit_schedules (team_id, credits_amount, every, mode, credits_max, rollover, next_on)
SELECT
    id, s.credits_amount, s.every, s.mode, s.credits_max, s.rollover,
    coalesce(
        period_start(s.every, s.next_on),
        period_after(s.every, period_start(s.every, (now() AT TIME ZONE 'UTC')::date), 1)
    )
FROM change
CROSS JOIN LATERAL jsonb_to_record(after -> 'schedule')
    AS s (credits_amount bigint, every text, mode text, credits_max bigint, rollover bigint, next_on date)
WHERE noun = 'team' AND action IN ('create', 'update') AND after -> 'schedule' <> 'null'
ORDER BY id
ON CONFLICT (team_id) DO UPDATE
SET credits_amount = excluded.credits_amount,
    mode = excluded.mode,
    credits_max = excluded.credits_max,
    rollover = excluded.rollover,
    next_on = CASE WHEN credit_schedules.every = excluded.every THEN credit_schedules.next_on ELSE excluded.next_on END,
    every = excluded.every,
    updated_at = now();

-- name: remove_schedules() :none
DELETE FROM credit_schedules s
USING change
WHERE noun = 'team' AND action = 'update' AND after -> 'schedule' = 'null' AND s.team_id = id;

-- name: set_prices() :none
-- Those of organizations, groups and teams, and those that stand alone: the current version is closed and another
-- inserted, at the same moment. That is later than the transaction began, as the version that is closed may be, too.
WITH wanted AS (
    SELECT
        row_number() OVER (ORDER BY noun, id) AS place,
        CASE noun WHEN 'organization' THEN id WHEN 'price' THEN s.fields ->> 'organization_id' END AS organization_id,
        CASE noun WHEN 'team' THEN id WHEN 'price' THEN s.fields ->> 'team_id' END AS team_id,
        CASE noun WHEN 'group' THEN id WHEN 'price' THEN s.fields ->> 'group_name' END AS group_name,
        CASE noun WHEN 'price' THEN s.fields ->> 'job_type' END AS job_type,
        CASE noun WHEN 'price' THEN s.fields ELSE s.fields -> 'price' END AS price
    FROM change c
    JOIN staged s USING (noun, id)
    WHERE c.action IN ('create', 'update') AND (noun = 'price' OR c.after ? 'price')
),
closed AS (
    UPDATE job_prices p
    SET closed_at = greatest(p.created_at, statement_timestamp())
    FROM wanted w
    WHERE p.closed_at IS NULL
      AND coalesce(p.team_id, p.organization_id, '') = coalesce(w.team_id, w.organization_id, '')
      AND (p.team_id IS NOT NULL) = (w.team_id IS NOT NULL)
      AND coalesce(p.group_name, '') = coalesce(w.group_name, '')
      AND coalesce(p.job_type, '') = coalesce(w.job_type, '')
    RETURNING w.place, p.closed_at
)
INSERT INTO job_prices (
    organization_id, team_id, group_name, job_type, credits, credits_per_usd, markup_percent,
    credits_per_1000_prompt_tokens, credits_per_1000_completion_tokens, minimum, maximum, hold, created_at
)
SELECT
    w.organization_id, w.team_id, w.group_name, w.job_type, coalesce(a.credits, 0), coalesce(a.credits_per_usd, 0),
    coalesce(a.markup_percent, 0), coalesce(a.credits_per_1000_prompt_tokens, 0),
    coalesce(a.credits_per_1000_completion_tokens, 0), coalesce(a.minimum, 0), a.maximum,
    coalesce(a.hold, greatest(a.credits, a.minimum, 0)), coalesce(closed.closed_at, statement_timestamp())
FROM wanted w
LEFT JOIN closed USING (place)
CROSS JOIN LATERAL jsonb_to_record(w.price) AS a (
    credits bigint, credits_per_usd numeric, markup_percent numeric, credits_per_1000_prompt_tokens numeric,
    credits_per_1000_completion_tokens numeric, minimum bigint, maximum bigint, hold bigint
)
WHERE w.price <> 'null'
ORDER BY place;

-- name: webhook_targets() :many
-- Where those are to lead that are new, or that may no longer lead everywhere.
SELECT s.source, s.document, s.section, s.place, s.fields ->> 'url' AS url
FROM change c
JOIN staged s USING (noun, id)
WHERE noun = 'webhook'
  AND NOT coalesce((s.fields -> 'allow_private')::boolean, false)
  AND (c.action = 'create' OR c.after ? 'allow_private')
ORDER BY s.source, s.document, s.place;

-- name: update_webhooks() :none
UPDATE webhooks w
SET event_types = CASE
        WHEN after ? 'event_types' THEN ARRAY(SELECT jsonb_array_elements_text(after -> 'event_types'))
        ELSE w.event_types
    END,
    allow_http = coalesce((after -> 'allow_http')::boolean, w.allow_http),
    allow_private = coalesce((after -> 'allow_private')::boolean, w.allow_private),
    updated_at = now()
FROM change
JOIN staged s USING (noun, id)
WHERE noun = 'webhook'
  AND action = 'update'
  AND (w.organization_id, w.url) IS NOT DISTINCT FROM (s.fields ->> 'organization_id', s.fields ->> 'url');

-- name: create_webhooks() :none
INSERT INTO webhooks (organization_id, url, event_types, allow_http, allow_private)
SELECT
    after ->> 'organization_id', after ->> 'url', ARRAY(SELECT jsonb_array_elements_text(after -> 'event_types')),
    coalesce((after -> 'allow_http')::boolean, false), coalesce((after -> 'allow_private')::boolean, false)
FROM change
WHERE noun = 'webhook' AND action = 'create'
ORDER BY id;

-- name: new_webhooks() :many
SELECT w.webhook_id
FROM change
JOIN webhooks w
    ON coalesce(w.organization_id, '') = coalesce(after ->> 'organization_id', '') AND w.url = after ->> 'url'
WHERE noun = 'webhook' AND action = 'create'
ORDER BY w.webhook_id;

-- name: credential_values() :many
-- The credentials and keys whose values are to be set or compared: those that are new, that are to be sent elsewhere,
-- or that a variable holds. What they are to be, and of what is there its `credential_id` and a key's `token`.
SELECT
    s.noun, s.id, s.source, s.document, s.section, s.place, c.action, s.fields ->> 'from_env' AS from_env,
    s.fields ->> 'organization_id' AS organization_id, s.fields ->> 'team_id' AS team_id,
    coalesce(s.fields ->> 'provider', 'litellm_proxy') AS provider,
    CASE WHEN s.fields ? 'api_base' THEN s.fields ->> 'api_base' ELSE r.record ->> 'api_base' END AS api_base,
    coalesce(r.credential_id, k.credential_id) AS credential_id, k.token
FROM staged s
LEFT JOIN change c ON c.noun = s.noun AND c.id = s.id
LEFT JOIN credential_records r ON s.noun = 'credential' AND r.id = s.id
LEFT JOIN key_records k ON s.noun = 'key' AND k.id = s.id
WHERE s.noun IN ('credential', 'key') AND (s.fields ? 'from_env' OR c.action IS NOT NULL)
ORDER BY s.noun, s.source, s.document, s.place, s.id;

-- name: keys_with(tokens) :many
SELECT team_id, token FROM proxy_keys WHERE token = ANY (%(tokens)s::text[]);

-- name: change_values(nouns, ids, before, after) :none
-- Values that differ: what is told of them in their place.
WITH differing AS (
    SELECT noun, id, jsonb_build_object('value', old) AS before, jsonb_build_object('value', new) AS after
    FROM unnest(%(nouns)s::text[], %(ids)s::text[], %(before)s::text[], %(after)s::text[]) AS v (noun, id, old, new)
),
known AS (
    UPDATE pg_temp.change c
    SET before = c.before || d.before,
        after = c.after || d.after
    FROM differing d
    WHERE c.noun = d.noun AND c.id = d.id
    RETURNING c.noun, c.id
)
INSERT INTO pg_temp.change (noun, id, action, before, after)
SELECT noun, id, 'update', before, after
FROM differing d
WHERE NOT EXISTS (SELECT FROM known WHERE known.noun = d.noun AND known.id = d.id);

-- name: replace_secret(credential_id, secret) :many
UPDATE credential_secrets
SET secret = %(secret)s
WHERE credential_id = %(credential_id)s
RETURNING credential_id;

-- name: made_keys() :many
-- The teams whose new keys were made here.
SELECT id AS team_id
FROM change
WHERE noun = 'key' AND action = 'create' AND NOT after ? 'from_env'
ORDER BY id;

-- name: has_keys() :one
SELECT EXISTS (SELECT FROM proxy_keys) AS has_keys;

-- name: limits() :one
-- Whether some are set or removed.
SELECT EXISTS (
    SELECT FROM change WHERE after ? 'limits' AND (after -> 'limits' <> '[]' OR before -> 'limits' <> '[]')
) AS are_changed;

-- name: lock_jobs() :none
LOCK TABLE ONLY jobs IN SHARE ROW EXCLUSIVE MODE;

-- name: set_bounds() :none
-- How far balances may go, and at which they are low; in the order in which all others lock them.
WITH wanted AS (
    SELECT
        id, after ? 'overdraft' AS has_overdraft, nullif(after ->> 'overdraft', 'unlimited')::bigint AS overdraft,
        CASE
            WHEN after ? 'low_credits' THEN ARRAY(SELECT jsonb_array_elements_text(after -> 'low_credits')::bigint)
        END AS low_credits
    FROM change
    WHERE noun = 'team' AND action IN ('create', 'update') AND after ?| ARRAY['overdraft', 'low_credits']
),
balance AS (
    SELECT
        c.team_id,
        CASE WHEN wanted.has_overdraft THEN wanted.overdraft ELSE c.credits_overdraft END AS credits_overdraft,
        coalesce(wanted.low_credits, c.low_credits) AS low_credits
    FROM wanted
    JOIN team_credits c ON c.team_id = wanted.id
    WHERE (wanted.has_overdraft AND c.credits_overdraft IS DISTINCT FROM wanted.overdraft)
       OR c.low_credits <> wanted.low_credits
    ORDER BY c.team_id
    FOR UPDATE OF c
)
UPDATE team_credits c
SET credits_overdraft = balance.credits_overdraft,
    low_credits = balance.low_credits
FROM balance
WHERE c.team_id = balance.team_id;

-- name: remove_limits() :none
DELETE FROM limits l
USING change c
WHERE c.noun IN ('organization', 'team')
  AND c.action = 'update'
  AND c.after ? 'limits'
  AND coalesce(l.team_id, l.organization_id) = c.id
  AND (l.team_id IS NOT NULL) = (c.noun = 'team')
  AND NOT EXISTS (
      SELECT
      FROM jsonb_to_recordset(c.after -> 'limits') AS kept (group_name text, measure text, per text)
      WHERE (coalesce(kept.group_name, ''), kept.measure, kept.per) = (coalesce(l.group_name, ''), l.measure, l.per)
  );

-- name: set_limits() :none
-- One that is there stays, with what it has counted.
INSERT INTO limits AS existing (organization_id, team_id, group_name, measure, per, amount, is_hard, alerts)
SELECT
    CASE c.noun WHEN 'organization' THEN c.id END, CASE c.noun WHEN 'team' THEN c.id END, l.group_name, l.measure, l.per,
    l.amount, coalesce(l.is_hard, true), coalesce(l.alerts, '{}')
FROM change c
CROSS JOIN LATERAL jsonb_to_recordset(c.after -> 'limits')
    AS l (group_name text, measure text, per text, amount numeric, is_hard boolean, alerts integer[])
WHERE c.noun IN ('organization', 'team') AND c.action IN ('create', 'update')
ORDER BY c.noun, c.id, l.group_name, l.measure, l.per
ON CONFLICT (
    coalesce(team_id, organization_id), (team_id IS NOT NULL), coalesce(group_name, ''), measure, per
) DO UPDATE
SET amount = excluded.amount,
    is_hard = excluded.is_hard,
    alerts = excluded.alerts,
    updated_at = now()
WHERE (existing.amount, existing.is_hard, existing.alerts)
    IS DISTINCT FROM (excluded.amount, excluded.is_hard, excluded.alerts);

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
