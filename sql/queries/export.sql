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
   OR EXISTS ( -- what their prices and limits name
       SELECT
       FROM (
           SELECT organization_id, team_id FROM job_prices p WHERE p.group_name = g.group_name AND closed_at IS NULL
           UNION ALL
           SELECT organization_id, team_id FROM limits l WHERE l.group_name = g.group_name
       ) AS named
       LEFT JOIN teams t USING (team_id)
       WHERE named.team_id = %(team_id)s
          OR coalesce(named.organization_id, t.organization_id) = %(organization_id)s
          OR named.organization_id = (SELECT organization_id FROM teams WHERE team_id = %(team_id)s)
   )
ORDER BY group_name;

-- name: teams(organization_id, team_id) :many
SELECT record
FROM team_records
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
ORDER BY team_id;

-- name: prices(organization_id, team_id) :many
-- Those that are not in the records of organizations, groups and teams; of a part, not those of everywhere.
SELECT record
FROM price_records
WHERE NOT is_short
  AND CASE
      WHEN %(organization_id)s::text IS NOT NULL
          THEN organization_id = %(organization_id)s
              OR team_id IN (SELECT team_id FROM teams WHERE organization_id = %(organization_id)s)
      WHEN %(team_id)s::text IS NOT NULL
          THEN team_id = %(team_id)s
              OR organization_id = (SELECT organization_id FROM teams WHERE team_id = %(team_id)s)
      ELSE true
  END
ORDER BY id COLLATE "C";

-- name: webhooks(organization_id, team_id) :many
-- Of a part, not those that get the events of all.
SELECT record
FROM webhook_records
WHERE CASE
    WHEN %(organization_id)s::text IS NOT NULL THEN organization_id = %(organization_id)s
    WHEN %(team_id)s::text IS NOT NULL
        THEN organization_id = (SELECT organization_id FROM teams WHERE team_id = %(team_id)s)
    ELSE true
END
ORDER BY id COLLATE "C";

-- name: credentials(organization_id, team_id) :many
-- Of a part, not the master key of the proxy.
SELECT record
FROM credential_records
WHERE CASE
    WHEN %(organization_id)s::text IS NOT NULL THEN organization_id = %(organization_id)s
    WHEN %(team_id)s::text IS NOT NULL
        THEN coalesce(team_id, %(team_id)s) = %(team_id)s
            AND organization_id = (SELECT organization_id FROM teams WHERE team_id = %(team_id)s)
    ELSE true
END
ORDER BY id COLLATE "C";

-- name: keys(organization_id, team_id) :many
SELECT record
FROM key_records k
JOIN teams t ON t.team_id = k.id
WHERE t.organization_id = coalesce(%(organization_id)s, t.organization_id) AND k.id = coalesce(%(team_id)s, k.id)
ORDER BY k.id COLLATE "C";
