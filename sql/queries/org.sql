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

-- name: list(status, row_limit) :many
SELECT *
FROM organization_details
WHERE (%(status)s::text IS NULL OR status = %(status)s)
ORDER BY organization_id
LIMIT %(row_limit)s;
