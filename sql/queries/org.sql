-- Organizations.

-- name: create(organization_id, name, metadata) :maybe
-- The new organization; nothing where the id is taken.
INSERT INTO organizations (organization_id, name, metadata)
VALUES (%(organization_id)s, %(name)s, %(metadata)s)
ON CONFLICT (organization_id) DO NOTHING
RETURNING organization_id, name, status, metadata, created_at, updated_at;

-- name: get(organization_id) :maybe
SELECT organization_id, name, status, metadata, created_at, updated_at
FROM organizations
WHERE organization_id = %(organization_id)s;

-- name: list(status, row_limit) :many
SELECT organization_id, name, status, metadata, created_at, updated_at
FROM organizations
WHERE (%(status)s::text IS NULL OR status = %(status)s)
ORDER BY organization_id
LIMIT %(row_limit)s;
