-- What is there, as a manifest has it: all, or of one organization or team with what they need.

-- name: organizations(organization_id, team_id) :many
SELECT record
FROM organization_records
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (
      %(team_id)s::text IS NULL
      OR organization_id = (SELECT organization_id FROM teams WHERE team_id = %(team_id)s)
  )
ORDER BY organization_id;

-- name: model_groups(organization_id, team_id) :many
SELECT record
FROM model_group_records g
WHERE (%(organization_id)s::text IS NULL AND %(team_id)s::text IS NULL)
   OR EXISTS (
       SELECT
       FROM team_model_groups a
       JOIN teams t USING (team_id)
       WHERE a.group_name = g.group_name
         AND (%(organization_id)s::text IS NULL OR t.organization_id = %(organization_id)s)
         AND (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s)
   )
ORDER BY group_name;

-- name: teams(organization_id, team_id) :many
SELECT record
FROM team_records
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
ORDER BY team_id;
