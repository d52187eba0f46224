-- Virtual keys of teams at a LiteLLM proxy: written here first, and made there as it is written here.

-- name: create(team_id, token, last_four, secret) :one
-- The key of a team that has none, and of no other; its value is the team's credential for the proxy.
WITH owner AS (
    SELECT
        t.team_id,
        t.organization_id,
        EXISTS (
            SELECT
            FROM credentials c
            WHERE coalesce(c.organization_id, '') = t.organization_id
              AND coalesce(c.team_id, '') = t.team_id
              AND c.provider = 'litellm_proxy'
              AND c.removed_at IS NULL
        ) AS has_credential,
        EXISTS (SELECT FROM proxy_keys k WHERE k.token = %(token)s) AS is_used
    FROM teams t
    WHERE t.team_id = %(team_id)s
),
credential AS (
    INSERT INTO credentials (organization_id, team_id, provider, last_four)
    SELECT organization_id, team_id, 'litellm_proxy', %(last_four)s FROM owner WHERE NOT has_credential AND NOT is_used
    RETURNING credential_id
),
stored AS (
    INSERT INTO credential_secrets (credential_id, secret) SELECT credential_id, %(secret)s FROM credential
),
key AS (
    INSERT INTO proxy_keys (team_id, credential_id, token)
    SELECT %(team_id)s, credential_id, %(token)s FROM credential
    RETURNING key_id
)
SELECT (SELECT key_id FROM key) AS key_id, has_credential, is_used FROM owner;

-- name: rotate(team_id, token, last_four, secret, grace) :maybe
-- Another key takes the place of the team's, which expires after its grace and is kept until then; those that have
-- expired before go.
WITH former AS (
    UPDATE proxy_keys k
    SET expires_at = now() + %(grace)s::interval
    WHERE k.team_id = %(team_id)s AND k.expires_at IS NULL
    RETURNING k.key_id, k.credential_id, k.token, k.is_blocked, k.expires_at
),
expired AS (
    DELETE FROM proxy_keys WHERE team_id = %(team_id)s AND expires_at <= now() RETURNING credential_id
),
replaced AS (
    UPDATE credentials c
    SET removed_at = now()
    FROM former
    WHERE c.credential_id = former.credential_id
    RETURNING c.credential_id, c.organization_id, c.team_id
),
forgotten AS (
    DELETE FROM credential_secrets
    WHERE credential_id IN (
        SELECT credential_id FROM expired UNION ALL SELECT credential_id FROM former WHERE expires_at <= now()
    )
),
credential AS (
    INSERT INTO credentials (organization_id, team_id, provider, last_four)
    SELECT organization_id, team_id, 'litellm_proxy', %(last_four)s FROM replaced
    RETURNING credential_id
),
stored AS (
    INSERT INTO credential_secrets (credential_id, secret) SELECT credential_id, %(secret)s FROM credential
)
INSERT INTO proxy_keys (team_id, credential_id, token, is_blocked)
SELECT %(team_id)s, credential.credential_id, %(token)s, former.is_blocked FROM credential, former
RETURNING
    (SELECT expires_at FROM former) AS previous_key_expires_at,
    (SELECT token FROM former) AS previous_token;

-- name: of(team_id) :maybe
-- The team's key, without those before it.
SELECT key_id, team_id, organization_id, key_alias, last_four, status, created_at, expires_at
FROM key_details
WHERE team_id = %(team_id)s AND expires_at IS NULL;

-- name: list(organization_id, team_id, after, row_limit) :many
SELECT key_id, team_id, organization_id, key_alias, last_four, status, created_at, expires_at
FROM key_details
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(after)s::bigint IS NULL OR key_id > %(after)s)
ORDER BY key_id
LIMIT %(row_limit)s;

-- name: set_blocked(team_id, is_blocked) :many
-- All keys of the team, also those that expire.
UPDATE proxy_keys SET is_blocked = %(is_blocked)s WHERE team_id = %(team_id)s RETURNING key_id;

-- name: delete(team_id) :many
-- All keys of the team, with their values.
WITH deleted AS (
    DELETE FROM proxy_keys WHERE team_id = %(team_id)s RETURNING key_id, credential_id, token
),
removed AS (
    UPDATE credentials c
    SET removed_at = now()
    FROM deleted
    WHERE c.credential_id = deleted.credential_id AND c.removed_at IS NULL
),
forgotten AS (
    DELETE FROM credential_secrets USING deleted WHERE credential_secrets.credential_id = deleted.credential_id
)
SELECT key_id, token FROM deleted;

-- name: tokens(organization_id, team_id) :many
SELECT token
FROM key_details
WHERE organization_id = coalesce(%(organization_id)s, organization_id) AND team_id = coalesce(%(team_id)s, team_id);

-- name: wanted(organization_id, team_id) :many
SELECT *
FROM wanted_keys
WHERE organization_id = coalesce(%(organization_id)s, organization_id) AND team_id = coalesce(%(team_id)s, team_id)
ORDER BY key_id;

-- name: wanted_now(key_ids) :many
SELECT * FROM wanted_keys WHERE key_id = ANY (%(key_ids)s::bigint[]);

-- name: installation() :one
SELECT installation_id FROM installation;

-- name: secret(key_id) :maybe
-- The value of a key, while it works.
SELECT c.credential_id, c.organization_id, c.team_id, c.provider, c.api_base, s.secret
FROM proxy_keys k
JOIN credentials c USING (credential_id)
JOIN credential_secrets s USING (credential_id)
WHERE k.key_id = %(key_id)s;
