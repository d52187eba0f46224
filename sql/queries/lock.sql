-- Locks that leave a work to one process at a time. A lock of a session would be nobody's behind a pooler, where the next
-- transaction may be in another session; so a transaction holds it: that of the work, or beside several one of its own.

-- name: hold(name) :one
-- Whether this transaction holds the lock of the work now, which it then does until it ends.
SELECT pg_try_advisory_xact_lock(hashtext('saasllm'), hashtext(%(name)s)) AS is_held;

-- name: stay() :one
-- Lets this transaction go on for as long as it takes, also idle: it holds a lock, waits for one, or for an answer.
SELECT count(set_config(name, '0', true)) AS settings
FROM pg_settings
-- The latter from PostgreSQL 17 on.
WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout');

-- name: check() :one
-- That the transaction with the lock goes on.
SELECT true AS is_held;

-- name: enter(name) :one
-- For each transaction of the work: what a process that was killed has sent last may still be running, and is waited for.
SELECT pg_advisory_xact_lock(hashtext('saasllm work'), hashtext(%(name)s)) AS entered;
