-- Who changed what.

-- name: list(organization_id, team_id, group_name, since, until, sort, after, row_limit) :many
-- The newest first, or the oldest; behind the record `after`.
SELECT audit_id, created_at, actor, role, command, noun, action, organization_id, team_id, group_name, before, after
FROM audit_log
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(group_name)s::text IS NULL OR group_name = %(group_name)s)
  AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
  AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s)
  AND CASE
      WHEN %(after)s::bigint IS NULL THEN true
      WHEN %(sort)s::text = 'oldest' THEN audit_id > %(after)s
      ELSE audit_id < %(after)s
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'oldest' THEN audit_id END,
    audit_id DESC
LIMIT %(row_limit)s;
