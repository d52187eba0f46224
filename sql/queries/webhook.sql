-- Webhooks: where events are sent, and what becomes of each.

-- name: create(organization_id, url, event_types, allow_http, allow_private) :one
-- Unless there is one for the same URL; then without an id.
WITH webhook AS (
    INSERT INTO webhooks (organization_id, url, event_types, allow_http, allow_private)
    SELECT %(organization_id)s::text, %(url)s, %(event_types)s::text[], %(allow_http)s, %(allow_private)s
    WHERE %(organization_id)s::text IS NULL
       OR EXISTS (SELECT FROM organizations WHERE organization_id = %(organization_id)s::text)
    ON CONFLICT (coalesce(organization_id, ''), url) DO NOTHING
    RETURNING webhook_id
)
SELECT
    (SELECT webhook_id FROM webhook) AS webhook_id,
    %(organization_id)s::text IS NULL
        OR EXISTS (SELECT FROM organizations WHERE organization_id = %(organization_id)s::text) AS organization_exists;

-- name: named(organization_id, url) :maybe
SELECT * FROM webhook_details WHERE (organization_id, url) IS NOT DISTINCT FROM (%(organization_id)s::text, %(url)s);

-- name: get(webhook_id) :maybe
SELECT * FROM webhook_details WHERE webhook_id = %(webhook_id)s;

-- name: list(organization_id, event_type, after, row_limit) :many
SELECT *
FROM webhook_details
WHERE (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(event_type)s::text IS NULL OR event_types && ARRAY['all', %(event_type)s::text])
  AND (%(after)s::bigint IS NULL OR webhook_id > %(after)s)
ORDER BY webhook_id
LIMIT %(row_limit)s;

-- name: update(webhook_id, url, event_types, allow_http, allow_private) :maybe
-- What is not given stays.
UPDATE webhooks w
SET url = new.url,
    event_types = new.event_types,
    allow_http = new.allow_http,
    allow_private = new.allow_private,
    updated_at = CASE
        WHEN (w.url, w.event_types, w.allow_http, w.allow_private)
            IS DISTINCT FROM (new.url, new.event_types, new.allow_http, new.allow_private)
        THEN now()
        ELSE w.updated_at
    END
FROM (
    SELECT
        coalesce(%(url)s::text, url) AS url,
        coalesce(%(event_types)s::text[], event_types) AS event_types,
        coalesce(%(allow_http)s::boolean, allow_http) AS allow_http,
        coalesce(%(allow_private)s::boolean, allow_private) AS allow_private
    FROM webhooks
    WHERE webhook_id = %(webhook_id)s
) AS new
WHERE w.webhook_id = %(webhook_id)s
RETURNING w.webhook_id;

-- name: disable(webhook_id) :maybe
UPDATE webhook_states
SET disabled_at = now(),
    disabled_reason = 'by_hand'
WHERE webhook_id = %(webhook_id)s AND disabled_at IS NULL
RETURNING webhook_id;

-- name: enable(webhook_id) :maybe
-- What it was to get when it was disabled is tried at once. What could not be delivered since it failed, and what
-- happened while it was disabled, it has missed: `missed_since`.
WITH due AS (
    UPDATE webhook_deliveries
    SET next_at = now()
    WHERE webhook_id = %(webhook_id)s AND status = 'pending' AND claimed_at IS NULL AND next_at > now()
)
UPDATE webhook_states s
SET disabled_at = NULL,
    disabled_reason = NULL,
    failing_since = NULL,
    retry_at = NULL
FROM (
    SELECT webhook_id, disabled_at, least(failing_since, disabled_at) AS failing_since
    FROM webhook_states
    WHERE webhook_id = %(webhook_id)s
    FOR UPDATE
) AS before
WHERE s.webhook_id = before.webhook_id AND before.disabled_at IS NOT NULL
RETURNING
    s.webhook_id,
    least(
        before.disabled_at,
        (
            SELECT min(e.created_at)
            FROM webhook_deliveries d
            JOIN events e USING (event_id)
            WHERE d.webhook_id = before.webhook_id AND d.status = 'failed' AND d.ended_at >= before.failing_since
        )
    ) AS missed_since;

-- name: delete(webhook_id) :maybe
-- With what was delivered, and what was still to be.
DELETE FROM webhooks WHERE webhook_id = %(webhook_id)s RETURNING webhook_id;

-- name: add_secret(webhook_id, secret, keep) :one
-- From now on it signs, and those before it as well for as long as they are kept: no longer than was said before. What
-- signs no more is removed.
WITH former AS (
    UPDATE webhook_secrets
    SET expires_at = least(expires_at, now() + %(keep)s::interval)
    WHERE webhook_id = %(webhook_id)s AND (expires_at IS NULL OR expires_at > now())
    RETURNING expires_at
),
ended AS (
    DELETE FROM webhook_secrets WHERE webhook_id = %(webhook_id)s AND expires_at <= now()
),
secret AS (
    INSERT INTO webhook_secrets (webhook_id, secret) VALUES (%(webhook_id)s, %(secret)s)
)
SELECT max(expires_at) AS previous_secret_expires_at FROM former;

-- name: is_under_way(webhook_id, before) :one
-- Whether a delivery that was signed before is still on its way.
SELECT EXISTS (
    SELECT
    FROM webhook_deliveries
    WHERE webhook_id = %(webhook_id)s
      AND status = 'pending'
      AND claimed_at <= %(before)s
      AND next_at > clock_timestamp()
) AS is_under_way;

-- name: secrets() :many
-- What signs now, of all webhooks.
SELECT webhook_id, secret
FROM webhook_secrets
WHERE expires_at IS NULL OR expires_at > now()
ORDER BY webhook_id, secret_id;

-- name: dispatch(row_limit) :one
SELECT dispatch_events(%(row_limit)s) AS dispatched;

-- name: claim(busy_webhooks, busy_attempts, most_each, lease_seconds) :many
-- Deliveries that are due, for this process alone until its lease ends: of each webhook so many at once, less those that
-- it is trying already (`busy_attempts` of `busy_webhooks`); of one that fails a single one. With each what signs it, the
-- newest first.
WITH due AS (
    SELECT d.delivery_id
    FROM webhooks w
    JOIN webhook_states s USING (webhook_id)
    LEFT JOIN unnest(%(busy_webhooks)s::bigint[], %(busy_attempts)s::integer[]) AS busy (webhook_id, attempts)
        USING (webhook_id)
    CROSS JOIN LATERAL (
        SELECT delivery_id
        FROM webhook_deliveries
        WHERE webhook_id = w.webhook_id AND status = 'pending' AND next_at <= statement_timestamp()
        ORDER BY next_at
        LIMIT greatest(
            CASE WHEN s.failing_since IS NULL THEN %(most_each)s::integer ELSE 1 END - coalesce(busy.attempts, 0), 0
        )
        FOR UPDATE SKIP LOCKED
    ) AS d
    WHERE s.disabled_at IS NULL AND (s.retry_at > statement_timestamp()) IS NOT TRUE
),
claimed AS (
    UPDATE webhook_deliveries d
    SET claimed_at = clock_timestamp(),
        next_at = clock_timestamp() + %(lease_seconds)s * interval '1 second',
        claim_no = d.claim_no + 1
    FROM due
    WHERE d.delivery_id = due.delivery_id
    RETURNING d.delivery_id, d.claim_no, d.attempts, d.webhook_id, d.event_id
)
SELECT
    c.delivery_id, c.claim_no, c.attempts, c.webhook_id, c.event_id, w.url, w.allow_http, w.allow_private,
    secret.secrets, e.event_type, e.organization_id, e.sequence_no, e.created_at, e.data
FROM claimed c
JOIN events e USING (event_id)
JOIN webhooks w USING (webhook_id)
CROSS JOIN LATERAL (
    SELECT array_agg(secret ORDER BY secret_id DESC) AS secrets
    FROM webhook_secrets
    WHERE webhook_id = c.webhook_id AND (expires_at IS NULL OR expires_at > now())
) AS secret
ORDER BY c.delivery_id;

-- name: record(results, disable_seconds) :many
-- What came of attempts: each is kept, and decides what becomes of its delivery, where nobody else has claimed that since.
-- A webhook of which nothing was delivered for so long is disabled, and one that is gone at once. Says which were.
WITH result AS (
    SELECT *
    FROM jsonb_to_recordset(%(results)s) AS result (
        delivery_id bigint, claim_no bigint, attempted_at timestamptz, duration_ms integer, status_code integer,
        error text, answer text, retry_seconds double precision, wait_seconds double precision, is_gone boolean
    )
),
locked AS (
    SELECT delivery_id, webhook_id
    FROM webhook_deliveries
    WHERE delivery_id IN (SELECT delivery_id FROM result)
    ORDER BY delivery_id
    FOR UPDATE
),
attempt AS (
    INSERT INTO webhook_attempts (delivery_id, attempted_at, duration_ms, status_code, error, answer)
    SELECT delivery_id, attempted_at, duration_ms, status_code, error, answer
    FROM result
    JOIN locked USING (delivery_id)
    -- It may be told twice, where the answer is lost on its way.
    WHERE NOT EXISTS (
        SELECT
        FROM webhook_attempts a
        WHERE a.delivery_id = result.delivery_id AND a.attempted_at = result.attempted_at
    )
    ORDER BY attempted_at
),
delivery AS (
    UPDATE webhook_deliveries d
    SET attempts = d.attempts + 1,
        claimed_at = NULL,
        claim_no = d.claim_no + 1,
        status = CASE
            WHEN r.error IS NULL THEN 'succeeded' WHEN r.retry_seconds IS NULL THEN 'failed' ELSE 'pending'
        END,
        next_at = CASE WHEN r.error IS NOT NULL THEN clock_timestamp() + r.retry_seconds * interval '1 second' END,
        ended_at = CASE WHEN r.error IS NULL OR r.retry_seconds IS NULL THEN clock_timestamp() END
    FROM result r
    JOIN locked USING (delivery_id)
    WHERE d.delivery_id = r.delivery_id
      AND d.status = 'pending'
      AND (d.claim_no = r.claim_no OR r.error IS NULL)
),
endpoint AS (
    SELECT
        webhook_id,
        bool_or(r.error IS NULL) AS is_well,
        bool_or(r.is_gone) AS is_gone,
        min(r.attempted_at) AS since,
        max(r.wait_seconds) AS wait_seconds
    FROM result r
    JOIN locked USING (delivery_id)
    GROUP BY webhook_id
),
state AS (
    SELECT s.webhook_id, s.disabled_at, s.failing_since, s.retry_at
    FROM webhook_states s
    JOIN endpoint USING (webhook_id)
    WHERE NOT is_well OR is_gone OR wait_seconds IS NOT NULL OR s.failing_since IS NOT NULL
    ORDER BY webhook_id
    FOR UPDATE OF s
)
UPDATE webhook_states s
SET failing_since = new.failing_since,
    retry_at = CASE
        WHEN wait_seconds IS NOT NULL THEN clock_timestamp() + wait_seconds * interval '1 second'
        WHEN state.retry_at > clock_timestamp() THEN state.retry_at
    END,
    disabled_reason = CASE WHEN state.disabled_at IS NULL THEN new.reason ELSE s.disabled_reason END,
    disabled_at = CASE
        -- Before what it could not be sent has ended.
        WHEN state.disabled_at IS NULL AND new.reason IS NOT NULL THEN statement_timestamp() ELSE state.disabled_at
    END
FROM state
JOIN endpoint USING (webhook_id)
CROSS JOIN LATERAL (
    SELECT
        failing_since,
        CASE
            WHEN is_gone THEN 'gone'
            WHEN failing_since <= clock_timestamp() - %(disable_seconds)s * interval '1 second' THEN 'failing'
        END AS reason
    FROM (SELECT CASE WHEN NOT is_well THEN coalesce(state.failing_since, since) END AS failing_since) AS one
) AS new
WHERE s.webhook_id = state.webhook_id
RETURNING
    s.webhook_id,
    s.failing_since IS NOT NULL AS is_failing,
    CASE WHEN state.disabled_at IS NULL THEN new.reason END AS disabled_reason;

-- name: release(claims) :none
-- What was claimed and not tried after all is due for others.
UPDATE webhook_deliveries d
SET claimed_at = NULL,
    next_at = clock_timestamp()
FROM jsonb_to_recordset(%(claims)s) AS claim (delivery_id bigint, claim_no bigint)
WHERE d.delivery_id = claim.delivery_id AND d.claim_no = claim.claim_no AND d.status = 'pending';

-- name: test(webhook_id, lease_seconds) :maybe
-- An event for this webhook alone, and its delivery, which is claimed already.
WITH event AS (
    INSERT INTO events (event_id, event_type, organization_id, data, is_dispatched)
    SELECT new_id(), 'webhook.test', organization_id, jsonb_build_object('webhook_id', webhook_id), true
    FROM webhooks
    WHERE webhook_id = %(webhook_id)s
    RETURNING event_id, event_type, organization_id, sequence_no, created_at, data
),
delivery AS (
    INSERT INTO webhook_deliveries (event_id, webhook_id, next_at, claimed_at, claim_no)
    SELECT event_id, %(webhook_id)s, clock_timestamp() + %(lease_seconds)s * interval '1 second', clock_timestamp(), 1
    FROM event
    RETURNING delivery_id, claim_no, attempts, webhook_id
)
SELECT
    d.delivery_id, d.claim_no, d.attempts, d.webhook_id, e.event_id, w.url, w.allow_http, w.allow_private,
    secret.secrets, e.event_type, e.organization_id, e.sequence_no, e.created_at, e.data
FROM delivery d
JOIN webhooks w USING (webhook_id)
CROSS JOIN event e
CROSS JOIN LATERAL (
    SELECT array_agg(secret ORDER BY secret_id DESC) AS secrets
    FROM webhook_secrets
    WHERE webhook_id = d.webhook_id AND (expires_at IS NULL OR expires_at > now())
) AS secret;

-- name: delivery(delivery_id) :maybe
SELECT * FROM webhook_delivery_details WHERE delivery_id = %(delivery_id)s;

-- name: deliveries(webhook_id, status, event_type, since, sort, after, row_limit) :many
-- The newest first, or the oldest; behind the delivery `after`.
SELECT *
FROM webhook_delivery_details
WHERE (%(webhook_id)s::bigint IS NULL OR webhook_id = %(webhook_id)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(event_type)s::text IS NULL OR event_type = %(event_type)s)
  AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
  AND CASE
      WHEN %(after)s::bigint IS NULL THEN true
      WHEN %(sort)s::text = 'oldest' THEN delivery_id > %(after)s
      ELSE delivery_id < %(after)s
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'oldest' THEN delivery_id END,
    delivery_id DESC
LIMIT %(row_limit)s;

-- name: attempts(delivery_id) :many
SELECT attempt_id, delivery_id, attempted_at, duration_ms, status_code, error, answer
FROM webhook_attempts
WHERE delivery_id = %(delivery_id)s
ORDER BY attempt_id;

-- name: replay(webhook_id, since) :one
-- Sends again, under the same ids, what a webhook has missed: what could not be delivered or still waits for another
-- try, and what happened while it was disabled.
WITH again AS (
    UPDATE webhook_deliveries d
    SET status = 'pending',
        attempts = 0,
        next_at = now(),
        ended_at = NULL
    FROM events e
    WHERE d.webhook_id = %(webhook_id)s
      AND e.event_id = d.event_id
      AND e.event_id >= first_id(%(since)s::timestamptz)
      AND e.created_at >= %(since)s::timestamptz
      AND e.event_type <> 'webhook.test'
      AND (d.status = 'failed' OR (d.status = 'pending' AND d.claimed_at IS NULL))
    RETURNING 1
),
missed AS (
    INSERT INTO webhook_deliveries (event_id, webhook_id)
    SELECT e.event_id, w.webhook_id
    FROM webhooks own
    JOIN events e ON e.event_id >= first_id(%(since)s::timestamptz)
        AND e.created_at >= greatest(%(since)s::timestamptz, own.created_at)
    CROSS JOIN LATERAL webhooks_for(e.organization_id::text, e.event_type) w
    WHERE own.webhook_id = %(webhook_id)s
      AND w.webhook_id = own.webhook_id
      AND e.is_dispatched
      AND (own.organization_id IS NULL OR e.organization_id = own.organization_id)
    ORDER BY e.event_id
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT (SELECT count(*) FROM again) + (SELECT count(*) FROM missed) AS deliveries;

-- name: is_waiting() :one
-- Whether something is to be delivered, now or later.
SELECT EXISTS (
    SELECT
    FROM webhook_deliveries d
    JOIN webhook_states s USING (webhook_id)
    WHERE d.status = 'pending' AND s.disabled_at IS NULL
) AS is_waiting;
