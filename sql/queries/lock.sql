-- Locks that leave a work to one process at a time: `apply`, `allocate`, `migrate`, and a batch, named `batch NAME`.
--
-- A lock of a session would be nobody's behind a pooler, where the next transaction may be in another session; so a
-- transaction holds it: that of the work, or beside several one of its own. A locked row would keep the server from
-- cleaning up old rows for as long as that transaction lasts, hours for a batch; so it is an advisory lock. Such a lock
-- anybody may hold who may connect. Those who may not do the work are passed over: each lock has a number, the first
-- one from 0 on that none of them holds. Transactions of the work that do not hold it have a number below 0.

-- name: look_again() :one
-- Else `others` knows, within one transaction, no session that began after its first look.
SELECT pg_stat_clear_snapshot();

-- name: others(work) :many
-- The numbers of the work's locks that others hold, and whether these may do the work: whether they are, or may become,
-- a role that may insert into its table.
SELECT
    held.objid::integer AS number,
    EXISTS (
        SELECT FROM pg_roles r
        WHERE pg_has_role(session.usesysid, r.oid, 'MEMBER')
          -- Before the first migration nobody can tell.
          AND coalesce(has_any_column_privilege(r.oid, work.done_in, 'INSERT'), true)
    ) AS may_work
FROM (
    SELECT to_regclass(CASE split_part(%(work)s, ' ', 1)
        WHEN 'allocate' THEN 'public.credit_schedules'
        WHEN 'apply' THEN 'public.teams'
        WHEN 'batch' THEN 'public.jobs'
        WHEN 'migrate' THEN 'public.saasllm_migrations'
    END)::oid AS done_in
) AS work
CROSS JOIN pg_locks held
-- None has the lock of a prepared transaction, which nobody works in.
LEFT JOIN pg_stat_activity session ON session.pid = held.pid
WHERE held.locktype = 'advisory'
  AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND held.objsubid = 2 -- it has two keys
  AND held.classid = (hashtext('saasllm ' || %(work)s)::bigint & 4294967295)::oid
  AND held.granted
  AND held.pid IS DISTINCT FROM pg_backend_pid();

-- name: hold(work, number) :one
-- Whether this transaction holds the lock of this number now, which it then does until it ends.
SELECT pg_try_advisory_xact_lock(hashtext('saasllm ' || %(work)s), %(number)s) AS is_held;

-- name: enter(work) :one
-- For each transaction of the work beside the one that holds its lock: what a process that was killed has sent last may
-- still be running, and is waited for.
SELECT pg_try_advisory_xact_lock(
    hashtext('saasllm ' || %(work)s), -1 - floor(random() * 2147483647)::integer
) AS is_entered;

-- name: stay() :one
-- Lets this transaction go on for as long as it takes, also idle: it holds a lock, waits for one, or for an answer.
SELECT count(set_config(name, '0', true)) AS settings
FROM pg_settings
-- The latter from PostgreSQL 17 on.
WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout');

-- name: check() :one
-- That the transaction with the lock goes on.
SELECT true AS is_held;
