-- Events: what has happened.

-- name: get(event_id) :maybe
SELECT event_id, event_type, organization_id, team_id, sequence_no, data, created_at
FROM events
WHERE event_id = %(event_id)s;

-- name: named(low, high, row_limit) :many
-- The events whose ids lie between two, for one that was named by the beginning of its id; the newest first.
SELECT event_id, created_at, event_type
FROM events
WHERE event_id >= %(low)s
  AND event_id <= %(high)s
ORDER BY event_id DESC
LIMIT %(row_limit)s;

-- name: list(event_types, organization_id, team_id, since, sort, after, row_limit) :many
-- The newest first, or the oldest; behind the event `after`. Its id is never older than the event, whose time is that at
-- which its transaction began: the index by the id leads to it.
SELECT event_id, event_type, organization_id, team_id, sequence_no, data, created_at
FROM events
WHERE (%(event_types)s::text[] IS NULL OR event_type = ANY (%(event_types)s::text[]))
  AND (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (
      %(since)s::timestamptz IS NULL
      OR (event_id >= first_id(%(since)s::timestamptz) AND created_at >= %(since)s::timestamptz)
  )
  AND CASE
      WHEN %(after)s::uuid IS NULL THEN true
      WHEN %(sort)s::text = 'oldest' THEN event_id > %(after)s::uuid
      ELSE event_id < %(after)s::uuid
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'oldest' THEN event_id END,
    event_id DESC
LIMIT %(row_limit)s;

-- name: horizon() :one
-- What a snapshot of now sees: of transactions from `xmin` on, not all have ended.
SELECT pg_current_snapshot()::text AS snapshot;

-- name: news(snapshot, event_types, organization_id, team_id) :many
-- What has been committed since a snapshot was taken: whatever the order in which transactions end, none is missed. An
-- event that came with a restore is none: its transaction's number may be still to come here, and is then later than
-- that of the transaction that wrote the row.
SELECT event_id, event_type, organization_id, team_id, sequence_no, data, created_at
FROM events
WHERE transaction >= pg_snapshot_xmin(%(snapshot)s::text::pg_snapshot)
  AND transaction < pg_snapshot_xmax(pg_current_snapshot())
  AND NOT pg_visible_in_snapshot(transaction, %(snapshot)s::text::pg_snapshot)
  AND age(transaction::xid) >= age(xmin)
  AND (%(event_types)s::text[] IS NULL OR event_type = ANY (%(event_types)s::text[]))
  AND (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
ORDER BY event_id;

-- name: prune(keep, row_limit) :one
-- Removes the oldest of those whose time is over, with their deliveries, but for what is still to be delivered; says how
-- many.
WITH event AS (
    DELETE FROM events
    WHERE event_id = ANY (ARRAY(
        SELECT e.event_id
        FROM events e
        LEFT JOIN LATERAL (
            SELECT d.event_id
            FROM webhook_deliveries d
            JOIN webhook_states s USING (webhook_id)
            WHERE d.event_id = e.event_id AND d.status = 'pending' AND s.disabled_at IS NULL
            LIMIT 1 -- looked up for each, and not all of them for these few
        ) AS awaited ON true
        WHERE e.event_id < first_id(now() - %(keep)s::interval) AND awaited.event_id IS NULL
        ORDER BY e.event_id
        LIMIT %(row_limit)s
    ))
    RETURNING 1
)
SELECT count(*) AS events FROM event;
