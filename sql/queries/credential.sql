-- Credentials: keys of model providers, encrypted by keys that the database does not have.

-- name: set(organization_id, team_id, provider, api_base, last_four, secret) :one
-- The one before it is removed; its secret goes, and the calls that were made with it still say so. A team's key at the
-- proxy is not replaced by another.
WITH owner AS (
    SELECT
        coalesce(t.organization_id, o.organization_id) AS organization_id,
        t.team_id,
        %(organization_id)s::text IS NULL OR o.organization_id IS NOT NULL AS organization_exists,
        %(team_id)s::text IS NULL OR t.team_id IS NOT NULL AS team_exists,
        EXISTS (
            SELECT
            FROM proxy_keys k
            WHERE k.team_id = t.team_id AND k.expires_at IS NULL AND %(provider)s::text = 'litellm_proxy'
        ) AS has_key
    FROM (VALUES (%(organization_id)s::text, %(team_id)s::text)) AS asked (organization_id, team_id)
    LEFT JOIN organizations o ON o.organization_id = asked.organization_id
    LEFT JOIN teams t ON t.team_id = asked.team_id
),
former AS (
    UPDATE credentials c
    SET removed_at = now()
    FROM owner
    WHERE coalesce(c.organization_id, '') = coalesce(owner.organization_id, '')
      AND coalesce(c.team_id, '') = coalesce(owner.team_id, '')
      AND c.provider = %(provider)s
      AND c.removed_at IS NULL
      AND NOT owner.has_key
      AND owner.organization_exists
      AND owner.team_exists
    RETURNING c.credential_id
),
forgotten AS (
    DELETE FROM credential_secrets USING former WHERE credential_secrets.credential_id = former.credential_id
),
credential AS (
    INSERT INTO credentials (organization_id, team_id, provider, api_base, last_four)
    SELECT organization_id, team_id, %(provider)s, %(api_base)s, %(last_four)s
    FROM owner
    WHERE organization_exists
      AND team_exists
      AND NOT has_key
      AND (SELECT count(*) FROM former) >= 0 -- which is removed first, then
    RETURNING credential_id
),
stored AS (
    INSERT INTO credential_secrets (credential_id, secret) SELECT credential_id, %(secret)s FROM credential
)
SELECT (SELECT credential_id FROM credential) AS credential_id, organization_exists, team_exists, has_key FROM owner;

-- name: get(credential_id) :maybe
SELECT * FROM credential_details WHERE credential_id = %(credential_id)s;

-- name: of(organization_id, team_id, provider) :maybe
-- That of a team, of an organization as a whole, or of nobody.
SELECT d.*, coalesce(s.secret, '') AS secret
FROM credential_details d
LEFT JOIN credential_secrets s USING (credential_id)
WHERE d.provider = %(provider)s
  AND d.team_id IS NOT DISTINCT FROM %(team_id)s::text
  AND (
      d.organization_id IS NOT DISTINCT FROM %(organization_id)s::text
      OR (%(organization_id)s::text IS NULL AND %(team_id)s::text IS NOT NULL)
  );

-- name: list(organization_id, team_id, provider, after, row_limit) :many
SELECT *
FROM credential_details
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(provider)s::text IS NULL OR provider = %(provider)s)
  AND (%(after)s::bigint IS NULL OR credential_id > %(after)s)
ORDER BY credential_id
LIMIT %(row_limit)s;

-- name: remove(credential_id) :maybe
-- Unless it is a team's key at the proxy.
WITH removed AS (
    UPDATE credentials c
    SET removed_at = now()
    WHERE credential_id = %(credential_id)s
      AND removed_at IS NULL
      AND NOT EXISTS (SELECT FROM proxy_keys k WHERE k.credential_id = c.credential_id)
    RETURNING credential_id
),
forgotten AS (
    DELETE FROM credential_secrets USING removed WHERE credential_secrets.credential_id = removed.credential_id
)
SELECT credential_id FROM removed;

-- name: models(organization_id, team_id) :many
-- The active models of the groups that a team, or those of an organization, may use.
SELECT DISTINCT m.model_name
FROM teams t
JOIN team_model_groups a USING (team_id)
JOIN model_groups g USING (group_name)
JOIN model_group_models m USING (group_name)
WHERE t.organization_id = coalesce(%(organization_id)s, t.organization_id)
  AND t.team_id = coalesce(%(team_id)s, t.team_id)
  AND g.status = 'active'
  AND m.is_active
ORDER BY m.model_name;

-- name: secrets(after, row_limit) :many
-- What is stored of each, with what it is bound to.
SELECT c.credential_id, c.organization_id, c.team_id, c.provider, c.api_base, coalesce(s.secret, '') AS secret
FROM credentials c
LEFT JOIN credential_secrets s USING (credential_id)
WHERE c.removed_at IS NULL AND c.credential_id > %(after)s
ORDER BY c.credential_id
LIMIT %(row_limit)s;

-- name: secrets_of(credential_ids) :many
SELECT c.credential_id, c.organization_id, c.team_id, c.provider, c.api_base, s.secret
FROM credential_secrets s
JOIN credentials c USING (credential_id)
WHERE s.credential_id = ANY (%(credential_ids)s::bigint[]);

-- name: replace_secrets(credential_ids, before, secrets) :many
-- Where nobody else has meanwhile.
UPDATE credential_secrets s
SET secret = new.secret
FROM unnest(%(credential_ids)s::bigint[], %(before)s::text[], %(secrets)s::text[])
    AS new (credential_id, before, secret)
WHERE s.credential_id = new.credential_id AND s.secret = new.before
RETURNING s.credential_id;

-- name: webhook_secrets(after, row_limit) :many
SELECT secret_id, webhook_id, secret
FROM webhook_secrets
WHERE secret_id > %(after)s
ORDER BY secret_id
LIMIT %(row_limit)s;

-- name: replace_webhook_secrets(secret_ids, before, secrets) :many
UPDATE webhook_secrets s
SET secret = new.secret
FROM unnest(%(secret_ids)s::bigint[], %(before)s::text[], %(secrets)s::text[]) AS new (secret_id, before, secret)
WHERE s.secret_id = new.secret_id AND s.secret = new.before
RETURNING s.secret_id;
