-- Jobs: each begins open, completes only together with its charge, and is finished once.


-- A job begins open, and once it is finished does not change its status again: it would be charged twice, or a charge
-- would lose its reason. (What is deleted, is deleted with its whole team: purge.sql.)

CREATE FUNCTION refuse_status() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        RAISE EXCEPTION 'a new job cannot be %', NEW.status
            USING ERRCODE = 'SL003', HINT = 'Insert it as pending or in_progress.';
    END IF;
    RAISE EXCEPTION 'job % is already %: neither its status nor its charge can be changed', OLD.job_id, OLD.status
        USING ERRCODE = 'SL003', HINT = 'Start a new job.';
END
$$;

CREATE TRIGGER jobs_begin_open AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.status NOT IN ('pending', 'in_progress')) EXECUTE FUNCTION refuse_status();

CREATE TRIGGER jobs_finish_once AFTER UPDATE ON jobs
    FOR EACH ROW
    WHEN (
        OLD.completed_at IS NOT NULL
        AND (NEW.status <> OLD.status OR NEW.credits_charged <> OLD.credits_charged)
    )
    EXECUTE FUNCTION refuse_status();


-- A job keeps its id and stays with its team, for a charge names both; and the numbers of what it has reserved. (Its
-- organization is the team's: a foreign key.)

CREATE FUNCTION refuse_other_job() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'job % cannot change its ID or hold_no, or be moved from team %', OLD.job_id, OLD.team_id
        USING ERRCODE = 'SL003', HINT = 'Start a new job.';
END
$$;

CREATE TRIGGER jobs_keep_id AFTER UPDATE ON jobs
    FOR EACH ROW
    WHEN (
        OLD.job_id <> NEW.job_id OR OLD.team_id <> NEW.team_id
        OR OLD.hold_no <> NEW.hold_no OR OLD.release_no <> NEW.release_no
    )
    EXECUTE FUNCTION refuse_other_job();


-- What a team has reserved is what its open jobs hold: from a job's beginning until its charge, which the ledger
-- counts, or until it ends without one. So many jobs can be open that summing them up each time would take long. Hence
-- each change has a number, the next one of its team, and is proven by the jobs that bear it: those that began with it,
-- those that came to hold more, or those that ended. A number that was passed is never taken again.

CREATE FUNCTION number_reservation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
DECLARE
    -- Of a team that is not there, a foreign key says so.
    next_no bigint := coalesce((public.lock_balance(NEW.team_id::text)).last_hold_no, 0) + 1;
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.hold_no := next_no;
    ELSIF NEW.status IN ('failed', 'cancelled') THEN
        NEW.release_no := next_no;
    ELSE
        NEW.raise_no := next_no;
        NEW.credits_raised := NEW.credits_held - OLD.credits_held;
    END IF;
    RETURN NEW;
END
$$;

-- A statement that begins many jobs has locked their balance already, and numbers them itself.
CREATE TRIGGER jobs_number_hold BEFORE INSERT ON jobs
    FOR EACH ROW WHEN (NEW.hold_no IS NULL) EXECUTE FUNCTION number_reservation();
CREATE TRIGGER jobs_number_release BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (NEW.status IN ('failed', 'cancelled') AND OLD.status IN ('pending', 'in_progress'))
    EXECUTE FUNCTION number_reservation();
CREATE TRIGGER jobs_number_raise BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (NEW.credits_held <> OLD.credits_held) EXECUTE FUNCTION number_reservation();

-- While it is open, a job may come to hold more. Less would have to be proven by what it held before.
CREATE FUNCTION check_raise() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'UPDATE'
        AND NEW.completed_at IS NULL
        AND NEW.raise_no > coalesce(OLD.raise_no, 0)
        AND NEW.credits_raised > 0
        AND NEW.credits_held = OLD.credits_held + NEW.credits_raised
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'what job % holds can only grow, while it is open', NEW.job_id
        USING ERRCODE = 'SL009', HINT = 'Set credits_held alone, to more than it was.';
END
$$;

CREATE TRIGGER jobs_begin_without_raise AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.raise_no IS NOT NULL) EXECUTE FUNCTION check_raise();
CREATE TRIGGER jobs_raise_hold AFTER UPDATE ON jobs
    FOR EACH ROW
    WHEN (NEW.credits_held <> OLD.credits_held OR NEW.raise_no IS DISTINCT FROM OLD.raise_no)
    EXECUTE FUNCTION check_raise();

-- For the functions of triggers, whose settings hold for it.
CREATE FUNCTION move_reservation(of_team text, credits bigint, first_no bigint, last_no bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    written_no bigint;
BEGIN
    UPDATE ONLY public.team_credits
    SET credits_reserved = credits_reserved + credits,
        last_hold_no = last_no
    WHERE team_id = of_team AND last_hold_no + 1 = first_no AND last_no = first_no
    RETURNING last_hold_no INTO written_no;

    IF written_no IS DISTINCT FROM last_no THEN
        RAISE EXCEPTION 'what the jobs of team % reserve or release does not have the next number', of_team
            USING ERRCODE = 'SL009',
                  HINT = 'Leave out hold_no and release_no; begin and end jobs in separate statements.';
    END IF;
END
$$;

CREATE FUNCTION reserve_credits() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    is_limited boolean;
BEGIN
    SELECT bool_or(
        EXISTS (
            SELECT
            FROM public.limits l
            WHERE coalesce(l.team_id, l.organization_id) IN (begun.team_id, begun.organization_id)
        )
    )
    INTO is_limited
    FROM (
        SELECT
            team_id,
            min(organization_id::text) AS organization_id,
            sum(credits_held)::bigint AS credits,
            min(hold_no) AS first_no,
            max(hold_no) AS last_no
        FROM new_rows
        GROUP BY team_id
        ORDER BY team_id
    ) AS begun
    CROSS JOIN LATERAL public.move_reservation(begun.team_id::text, begun.credits, begun.first_no, begun.last_no);

    IF is_limited THEN
        PERFORM public.count_use(of_limit, period_start, jobs, credits)
        FROM (
            SELECT
                l AS of_limit,
                public.limit_period(l.per, job.created_at) AS period_start,
                count(*) AS jobs,
                sum(job.credits_held)::bigint AS credits
            FROM new_rows job
            CROSS JOIN LATERAL public.limits_of(job.team_id::text, job.organization_id::text, job.model_groups_used) l
            WHERE NOT (job.is_queued AND job.status = 'pending' AND l.per = 'concurrent') -- it does not run yet
            GROUP BY l, period_start
            ORDER BY l, period_start
        ) AS begun;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_reserve_credits AFTER INSERT ON jobs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION reserve_credits();


-- A job ends with its charge, or with what it has reserved free again. Many are settled by one statement: what each of
-- them is checked for is asked once and not job by job, and each charge is looked up by the one index that names it
-- alone. That a completed job was charged holds before its update as well as after it.

CREATE FUNCTION settle_jobs() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    uncharged   text;
    released    uuid[];
    expired     text[];
    is_open     boolean;
    has_queued  boolean;
    has_waiting boolean;
    has_ended   boolean;
    has_short   boolean;
BEGIN
    SELECT
        min(job.job_id::text) FILTER (
            WHERE job.status = 'completed'
              AND (
                  SELECT c.team_id = job.team_id AND c.credits_amount = - job.credits_charged
                  FROM ONLY public.credit_transactions c
                  WHERE c.job_id = job.job_id AND c.transaction_type = 'deduction'
              ) IS NOT TRUE
        ),
        array_agg(job.job_id) FILTER (WHERE job.release_no IS NOT NULL),
        bool_or(job.lease_expires_at IS NOT NULL),
        bool_or(job.is_queued),
        bool_or(job.is_queued AND job.status = 'pending'),
        bool_or(job.lease_expires_at IS NULL),
        bool_or(job.credits_short > 0)
    INTO uncharged, released, is_open, has_queued, has_waiting, has_ended, has_short
    FROM new_rows job;

    IF uncharged IS NOT NULL THEN
        RAISE EXCEPTION 'job % cannot be completed without its deduction', uncharged
            USING ERRCODE = 'SL003', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    IF has_queued AND has_ended THEN
        -- What is finished leaves the queue, with its request: before the counters of limits, for which whoever takes
        -- jobs waits with rows of the queue.
        DELETE FROM ONLY public.job_queue
        WHERE job_id = ANY (ARRAY(SELECT job_id FROM new_rows WHERE is_queued AND completed_at IS NOT NULL));
    END IF;
    IF released IS NOT NULL THEN
        released := ARRAY(
            SELECT job_id
            FROM old_rows
            WHERE job_id = ANY (released) AND release_no IS NULL
        );
        PERFORM public.move_reservation(team_id::text, - credits, first_no, last_no)
        FROM (
            SELECT
                team_id,
                sum(credits_held)::bigint AS credits,
                min(release_no) AS first_no,
                max(release_no) AS last_no
            FROM new_rows
            WHERE job_id = ANY (released)
            GROUP BY team_id
            ORDER BY team_id
        ) AS ended;
        -- What they held and nobody else may use any more.
        expired := ARRAY(
            SELECT DISTINCT job.team_id::text
            FROM new_rows job
            JOIN ONLY public.team_credits c ON c.team_id = job.team_id
            WHERE job.job_id = ANY (released) AND job.created_at < c.held_expired_at
        );
        IF expired <> '{}' THEN
            PERFORM public.expire_credits(expired, and_released => true);
        END IF;
    END IF;
    IF (has_ended OR has_waiting) AND EXISTS (
        SELECT
        FROM new_rows job
        CROSS JOIN LATERAL public.limits_of(job.team_id::text, job.organization_id::text, job.model_groups_used)
    ) THEN
        PERFORM public.count_stopped(
            ARRAY(
                SELECT job.job_id
                FROM new_rows job
                JOIN old_rows USING (job_id)
                WHERE job.completed_at IS NOT NULL AND old_rows.completed_at IS NULL
            ),
            ARRAY(SELECT job_id FROM old_rows WHERE is_queued AND status = 'pending'),
            ARRAY(
                SELECT job.job_id
                FROM new_rows job
                JOIN old_rows before USING (job_id)
                WHERE job.is_queued AND job.status = 'pending' AND before.status = 'in_progress'
            )
        );
    END IF;
    IF is_open THEN
        PERFORM public.move_reservation(team_id::text, credits, first_no, last_no)
        FROM (
            SELECT
                job.team_id,
                sum(job.credits_raised)::bigint AS credits,
                min(job.raise_no) AS first_no,
                max(job.raise_no) AS last_no
            FROM new_rows job
            JOIN old_rows USING (job_id)
            WHERE job.raise_no IS DISTINCT FROM old_rows.raise_no
            GROUP BY job.team_id
            ORDER BY job.team_id
        ) AS raised;
        -- What a job uses of another group is counted from then on, and what it holds more; and that a worker runs it.
        PERFORM public.count_use(of_limit, period_start, jobs, credits)
        FROM (
            SELECT
                l AS of_limit,
                public.limit_period(l.per, job.created_at) AS period_start,
                count(*) FILTER (WHERE is_new OR is_taken) AS jobs,
                sum(job.credits_held - CASE WHEN is_new THEN 0 ELSE before.credits_held END)::bigint AS credits
            FROM new_rows job
            JOIN old_rows before USING (job_id)
            CROSS JOIN LATERAL public.limits_of(job.team_id::text, job.organization_id::text, job.model_groups_used) l
            -- Of no group it is none that is new, also where there were none: NULL is not among nothing.
            CROSS JOIN LATERAL (
                SELECT
                    l.group_name IS NOT NULL AND l.group_name <> ALL (before.model_groups_used) AS is_new,
                    l.per = 'concurrent' AND job.is_queued AND job.status <> before.status
                        AND job.status = 'in_progress' AS is_taken
            ) AS was
            WHERE job.completed_at IS NULL
              AND (is_new OR is_taken OR (l.measure = 'credits' AND job.credits_held <> before.credits_held))
            GROUP BY l, period_start
            ORDER BY l, period_start
        ) AS larger;
    END IF;
    IF has_ended AND (has_short OR EXISTS (SELECT FROM public.webhooks)) THEN
        PERFORM public.tell_of_jobs(
            ARRAY(
                SELECT job.job_id
                FROM new_rows job
                JOIN old_rows USING (job_id)
                WHERE job.completed_at IS NOT NULL AND old_rows.completed_at IS NULL
            )
        );
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_settle AFTER UPDATE ON jobs
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION settle_jobs();

-- As with the ledger, nothing comes through a parent table, for which triggers of statements would not fire.
CREATE TRIGGER jobs_have_no_parent AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS old_rows
    FOR EACH ROW WHEN (false) EXECUTE FUNCTION refuse_other_job();


-- Calls as they come from a runner; `began` counts the seconds from the start of their job, or of their request.
CREATE FUNCTION call_rows(calls jsonb) RETURNS TABLE (
    model_group_used text, resolved_model text, attempt integer, prompt_tokens integer, completion_tokens integer,
    total_tokens integer, cost_usd numeric, latency_ms integer, purpose text, finish_reason text, error text,
    prompt text, answer text, credential_id bigint, began interval
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT
        model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens, cost_usd,
        latency_ms, purpose, finish_reason, error, prompt, answer, credential_id, began * interval '1 second'
    FROM jsonb_to_recordset(calls) AS call (
        model_group_used text, resolved_model text, attempt integer, prompt_tokens integer, completion_tokens integer,
        total_tokens integer, cost_usd numeric, latency_ms integer, purpose text, finish_reason text, error text,
        prompt text, answer text, credential_id bigint, began double precision
    )
    ORDER BY attempt
$$;


-- What a job asks of a group: its active models in their order (NULL where it has none), and our own prices of them.
CREATE VIEW callable_groups AS
SELECT g.group_name, g.status, m.model_names, m.model_prices
FROM model_groups g
CROSS JOIN LATERAL (
    SELECT
        array_agg(model_name ORDER BY priority) AS model_names,
        jsonb_object_agg(p.model_name, to_jsonb(p)) FILTER (WHERE p.model_name IS NOT NULL) AS model_prices
    FROM model_group_models
    LEFT JOIN model_prices p USING (model_name)
    WHERE group_name = g.group_name AND is_active
) m;


-- What a job of a team and a group runs with, and the one condition that refuses it, where there is one; without a group
-- it is that of the team. Where the balance is not that of the last entry, nothing could be charged: no model is paid
-- for that.
CREATE FUNCTION job_scope(
    of_team text, of_group text,
    OUT team_id text, OUT organization_id text, OUT model_names text[], OUT model_prices jsonb, OUT model_keys jsonb,
    OUT refusal text
)
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET jit = off AS $$
#variable_conflict use_column
BEGIN
    SELECT
        t.team_id,
        t.organization_id,
        g.model_names,
        g.model_prices,
        keys_of(t.team_id, t.organization_id),
        CASE
            WHEN t.team_id IS NULL THEN 'team_not_found'
            WHEN of_group IS NOT NULL AND g.group_name IS NULL THEN 'group_not_found'
            WHEN o.status <> 'active' THEN 'organization_suspended'
            WHEN t.status <> 'active' THEN 'team_suspended'
            WHEN c.is_sound IS NOT TRUE THEN 'balance_differs'
            WHEN of_group IS NOT NULL AND a.group_name IS NULL THEN 'group_not_assigned'
            WHEN g.status <> 'active' THEN 'group_inactive'
            WHEN of_group IS NOT NULL AND g.model_names IS NULL THEN 'no_active_model'
        END
    INTO team_id, organization_id, model_names, model_prices, model_keys, refusal
    FROM (VALUES (of_team, of_group)) AS asked (team_id, group_name)
    LEFT JOIN teams t ON t.team_id = asked.team_id
    LEFT JOIN organizations o ON o.organization_id = t.organization_id
    LEFT JOIN callable_groups g ON g.group_name = asked.group_name
    LEFT JOIN team_model_groups a ON a.team_id = t.team_id AND a.group_name = g.group_name
    LEFT JOIN checked_balances c ON c.team_id = t.team_id;
END
$$;
