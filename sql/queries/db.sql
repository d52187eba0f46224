-- Databases as a whole.

-- name: drop_demo() :none
DROP DATABASE IF EXISTS saasllm_demo WITH (FORCE);

-- name: create_demo() :none
CREATE DATABASE saasllm_demo;

-- name: lock_restore() :one
-- Whether this session is now the one that restores, until it ends.
SELECT pg_try_advisory_lock(hashtext('saasllm restore')) AS is_locked;

-- name: drop_restored() :none
DROP DATABASE IF EXISTS saasllm_restored WITH (FORCE);

-- name: create_restored() :none
CREATE DATABASE saasllm_restored TEMPLATE template0;

-- name: renew_installation() :none
-- Of the keys at a proxy, those that are not in the backup are another database's: they are left there.
UPDATE installation SET installation_id = gen_random_uuid();

-- name: drop_replaced() :none
DROP DATABASE IF EXISTS saasllm_replaced WITH (FORCE);

-- name: end_sessions() :none
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IN ('saasllm', 'saasllm_restored');

-- name: move_away() :none
ALTER DATABASE saasllm RENAME TO saasllm_replaced;

-- name: move_in() :none
ALTER DATABASE saasllm_restored RENAME TO saasllm;

-- name: backend() :one
-- The process that serves this connection: behind a pooler another one than was told when it was opened.
SELECT pg_backend_pid() AS pid;

-- name: clock() :one
SELECT clock_timestamp() AS now;
