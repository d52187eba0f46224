-- Workers: they take jobs, hold them by leases, and see to what else is due.

-- name: register(host, pid, concurrency, team_id, organization_id, group_name) :one
INSERT INTO workers (host, pid, concurrency, team_id, organization_id, group_name)
VALUES (%(host)s, %(pid)s, %(concurrency)s, %(team_id)s, %(organization_id)s, %(group_name)s)
RETURNING worker_id;

-- name: take(worker_id, most, lease_seconds, with_suspect) :many
-- (Numbers in a request are none of money, and go to the provider as they are: it is text here.)
SELECT
    job_id, group_name, request::text AS request, purpose, timeout_seconds, is_suspect, model_names, model_prices,
    model_keys
FROM take_jobs(%(worker_id)s, %(most)s, %(lease_seconds)s, %(with_suspect)s);

-- name: has_seen_all(worker_id) :maybe
-- Whether it found all that waits when it last took some: there was nothing else that may run now.
SELECT has_seen_all FROM workers WHERE worker_id = %(worker_id)s;

-- name: beat(worker_id, is_stopping) :maybe
-- That it is alive; none where it was given up and forgotten.
UPDATE workers
SET seen_at = clock_timestamp(),
    is_stopping = %(is_stopping)s,
    is_idle = is_idle AND NOT %(is_stopping)s
WHERE worker_id = %(worker_id)s
RETURNING worker_id;

-- name: extend_leases(worker_id, job_ids, lease_seconds, with_lost) :many
-- Of what it runs, from now on; by 0 seconds they run out. What it had lost, as its leases ran out, and nobody has taken
-- since, it takes back (`with_lost`).
WITH mine AS (
    SELECT j.job_id, q.state
    FROM jobs j
    JOIN job_queue q USING (job_id)
    WHERE j.job_id = ANY (%(job_ids)s::uuid[])
      AND j.status IN ('pending', 'in_progress')
      AND q.worker_id = %(worker_id)s
      AND (q.state = 'running' OR %(with_lost)s)
    ORDER BY j.job_id
    FOR UPDATE
),
again AS (
    UPDATE job_queue q
    SET state = 'running',
        losses = losses - 1
    FROM mine
    WHERE q.job_id = mine.job_id AND mine.state = 'waiting'
)
UPDATE jobs j
SET status = 'in_progress',
    lease_expires_at = clock_timestamp() + %(lease_seconds)s * interval '1 second'
FROM mine
WHERE j.job_id = mine.job_id
RETURNING j.job_id;

-- name: put_back(worker_id, job_ids) :many
-- What it has taken and does not run after all waits for another. (What it waits for here may meanwhile have become
-- another's: then its row in the queue says so, as the job's alone would not.)
WITH held AS (
    SELECT j.job_id, q.expires_at
    FROM jobs j
    JOIN job_queue q USING (job_id)
    WHERE j.job_id = ANY (%(job_ids)s::uuid[])
      AND j.status = 'in_progress'
      AND q.worker_id = %(worker_id)s
      AND q.state = 'running'
    ORDER BY j.job_id
    FOR UPDATE
),
job AS (
    UPDATE jobs
    SET status = 'pending',
        lease_expires_at = held.expires_at
    FROM held
    WHERE jobs.job_id = held.job_id
    RETURNING jobs.job_id
)
UPDATE job_queue q
SET state = 'waiting',
    worker_id = NULL
FROM job
WHERE q.job_id = job.job_id
RETURNING q.job_id;

-- name: leave(worker_id) :none
DELETE FROM workers WHERE worker_id = %(worker_id)s;

-- name: start_duty(worker_id, duties, holds) :maybe
-- Of these duties, the one that is due for the longest time. It is this worker's for so many seconds (`holds`, one for
-- each); should the worker die, another's then.
UPDATE duties
SET next_at = clock_timestamp() + due.hold * interval '1 second',
    worker_id = %(worker_id)s
FROM (
    SELECT duty, asked.hold
    FROM duties
    JOIN unnest(%(duties)s::text[], %(holds)s::double precision[]) AS asked (duty, hold) USING (duty)
    WHERE next_at <= clock_timestamp()
       OR next_at > clock_timestamp() + asked.hold * interval '1 second' -- by a clock that was wrong
    ORDER BY next_at
    LIMIT 1
    FOR UPDATE OF duties SKIP LOCKED
) AS due
WHERE duties.duty = due.duty
RETURNING duties.duty, duties.done_at, clock_timestamp() AS now;

-- name: end_duty(duty, worker_id, is_done, every_seconds) :none
-- Next time it is due in so many seconds, whether it was done or not.
UPDATE duties
SET next_at = clock_timestamp() + %(every_seconds)s * interval '1 second',
    worker_id = NULL,
    done_at = CASE WHEN %(is_done)s THEN clock_timestamp() ELSE done_at END
WHERE duty = %(duty)s AND worker_id = %(worker_id)s;

-- name: prune(row_limit) :one
-- Removes answers whose time is over, and workers that were lost a day ago; says how many answers.
WITH forgotten AS (
    DELETE FROM workers WHERE seen_at < clock_timestamp() - interval '1 day'
),
answer AS (
    DELETE FROM job_answers
    WHERE job_id IN (
        SELECT job_id FROM job_answers WHERE expires_at <= statement_timestamp() ORDER BY expires_at LIMIT %(row_limit)s
    )
    RETURNING 1
)
SELECT count(*) AS answers FROM answer;

-- name: list() :many
SELECT * FROM worker_details ORDER BY worker_id;

-- name: queue() :one
-- How many jobs wait, and for how long the oldest has; how many are for later, and how many run.
SELECT
    count(*) FILTER (WHERE is_due) AS waiting,
    floor(extract(epoch FROM clock_timestamp() - min(due_at) FILTER (WHERE is_due)))::bigint AS waiting_seconds,
    count(*) FILTER (WHERE state <> 'running' AND NOT is_due) AS scheduled,
    count(*) FILTER (WHERE state = 'running') AS running
FROM (SELECT state, due_at, state <> 'running' AND due_at <= clock_timestamp() AS is_due FROM job_queue) AS job;
