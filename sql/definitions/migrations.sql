-- The check that travels with the first query of every command: is the database as the program says, does it enforce
-- its rules, and may the program see all of it?

-- Raises SL001 with what is pending, or SL002 with a migration that the program does not know. The program names its
-- migrations, and each file of definitions with its checksum. Where row-level security holds for the caller, what is
-- hidden would pass for what is not there: a ledger of which the half is missing would look sound. Where no trigger
-- fires (SL010), as after a move by a tool that has set so for the role or the database, a charge would move no
-- balance.
CREATE FUNCTION require_migrations(known text[], definitions text[]) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    unknown text;
    pending text;
    partial text;
BEGIN
    SELECT min(migration) INTO unknown FROM public.saasllm_migrations WHERE migration <> ALL (known);
    IF unknown IS NOT NULL THEN
        RAISE EXCEPTION '%', unknown USING ERRCODE = 'SL002';
    END IF;

    SELECT min(name) INTO pending
    FROM unnest(known) AS name
    WHERE name NOT IN (SELECT migration FROM public.saasllm_migrations);
    IF pending IS NULL THEN
        -- Changed or new in the files, or gone from them.
        SELECT min(split_part(file, ' ', 1)) INTO pending
        FROM unnest(definitions) AS wanted (file)
        FULL JOIN (SELECT definition || ' ' || checksum AS file FROM public.saasllm_definitions) recorded USING (file)
        WHERE num_nulls(wanted.file, recorded.file) > 0;
    END IF;
    IF pending IS NOT NULL THEN
        RAISE EXCEPTION '%', pending USING ERRCODE = 'SL001';
    END IF;

    IF current_setting('session_replication_role') = 'replica' THEN
        RAISE EXCEPTION 'session_replication_role is replica, so it enforces none of its rules'
            USING ERRCODE = 'SL010', HINT = 'Reset it for the role, the database and the server. See: saasllm doctor';
    END IF;

    SELECT string_agg(name, ', ') INTO partial
    FROM unnest(ARRAY[
        'organizations', 'model_groups', 'model_group_models', 'teams', 'team_model_groups', 'team_credits',
        'credit_transactions', 'credit_grants', 'credit_uses', 'credit_schedules', 'jobs', 'job_refusals', 'llm_calls',
        'audit_log', 'model_prices', 'job_prices', 'limits', 'limit_counters', 'job_queue', 'job_answers', 'workers',
        'duties', 'events', 'event_counters', 'limit_alerts', 'webhooks', 'webhook_states', 'webhook_secrets',
        'webhook_deliveries', 'webhook_attempts', 'credentials', 'credential_secrets', 'proxy_keys', 'installation',
        'usage_days', 'usage_models', 'usage_changes', 'usage_state'
    ]) AS name
    WHERE row_security_active(to_regclass('public.' || name));
    IF partial IS NOT NULL THEN
        RAISE EXCEPTION 'row-level security may hide rows of % from it', partial
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Use a role with BYPASSRLS, or: ALTER TABLE ... DISABLE ROW LEVEL SECURITY';
    END IF;
END
$$;
