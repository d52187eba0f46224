-- What `doctor` asks of the database. It may be one that is not migrated.

-- name: server() :one
SELECT
    current_setting('server_version') AS version,
    current_setting('server_version_num')::integer / 10000 AS major_version,
    clock_timestamp() AS clock,
    current_user AS role,
    (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS is_superuser,
    pg_is_in_recovery() AS is_replica,
    current_setting('session_replication_role') AS replication_role,
    ARRAY(
        SELECT name
        FROM unnest(ARRAY['fsync', 'full_page_writes', 'synchronous_commit']) AS name
        WHERE current_setting(name) = 'off'
    ) AS not_durable;

-- name: enforced() :many
-- The rules that are in force: constraints, indexes and triggers. A foreign key is one as long as its triggers are.
SELECT 'constraint ' || n.conname AS rule
FROM pg_constraint n
WHERE n.connamespace = 'public'::regnamespace
  AND n.contype NOT IN ('n', 't') -- the column has its NOT NULL, and a trigger is one of the others
  AND n.convalidated
  AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgconstraint = n.oid AND t.tgenabled NOT IN ('O', 'A'))
UNION ALL
SELECT 'index ' || c.relname
FROM pg_index i
JOIN pg_class c ON c.oid = i.indexrelid
WHERE c.relnamespace = 'public'::regnamespace AND i.indisvalid AND i.indisready
UNION ALL
SELECT 'trigger ' || c.relname || '.' || t.tgname
FROM pg_trigger t
JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A');

-- name: taken_ids() :many
-- The tables whose next id is taken, as far as the role may know.
SELECT name
FROM (
    VALUES
        ('credit_transactions', 'transaction_id', (SELECT max(transaction_id) FROM credit_transactions)),
        ('audit_log', 'audit_id', (SELECT max(audit_id) FROM audit_log)),
        ('job_refusals', 'refusal_id', (SELECT max(refusal_id) FROM job_refusals)),
        ('workers', 'worker_id', (SELECT max(worker_id) FROM workers)),
        ('webhooks', 'webhook_id', (SELECT max(webhook_id) FROM webhooks)),
        ('webhook_secrets', 'secret_id', (SELECT max(secret_id) FROM webhook_secrets)),
        ('webhook_deliveries', 'delivery_id', (SELECT max(delivery_id) FROM webhook_deliveries)),
        ('webhook_attempts', 'attempt_id', (SELECT max(attempt_id) FROM webhook_attempts)),
        ('credentials', 'credential_id', (SELECT max(credential_id) FROM credentials)),
        ('proxy_keys', 'key_id', (SELECT max(key_id) FROM proxy_keys))
) AS numbered (name, id, highest)
CROSS JOIN LATERAL (SELECT pg_get_serial_sequence('public.' || name, id)::regclass AS sequence OFFSET 0) AS its
WHERE CASE
    WHEN has_sequence_privilege(sequence, 'SELECT') THEN highest > coalesce(pg_sequence_last_value(sequence), 0)
END;

-- name: rights(tables) :one
-- The tables of saasllm that the role may not read (of one, not each reads the secrets), or not in full, what it may do,
-- and who may make objects beside them.
SELECT
    ARRAY(
        SELECT c.oid::regclass::text
        FROM pg_class c
        WHERE c.relnamespace = 'public'::regnamespace
          AND c.relkind = 'r'
          AND c.relname = ANY (%(tables)s)
          AND (NOT has_any_column_privilege(c.oid, 'SELECT') OR row_security_active(c.oid))
        ORDER BY c.relname
    ) AS unreadable,
    pg_has_role(t.relowner, 'USAGE') AS may_migrate,
    has_table_privilege('teams', 'INSERT') AS may_administer,
    has_any_column_privilege('jobs', 'INSERT') AS may_run_jobs,
    ARRAY(
        SELECT coalesce(quote_ident(r.rolname), 'PUBLIC')
        FROM pg_namespace n
        CROSS JOIN aclexplode(n.nspacl) AS acl
        LEFT JOIN pg_roles r ON r.oid = acl.grantee
        WHERE n.nspname = 'public'
          AND acl.privilege_type = 'CREATE'
          AND acl.grantee NOT IN (n.nspowner, t.relowner)
          AND r.rolsuper IS NOT TRUE
        ORDER BY r.rolname
    ) AS may_create
FROM pg_class t
WHERE t.oid = 'public.teams'::regclass;

-- name: others(tables, triggers) :one
-- What somebody has put on the tables of saasllm: triggers beside its own, and policies.
SELECT
    ARRAY(
        SELECT c.relname || '.' || t.tgname
        FROM pg_trigger t
        JOIN pg_class c ON c.oid = t.tgrelid
        WHERE c.relnamespace = 'public'::regnamespace
          AND c.relname = ANY (%(tables)s)
          AND NOT t.tgisinternal
          AND 'trigger ' || c.relname || '.' || t.tgname <> ALL (%(triggers)s)
        ORDER BY c.relname, t.tgname
    ) AS triggers,
    ARRAY(
        SELECT relname::text
        FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relname = ANY (%(tables)s) AND relrowsecurity
        ORDER BY relname
    ) AS secured;

-- name: see_all() :one
-- For the rest of the transaction, a policy that would hide rows is an error.
SELECT set_config('row_security', 'off', true) AS row_security;

-- name: overdue() :one
-- Jobs whose lease ran out, and active teams whose scheduled credits are due.
SELECT
    (
        SELECT count(*)
        FROM jobs
        WHERE status IN ('pending', 'in_progress') AND lease_expires_at <= statement_timestamp()
    ) AS expired_jobs,
    count(*) AS due_teams,
    min(s.next_on) AS due_since
FROM credit_schedules s
JOIN teams t USING (team_id)
JOIN organizations o USING (organization_id)
WHERE s.next_on <= (now() AT TIME ZONE 'UTC')::date AND t.status = 'active' AND o.status = 'active';

-- name: queue() :one
-- Whether a job has waited for a minute that none of the workers takes.
SELECT EXISTS (
    SELECT
    FROM job_queue q
    JOIN teams t USING (team_id)
    WHERE q.state <> 'running'
      AND q.due_at < clock_timestamp() - interval '1 minute'
      AND NOT EXISTS (
          SELECT
          FROM worker_details w
          WHERE w.status = 'alive'
            AND q.team_id = coalesce(w.team_id, q.team_id)
            AND t.organization_id = coalesce(w.organization_id, t.organization_id)
            AND q.group_name = coalesce(w.group_name, q.group_name)
      )
) AS lacks_worker;

-- name: limits() :many
-- Those that are used to their lowest alert, else to 80 percent; the fullest first.
SELECT organization_id, team_id, group_name, measure, per, amount, used_percent
FROM limit_details
WHERE counted * 100 >= amount * coalesce((SELECT min(alert) FROM unnest(alerts) AS alert), 80)
ORDER BY used_percent DESC, limit_id;

-- name: unpriced(days) :one
-- The jobs of these days whose price was to count something that nobody knows, their teams, and the models at fault.
SELECT
    count(*) AS jobs,
    array_agg(DISTINCT j.team_id::text) AS teams,
    ARRAY(
        SELECT DISTINCT l.resolved_model
        FROM jobs unpriced
        JOIN llm_calls l USING (job_id)
        WHERE unpriced.is_unpriced
          AND unpriced.created_at > now() - %(days)s * interval '1 day'
          AND l.error IS NULL
          AND (l.cost_usd IS NULL OR l.prompt_tokens IS NULL OR l.completion_tokens IS NULL)
        ORDER BY l.resolved_model
    ) AS model_names
FROM jobs j
WHERE j.is_unpriced AND j.created_at > now() - %(days)s * interval '1 day';

-- name: webhooks() :many
-- Those that do not work: disabled for what came of their deliveries, or failing; the longest first.
SELECT webhook_id, url, status, failing_since, coalesce(failing_since, disabled_at) AS since
FROM webhook_details
WHERE status = 'failing' OR disabled_reason <> 'by_hand'
ORDER BY since, webhook_id;

-- name: deliveries(minutes) :one
-- Whether a webhook has waited so long for an event, or for a delivery that is due. Of one that fails, deliveries are
-- slow.
SELECT
    EXISTS (
        SELECT
        FROM events e
        CROSS JOIN LATERAL webhooks_for(e.organization_id::text, e.event_type) w
        JOIN webhook_states s USING (webhook_id)
        WHERE NOT e.is_dispatched
          AND e.created_at < now() - %(minutes)s * interval '1 minute'
          AND e.created_at >= w.created_at
          AND s.disabled_at IS NULL
    ) OR EXISTS (
        SELECT
        FROM webhook_deliveries d
        JOIN webhook_states s USING (webhook_id)
        WHERE d.status = 'pending'
          AND d.next_at < now() - %(minutes)s * interval '1 minute'
          AND num_nonnulls(s.disabled_at, s.failing_since, s.retry_at) = 0
    ) AS lacks_deliverer;

-- name: secrets() :one
-- Whether the role may read secrets, as they are stored, and whether there are keys at the proxy.
SELECT
    has_column_privilege('webhook_secrets', 'secret', 'SELECT')
        AND has_column_privilege('credential_secrets', 'secret', 'SELECT') AS may_read,
    EXISTS (SELECT FROM proxy_keys) AS has_keys;

-- name: models() :many
-- The models that jobs may call, and whether they have a price of our own.
SELECT DISTINCT m.model_name, p.model_name IS NOT NULL AS is_priced
FROM model_group_models m
JOIN model_groups g USING (group_name)
LEFT JOIN model_prices p USING (model_name)
WHERE m.is_active AND g.status = 'active'
ORDER BY m.model_name;
