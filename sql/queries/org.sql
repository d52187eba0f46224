-- Organizations.

-- name: create(organization_id, name, metadata) :one
-- Whether the organization was created: it is not where the id is taken.
WITH created AS (
    INSERT INTO organizations (organization_id, name, metadata)
    VALUES (%(organization_id)s, %(name)s, %(metadata)s)
    ON CONFLICT (organization_id) DO NOTHING
    RETURNING organization_id
)
SELECT EXISTS (SELECT FROM created) AS created;

-- name: get(organization_id) :maybe
SELECT * FROM organization_details WHERE organization_id = %(organization_id)s;

-- name: list(status, metadata, search, sort, after, row_limit) :many
-- By the id, or by time where `sort` is newest or oldest; behind the row `after`. What is searched for is found first:
-- the planner cannot know how rare it is, and would walk along the order instead.
-- (`metadata <> '{}'` is the condition of the index.)
SELECT *
FROM organization_details
WHERE (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(metadata)s::jsonb IS NULL OR (metadata @> %(metadata)s AND metadata <> '{}'))
  AND (
      %(search)s::text IS NULL
      OR organization_id = ANY (
          ARRAY(
              SELECT organization_id
              FROM organizations
              WHERE search_vector(organization_id, name) @@ search_query(%(search)s)
          )
      )
  )
  AND CASE
      WHEN %(after)s::text IS NULL THEN true
      WHEN %(sort)s::text = 'newest'
          THEN (created_at, organization_id)
              < ((SELECT created_at FROM organizations WHERE organization_id = %(after)s), %(after)s)
      WHEN %(sort)s::text = 'oldest'
          THEN (created_at, organization_id)
              > ((SELECT created_at FROM organizations WHERE organization_id = %(after)s), %(after)s)
      ELSE organization_id > %(after)s
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'newest' THEN created_at END DESC,
    CASE WHEN %(sort)s::text = 'newest' THEN organization_id END DESC,
    CASE WHEN %(sort)s::text = 'oldest' THEN created_at END,
    organization_id
LIMIT %(row_limit)s;

-- name: update(organization_id, name, own_keys_only, metadata, unset_metadata) :maybe
-- What is not given stays; metadata is merged, key by key.
UPDATE organizations
SET name = coalesce(%(name)s, name),
    own_keys_only = coalesce(%(own_keys_only)s, own_keys_only),
    metadata = (metadata || %(metadata)s::jsonb) - %(unset_metadata)s::text[],
    updated_at = now()
WHERE organization_id = %(organization_id)s
RETURNING organization_id;

-- name: set_status(organization_id, status) :maybe
-- And whether its teams have keys at the proxy, which is then to know of it.
UPDATE organizations o
SET updated_at = CASE WHEN status = %(status)s THEN updated_at ELSE now() END,
    status = %(status)s
WHERE organization_id = %(organization_id)s
RETURNING
    organization_id,
    EXISTS (
        SELECT FROM teams t JOIN proxy_keys k USING (team_id) WHERE t.organization_id = o.organization_id
    ) AS has_keys;

-- name: delete(organization_id) :one
-- Deletes an organization that has no team; says whether it did and how many teams there are.
WITH deleted AS (
    DELETE FROM organizations o
    WHERE organization_id = %(organization_id)s
      AND NOT EXISTS (SELECT FROM teams t WHERE t.organization_id = o.organization_id)
    RETURNING organization_id
)
SELECT
    EXISTS (SELECT FROM deleted) AS deleted,
    (SELECT count(*) FROM teams WHERE organization_id = %(organization_id)s) AS teams;

-- name: lock(organization_id) :maybe
-- So that no team comes to it until the end of the transaction.
SELECT organization_id FROM organizations WHERE organization_id = %(organization_id)s FOR UPDATE;

-- name: complete(prefix) :many
-- The first ids that begin so, for a shell; '~' comes after every character of an id.
SELECT organization_id AS id
FROM organizations
WHERE organization_id >= %(prefix)s AND organization_id < %(prefix)s || '~'
ORDER BY organization_id
LIMIT 100;

-- name: near(name) :many
-- Ids among which the one may be that was meant: those that begin alike, however many letters, and the first ones.
SELECT near.organization_id AS id
FROM generate_series(1, length(%(name)s::text)) AS letters
CROSS JOIN LATERAL (
    SELECT organization_id
    FROM organizations
    WHERE organization_id >= left(%(name)s::text, letters) AND organization_id < left(%(name)s::text, letters) || '~'
    ORDER BY organization_id
    LIMIT 20
) AS near
UNION
(SELECT organization_id FROM organizations ORDER BY organization_id LIMIT 1000);
