-- Jobs: begin, settle, sweep, and what is told of them.
--
-- Lock order, everywhere: the job's row, then its team's balance.

-- name: begin(job_id, team_id, group_name, job_type, external_task_id, metadata, idempotency_key, request_hash, lease_seconds) :one
-- Reserves what the job's price says and opens the job under a lease, if everything allows it; else says the one
-- condition that failed, and nothing is done. A key in use gives the job that has it; a job that is there already was
-- begun by the same request, whose answer was lost. Without a group it is pending: its calls follow. Where the balance
-- is not that of the last entry, nothing could be charged: no model is paid for that. With the models come their
-- prices and keys.
WITH request AS (
    SELECT
        scope.team_id,
        scope.organization_id,
        scope.model_names,
        scope.model_prices,
        scope.model_keys,
        terms.price_id,
        coalesce(mine.credits_held, terms.credits_held) AS credits_held,
        terms.limit_reached,
        k.job_id AS existing_job_id,
        k.status AS existing_status,
        k.request_hash AS existing_request_hash,
        k.lease_expires_at <= now() AS existing_is_expired,
        CASE
            WHEN mine.job_id IS NOT NULL THEN 'begun'
            WHEN k.job_id IS NOT NULL THEN 'key_in_use'
            WHEN scope.refusal IS NOT NULL THEN scope.refusal
            WHEN terms.limit_reached IS NOT NULL THEN 'limit_reached'
        END AS known_outcome
    FROM job_scope(%(team_id)s, %(group_name)s) AS scope
    LEFT JOIN LATERAL terms_of(
        scope.team_id, scope.organization_id, %(group_name)s::text, %(job_type)s::text
    ) AS terms ON true
    LEFT JOIN jobs mine ON mine.job_id = %(job_id)s
    LEFT JOIN jobs k ON k.idempotency_key = %(idempotency_key)s
        AND k.status NOT IN ('failed', 'cancelled')
),
job AS (
    INSERT INTO jobs (
        job_id, team_id, organization_id, job_type, status, external_task_id, model_groups_used, price_ids, metadata,
        started_at, lease_expires_at, idempotency_key, request_hash, credits_held, hold_no
    )
    SELECT
        %(job_id)s, request.team_id, request.organization_id, %(job_type)s,
        CASE WHEN %(group_name)s::text IS NULL THEN 'pending' ELSE 'in_progress' END, %(external_task_id)s,
        CASE WHEN %(group_name)s::text IS NULL THEN '{}' ELSE ARRAY[%(group_name)s::text] END,
        CASE WHEN %(group_name)s::text IS NULL THEN '{}' ELSE ARRAY[request.price_id] END, %(metadata)s,
        CASE WHEN %(group_name)s::text IS NOT NULL THEN now() END, now() + %(lease_seconds)s * interval '1 second',
        %(idempotency_key)s, %(request_hash)s, request.credits_held, balance.last_hold_no + 1
    FROM request
    CROSS JOIN LATERAL lock_balance(request.team_id) AS balance
    WHERE request.known_outcome IS NULL AND balance.credits_usable >= request.credits_held
    RETURNING job_id
)
SELECT
    coalesce(
        request.known_outcome,
        CASE WHEN EXISTS (SELECT FROM job) THEN 'begun' ELSE 'insufficient_credits' END
    ) AS outcome,
    request.credits_held,
    limit_record(request.limit_reached) AS limit_reached,
    request.model_names,
    request.model_prices,
    request.model_keys,
    request.existing_job_id,
    request.existing_status,
    request.existing_request_hash,
    request.existing_is_expired,
    request.organization_id
FROM request;

-- name: begin_many(team_id, group_name, jobs, lease_seconds) :many
-- As `begin`, for many jobs of one team and group.
SELECT * FROM begin_jobs(%(team_id)s, %(group_name)s, %(jobs)s, %(lease_seconds)s);

-- name: submit(team_id, group_name, jobs) :many
-- Queues jobs of one team and group for workers.
SELECT job_id, outcome, limit_reached, credits_held, organization_id, existing_job_id
FROM begin_jobs(%(team_id)s, %(group_name)s, %(jobs)s);

-- name: keep_refusal(team_id, group_name, reason, refusals, limit_id) :none
-- Counts jobs that were refused in this hour, and tells that a limit is reached, where one has refused them. Another
-- that counts, or deletes the team, is waited for only so long: the refusal is still to be told.
WITH kept AS (
    INSERT INTO job_refusals AS kept (team_id, group_name, reason, refusals)
    SELECT %(team_id)s, %(group_name)s, %(reason)s, %(refusals)s
    FROM set_config('lock_timeout', '1s', true)
    ON CONFLICT (team_id, hour, reason, coalesce(group_name, '')) DO UPDATE
    SET refusals = kept.refusals + excluded.refusals,
        last_at = greatest(kept.last_at, excluded.last_at)
    RETURNING refusal_id
)
SELECT tell_of_limit(l, d.counted, is_refusing => true)
FROM kept
JOIN limits l ON l.limit_id = %(limit_id)s
JOIN limit_details d USING (limit_id);

-- name: start_call(job_id, group_name, lease_seconds) :one
-- The models of a group for a call of an open job, which it holds under a lease of at least so long; else the one
-- condition that failed. A team that was suspended meanwhile may finish its job. A group that is new to the job brings
-- its price: where that holds more than the job does, the job comes to hold as much.
WITH job AS (
    SELECT
        job_id, team_id, organization_id, job_type, status, lease_expires_at, model_groups_used, credits_held, is_queued
    FROM jobs
    WHERE job_id = %(job_id)s
    FOR UPDATE
),
request AS (
    SELECT
        j.job_id,
        j.team_id,
        g.model_names,
        g.model_prices,
        p.price_id,
        j.credits_held AS credits_held_before,
        CASE WHEN f.is_first THEN greatest(j.credits_held, coalesce(p.hold, 1)) ELSE j.credits_held END AS credits_held,
        f.is_first,
        CASE
            WHEN j.job_id IS NULL THEN 'job_not_found'
            WHEN g.group_name IS NULL THEN 'group_not_found'
            WHEN j.status NOT IN ('pending', 'in_progress') THEN 'job_finished'
            WHEN j.is_queued THEN 'job_queued'
            WHEN a.group_name IS NULL THEN 'group_not_assigned'
            WHEN g.status <> 'active' THEN 'group_inactive'
            WHEN g.model_names IS NULL THEN 'no_active_model'
            WHEN j.lease_expires_at <= clock_timestamp() THEN 'lease_lost'
        END AS refusal,
        j.organization_id
    FROM (VALUES (%(job_id)s::uuid, %(group_name)s::text)) AS asked (job_id, group_name)
    LEFT JOIN job j ON j.job_id = asked.job_id
    CROSS JOIN LATERAL (SELECT asked.group_name <> ALL (j.model_groups_used) AS is_first) AS f
    LEFT JOIN callable_groups g ON g.group_name = asked.group_name
    LEFT JOIN team_model_groups a ON a.team_id = j.team_id AND a.group_name = g.group_name
    LEFT JOIN LATERAL price_of(j.team_id::text, j.organization_id::text, asked.group_name, j.job_type) p ON f.is_first
),
reached AS (
    SELECT l.limit_id
    FROM request
    CROSS JOIN LATERAL hard_limits(request.team_id::text, request.organization_id::text, %(group_name)s) l
    WHERE request.refusal IS NULL
      AND request.is_first
      AND (
          (l.is_of_group AND (l.room_jobs < 1 OR l.room_credits < request.credits_held))
          OR (
              request.credits_held > request.credits_held_before
              AND l.room_credits < request.credits_held - request.credits_held_before
          )
      )
    ORDER BY l.room_at DESC
    LIMIT 1
),
started AS (
    UPDATE jobs j
    SET status = 'in_progress',
        started_at = coalesce(j.started_at, now()),
        lease_expires_at = greatest(j.lease_expires_at, now() + %(lease_seconds)s * interval '1 second'),
        model_groups_used = CASE
            WHEN request.is_first THEN j.model_groups_used || %(group_name)s::text
            ELSE j.model_groups_used
        END,
        price_ids = CASE WHEN request.is_first THEN j.price_ids || request.price_id ELSE j.price_ids END,
        credits_held = request.credits_held
    FROM request
    WHERE j.job_id = request.job_id
      AND request.refusal IS NULL
      AND NOT EXISTS (SELECT FROM reached)
      AND (
          request.credits_held = request.credits_held_before
          OR (SELECT credits_usable FROM lock_balance(request.team_id::text))
              >= request.credits_held - request.credits_held_before
      )
    RETURNING j.job_id
)
SELECT
    coalesce(
        refusal,
        CASE
            WHEN EXISTS (SELECT FROM started) THEN 'started'
            WHEN EXISTS (SELECT FROM reached) THEN 'limit_reached'
            ELSE 'insufficient_credits'
        END
    ) AS outcome,
    team_id,
    organization_id,
    model_names,
    model_prices,
    keys_of(team_id::text, organization_id::text) AS model_keys,
    credits_held,
    credits_held_before,
    limit_record((SELECT limit_id FROM reached)) AS limit_reached,
    (SELECT to_jsonb(c) FROM credit_details c WHERE c.team_id = request.team_id) AS credits,
    now() AS started_at
FROM request;

-- name: extend_lease(job_id, lease_seconds) :maybe
-- Of an open job whose lease holds; its row stays locked until the end of the transaction.
UPDATE jobs
SET lease_expires_at = greatest(lease_expires_at, now() + %(lease_seconds)s * interval '1 second')
WHERE job_id = %(job_id)s
  AND status IN ('pending', 'in_progress')
  AND lease_expires_at > clock_timestamp()
RETURNING lease_expires_at;

-- name: record_calls(job_id, started_at, calls) :many
-- The calls of one request, once: their times tell whether they are there already.
INSERT INTO llm_calls (
    job_id, team_id, model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens,
    cost_usd, latency_ms, purpose, finish_reason, error, prompt, answer, credential_id, created_at
)
SELECT
    job.job_id, job.team_id, call.model_group_used, call.resolved_model, call.attempt, call.prompt_tokens,
    call.completion_tokens, call.total_tokens, call.cost_usd, call.latency_ms, call.purpose, call.finish_reason,
    call.error, call.prompt, call.answer, call.credential_id, %(started_at)s::timestamptz + call.began
FROM jobs job, call_rows(%(calls)s) AS call
WHERE job.job_id = %(job_id)s
  AND NOT EXISTS (
      SELECT
      FROM llm_calls known
      WHERE known.job_id = job.job_id
        AND known.attempt = call.attempt
        AND known.created_at = %(started_at)s::timestamptz + call.began
  )
RETURNING call_id;

-- name: settle(job_id, status, error_message, calls, is_final) :one
-- Finishes an open job whose lease holds, with its calls, and charges what it costs where it completed or frees what it
-- holds where it did not. The second time it does nothing and says so. Where it costs more than it holds, it is left as
-- it is (`credits_due` says what for) until `is_final`: then it is charged what it holds, and the rest is short.
-- `calls` is a JSON array; `began` counts the seconds from the job's start, so that the database's clock dates them.
-- They are written before the balance is locked, which others wait for.
WITH charge AS (
    SELECT
        held.job_id, held.credits_held, c.price_id, c.is_unpriced,
        CASE WHEN %(status)s = 'completed' THEN coalesce(c.credits_due, 1) END AS credits_due -- 1 without a price
    FROM jobs held
    LEFT JOIN LATERAL charge_of(
        CASE WHEN %(status)s = 'completed' AND array_remove(held.price_ids, NULL) <> '{}' THEN held.price_ids END,
        held.job_id,
        %(calls)s
    ) c ON true
    WHERE held.job_id = %(job_id)s -- and open: only then it has a lease
      AND held.lease_expires_at > clock_timestamp()
),
job AS (
    UPDATE jobs j
    SET status = %(status)s,
        completed_at = clock_timestamp(),
        credits_charged = CASE
            WHEN charge.credits_due IS NOT NULL THEN least(charge.credits_due, charge.credits_held)
        END,
        credits_short = greatest(charge.credits_due - charge.credits_held, 0),
        price_id = charge.price_id,
        is_unpriced = coalesce(charge.is_unpriced, false),
        error_message = %(error_message)s,
        lease_expires_at = NULL
    FROM charge
    WHERE j.job_id = charge.job_id
      AND j.job_id = %(job_id)s
      AND j.lease_expires_at > clock_timestamp()
      AND (%(is_final)s::boolean OR charge.credits_due <= charge.credits_held OR charge.credits_due IS NULL)
    RETURNING
        j.job_id, j.team_id, j.organization_id, j.status, j.started_at, j.credits_charged, j.credits_short, j.is_unpriced
),
calls AS (
    INSERT INTO llm_calls (
        job_id, team_id, model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens,
        cost_usd, latency_ms, purpose, finish_reason, error, prompt, answer, credential_id, created_at
    )
    SELECT
        job.job_id, job.team_id, call.model_group_used, call.resolved_model, call.attempt, call.prompt_tokens,
        call.completion_tokens, call.total_tokens, call.cost_usd, call.latency_ms, call.purpose, call.finish_reason,
        call.error, call.prompt, call.answer, call.credential_id, job.started_at + call.began
    FROM job, call_rows(%(calls)s) AS call
    RETURNING call_id
),
deduction AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before, credits_after,
        reason, actor, command
    )
    SELECT
        job.team_id, job.organization_id, balance.last_entry_no + 1, job.job_id, 'deduction', - job.credits_charged,
        balance.credits_remaining, balance.credits_remaining - job.credits_charged, 'Job completed',
        NULL, NULL
    FROM job, lock_balance(job.team_id::text) AS balance
    WHERE job.status = 'completed' AND (SELECT count(*) FROM calls) >= 0
    RETURNING credits_after
)
SELECT
    asked.job_id,
    job.job_id IS NOT NULL AS settled,
    coalesce(job.status, j.status) AS status,
    coalesce(job.credits_charged, j.credits_charged) AS credits_charged,
    coalesce(job.credits_short, j.credits_short) AS credits_short,
    coalesce(job.is_unpriced, j.is_unpriced) AS is_unpriced,
    CASE WHEN job.job_id IS NULL THEN (SELECT credits_due FROM charge) END AS credits_due,
    coalesce(
        (SELECT credits_after FROM deduction),
        (SELECT credits_remaining FROM current_balances WHERE team_id = j.team_id)
    ) AS credits_remaining
FROM (VALUES (%(job_id)s::uuid)) AS asked (job_id)
LEFT JOIN jobs j USING (job_id)
LEFT JOIN job USING (job_id);

-- name: settle_many(results, is_final) :many
-- As `settle`, for many jobs: `results` is a JSON array of their job_id, status, error_message and calls; of one that a
-- worker ran also its worker_id, for only who took it last may settle it, and its answer, to be kept for keep_seconds.
-- The jobs, and then the balances of their teams, are locked in their order; each is looked up by its id, however many
-- jobs are open. The calls are written before the balances are locked, which others wait for, unless a job frees its
-- credits.
WITH result AS (
    SELECT *
    FROM jsonb_to_recordset(%(results)s::jsonb) AS result (
        job_id uuid, status text, error_message text, calls jsonb, worker_id bigint, answer jsonb,
        keep_seconds double precision
    )
    ORDER BY job_id
),
held AS (
    SELECT result.*, open.team_id, open.credits_held, open.price_ids
    FROM result
    CROSS JOIN LATERAL (
        SELECT team_id, credits_held, price_ids
        FROM jobs
        WHERE job_id = result.job_id AND lease_expires_at > clock_timestamp()
        FOR UPDATE
    ) AS open
    WHERE result.worker_id IS NULL
       OR result.worker_id = (SELECT worker_id FROM job_queue q WHERE q.job_id = result.job_id)
),
charge AS (
    SELECT
        held.*, c.price_id, c.is_unpriced,
        CASE WHEN held.status = 'completed' THEN coalesce(c.credits_due, 1) END AS credits_due
    FROM held
    LEFT JOIN LATERAL charge_of(
        CASE WHEN held.status = 'completed' AND array_remove(held.price_ids, NULL) <> '{}' THEN held.price_ids END,
        held.job_id,
        coalesce(held.calls, '[]')
    ) c ON true
),
freed AS (
    SELECT count(*) AS teams
    FROM (
        SELECT DISTINCT team_id
        FROM held
        WHERE EXISTS (SELECT FROM held WHERE status <> 'completed')
        ORDER BY team_id
    ) AS team
    CROSS JOIN LATERAL lock_balance(team.team_id::text)
),
job AS (
    UPDATE jobs j
    SET status = charge.status,
        completed_at = clock_timestamp(),
        credits_charged = CASE
            WHEN charge.credits_due IS NOT NULL THEN least(charge.credits_due, charge.credits_held)
        END,
        credits_short = greatest(charge.credits_due - charge.credits_held, 0),
        price_id = charge.price_id,
        is_unpriced = coalesce(charge.is_unpriced, false),
        error_message = charge.error_message,
        lease_expires_at = NULL
    FROM charge
    WHERE j.job_id = charge.job_id
      AND j.job_id = ANY (ARRAY(SELECT job_id FROM held))
      AND (%(is_final)s::boolean OR charge.credits_due <= charge.credits_held OR charge.credits_due IS NULL)
      AND (SELECT teams FROM freed) >= 0
    RETURNING
        j.job_id, j.team_id, j.organization_id, j.status, j.started_at, j.credits_charged, j.credits_short,
        j.is_unpriced, charge.calls, charge.answer, charge.keep_seconds
),
answer AS (
    INSERT INTO job_answers (job_id, content, tool_calls, not_sent, expires_at)
    SELECT
        job.job_id, told.content, told.tool_calls, told.not_sent, now() + job.keep_seconds * interval '1 second'
    FROM job
    CROSS JOIN LATERAL jsonb_to_record(job.answer) AS told (content text, tool_calls jsonb, not_sent text[])
    WHERE job.status = 'completed' AND job.keep_seconds > 0
),
calls AS (
    INSERT INTO llm_calls (
        job_id, team_id, model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens,
        cost_usd, latency_ms, purpose, finish_reason, error, prompt, answer, credential_id, created_at
    )
    SELECT
        job.job_id, job.team_id, call.model_group_used, call.resolved_model, call.attempt, call.prompt_tokens,
        call.completion_tokens, call.total_tokens, call.cost_usd, call.latency_ms, call.purpose, call.finish_reason,
        call.error, call.prompt, call.answer, call.credential_id, job.started_at + call.began
    FROM job, call_rows(job.calls) AS call
    RETURNING call_id
),
balance AS (
    SELECT touched.team_id, c.last_entry_no, c.credits_remaining
    FROM (SELECT DISTINCT team_id FROM job WHERE (SELECT count(*) FROM calls) >= 0 ORDER BY team_id) AS touched
    CROSS JOIN LATERAL lock_balance(touched.team_id::text) AS c
),
deduction AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before, credits_after,
        reason, actor, command
    )
    SELECT
        team_id, charged.organization_id, balance.last_entry_no + charged.number, charged.job_id, 'deduction',
        - charged.credits_charged, balance.credits_remaining - charged.credits_so_far + charged.credits_charged,
        balance.credits_remaining - charged.credits_so_far, 'Job completed',
        NULL, NULL
    FROM (
        SELECT
            job_id, team_id, organization_id, credits_charged,
            row_number() OVER (PARTITION BY team_id ORDER BY job_id) AS number,
            (sum(credits_charged) OVER (PARTITION BY team_id ORDER BY job_id))::bigint AS credits_so_far
        FROM job
        WHERE status = 'completed'
    ) AS charged
    JOIN balance USING (team_id)
)
SELECT
    result.job_id,
    job.job_id IS NOT NULL AS settled,
    coalesce(job.status, j.status) AS status,
    coalesce(job.credits_charged, j.credits_charged) AS credits_charged,
    coalesce(job.credits_short, j.credits_short) AS credits_short,
    coalesce(job.is_unpriced, j.is_unpriced) AS is_unpriced,
    CASE WHEN job.job_id IS NULL THEN charge.credits_due END AS credits_due
FROM (SELECT job_id FROM result) AS result
LEFT JOIN charge USING (job_id)
LEFT JOIN job USING (job_id)
LEFT JOIN LATERAL (
    SELECT status, credits_charged, credits_short, is_unpriced
    FROM jobs
    WHERE job_id = result.job_id AND job.job_id IS NULL
    OFFSET 0 -- else all jobs are read to be joined
) AS j ON true;

-- name: raise_holds(jobs) :none
-- Lets open jobs hold more, as far as their teams have the credits and, where they are asked for one by one, as far as
-- the limits of credits leave room: `jobs` is a JSON array of their job_id and of the credits that are due for them.
WITH due AS (
    SELECT *
    FROM jsonb_to_recordset(%(jobs)s::jsonb) AS due (job_id uuid, credits_due bigint)
    ORDER BY job_id
),
job AS (
    SELECT open.*, due.credits_due - open.credits_held AS credits
    FROM due
    CROSS JOIN LATERAL (
        SELECT job_id, team_id, organization_id, model_groups_used, created_at, credits_held
        FROM jobs
        WHERE job_id = due.job_id AND lease_expires_at > clock_timestamp()
        FOR UPDATE
    ) AS open
    WHERE due.credits_due > open.credits_held
),
team AS (
    SELECT touched.team_id, balance.credits_usable
    FROM (SELECT DISTINCT team_id FROM job ORDER BY team_id) AS touched
    CROSS JOIN LATERAL lock_balance(touched.team_id::text) AS balance
),
room AS (
    SELECT min(state.room_credits) AS credits
    FROM job
    CROSS JOIN LATERAL limits_of(job.team_id::text, job.organization_id::text, job.model_groups_used) AS l
    CROSS JOIN LATERAL limit_state(l.limit_id, l.measure, l.per, l.amount, job.created_at) AS state
    WHERE l.measure = 'credits' AND l.is_hard AND (SELECT count(*) FROM job) = 1
),
raise AS (
    SELECT
        job_id,
        greatest(
            least(
                job.credits,
                team.credits_usable - sum(job.credits) OVER (PARTITION BY team_id ORDER BY job_id) + job.credits,
                room.credits
            ),
            0
        )::bigint AS credits
    FROM job
    JOIN team USING (team_id)
    CROSS JOIN room
)
UPDATE jobs j
SET credits_held = j.credits_held + raise.credits
FROM raise
WHERE j.job_id = raise.job_id
  AND j.job_id = ANY (ARRAY(SELECT job_id FROM job))
  AND raise.credits > 0;

-- name: extend_leases(job_ids, lease_seconds) :many
-- Of those jobs that are open and whose lease holds.
UPDATE jobs
SET lease_expires_at = now() + %(lease_seconds)s * interval '1 second'
WHERE job_id IN (
    SELECT job_id
    FROM jobs
    WHERE job_id = ANY (%(job_ids)s::uuid[])
      AND status IN ('pending', 'in_progress')
      AND lease_expires_at > clock_timestamp()
    ORDER BY job_id
    FOR UPDATE
)
RETURNING job_id;

-- name: end_leases(team_id, key_prefix) :many
-- Of the open jobs of a batch, whose process is gone.
UPDATE jobs
SET lease_expires_at = clock_timestamp()
WHERE job_id IN (
    SELECT job_id
    FROM jobs
    WHERE team_id = %(team_id)s
      AND status IN ('pending', 'in_progress')
      AND starts_with(idempotency_key, %(key_prefix)s)
    ORDER BY job_id
    FOR UPDATE
)
RETURNING job_id;

-- name: sweep(team_id, row_limit) :one
-- Ends the leases that ran out, of the team or of all: fails the jobs, and frees their credits; but what a worker ran
-- waits for another, up to three times. Says how many leases were `swept`, and how many of those jobs wait again. It
-- waits for what is just being settled or swept by another, so that afterwards the credits are free. However many jobs
-- are open, the index tells those whose lease ran out: by the time of the statement, not by a clock that goes on.
WITH expired AS (
    SELECT
        j.job_id,
        j.team_id,
        q.expires_at,
        CASE
            WHEN q.job_id IS NULL THEN 'left'
            WHEN q.state <> 'running' OR q.expires_at <= clock_timestamp() THEN 'too_late'
            WHEN q.losses >= 2 THEN 'poison'
            ELSE 'again'
        END AS fate
    FROM jobs j
    LEFT JOIN job_queue q USING (job_id)
    WHERE j.job_id = ANY (
        ARRAY(
            SELECT job_id
            FROM jobs
            WHERE (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
              AND status IN ('pending', 'in_progress')
              AND lease_expires_at <= statement_timestamp()
            ORDER BY team_id, lease_expires_at
            LIMIT %(row_limit)s
        )
    )
      AND j.status IN ('pending', 'in_progress')
      AND j.lease_expires_at <= statement_timestamp()
    ORDER BY j.job_id
    FOR UPDATE OF j
),
balance AS (
    SELECT count(*) AS teams
    FROM (SELECT DISTINCT team_id FROM expired WHERE fate <> 'again' ORDER BY team_id) AS team
    CROSS JOIN LATERAL lock_balance(team.team_id::text)
),
swept AS (
    UPDATE jobs
    SET status = CASE fate WHEN 'again' THEN 'pending' ELSE 'failed' END,
        completed_at = CASE WHEN fate <> 'again' THEN clock_timestamp() END,
        error_message = 'The job expired at '
            || to_char(lease_expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
            || CASE fate
                WHEN 'left' THEN ': its process was killed, or it was left alone.'
                WHEN 'too_late' THEN ': no worker has run it in time.'
                WHEN 'poison' THEN ': three workers have died while they ran it.'
            END,
        lease_expires_at = CASE fate WHEN 'again' THEN expired.expires_at END
    FROM expired
    WHERE jobs.job_id = expired.job_id AND (SELECT teams FROM balance) >= 0
    RETURNING jobs.job_id, expired.fate
),
again AS (
    UPDATE job_queue q
    SET state = 'waiting',
        losses = losses + 1
    FROM swept
    WHERE q.job_id = swept.job_id AND swept.fate = 'again'
)
SELECT
    count(*) AS swept,
    count(*) FILTER (WHERE fate = 'again') AS requeued
FROM swept;

-- name: expired_teams() :many
-- The teams with jobs whose lease ran out.
SELECT DISTINCT team_id
FROM jobs
WHERE status IN ('pending', 'in_progress') AND lease_expires_at <= statement_timestamp()
ORDER BY team_id;

-- name: results(job_ids) :many
-- How jobs stand, in the order of their ids, and what was answered, as far as it is kept.
SELECT
    j.job_id,
    j.team_id,
    j.status,
    j.is_queued,
    j.model_groups_used,
    j.error_message,
    j.credits_charged,
    j.credits_short,
    j.is_unpriced,
    b.credits_remaining,
    a.job_id IS NOT NULL AS is_kept,
    a.content,
    a.tool_calls,
    a.not_sent
FROM unnest(%(job_ids)s::uuid[]) WITH ORDINALITY AS asked (job_id, place)
JOIN jobs j USING (job_id)
LEFT JOIN job_answers a USING (job_id)
LEFT JOIN current_balances b ON b.team_id = j.team_id
ORDER BY asked.place;

-- name: get(job_id) :maybe
-- `charged_by` is the price by which it was charged; none where it was not, or was charged one credit for want of a
-- price.
SELECT d.*, (SELECT price_terms(p) FROM job_prices p WHERE p.price_id = d.price_id) AS charged_by
FROM job_details d
WHERE job_id = %(job_id)s;

-- name: named(low, high, row_limit) :many
-- The jobs whose ids lie between two, for one that was named by the beginning of its id; the newest first.
SELECT job_id, created_at, status
FROM jobs
WHERE job_id >= %(low)s
  AND job_id <= %(high)s
ORDER BY job_id DESC
LIMIT %(row_limit)s;

-- name: calls(job_id) :many
-- The attempts of a job, in the order in which they were made.
SELECT * FROM llm_call_details WHERE job_id = %(job_id)s ORDER BY call_id;

-- name: calls_of(job_ids) :many
-- As `calls`, of many jobs.
SELECT * FROM llm_call_details WHERE job_id = ANY (%(job_ids)s::uuid[]) ORDER BY job_id, call_id;

-- name: list(team_id, organization_id, status, group_name, job_type, external_task_id, metadata, since, until, sort, after, row_limit) :many
-- The newest first, or the oldest; behind the job `after`. (`metadata <> '{}'` is the condition of the index.)
SELECT *
FROM job_details
WHERE (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(status)s::text IS NULL OR status = %(status)s)
  AND (%(group_name)s::text IS NULL OR %(group_name)s = ANY (model_groups_used))
  AND (%(job_type)s::text IS NULL OR job_type = %(job_type)s)
  AND (%(external_task_id)s::text IS NULL OR external_task_id = %(external_task_id)s)
  AND (%(metadata)s::jsonb IS NULL OR (metadata @> %(metadata)s AND metadata <> '{}'))
  AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
  AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s)
  AND CASE
      WHEN %(after)s::uuid IS NULL THEN true
      WHEN %(sort)s::text = 'oldest'
          THEN (created_at, job_id) > ((SELECT created_at FROM jobs WHERE job_id = %(after)s), %(after)s)
      ELSE (created_at, job_id) < ((SELECT created_at FROM jobs WHERE job_id = %(after)s), %(after)s)
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'oldest' THEN created_at END,
    CASE WHEN %(sort)s::text = 'oldest' THEN job_id END,
    created_at DESC,
    job_id DESC
LIMIT %(row_limit)s;

-- name: refused(team_id, organization_id, group_name, since, until, sort, after, row_limit) :many
-- Jobs that were refused, counted by hour: the newest first, or the oldest; behind the row `after`.
SELECT *
FROM job_refusal_details
WHERE (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
  AND (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
  AND (%(group_name)s::text IS NULL OR group_name = %(group_name)s)
  AND (%(since)s::timestamptz IS NULL OR last_at >= %(since)s)
  AND (%(until)s::timestamptz IS NULL OR first_at < %(until)s)
  AND CASE
      WHEN %(after)s::bigint IS NULL THEN true
      WHEN %(sort)s::text = 'oldest' THEN refusal_id > %(after)s
      ELSE refusal_id < %(after)s
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'oldest' THEN refusal_id END,
    refusal_id DESC
LIMIT %(row_limit)s;

-- name: annotate(job_id, metadata, unset_metadata) :maybe
UPDATE jobs
SET metadata = (metadata || %(metadata)s::jsonb) - %(unset_metadata)s::text[]
WHERE job_id = %(job_id)s
RETURNING job_id;

-- name: costs(job_id) :many
-- What a job cost us: as a whole (without a resolved_model) and then per model. cost_usd is the sum of what is known,
-- of failed calls too, and NULL where there were answers and none is known; unpriced_calls were answered without a
-- known price.
SELECT
    resolved_model,
    count(*) AS calls,
    count(error) AS failed_calls,
    coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
    coalesce(sum(completion_tokens), 0) AS completion_tokens,
    coalesce(sum(total_tokens), 0) AS total_tokens,
    CASE
        WHEN count(cost_usd) = 0 AND count(*) > count(error) THEN NULL
        ELSE coalesce(sum(cost_usd), 0)
    END AS cost_usd,
    count(*) FILTER (WHERE error IS NULL AND cost_usd IS NULL) AS unpriced_calls
FROM llm_calls
WHERE job_id = %(job_id)s
GROUP BY GROUPING SETS ((), (resolved_model))
ORDER BY GROUPING(resolved_model) DESC, min(call_id);

-- name: charge(job_id) :maybe
-- What a job brought, and what of it is left to us.
SELECT
    j.credits_charged,
    coalesce(
        (
            SELECT credits_amount
            FROM credit_transactions
            WHERE job_id = j.job_id AND transaction_type = 'refund'
        ),
        0
    ) AS credits_refunded,
    j.credits_short,
    j.price_id,
    (SELECT price_terms(p) FROM job_prices p WHERE p.price_id = j.price_id) AS charged_by,
    j.is_unpriced,
    (SELECT trim_scale(sum(amount_usd)) FROM margin_parts WHERE job_id = j.job_id) AS margin_usd
FROM jobs j
WHERE j.job_id = %(job_id)s;
