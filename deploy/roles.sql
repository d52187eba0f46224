-- Who logs in, in a deployment: saasllm_migrator runs `migrate up` and owns the tables, saasllm_operator administers and
-- allocates credits, saasllm_worker runs jobs. Run it in saasllm's own, empty database, as whoever may create roles, with
-- the passwords in the environment (psql 15 or newer); again, it sets the passwords anew:
--
--     MIGRATOR_PASSWORD=… OPERATOR_PASSWORD=… WORKER_PASSWORD=… psql "$ADMINISTRATOR_URL" --file deploy/roles.sql

\set ON_ERROR_STOP on
\getenv migrator MIGRATOR_PASSWORD
\getenv operator OPERATOR_PASSWORD
\getenv worker WORKER_PASSWORD

SET client_min_messages = warning;
BEGIN;

-- The three that `migrate up` gives their rights; it makes them where it may, which saasllm_migrator may not.
SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY['saasllm_admin', 'saasllm_runner', 'saasllm_readonly']) AS name
WHERE to_regrole(name) IS NULL
\gexec

SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY['saasllm_migrator', 'saasllm_operator', 'saasllm_worker']) AS name
WHERE to_regrole(name) IS NULL
\gexec

ALTER ROLE saasllm_migrator LOGIN PASSWORD :'migrator';
ALTER ROLE saasllm_operator LOGIN PASSWORD :'operator';
ALTER ROLE saasllm_worker LOGIN PASSWORD :'worker';

GRANT saasllm_admin TO saasllm_operator;
GRANT saasllm_runner TO saasllm_worker;

-- Who could create objects there could put functions of their own in the way of the program's queries.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO saasllm_migrator WITH GRANT OPTION;

COMMIT;
