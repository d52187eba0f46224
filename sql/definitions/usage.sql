-- What was used, by days: summed up, but for the last hours, which are counted.
--
-- A sum counts as long as nothing changes of what it sums up. What changes something of an hour ago or earlier (a job
-- that ends at last, a refund, a call that is entered late) says so in the same transaction, in usage_changes: who sees
-- the change sees that the sum does not count, and counts for himself. Of the last hour nobody says anything, for that
-- is not summed up.


CREATE VIEW call_usage AS
SELECT
    c.created_at,
    c.team_id,
    coalesce(j.job_type, '') AS job_type,
    c.model_group_used AS group_name,
    c.resolved_model,
    1 AS calls,
    (c.error IS NOT NULL)::integer AS failed_calls,
    (c.cost_usd IS NOT NULL)::integer AS priced_calls,
    (c.error IS NULL AND c.cost_usd IS NULL)::integer AS unpriced_calls,
    c.prompt_tokens,
    c.completion_tokens,
    c.total_tokens,
    c.cost_usd
FROM llm_calls c
LEFT JOIN jobs j USING (job_id);

-- Everything that counts, each by its own time: a job when it was created, by what has become of it since, and its
-- margin with it; a credit when it moved; a call when it was made. What moved for no job is of the type ''.
CREATE VIEW usage_entries AS
SELECT
    created_at, team_id, job_type,
    1 AS jobs,
    (status = 'completed')::integer AS jobs_completed,
    (status = 'failed')::integer AS jobs_failed,
    (status = 'cancelled')::integer AS jobs_cancelled,
    (status IN ('pending', 'in_progress'))::integer AS jobs_open,
    is_unpriced::integer AS jobs_unpriced,
    credits_charged,
    credits_short,
    NULL::bigint AS credits_added,
    NULL::bigint AS credits_deducted,
    NULL::bigint AS credits_refunded,
    NULL::bigint AS credits_adjusted,
    NULL::bigint AS credits_expired,
    NULL::integer AS calls,
    NULL::integer AS failed_calls,
    NULL::integer AS priced_calls,
    NULL::integer AS unpriced_calls,
    NULL::integer AS prompt_tokens,
    NULL::integer AS completion_tokens,
    NULL::integer AS total_tokens,
    NULL::numeric AS cost_usd,
    NULL::numeric AS margin_usd
FROM jobs
UNION ALL
SELECT
    created_at, team_id, job_type,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, -- no job
    NULL, NULL, NULL, NULL, NULL, -- no credits
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, -- no call
    amount_usd
FROM margin_parts
UNION ALL
SELECT
    c.created_at, c.team_id, coalesce(j.job_type, ''),
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    CASE WHEN c.transaction_type = 'allocation' THEN c.credits_amount END,
    CASE WHEN c.transaction_type = 'deduction' THEN -c.credits_amount END,
    CASE WHEN c.transaction_type = 'refund' THEN c.credits_amount END,
    CASE WHEN c.transaction_type = 'adjustment' THEN c.credits_amount END,
    CASE WHEN c.transaction_type = 'expiry' THEN -c.credits_amount END,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL
FROM credit_transactions c
LEFT JOIN jobs j USING (job_id)
UNION ALL
SELECT
    created_at, team_id, job_type,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL,
    calls, failed_calls, priced_calls, unpriced_calls, prompt_tokens, completion_tokens, total_tokens, cost_usd,
    NULL
FROM call_usage;

-- The days of teams whose sums do not count, and when each begins and ends.
CREATE VIEW changed_days AS
SELECT
    team_id,
    day,
    day::timestamp AT TIME ZONE 'UTC' AS since,
    (day + 1)::timestamp AT TIME ZONE 'UTC' AS until
FROM (SELECT DISTINCT team_id, day FROM usage_changes) AS changed;

CREATE VIEW changed_months AS
SELECT DISTINCT team_id, date_trunc('month', day::timestamp)::date AS month FROM usage_changes;


-- What no sum counts, between two midnights: what came since all was summed up (when that is the caller has read, so
-- that the planner knows it, too), and before that the days of teams of which something has changed.

CREATE FUNCTION unsummed_usage(since timestamptz, until timestamptz, summed_until timestamptz)
RETURNS SETOF usage_days LANGUAGE sql STABLE AS $$
    SELECT
        (e.created_at AT TIME ZONE 'UTC')::date, false, e.team_id, e.job_type,
        e.jobs, e.jobs_completed, e.jobs_failed, e.jobs_cancelled, e.jobs_open, e.jobs_unpriced,
        e.credits_charged, e.credits_short,
        e.credits_added, e.credits_deducted, e.credits_refunded, e.credits_adjusted, e.credits_expired,
        e.calls, e.failed_calls, e.priced_calls, e.unpriced_calls,
        e.prompt_tokens, e.completion_tokens, e.total_tokens, e.cost_usd, e.margin_usd
    FROM (
        SELECT *
        FROM usage_entries
        WHERE created_at >= greatest($1, $3) AND created_at < $2
        UNION ALL
        SELECT entry.*
        FROM changed_days d
        CROSS JOIN LATERAL (
            SELECT *
            FROM usage_entries
            WHERE team_id = d.team_id AND created_at >= d.since AND created_at < least(d.until, $3)
            OFFSET 0
        ) AS entry
        WHERE d.since >= $1 AND d.since < least($2, $3)
    ) AS e
$$;

CREATE FUNCTION unsummed_calls(since timestamptz, until timestamptz, summed_until timestamptz)
RETURNS SETOF usage_models LANGUAGE sql STABLE AS $$
    SELECT
        (e.created_at AT TIME ZONE 'UTC')::date, false, e.team_id, e.job_type, e.group_name, e.resolved_model,
        e.calls, e.failed_calls, e.priced_calls, e.unpriced_calls,
        e.prompt_tokens, e.completion_tokens, e.total_tokens, e.cost_usd
    FROM (
        SELECT *
        FROM call_usage
        WHERE created_at >= greatest($1, $3) AND created_at < $2
        UNION ALL
        SELECT entry.*
        FROM changed_days d
        CROSS JOIN LATERAL (
            SELECT *
            FROM call_usage
            WHERE team_id = d.team_id AND created_at >= d.since AND created_at < least(d.until, $3)
            OFFSET 0
        ) AS entry
        WHERE d.since >= $1 AND d.since < least($2, $3)
    ) AS e
$$;


-- What was used between two midnights: what is summed up, and what no sum counts. The months that are asked for as a
-- whole (from the first to before the last) are read as such, but for those of teams in which something has changed.

CREATE FUNCTION usage_within(
    since timestamptz, until timestamptz, summed_until timestamptz, months_since date, months_until date
) RETURNS SETOF usage_days LANGUAGE sql STABLE AS $$
    SELECT *
    FROM usage_days u
    WHERE u.is_month
      AND u.day >= $4
      AND u.day < $5
      AND NOT EXISTS (SELECT FROM changed_months c WHERE c.team_id = u.team_id AND c.month = u.day)
    UNION ALL
    SELECT *
    FROM usage_days u
    WHERE NOT u.is_month
      AND u.day >= ($1 AT TIME ZONE 'UTC')::date
      AND u.day < ($2 AT TIME ZONE 'UTC')::date
      AND (u.day < $4 OR u.day >= $5)
      AND NOT EXISTS (SELECT FROM usage_changes c WHERE c.team_id = u.team_id AND c.day = u.day)
    UNION ALL
    SELECT u.*
    FROM changed_months m
    JOIN usage_days u ON u.team_id = m.team_id AND u.day >= m.month AND u.day < m.month + interval '1 month'
    WHERE NOT u.is_month
      AND m.month >= $4
      AND m.month < $5
      AND NOT EXISTS (SELECT FROM usage_changes c WHERE c.team_id = u.team_id AND c.day = u.day)
    UNION ALL
    SELECT * FROM unsummed_usage($1, $2, $3)
$$;

CREATE FUNCTION calls_within(
    since timestamptz, until timestamptz, summed_until timestamptz, months_since date, months_until date
) RETURNS SETOF usage_models LANGUAGE sql STABLE AS $$
    SELECT *
    FROM usage_models u
    WHERE u.is_month
      AND u.day >= $4
      AND u.day < $5
      AND NOT EXISTS (SELECT FROM changed_months c WHERE c.team_id = u.team_id AND c.month = u.day)
    UNION ALL
    SELECT *
    FROM usage_models u
    WHERE NOT u.is_month
      AND u.day >= ($1 AT TIME ZONE 'UTC')::date
      AND u.day < ($2 AT TIME ZONE 'UTC')::date
      AND (u.day < $4 OR u.day >= $5)
      AND NOT EXISTS (SELECT FROM usage_changes c WHERE c.team_id = u.team_id AND c.day = u.day)
    UNION ALL
    SELECT u.*
    FROM changed_months m
    JOIN usage_models u ON u.team_id = m.team_id AND u.day >= m.month AND u.day < m.month + interval '1 month'
    WHERE NOT u.is_month
      AND m.month >= $4
      AND m.month < $5
      AND NOT EXISTS (SELECT FROM usage_changes c WHERE c.team_id = u.team_id AND c.day = u.day)
    UNION ALL
    SELECT * FROM unsummed_calls($1, $2, $3)
$$;


-- By which a report is sorted: what its rows are told apart by, one after the other.
CREATE FUNCTION usage_key(
    name text, organization_id text, team_id text, month text, day text, job_type text, group_name text,
    resolved_model text
) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (CASE name
    WHEN 'org' THEN organization_id
    WHEN 'team' THEN team_id
    WHEN 'month' THEN month
    WHEN 'day' THEN day
    WHEN 'job_type' THEN job_type
    WHEN 'group' THEN group_name
    WHEN 'model' THEN resolved_model
END) COLLATE "C";


-- Sums up what is an hour old and what has changed, some of it at a time, and says whether that was all.
--
-- Who wrote something in the last hour has not told of it: so an hour waits for all transactions that were there when
-- it was noted to be over. (In a copy of the database, the number of that moment may be one that is still to come.)
-- A purge waits for this, and this for a purge, by the row of usage_state: these are sums of teams that are there.
CREATE FUNCTION sum_usage() RETURNS TABLE (hours integer, changes bigint, is_done boolean)
LANGUAGE plpgsql
SET timezone = 'UTC'
SET plan_cache_mode = force_custom_plan
-- What lies together in time has its jobs together, too: no table is read as a whole for some of it.
SET random_page_cost = 1.1
SET enable_seqscan = off
SET jit = off -- to compile this takes longer than it saves
AS $$
DECLARE
    state usage_state;
    sum_until timestamptz;
    most_changes CONSTANT integer := 2000;
    changed_until timestamptz;
    first_at timestamptz;
    last_at timestamptz;
    months_since timestamp;
    months_until timestamp;
    team_ids text[];
    on_days date[];
BEGIN
    SELECT * INTO STRICT state FROM usage_state FOR UPDATE;

    sum_until := state.summed_until;
    IF state.next_until > state.summed_until AND state.next_noted < pg_snapshot_xmin(pg_current_snapshot()) THEN
        -- From the next job on, with the time before it, so many that it takes some seconds.
        SELECT date_trunc('hour', min(j.created_at)) INTO first_at
        FROM jobs j
        WHERE j.created_at >= state.summed_until AND j.created_at < state.next_until;
        SELECT greatest(date_trunc('hour', j.created_at), first_at + interval '1 hour') INTO last_at
        FROM jobs j
        WHERE j.created_at >= state.summed_until
        ORDER BY j.created_at
        OFFSET 100000
        LIMIT 1;
        sum_until := least(first_at + interval '1 month', last_at, state.next_until);
    END IF;

    -- The first days that have changed, so many that this takes some seconds, too.
    SELECT least(max(d.until), state.summed_until), count(*) INTO changed_until, changes
    FROM (
        SELECT d.until FROM changed_days d WHERE d.since < state.summed_until ORDER BY d.day LIMIT most_changes
    ) AS d;
    changed_until := coalesce(changed_until, '1970-01-01');
    IF sum_until > state.summed_until OR changes > 0 THEN
        months_since := date_trunc('month', state.summed_until);
        months_until := date_trunc('month', sum_until);
        -- The last day goes on where it was summed up so far; the days that have changed begin anew.
        WITH changed AS MATERIALIZED (
            SELECT d.team_id, d.day FROM changed_days d WHERE d.since < changed_until
        ),
        told AS (
            DELETE FROM usage_changes c WHERE c.day < changed_until
        ),
        gone AS (
            DELETE FROM usage_days u
            WHERE NOT u.is_month
              AND (u.day = state.summed_until::date OR (u.team_id, u.day) IN (SELECT * FROM changed))
            RETURNING u.*
        ),
        gone_models AS (
            DELETE FROM usage_models m
            WHERE NOT m.is_month
              AND (m.day = state.summed_until::date OR (m.team_id, m.day) IN (SELECT * FROM changed))
            RETURNING m.*
        ),
        of_models AS (
            INSERT INTO usage_models
            SELECT
                u.day, false, u.team_id, u.job_type, u.group_name, u.resolved_model,
                sum(u.calls), sum(u.failed_calls), sum(u.priced_calls), sum(u.unpriced_calls),
                coalesce(sum(u.prompt_tokens), 0), coalesce(sum(u.completion_tokens), 0),
                coalesce(sum(u.total_tokens), 0), coalesce(sum(u.cost_usd), 0)
            FROM (
                SELECT * FROM gone_models WHERE (team_id, day) NOT IN (SELECT * FROM changed)
                UNION ALL
                SELECT * FROM unsummed_calls('1970-01-01', changed_until, state.summed_until)
                UNION ALL
                SELECT * FROM unsummed_calls(state.summed_until, sum_until, state.summed_until)
            ) AS u
            GROUP BY u.day, u.team_id, u.job_type, u.group_name, u.resolved_model
            ORDER BY u.day
        ),
        of_days AS (
            INSERT INTO usage_days
            SELECT
                u.day, false, u.team_id, u.job_type,
                coalesce(sum(u.jobs), 0), coalesce(sum(u.jobs_completed), 0), coalesce(sum(u.jobs_failed), 0),
                coalesce(sum(u.jobs_cancelled), 0), coalesce(sum(u.jobs_open), 0), coalesce(sum(u.jobs_unpriced), 0),
                coalesce(sum(u.credits_charged), 0), coalesce(sum(u.credits_short), 0),
                coalesce(sum(u.credits_added), 0), coalesce(sum(u.credits_deducted), 0),
                coalesce(sum(u.credits_refunded), 0), coalesce(sum(u.credits_adjusted), 0),
                coalesce(sum(u.credits_expired), 0),
                coalesce(sum(u.calls), 0), coalesce(sum(u.failed_calls), 0), coalesce(sum(u.priced_calls), 0),
                coalesce(sum(u.unpriced_calls), 0), coalesce(sum(u.prompt_tokens), 0),
                coalesce(sum(u.completion_tokens), 0), coalesce(sum(u.total_tokens), 0), coalesce(sum(u.cost_usd), 0),
                sum(u.margin_usd)
            FROM (
                SELECT * FROM gone WHERE (team_id, day) NOT IN (SELECT * FROM changed)
                UNION ALL
                SELECT * FROM unsummed_usage('1970-01-01', changed_until, state.summed_until)
                UNION ALL
                SELECT * FROM unsummed_usage(state.summed_until, sum_until, state.summed_until)
            ) AS u
            GROUP BY u.day, u.team_id, u.job_type
            ORDER BY u.day
        )
        SELECT array_agg(c.team_id::text), array_agg(c.day) INTO team_ids, on_days FROM changed c;

        -- Then the months of these days, and those that are over now.
        DELETE FROM usage_days u
        USING unnest(team_ids, on_days) AS c (team_id, day)
        WHERE u.is_month AND u.team_id = c.team_id AND u.day = date_trunc('month', c.day::timestamp);
        DELETE FROM usage_models u
        USING unnest(team_ids, on_days) AS c (team_id, day)
        WHERE u.is_month AND u.team_id = c.team_id AND u.day = date_trunc('month', c.day::timestamp);

        WITH again AS (
            SELECT DISTINCT c.team_id, first::date AS first
            FROM unnest(team_ids, on_days) AS c (team_id, day)
            CROSS JOIN date_trunc('month', c.day::timestamp) AS first
            WHERE first < months_since
        ),
        of_models AS (
            INSERT INTO usage_models
            SELECT
                date_trunc('month', u.day::timestamp)::date, true,
                u.team_id, u.job_type, u.group_name, u.resolved_model,
                sum(u.calls), sum(u.failed_calls), sum(u.priced_calls), sum(u.unpriced_calls),
                coalesce(sum(u.prompt_tokens), 0), coalesce(sum(u.completion_tokens), 0),
                coalesce(sum(u.total_tokens), 0), coalesce(sum(u.cost_usd), 0)
            FROM (
                SELECT * FROM usage_models WHERE NOT is_month AND day >= months_since AND day < months_until
                UNION ALL
                SELECT u.*
                FROM again a
                JOIN usage_models u ON u.team_id = a.team_id
                WHERE NOT u.is_month AND u.day >= a.first AND u.day < a.first + interval '1 month'
            ) AS u
            GROUP BY 1, u.team_id, u.job_type, u.group_name, u.resolved_model
            ORDER BY 1
        )
        INSERT INTO usage_days
        SELECT
            date_trunc('month', u.day::timestamp)::date, true, u.team_id, u.job_type,
            coalesce(sum(u.jobs), 0), coalesce(sum(u.jobs_completed), 0), coalesce(sum(u.jobs_failed), 0),
            coalesce(sum(u.jobs_cancelled), 0), coalesce(sum(u.jobs_open), 0), coalesce(sum(u.jobs_unpriced), 0),
            coalesce(sum(u.credits_charged), 0), coalesce(sum(u.credits_short), 0),
            coalesce(sum(u.credits_added), 0), coalesce(sum(u.credits_deducted), 0),
            coalesce(sum(u.credits_refunded), 0), coalesce(sum(u.credits_adjusted), 0),
            coalesce(sum(u.credits_expired), 0),
            coalesce(sum(u.calls), 0), coalesce(sum(u.failed_calls), 0), coalesce(sum(u.priced_calls), 0),
            coalesce(sum(u.unpriced_calls), 0), coalesce(sum(u.prompt_tokens), 0),
            coalesce(sum(u.completion_tokens), 0), coalesce(sum(u.total_tokens), 0), coalesce(sum(u.cost_usd), 0),
            sum(u.margin_usd)
        FROM (
            SELECT * FROM usage_days WHERE NOT is_month AND day >= months_since AND day < months_until
            UNION ALL
            SELECT u.*
            FROM again a
            JOIN usage_days u ON u.team_id = a.team_id
            WHERE NOT u.is_month AND u.day >= a.first AND u.day < a.first + interval '1 month'
        ) AS u
        GROUP BY 1, u.team_id, u.job_type
        ORDER BY 1;
    END IF;

    hours := coalesce(extract(epoch FROM sum_until - first_at) / 3600, 0); -- none of those before the first job
    is_done := sum_until = state.summed_until AND changes < most_changes;
    UPDATE usage_state SET summed_until = sum_until;
    IF state.next_until <= sum_until OR state.next_noted >= pg_snapshot_xmax(pg_current_snapshot()) THEN
        -- What is over by an hour, and by some minutes for clocks that are set.
        UPDATE usage_state
        SET next_until = greatest(date_trunc('hour', clock_timestamp() - interval '75 minutes'), sum_until),
            next_noted = pg_current_xact_id()
        RETURNING next_until = sum_until AND changes < most_changes INTO is_done;
    END IF;
    RETURN NEXT;
END
$$;


-- What changes of an hour ago and earlier.

CREATE FUNCTION tell_usage(of_team text, at timestamptz) RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO public.usage_changes (team_id, day)
    SELECT of_team, CAST(at AT TIME ZONE 'UTC' AS date)
    WHERE at < clock_timestamp() - interval '1 hour'
$$;

CREATE FUNCTION tell_late_usage() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM public.tell_usage(NEW.team_id, NEW.created_at);
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_tell_late AFTER INSERT OR UPDATE ON jobs
    FOR EACH ROW WHEN (NEW.created_at < clock_timestamp() - interval '1 hour') EXECUTE FUNCTION tell_late_usage();
CREATE TRIGGER llm_calls_tell_late AFTER INSERT ON llm_calls
    FOR EACH ROW WHEN (NEW.created_at < clock_timestamp() - interval '1 hour') EXECUTE FUNCTION tell_late_usage();
CREATE TRIGGER credit_transactions_tell_late AFTER INSERT ON credit_transactions
    FOR EACH ROW WHEN (NEW.created_at < clock_timestamp() - interval '1 hour') EXECUTE FUNCTION tell_late_usage();

-- A refund takes away what its job has brought.
CREATE FUNCTION tell_refund() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM public.tell_usage(j.team_id, j.created_at) FROM public.jobs j WHERE j.job_id = NEW.job_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER credit_transactions_tell_refund AFTER INSERT ON credit_transactions
    FOR EACH ROW WHEN (NEW.transaction_type = 'refund') EXECUTE FUNCTION tell_refund();

-- The margin of a job is of its day, whenever its calls were made. (They are entered while it is open, and its end
-- tells.) Of calls that change or go, their own days are told, too.
CREATE FUNCTION tell_calls() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.usage_changes (team_id, day)
    SELECT DISTINCT j.team_id, CAST(j.created_at AT TIME ZONE 'UTC' AS date)
    FROM calls c
    JOIN public.jobs j ON j.job_id = c.job_id
    WHERE j.created_at < clock_timestamp() - interval '1 hour';
    INSERT INTO public.usage_changes (team_id, day)
    SELECT DISTINCT c.team_id, CAST(c.created_at AT TIME ZONE 'UTC' AS date)
    FROM calls c
    WHERE c.created_at < clock_timestamp() - interval '1 hour'
      -- Where their team goes with them, so do its sums.
      AND EXISTS (SELECT FROM public.teams t WHERE t.team_id = c.team_id);
    RETURN NULL;
END
$$;

CREATE TRIGGER llm_calls_tell_old AFTER UPDATE ON llm_calls
    REFERENCING OLD TABLE AS calls
    FOR EACH STATEMENT EXECUTE FUNCTION tell_calls();
CREATE TRIGGER llm_calls_tell_changed AFTER UPDATE ON llm_calls
    REFERENCING NEW TABLE AS calls
    FOR EACH STATEMENT EXECUTE FUNCTION tell_calls();
CREATE TRIGGER llm_calls_tell_deleted AFTER DELETE ON llm_calls
    REFERENCING OLD TABLE AS calls
    FOR EACH STATEMENT EXECUTE FUNCTION tell_calls();

CREATE FUNCTION tell_all_calls() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.usage_changes (team_id, day)
    SELECT DISTINCT u.team_id, u.day FROM public.usage_days u WHERE NOT u.is_month;
    RETURN NULL;
END
$$;

CREATE TRIGGER llm_calls_tell_truncated AFTER TRUNCATE ON llm_calls
    FOR EACH STATEMENT EXECUTE FUNCTION tell_all_calls();

-- Its calls and entries are of its type, and of days of their own.
CREATE FUNCTION tell_other_job() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM public.tell_usage(OLD.team_id, OLD.created_at);
    PERFORM public.tell_usage(c.team_id, c.created_at) FROM public.llm_calls c WHERE c.job_id = OLD.job_id;
    PERFORM public.tell_usage(c.team_id, c.created_at) FROM public.credit_transactions c WHERE c.job_id = OLD.job_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_tell_other AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.created_at <> NEW.created_at OR OLD.job_type <> NEW.job_type)
    EXECUTE FUNCTION tell_other_job();
