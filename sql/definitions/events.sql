-- Events: what happens is told in the transaction in which it happens, whatever client makes it.
--
-- What happens with every job, or to every team at once, is written only where a webhook wants it; all else is rare, and
-- always written. An event locks nothing, so that nobody waits for another: its number in its organization comes later
-- (webhooks.sql). What it tells, `data`, is an object of fields that have the names and values of the columns elsewhere.


-- The smallest UUID of version 7 of a time.
CREATE FUNCTION first_id(at timestamptz) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN encode(
    int8send((floor(extract(epoch FROM at) * 1000)::bigint << 16) | 28672) || '\x8000000000000000'::bytea, 'hex'
)::uuid;

-- A UUID of version 7: it begins with the time, so that new rows lie together in the index, and in their order.
CREATE FUNCTION new_id() RETURNS uuid
LANGUAGE sql VOLATILE PARALLEL SAFE AS $$
    SELECT encode(
        overlay(
            uuid_send(gen_random_uuid())
            PLACING int8send(((now_us / 1000) << 16) | 28672 | ((now_us % 1000) * 4096 / 1000)) FROM 1 FOR 8
        ),
        'hex'
    )::uuid
    FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now_us OFFSET 0) AS clock
$$;

-- A time as the program writes it, whatever the zone of the session.
CREATE FUNCTION utc(at timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');


-- The webhooks that want an event. By the index: where a function does without sequential scans, one would count as
-- dear, and a server with JIT would compile it each time.
CREATE FUNCTION webhooks_for(of_organization text, of_type text) RETURNS SETOF webhooks
LANGUAGE sql STABLE PARALLEL SAFE ROWS 1 AS $$
    SELECT *
    FROM public.webhooks w
    WHERE coalesce(w.organization_id, '') IN ('', of_organization)
      AND (of_type = ANY (w.event_types) OR 'all' = ANY (w.event_types))
      AND of_type <> 'webhook.test' -- that is for one alone
$$;

-- Whether an event is to be written.
CREATE FUNCTION is_told(of_organization text, of_type text) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT (of_type NOT LIKE 'job.%' AND of_type NOT IN ('credits.allocated', 'credits.expired'))
        OR EXISTS (SELECT FROM public.webhooks_for(of_organization, of_type))
$$;


-- Jobs that have ended; and always what could not be charged for one. No more of their texts than any
-- endpoint takes, and neither metadata nor groups where they are too large: 16 kB in all, whatever a job has.
CREATE FUNCTION tell_of_jobs(ended uuid[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.events (event_id, event_type, organization_id, team_id, data)
    SELECT
        public.new_id(),
        told.event_type,
        j.organization_id,
        j.team_id,
        jsonb_build_object(
            'job_id', j.job_id, 'team_id', j.team_id, 'job_type', left(j.job_type, 255), 'status', j.status,
            'external_task_id', left(j.external_task_id, 255),
            'model_groups_used', CASE
                WHEN octet_length(to_jsonb(j.model_groups_used)::text) <= 3072 THEN j.model_groups_used
            END,
            'credits_charged', j.credits_charged, 'credits_short', j.credits_short,
            'error_message', left(j.error_message, 500),
            'metadata', CASE WHEN octet_length(j.metadata::text) <= 6144 THEN j.metadata END,
            'created_at', public.utc(j.created_at), 'started_at', public.utc(j.started_at),
            'completed_at', public.utc(j.completed_at)
        )
    FROM ONLY public.jobs j
    CROSS JOIN LATERAL (
        SELECT 'job.' || j.status AS event_type
        UNION ALL
        SELECT 'credits.short' WHERE j.credits_short > 0
    ) AS told
    WHERE j.job_id = ANY (ended) AND public.is_told(j.organization_id::text, told.event_type);
END
$$;


-- What moves credits, but for what jobs are charged.
CREATE FUNCTION tell_of_entries(entries credit_transactions[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.events (event_id, event_type, organization_id, team_id, data)
    SELECT
        public.new_id(),
        told.event_type,
        e.organization_id,
        e.team_id,
        jsonb_build_object(
            'transaction_id', e.transaction_id, 'team_id', e.team_id, 'entry_no', e.entry_no,
            'transaction_type', e.transaction_type, 'credits_amount', e.credits_amount,
            'credits_after', e.credits_after, 'job_id', e.job_id, 'source', e.source,
            'period', left(e.period, 255),
            'category', e.category, 'expires_at', public.utc(e.expires_at), 'grant_id', e.grant_id,
            'created_at', public.utc(e.created_at)
        )
    FROM unnest(entries) AS e
    CROSS JOIN LATERAL (
        SELECT 'credits.' || CASE
            WHEN e.transaction_type = 'allocation' AND e.period IS NOT NULL THEN 'allocated'
            WHEN e.transaction_type = 'allocation' THEN 'added'
            WHEN e.transaction_type = 'refund' THEN 'refunded'
            WHEN e.transaction_type = 'adjustment' THEN 'adjusted'
            ELSE 'expired'
        END AS event_type
    ) AS told
    WHERE e.transaction_type <> 'deduction' AND public.is_told(e.organization_id::text, told.event_type)
    ORDER BY e.transaction_id;
END
$$;


-- A team's credits have fallen to a threshold of it, or are used up with its overdraft. That they were above before is
-- what makes it an event: so each is told once until they have been above again. A threshold that is set below them is
-- told at once. For the guard of balances (ledger.sql), which sees each of their movements.
CREATE FUNCTION tell_of_balance(was team_credits, is_now team_credits) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.events (event_id, event_type, organization_id, team_id, data)
    SELECT
        public.new_id(),
        told.event_type,
        t.organization_id,
        t.team_id,
        jsonb_build_object(
            'team_id', t.team_id, 'credits_remaining', is_now.credits_remaining,
            'credits_overdraft', is_now.credits_overdraft
        ) || told.data
    FROM public.teams t
    CROSS JOIN (
        SELECT 'credits.low' AS event_type, jsonb_build_object('low_credits', threshold) AS data
        FROM (SELECT DISTINCT threshold FROM unnest(is_now.low_credits) AS threshold ORDER BY threshold DESC) AS set
        WHERE is_now.credits_remaining <= threshold
          AND (was.credits_remaining > threshold OR threshold <> ALL (was.low_credits))
        UNION ALL
        SELECT 'credits.exhausted', '{}'
        WHERE (was.credits_remaining + was.credits_overdraft <= 0) IS NOT TRUE -- or without a bound
          AND is_now.credits_remaining + is_now.credits_overdraft <= 0
    ) AS told
    WHERE t.team_id = is_now.team_id;
END
$$;

CREATE FUNCTION tell_of_threshold() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    PERFORM public.tell_of_balance(OLD, NEW);
    RETURN NULL;
END
$$;

-- By its columns, and not by a condition, which every movement of a balance would pay for.
CREATE TRIGGER team_credits_tell AFTER UPDATE OF low_credits, credits_overdraft ON team_credits
    FOR EACH ROW EXECUTE FUNCTION tell_of_threshold();


-- A limit is used to one of its alerts, or reached (that is 100 percent): told once a period, of each amount that it has
-- in it. For the triggers of jobs, whose settings hold for it. Jobs at once have no period: of those it is an hour.
CREATE FUNCTION tell_of_limit(of_limit limits, counted numeric, is_refusing boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    since timestamptz := CASE
        WHEN of_limit.per = 'total' THEN timestamptz 'epoch'
        ELSE date_trunc(CASE of_limit.per WHEN 'concurrent' THEN 'hour' ELSE of_limit.per END, now(), 'UTC')
    END;
    new_alerts integer[] := ARRAY(
        SELECT DISTINCT alert
        FROM unnest(of_limit.alerts || 100) AS alert
        WHERE (counted * 100 >= alert * of_limit.amount OR (alert = 100 AND is_refusing))
          AND NOT EXISTS (
              SELECT
              FROM public.limit_alerts told
              WHERE told.limit_id = of_limit.limit_id
                AND told.period_start = since
                AND told.amount = of_limit.amount
                AND told.alert = alert.alert
          )
        ORDER BY alert
    );
BEGIN
    IF new_alerts = '{}' THEN
        RETURN;
    END IF;
    WITH told AS (
        INSERT INTO public.limit_alerts (limit_id, period_start, amount, alert)
        SELECT of_limit.limit_id, since, of_limit.amount, alert FROM unnest(new_alerts) AS alert
        ON CONFLICT DO NOTHING
        RETURNING alert
    )
    INSERT INTO public.events (event_id, event_type, organization_id, team_id, data)
    SELECT
        public.new_id(),
        CASE told.alert WHEN 100 THEN 'limit.reached' ELSE 'limit.alert' END,
        coalesce(
            of_limit.organization_id, (SELECT t.organization_id FROM public.teams t WHERE t.team_id = of_limit.team_id)
        ),
        of_limit.team_id,
        jsonb_build_object(
            'limit_id', of_limit.limit_id, 'organization_id', of_limit.organization_id, 'team_id', of_limit.team_id,
            'group_name', of_limit.group_name, 'measure', of_limit.measure, 'per', of_limit.per,
            'amount', of_limit.amount, 'is_hard', of_limit.is_hard, 'alert', told.alert,
            'counted', trim_scale(counted), 'period_start', public.utc(nullif(since, 'epoch'))
        )
    FROM told
    ORDER BY told.alert;
    -- Of periods that are short, those of long ago.
    DELETE FROM ONLY public.limit_alerts
    WHERE limit_id = of_limit.limit_id AND period_start < since - interval '1 day' AND since > 'epoch';
END
$$;

CREATE FUNCTION forget_alerts() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM ONLY public.limit_alerts WHERE limit_id = OLD.limit_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER limits_forget_alerts AFTER DELETE ON limits
    FOR EACH ROW EXECUTE FUNCTION forget_alerts();


-- Organizations and teams that come and go, or may run no jobs for a time: as their records say.
CREATE FUNCTION tell_of_records() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    INSERT INTO public.events (event_id, event_type, organization_id, team_id, data)
    SELECT
        public.new_id(),
        noun || '.' || CASE
            WHEN action = 'create' THEN 'created'
            WHEN action <> 'update' THEN 'deleted'
            WHEN after ->> 'status' = 'suspended' THEN 'suspended'
            ELSE 'resumed'
        END,
        organization_id,
        team_id,
        CASE noun WHEN 'team' THEN jsonb_build_object('team_id', team_id) ELSE '{}' END
        || jsonb_build_object('organization_id', organization_id)
    FROM new_rows
    WHERE noun IN ('organization', 'team') AND (action <> 'update' OR before ->> 'status' <> after ->> 'status')
    ORDER BY audit_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER audit_log_tell AFTER INSERT ON audit_log
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION tell_of_records();


-- Who may not change teams removes events only when they are old.
CREATE FUNCTION refuse_forgetting() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT has_table_privilege('public.teams', 'UPDATE') THEN
        RAISE EXCEPTION 'an event of the last day is removed only by who may change teams'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER events_stay AFTER DELETE ON events
    FOR EACH ROW WHEN (OLD.created_at > now() - interval '1 day') EXECUTE FUNCTION refuse_forgetting();
