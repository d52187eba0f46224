-- What is applied, and what a schema holds.

-- name: create_record() :none
-- What is applied: each migration, and each file of definitions with the checksums of what it defines.
CREATE TABLE IF NOT EXISTS saasllm_migrations (
    migration   text        PRIMARY KEY,
    checksum    text        NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    duration_ms integer     NOT NULL
);
CREATE TABLE IF NOT EXISTS saasllm_definitions (
    definition text        PRIMARY KEY,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    objects    jsonb       NOT NULL
);

-- name: check(known, definitions) :one
-- Raises SL001 where a migration or a definition is pending, SL002 where an unknown migration is applied, SL010 where
-- no rule is enforced.
SELECT public.require_migrations(%(known)s, %(definitions)s) AS checked;

-- name: act(actor, command) :one
-- For the audit log, until the transaction ends. As the two that follow, it also says where the tables are: whatever
-- search_path the role or the database has, none in another schema and no temporary one stands in for ours.
SELECT
    pg_catalog.set_config('search_path', 'public, pg_temp', true) AS search_path,
    pg_catalog.set_config('saasllm.actor', %(actor)s, true) AS actor,
    pg_catalog.set_config('saasllm.command', %(command)s, true) AS command;

-- name: limit_time(milliseconds) :one
-- Of each statement, until the transaction ends.
SELECT
    pg_catalog.set_config('search_path', 'public, pg_temp', true) AS search_path,
    pg_catalog.set_config('statement_timeout', %(milliseconds)s, true) AS milliseconds;

-- name: look() :one
-- For who only looks.
SELECT pg_catalog.set_config('search_path', 'public, pg_temp', true) AS search_path;

-- name: schema() :one
SELECT current_schema() AS schema;

-- name: recorded() :many
-- What is applied: migrations, and files of definitions with what they define.
SELECT migration, checksum, applied_at, NULL AS objects FROM public.saasllm_migrations
UNION ALL
SELECT definition, checksum, applied_at, objects FROM public.saasllm_definitions
ORDER BY migration;

-- name: record(migration, checksum, duration_ms) :none
INSERT INTO saasllm_migrations (migration, checksum, duration_ms)
VALUES (%(migration)s, %(checksum)s, %(duration_ms)s);

-- name: record_definitions(definition, checksum, objects) :none
INSERT INTO saasllm_definitions AS d (definition, checksum, objects)
VALUES (%(definition)s, %(checksum)s, %(objects)s)
ON CONFLICT (definition) DO UPDATE
SET checksum = excluded.checksum, objects = excluded.objects, applied_at = excluded.applied_at
WHERE (d.checksum, d.objects) IS DISTINCT FROM (excluded.checksum, excluded.objects);

-- name: forget_definitions(definitions) :none
-- All but these.
DELETE FROM saasllm_definitions WHERE definition <> ALL (%(definitions)s);

-- name: existing() :many
-- The tables, functions, views and enabled triggers of our schema, and what DROP calls each.
SELECT 'function ' || proname AS object, oid::regprocedure::text AS dropped_as
FROM pg_proc
WHERE pronamespace = to_regnamespace('public')
UNION ALL
SELECT CASE relkind WHEN 'v' THEN 'view ' ELSE 'table ' END || relname, quote_ident(relname)
FROM pg_class
WHERE relnamespace = to_regnamespace('public') AND relkind IN ('v', 'r', 'p')
UNION ALL
SELECT 'trigger ' || c.relname || '.' || t.tgname, quote_ident(t.tgname) || ' ON ' || quote_ident(c.relname)
FROM pg_trigger t
JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace = to_regnamespace('public') AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A');

-- name: built_on(kind, name) :many
-- The functions, views and triggers that are built on a function or view, as in `existing`.
WITH built AS (
    SELECT classid, objid
    FROM pg_depend
    WHERE (refclassid, refobjid) = CASE %(kind)s
        WHEN 'function' THEN ('pg_proc'::regclass::oid, to_regprocedure(%(name)s)::oid)
        WHEN 'view' THEN ('pg_class'::regclass::oid, to_regclass(%(name)s)::oid)
    END
)
SELECT 'function ' || p.proname AS object, p.oid::regprocedure::text AS dropped_as
FROM pg_proc p
JOIN built ON classid = p.tableoid AND objid = p.oid
UNION
SELECT 'view ' || c.relname, quote_ident(c.relname)
FROM pg_rewrite r
JOIN built ON classid = r.tableoid AND objid = r.oid
JOIN pg_class c ON c.oid = r.ev_class AND c.relkind = 'v' AND c.relname <> %(name)s
UNION
SELECT 'trigger ' || c.relname || '.' || t.tgname, quote_ident(t.tgname) || ' ON ' || quote_ident(c.relname)
FROM pg_trigger t
JOIN built ON classid = t.tableoid AND objid = t.oid
JOIN pg_class c ON c.oid = t.tgrelid;

-- name: create_roles() :none
-- Where this role may; another database of the server may have them already.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['saasllm_admin', 'saasllm_runner', 'saasllm_readonly'] LOOP
        BEGIN
            IF to_regrole(name) IS NULL THEN
                EXECUTE format('CREATE ROLE %I', name);
            END IF;
        EXCEPTION WHEN insufficient_privilege OR duplicate_object OR unique_violation THEN
            NULL;
        END;
    END LOOP;
END
$$;

-- name: may_grant() :one
-- Whether the roles are there, and this one owns the tables.
SELECT
    num_nulls(to_regrole('saasllm_admin'), to_regrole('saasllm_runner'), to_regrole('saasllm_readonly')) = 0
    AND (SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'public.teams'::regclass) AS may_grant;

-- name: rights(relations) :many
-- Who may do what with these tables and views, their columns and their sequences, beside the owner and superusers.
WITH relation AS (
    SELECT oid, relname, relkind, relowner, relacl
    FROM pg_class c
    WHERE relnamespace = 'public'::regnamespace
      AND (
          relname = ANY (%(relations)s)
          OR relkind = 'S' AND oid IN (
              SELECT objid
              FROM pg_depend
              WHERE classid = 'pg_class'::regclass
                AND refclassid = 'pg_class'::regclass
                AND refobjid IN (SELECT to_regclass('public.' || quote_ident(name)) FROM unnest(%(relations)s) AS name)
          )
      )
)
SELECT
    coalesce(r.rolname, 'PUBLIC') AS role,
    CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind,
    c.relname AS relation,
    acl.privilege_type AS privilege,
    acl.column_name AS column,
    acl.is_grantable
FROM relation c
CROSS JOIN LATERAL (
    SELECT '' AS column_name, held.* FROM aclexplode(c.relacl) AS held
    UNION ALL
    SELECT a.attname, held.*
    FROM pg_attribute a, aclexplode(a.attacl) AS held
    WHERE a.attrelid = c.oid AND NOT a.attisdropped
) AS acl
LEFT JOIN pg_roles r ON r.oid = acl.grantee
WHERE acl.grantee <> c.relowner AND r.rolsuper IS NOT TRUE
ORDER BY role, relation, privilege, acl.column_name;

-- name: advance_ids() :none
-- Where rows came without their sequence (a restore of data alone, a switch to a logical replica), the next ids would
-- be taken. (A call's id is one of its job alone.) Nothing is locked where all is well.
DO $$
DECLARE
    numbered record;
    is_behind boolean;
BEGIN
    FOR numbered IN
        SELECT name, id, pg_get_serial_sequence('public.' || name, id)::regclass AS sequence
        FROM (
            VALUES
                ('credit_transactions', 'transaction_id'), ('audit_log', 'audit_id'), ('job_refusals', 'refusal_id'),
                ('workers', 'worker_id'), ('webhooks', 'webhook_id'), ('webhook_secrets', 'secret_id'),
                ('webhook_deliveries', 'delivery_id'), ('webhook_attempts', 'attempt_id'),
                ('credentials', 'credential_id'), ('proxy_keys', 'key_id')
        ) AS numbered (name, id)
    LOOP
        CONTINUE WHEN NOT has_sequence_privilege(numbered.sequence, 'UPDATE');
        EXECUTE format(
            'SELECT max(%I) > coalesce(pg_sequence_last_value(%L), 0) FROM public.%I',
            numbered.id, numbered.sequence, numbered.name
        ) INTO is_behind;
        IF is_behind THEN
            EXECUTE format('LOCK TABLE public.%I IN SHARE ROW EXCLUSIVE MODE', numbered.name);
            EXECUTE format(
                'SELECT setval(%L, greatest(max(%I), pg_sequence_last_value(%L))) FROM public.%I',
                numbered.sequence, numbered.id, numbered.sequence, numbered.name
            );
        END IF;
    END LOOP;
END
$$;

-- name: objects() :many
-- All that decides how the tables of the current schema behave, each with its definition. The records of what is
-- applied are left out, and the schema's name with them, so that two schemas can be compared.
WITH tables AS (
    SELECT oid, relname, relpersistence, relrowsecurity, relhasrules, relhassubclass
    FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace
      AND relkind IN ('r', 'p')
      AND relname NOT IN ('saasllm_migrations', 'saasllm_definitions')
)
SELECT 'column ' || t.relname || '.' || a.attname AS object,
    concat_ws(' ',
        format_type(a.atttypid, a.atttypmod),
        CASE WHEN a.attnotnull THEN 'NOT NULL' END,
        CASE WHEN a.attidentity <> '' THEN 'IDENTITY ' || a.attidentity::text END,
        CASE WHEN a.attgenerated <> '' THEN 'GENERATED' END,
        pg_get_expr(d.adbin, d.adrelid)
    ) AS definition
FROM tables t
JOIN pg_attribute a ON a.attrelid = t.oid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'table ' || relname || '.',
    concat_ws(' ',
        relpersistence::text,
        CASE WHEN relrowsecurity THEN 'ROW LEVEL SECURITY' END,
        CASE WHEN relhasrules THEN 'RULES' END,
        CASE WHEN relhassubclass THEN 'CHILDREN' END
    )
FROM tables
UNION ALL
SELECT 'constraint ' || coalesce(t.relname, d.typname) || '.' || n.conname, pg_get_constraintdef(n.oid)
FROM pg_constraint n
LEFT JOIN tables t ON t.oid = n.conrelid
LEFT JOIN pg_type d ON d.oid = n.contypid AND d.typnamespace = current_schema()::regnamespace
WHERE num_nonnulls(t.oid, d.oid) > 0
  AND n.contype <> 'n' -- NOT NULL is a constraint of its own from PostgreSQL 18 on; the column has it already
UNION ALL
SELECT 'index ' || t.relname || '.' || c.relname, replace(pg_get_indexdef(c.oid), current_schema() || '.', '')
FROM tables t
JOIN pg_index i ON i.indrelid = t.oid
JOIN pg_class c ON c.oid = i.indexrelid
UNION ALL
SELECT 'trigger ' || t.relname || '.' || g.tgname,
    concat_ws(' ', replace(pg_get_triggerdef(g.oid), current_schema() || '.', ''), 'enabled ' || g.tgenabled::text)
FROM tables t
JOIN pg_trigger g ON g.tgrelid = t.oid
WHERE NOT g.tgisinternal
UNION ALL
SELECT 'function ' || oid::regprocedure::text,
    concat_ws(' ',
        md5(coalesce(replace(pg_get_function_sqlbody(oid), current_schema() || '.', ''), prosrc)),
        proconfig::text,
        provolatile::text,
        CASE WHEN prosecdef THEN 'SECURITY DEFINER' END
    )
FROM pg_proc
WHERE pronamespace = current_schema()::regnamespace
UNION ALL
SELECT 'view ' || relname, pg_get_viewdef(oid)
FROM pg_class
WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('v', 'm')
UNION ALL
SELECT 'domain ' || d.typname,
    concat_ws(' ', format_type(d.typbasetype, d.typtypmod), l.collname, CASE WHEN d.typnotnull THEN 'NOT NULL' END)
FROM pg_type d
LEFT JOIN pg_collation l ON l.oid = d.typcollation
WHERE d.typnamespace = current_schema()::regnamespace AND d.typtype = 'd'
ORDER BY object;
