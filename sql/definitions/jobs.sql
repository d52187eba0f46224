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
    RAISE EXCEPTION 'job % is already %: its status cannot be changed', OLD.job_id, OLD.status
        USING ERRCODE = 'SL003', HINT = 'Start a new job.';
END
$$;

CREATE TRIGGER jobs_begin_open AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.status NOT IN ('pending', 'in_progress')) EXECUTE FUNCTION refuse_status();

CREATE TRIGGER jobs_finish_once AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.completed_at IS NOT NULL AND NEW.status <> OLD.status)
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


-- What a team has reserved is what its open jobs hold, a credit each: from a job's beginning until its charge, which the
-- ledger counts, or until it ends without one. So many jobs can be open that counting them each time would take long.
-- Hence each change has a number, the next one of its team, and is proven by the jobs that bear it: those that began
-- with it, and those that ended. A number that was passed is never taken again.

CREATE FUNCTION number_reservation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
DECLARE
    -- Of a team that is not there, a foreign key says so.
    next_no bigint := coalesce((public.lock_balance(NEW.team_id::text)).last_hold_no, 0) + 1;
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.hold_no := next_no;
    ELSE
        NEW.release_no := next_no;
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
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
BEGIN
    PERFORM public.move_reservation(team_id::text, jobs, first_no, last_no)
    FROM (
        SELECT team_id, count(*) AS jobs, min(hold_no) AS first_no, max(hold_no) AS last_no
        FROM new_rows
        GROUP BY team_id
        ORDER BY team_id
    ) AS begun;
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
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
DECLARE
    uncharged    text;
    has_released boolean;
BEGIN
    SELECT
        min(job.job_id::text) FILTER (
            WHERE job.status = 'completed'
              AND job.team_id IS DISTINCT FROM (
                  SELECT c.team_id
                  FROM ONLY public.credit_transactions c
                  WHERE c.job_id = job.job_id AND c.transaction_type = 'deduction'
              )
        ),
        bool_or(job.release_no IS NOT NULL)
    INTO uncharged, has_released
    FROM new_rows job;

    IF uncharged IS NOT NULL THEN
        RAISE EXCEPTION 'job % cannot be completed without its deduction', uncharged
            USING ERRCODE = 'SL003', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    IF has_released THEN
        PERFORM public.move_reservation(team_id::text, - jobs, first_no, last_no)
        FROM (
            SELECT job.team_id, count(*) AS jobs, min(job.release_no) AS first_no, max(job.release_no) AS last_no
            FROM new_rows job
            JOIN old_rows USING (job_id)
            WHERE job.release_no IS NOT NULL AND old_rows.release_no IS NULL
            GROUP BY job.team_id
            ORDER BY job.team_id
        ) AS ended;
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
    prompt text, answer text, began interval
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT
        model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens, cost_usd,
        latency_ms, purpose, finish_reason, error, prompt, answer, began * interval '1 second'
    FROM jsonb_to_recordset(calls) AS call (
        model_group_used text, resolved_model text, attempt integer, prompt_tokens integer, completion_tokens integer,
        total_tokens integer, cost_usd numeric, latency_ms integer, purpose text, finish_reason text, error text,
        prompt text, answer text, began double precision
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
