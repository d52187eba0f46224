-- Numbers for Prometheus: `doctor -o prometheus`, and the file of a worker.

-- name: read(most_models) :many
-- Each number with the values of its labels, which are few, however many teams and models there are: of the models that
-- were called most, each; the others together.
SELECT metric, labels, value::double precision AS value
FROM (
    SELECT
        coalesce(sum(greatest(c.credits_remaining - coalesce(expired.credits, 0), 0)), 0) AS remaining,
        coalesce(sum(c.credits_reserved), 0) AS reserved,
        coalesce(sum(greatest(coalesce(expired.credits, 0) - c.credits_remaining, 0)), 0) AS overdrawn
    FROM team_credits c
    LEFT JOIN ( -- as current_balances, but for all teams at once
        SELECT team_id, sum(credits) AS credits
        FROM due_expiries(
            ARRAY(SELECT team_id::text FROM team_credits WHERE next_expiry_at <= clock_timestamp())
        )
        GROUP BY team_id
    ) AS expired USING (team_id)
) AS balance
CROSS JOIN LATERAL (
    VALUES
        ('credits_remaining', '{}'::text[], remaining),
        ('credits_reserved', '{}', reserved),
        ('credits_overdrawn', '{}', overdrawn)
) AS number (metric, labels, value)
UNION ALL
SELECT metric, labels, value
FROM (
    SELECT
        count(*) FILTER (WHERE status = 'pending') AS pending,
        count(*) FILTER (WHERE status = 'in_progress') AS in_progress,
        count(*) FILTER (WHERE lease_expires_at <= statement_timestamp()) AS expired
    FROM jobs
    WHERE status IN ('pending', 'in_progress')
) AS open
CROSS JOIN LATERAL (
    VALUES
        ('jobs_open', '{pending}'::text[], pending),
        ('jobs_open', '{in_progress}', in_progress),
        ('leases_expired', '{}', expired)
) AS number (metric, labels, value)
UNION ALL
SELECT metric, labels, value
FROM (
    SELECT
        count(*) FILTER (WHERE status = 'completed') AS completed,
        count(*) FILTER (WHERE status = 'failed') AS failed,
        count(*) FILTER (WHERE status = 'cancelled') AS cancelled
    FROM jobs
    WHERE completed_at > statement_timestamp() - interval '1 hour'
) AS ended
CROSS JOIN LATERAL (
    VALUES
        ('jobs_ended_last_hour', '{completed}'::text[], completed),
        ('jobs_ended_last_hour', '{failed}', failed),
        ('jobs_ended_last_hour', '{cancelled}', cancelled)
) AS number (metric, labels, value)
UNION ALL
SELECT metric, labels, value
FROM (
    SELECT
        count(*) FILTER (WHERE state <> 'running' AND due_at <= statement_timestamp()) AS waiting,
        count(*) FILTER (WHERE state <> 'running' AND due_at > statement_timestamp()) AS scheduled,
        count(*) FILTER (WHERE state = 'running') AS running,
        extract(
            epoch FROM statement_timestamp()
                - min(due_at) FILTER (WHERE state <> 'running' AND due_at <= statement_timestamp())
        ) AS waiting_seconds
    FROM job_queue
) AS queue
CROSS JOIN LATERAL (
    VALUES
        ('queue_jobs', '{waiting}'::text[], waiting),
        ('queue_jobs', '{scheduled}', scheduled),
        ('queue_jobs', '{running}', running),
        ('queue_oldest_waiting_seconds', '{}', coalesce(waiting_seconds, 0))
) AS number (metric, labels, value)
UNION ALL
SELECT 'workers', ARRAY[status], count(worker_id)
FROM unnest(ARRAY['alive', 'stopping', 'lost']) AS status
LEFT JOIN worker_details USING (status)
GROUP BY status
UNION ALL
SELECT 'webhooks', ARRAY[status], count(webhook_id)
FROM unnest(ARRAY['active', 'failing', 'disabled']) AS status
LEFT JOIN webhook_details USING (status)
GROUP BY status
UNION ALL
SELECT 'events_undispatched', '{}', count(*) FROM events WHERE NOT is_dispatched
UNION ALL
SELECT metric, labels, value
FROM (
    SELECT
        count(*) AS pending,
        extract(
            epoch FROM statement_timestamp() - min(d.next_at) FILTER (WHERE d.next_at <= statement_timestamp())
        ) AS due_seconds
    FROM webhook_deliveries d
    JOIN webhook_states s USING (webhook_id)
    WHERE d.status = 'pending' AND s.disabled_at IS NULL
) AS backlog
CROSS JOIN LATERAL (
    VALUES
        ('webhook_deliveries_pending', '{}'::text[], pending),
        ('webhook_deliveries_oldest_due_seconds', '{}', coalesce(due_seconds, 0))
) AS number (metric, labels, value)
UNION ALL
SELECT 'llm_calls_last_hour', ARRAY[model, outcome], sum(calls)
FROM (
    SELECT
        CASE WHEN row_number() OVER (ORDER BY count(*) DESC, resolved_model) <= %(most_models)s THEN resolved_model
            ELSE 'other'
        END AS model,
        count(*) FILTER (WHERE error IS NULL) AS answered,
        count(*) FILTER (WHERE error IS NOT NULL) AS failed
    FROM (
        SELECT left(resolved_model, 255) AS resolved_model, error -- as long as the program lets a name be
        FROM llm_calls
        WHERE created_at > statement_timestamp() - interval '1 hour'
    ) AS call
    GROUP BY resolved_model
) AS called
CROSS JOIN LATERAL (VALUES ('answered', answered), ('failed', failed)) AS number (outcome, calls)
GROUP BY model, outcome;
