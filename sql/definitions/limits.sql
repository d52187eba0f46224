-- Limits: what counts towards them, and what holds them.
--
-- A job counts where it began: in the row of that period, from its beginning until it has ended, whenever that is. Rows
-- of limits are locked in the order of the limits, after the balances, and until the transaction ends: what touches
-- them comes last. A team that has no limit, nor its organization, pays an index lookup for that.


-- The limits that concern a job: those of its team and organization, and of its team with its groups.
CREATE FUNCTION limits_of(of_team text, of_organization text, of_groups text[]) RETURNS SETOF limits
LANGUAGE sql STABLE PARALLEL SAFE ROWS 1 AS $$
    SELECT *
    FROM public.limits
    WHERE coalesce(team_id, organization_id) IN (of_team, of_organization)
      AND (team_id IS NULL OR team_id = of_team)
      AND (organization_id IS NULL OR organization_id = of_organization)
      AND (group_name IS NULL OR group_name = ANY (of_groups))
$$;

-- What a job has used by its calls, failed ones too, or by those to a group.
CREATE FUNCTION used_by_calls(of_job uuid, of_group text) RETURNS TABLE (tokens numeric, cost_usd numeric)
LANGUAGE sql STABLE PARALLEL SAFE ROWS 1 AS $$
    SELECT
        sum(coalesce(c.total_tokens, coalesce(c.prompt_tokens, 0) + coalesce(c.completion_tokens, 0))),
        sum(c.cost_usd)
    FROM ONLY public.llm_calls c
    WHERE c.job_id = of_job AND (of_group IS NULL OR c.model_group_used = of_group)
$$;

-- Where the row of a moment begins: for a window that slides it is a second or a minute of it, else the whole period.
CREATE FUNCTION limit_period(per text, at timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE
    WHEN per IN ('total', 'concurrent') THEN timestamptz 'epoch'
    ELSE date_trunc(CASE per WHEN 'minute' THEN 'second' WHEN 'hour' THEN 'minute' ELSE per END, at, 'UTC')
END;

-- Whether jobs that are running count: not towards jobs in a period, which are counted as they begin.
CREATE FUNCTION counts_running(measure text, per text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN measure <> 'jobs' OR per = 'concurrent';

-- How long a window that slides is; zero for any other.
CREATE FUNCTION limit_window(per text) RETURNS interval
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE per WHEN 'minute' THEN interval '1 minute' WHEN 'hour' THEN interval '1 hour' ELSE interval '0' END;

-- What counts of it: what is used or in use. What tokens and money a job will use is known at its end: while it runs,
-- it counts as what such jobs used lately.
CREATE FUNCTION limit_counted(
    measure text, per text, used numeric, running bigint, reserved bigint, expected numeric
) RETURNS numeric
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE
    WHEN per = 'concurrent' THEN running
    WHEN measure = 'jobs' THEN used
    WHEN measure = 'credits' THEN used + reserved
    ELSE used + running * coalesce(expected, 0)
END;

-- How it stands with a limit in the period of a moment. `counted` is what is used or in use; `room_jobs` says how many
-- jobs may begin, `room_credits` how many credits they may hold; `room_at` when there is more room, NULL where no time
-- brings it. What tokens and money a job will use is known at its end: while it runs, it counts as what such jobs used
-- lately.
CREATE FUNCTION limit_state(of_limit bigint, measure text, per text, amount numeric, at timestamptz)
RETURNS TABLE (
    used numeric, running bigint, reserved bigint, expected numeric, counted numeric, room_jobs numeric,
    room_credits numeric, room_at timestamptz
)
LANGUAGE sql STABLE PARALLEL SAFE ROWS 1 AS $$
    SELECT
        c.used,
        c.running,
        c.reserved,
        lately.expected,
        now_is.counted,
        CASE
            WHEN now_is.counted >= amount THEN 0
            WHEN measure = 'jobs' THEN amount - now_is.counted
            WHEN measure = 'credits' OR lately.expected IS NULL OR lately.expected = 0 THEN 'Infinity'
            ELSE ceil((amount - c.used) / lately.expected) - c.running
        END,
        CASE WHEN measure = 'credits' THEN amount - now_is.counted ELSE 'Infinity' END,
        CASE
            WHEN per IN ('total', 'concurrent') OR amount = 0 THEN NULL
            WHEN public.limit_window(per) > interval '0'
                THEN c.first_start
                    + public.limit_window(per)
                    + CASE per WHEN 'hour' THEN interval '1 minute' ELSE interval '1 second' END
            -- In UTC: a session's own time zone may have another month then, or a day of 23 hours.
            ELSE (public.limit_period(per, at) AT TIME ZONE 'UTC' + ('1 ' || per)::interval) AT TIME ZONE 'UTC'
        END
    FROM (
        SELECT
            coalesce(sum(used), 0) AS used,
            coalesce(sum(running), 0)::bigint AS running,
            coalesce(sum(reserved), 0)::bigint AS reserved,
            min(period_start) FILTER (WHERE used > 0 OR running > 0) AS first_start
        FROM public.limit_counters
        WHERE limit_id = of_limit
          AND period_start >= public.limit_period(per, at) - public.limit_window(per)
          AND (period_start = public.limit_period(per, at) OR public.limit_window(per) > interval '0')
    ) AS c
    CROSS JOIN LATERAL (
        SELECT (
            SELECT expected
            FROM public.limit_counters
            WHERE limit_id = of_limit AND expected IS NOT NULL AND measure IN ('tokens', 'cost_usd')
            ORDER BY period_start DESC
            LIMIT 1
        ) AS expected
    ) AS lately
    CROSS JOIN LATERAL (
        SELECT public.limit_counted(measure, per, c.used, c.running, c.reserved, lately.expected) AS counted
    ) AS now_is
$$;

CREATE VIEW limit_details AS
SELECT
    l.limit_id,
    l.organization_id,
    l.team_id,
    l.group_name,
    l.measure,
    l.per,
    l.amount,
    l.is_hard,
    l.alerts,
    s.used,
    CASE WHEN counts_running(l.measure, l.per) THEN s.running END AS running,
    s.counted,
    CASE WHEN l.amount > 0 THEN trim_scale(round(100 * s.counted / l.amount, 1)) ELSE 100 END AS used_percent,
    (
        SELECT max(alert)
        FROM unnest(l.alerts) AS alert
        WHERE s.counted * 100 >= alert * l.amount
    ) AS alert_reached,
    s.room_jobs,
    s.room_credits,
    s.room_at,
    l.created_at,
    l.updated_at
FROM limits l
CROSS JOIN LATERAL limit_state(l.limit_id, l.measure, l.per, l.amount, now()) AS s;

-- The room that the hard limits of a job of a team and a group leave; without a group those of team and organization.
CREATE FUNCTION hard_limits(of_team text, of_organization text, of_group text)
RETURNS TABLE (
    limit_id bigint, per text, is_of_group boolean, room_jobs numeric, room_credits numeric, room_at timestamptz
)
LANGUAGE plpgsql STABLE ROWS 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    RETURN QUERY
    SELECT l.limit_id, l.per, l.group_name IS NOT NULL, s.room_jobs, s.room_credits, s.room_at
    FROM limits_of(of_team, of_organization, ARRAY[of_group]) l
    CROSS JOIN LATERAL limit_state(l.limit_id, l.measure, l.per, l.amount, now()) AS s
    WHERE l.is_hard;
END
$$;

-- A limit as it is told to whom it refuses: planned only where it is.
CREATE FUNCTION limit_record(of_limit bigint) RETURNS jsonb
LANGUAGE plpgsql STABLE STRICT AS $$
BEGIN
    RETURN (SELECT to_jsonb(l) FROM limit_details l WHERE l.limit_id = of_limit);
END
$$;

-- On which terms a job begins: its price, what it holds by that, and the hard limit that leaves no room for it, where
-- there is one: the one that does so for the longest time.
CREATE FUNCTION terms_of(
    of_team text, of_organization text, of_group text, of_job_type text,
    OUT price_id bigint, OUT credits_held bigint, OUT limit_reached bigint
)
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    SELECT p.price_id, p.hold
    INTO price_id, credits_held
    FROM price_of(of_team, of_organization, of_group, of_job_type) p;
    credits_held := coalesce(credits_held, 1);

    IF EXISTS (SELECT FROM limits_of(of_team, of_organization, ARRAY[of_group])) THEN
        SELECT l.limit_id
        INTO limit_reached
        FROM hard_limits(of_team, of_organization, of_group) l
        WHERE l.room_jobs < 1 OR l.room_credits < credits_held
        ORDER BY l.room_at DESC
        LIMIT 1;
    END IF;
END
$$;


-- Counts jobs that begin, and what credits are held for them: for the triggers of jobs, for every client. A hard limit
-- that is passed by it refuses them; else it is told where it is nearly reached. Jobs that are running count only where
-- that is limited by them; those that wait for a worker do not run at once with others.
CREATE FUNCTION count_use(of_limit limits, of_period timestamptz, jobs bigint, credits bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    is_new   boolean;
    used     numeric;
    running  bigint;
    reserved bigint;
    expected numeric;
    counted  numeric;
BEGIN
    INSERT INTO public.limit_counters AS c (limit_id, period_start, used, running, reserved)
    VALUES (
        of_limit.limit_id,
        of_period,
        CASE WHEN of_limit.measure = 'jobs' THEN jobs ELSE 0 END,
        CASE WHEN public.counts_running(of_limit.measure, of_limit.per) THEN jobs ELSE 0 END,
        CASE WHEN of_limit.measure = 'credits' THEN credits ELSE 0 END
    )
    ON CONFLICT (limit_id, period_start) DO UPDATE
    SET used = c.used + excluded.used,
        running = c.running + excluded.running,
        reserved = c.reserved + excluded.reserved
    RETURNING c.xmax = 0, c.used, c.running, c.reserved, c.expected INTO is_new, used, running, reserved, expected;

    IF is_new AND public.limit_window(of_limit.per) > interval '0' THEN
        DELETE FROM ONLY public.limit_counters c
        WHERE c.limit_id = of_limit.limit_id
          AND c.period_start < of_period - 2 * public.limit_window(of_limit.per)
          AND c.running = 0;
    END IF;
    -- Its row is all there is to know of most: not of a window, nor of a period in which no job has ended.
    IF public.limit_window(of_limit.per) > interval '0'
        OR (of_limit.measure IN ('tokens', 'cost_usd') AND expected IS NULL)
    THEN
        SELECT s.used, s.running, s.reserved, s.expected
        INTO used, running, reserved, expected
        FROM public.limit_state(of_limit.limit_id, of_limit.measure, of_limit.per, of_limit.amount, of_period) AS s;
    END IF;
    counted := public.limit_counted(of_limit.measure, of_limit.per, used, running, reserved, expected);
    -- Of tokens and money, those jobs count that were running before: the last that has begun asks for the others.
    IF of_limit.is_hard AND (
        CASE
            WHEN of_limit.measure IN ('tokens', 'cost_usd')
                THEN jobs > 0 AND used + (running - 1) * coalesce(expected, 0) >= of_limit.amount
            ELSE counted > of_limit.amount
        END
    ) THEN
        RAISE EXCEPTION 'the limit of % % is reached', trim_scale(of_limit.amount) || ' ' || of_limit.measure,
            CASE of_limit.per
                WHEN 'total' THEN 'in total'
                WHEN 'concurrent' THEN 'at once'
                ELSE 'per ' || of_limit.per
            END
            USING ERRCODE = 'SL011', HINT = 'See: saasllm limit list';
    END IF;
    IF of_period <> public.limit_period(of_limit.per, now()) THEN
        -- A job of an earlier time: what it is told by is how it stands now.
        SELECT s.counted
        INTO counted
        FROM public.limit_state(of_limit.limit_id, of_limit.measure, of_limit.per, of_limit.amount, now()) AS s;
    END IF;
    PERFORM public.tell_of_limit(of_limit, counted);
END
$$;

-- Counts jobs that are not running any more: what those have used that have ended is known, and those that were put
-- back wait again. What the limits say now does not matter: a job is never kept from its end. (Each counter is written
-- once: when a transaction writes a row for the second time, its foreign key is checked, which waits for whoever
-- removes the limit, who waits for the counter.)
CREATE FUNCTION count_stopped(ended uuid[], ended_waiting uuid[], put_back uuid[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    job     record;
    counted numeric;
    limits  public.limits[] := '{}';
    counts  numeric[] := '{}'; -- of each of them
BEGIN
    FOR job IN
        SELECT
            l AS of_limit,
            l.limit_id,
            public.limit_period(l.per, j.created_at) AS period_start,
            count(*) FILTER (WHERE l.per <> 'concurrent' OR j.job_id <> ALL (ended_waiting)) AS jobs,
            count(*) FILTER (WHERE j.status = 'completed') AS completed,
            CASE WHEN l.measure = 'credits' THEN sum(j.credits_held) ELSE 0 END AS released,
            coalesce(
                sum(
                    CASE l.measure
                        WHEN 'credits' THEN j.credits_charged
                        WHEN 'tokens' THEN c.tokens
                        WHEN 'cost_usd' THEN c.cost_usd
                    END
                ),
                0
            ) AS used
        FROM ONLY public.jobs j
        CROSS JOIN LATERAL public.limits_of(j.team_id::text, j.organization_id::text, j.model_groups_used) l
        CROSS JOIN LATERAL public.used_by_calls(
            CASE WHEN l.measure IN ('tokens', 'cost_usd') THEN j.job_id END, l.group_name::text
        ) c
        WHERE j.job_id = ANY (ended || put_back)
          AND public.counts_running(l.measure, l.per)
          AND (l.per = 'concurrent' OR j.job_id <> ALL (put_back))
        GROUP BY l, l.limit_id, l.measure, period_start
        ORDER BY l.limit_id, period_start
    LOOP
        UPDATE ONLY public.limit_counters AS c
        SET used = used + job.used,
            running = greatest(running - job.jobs, 0),
            reserved = greatest(reserved - job.released, 0),
            -- A moving average over some ten jobs.
            expected = CASE
                WHEN job.completed = 0 THEN expected
                ELSE round(
                    coalesce(
                        expected + (job.used / job.completed - expected) * least(job.completed, 10) / 10,
                        job.used / job.completed
                    ),
                    12
                )
            END
        WHERE limit_id = job.limit_id AND period_start = job.period_start
        RETURNING
            public.limit_counted((job.of_limit).measure, (job.of_limit).per, c.used, c.running, c.reserved, c.expected)
        INTO counted;

        IF public.limit_window((job.of_limit).per) > interval '0' THEN
            SELECT s.counted
            INTO counted
            FROM public.limit_state(
                job.limit_id, (job.of_limit).measure, (job.of_limit).per, (job.of_limit).amount, now()
            ) AS s;
        ELSIF job.period_start <> public.limit_period((job.of_limit).per, now()) THEN
            counted := NULL; -- that period is over
        END IF;
        limits := limits || job.of_limit;
        counts := counts || counted;
    END LOOP;
    -- When it has all of its counters: others that tell of the same limit may have one that it still needs.
    FOR number IN 1 .. cardinality(limits) LOOP
        PERFORM public.tell_of_limit(limits[number], counts[number]);
    END LOOP;
END
$$;

-- Open jobs that are purged with their team are not running in their organization any more.
CREATE FUNCTION forget_jobs() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
BEGIN
    UPDATE ONLY public.limit_counters counter
    SET running = greatest(counter.running - gone.jobs, 0),
        reserved = greatest(counter.reserved - gone.credits, 0)
    FROM (
        SELECT
            l.limit_id,
            public.limit_period(l.per, job.created_at) AS period_start,
            count(*) FILTER (WHERE l.per <> 'concurrent' OR NOT (job.is_queued AND job.status = 'pending')) AS jobs,
            sum(job.credits_held) AS credits
        FROM old_rows job
        JOIN public.limits l ON l.organization_id = job.organization_id
        WHERE job.completed_at IS NULL
        GROUP BY l.limit_id, period_start
    ) AS gone
    WHERE counter.limit_id = gone.limit_id AND counter.period_start = gone.period_start;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_forget AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION forget_jobs();


-- A limit that is new counts what was used before, in the period that is under way, and what is running. Jobs that
-- begin or end meanwhile would be counted twice or not at all: they wait. But not for long, should the transaction of an
-- application that has submitted a job not end.
CREATE FUNCTION count_past_use() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET lock_timeout = '5s' AS $$
BEGIN
    LOCK TABLE ONLY public.jobs IN SHARE ROW EXCLUSIVE MODE;
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE EXCEPTION 'jobs that began or ended meanwhile cannot be counted in a transaction that does not see them'
            USING ERRCODE = 'serialization_failure', HINT = 'Set limits in a READ COMMITTED transaction.';
    END IF;
    DELETE FROM ONLY public.limit_counters WHERE limit_id = NEW.limit_id;
    INSERT INTO public.limit_counters (limit_id, period_start, used, running, reserved, expected)
    SELECT
        NEW.limit_id,
        public.limit_period(NEW.per, j.created_at) AS period_start,
        coalesce(
            sum(
                CASE NEW.measure
                    WHEN 'jobs' THEN 1
                    WHEN 'credits' THEN j.credits_charged
                    WHEN 'tokens' THEN c.tokens
                    WHEN 'cost_usd' THEN c.cost_usd
                END
            ),
            0
        ),
        count(*) FILTER (
            WHERE j.completed_at IS NULL
              AND public.counts_running(NEW.measure, NEW.per)
              AND NOT (NEW.per = 'concurrent' AND j.is_queued AND j.status = 'pending')
        ),
        coalesce(sum(j.credits_held) FILTER (WHERE j.completed_at IS NULL AND NEW.measure = 'credits'), 0),
        CASE NEW.measure
            WHEN 'tokens' THEN round(avg(c.tokens) FILTER (WHERE j.status = 'completed'), 12)
            WHEN 'cost_usd' THEN round(avg(c.cost_usd) FILTER (WHERE j.status = 'completed'), 12)
        END
    FROM ONLY public.jobs j
    -- Of one that is open they count at its end.
    CROSS JOIN LATERAL public.used_by_calls(
        CASE WHEN NEW.measure IN ('tokens', 'cost_usd') AND j.completed_at IS NOT NULL THEN j.job_id END,
        NEW.group_name::text
    ) c
    WHERE (j.team_id = NEW.team_id OR j.organization_id = NEW.organization_id)
      AND (NEW.group_name IS NULL OR NEW.group_name = ANY (j.model_groups_used))
      AND (
          j.completed_at IS NULL
          OR (
              NEW.per <> 'concurrent'
              AND j.created_at >= public.limit_period(NEW.per, now()) - public.limit_window(NEW.per)
          )
      )
    GROUP BY period_start;
    RETURN NULL;
END
$$;

CREATE TRIGGER limits_count_past_use AFTER INSERT ON limits
    FOR EACH ROW EXECUTE FUNCTION count_past_use();

-- What a limit counts stays what it is: else its counters would say something else. What it has counted goes with it,
-- or where its window has long slid on.
CREATE FUNCTION refuse_limit_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_TABLE_NAME = 'limits' THEN
        RAISE EXCEPTION 'limit % cannot be moved, or count something else', OLD.limit_id
            USING ERRCODE = 'SL012', HINT = 'Remove it, and set another.';
    END IF;
    IF TG_OP = 'DELETE' AND NOT EXISTS (
        SELECT
        FROM ONLY public.limits l
        WHERE l.limit_id = OLD.limit_id
          AND NOT (
              public.limit_window(l.per) > interval '0'
              AND OLD.period_start < clock_timestamp() - 2 * public.limit_window(l.per)
              AND OLD.running = 0
          )
    ) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'what limits have counted as used stays: % is not allowed', TG_OP
        USING ERRCODE = 'SL012', HINT = 'Raise the limit: saasllm limit set';
END
$$;

CREATE TRIGGER limits_stay AFTER UPDATE ON limits
    FOR EACH ROW
    WHEN (
        (OLD.limit_id, OLD.organization_id, OLD.team_id, OLD.group_name, OLD.measure, OLD.per)
        IS DISTINCT FROM (NEW.limit_id, NEW.organization_id, NEW.team_id, NEW.group_name, NEW.measure, NEW.per)
    )
    EXECUTE FUNCTION refuse_limit_change();
CREATE TRIGGER limit_counters_only_grow AFTER UPDATE ON limit_counters
    FOR EACH ROW
    WHEN (
        NEW.used < OLD.used OR (NEW.limit_id, NEW.period_start) IS DISTINCT FROM (OLD.limit_id, OLD.period_start)
    )
    EXECUTE FUNCTION refuse_limit_change();
CREATE TRIGGER limit_counters_stay AFTER DELETE ON limit_counters
    FOR EACH ROW EXECUTE FUNCTION refuse_limit_change();
CREATE TRIGGER limit_counters_no_truncate BEFORE TRUNCATE ON limit_counters
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_limit_change();
