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
    next_no bigint := (public.lock_balance(NEW.team_id)).last_hold_no + 1;
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

CREATE FUNCTION move_reservation(of_team text, credits bigint, first_no bigint, last_no bigint) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
BEGIN
    UPDATE ONLY public.team_credits
    SET credits_reserved = credits_reserved + credits,
        last_hold_no = last_no
    WHERE team_id = of_team AND last_hold_no + 1 = first_no AND last_no = first_no;

    IF NOT FOUND THEN
        RAISE EXCEPTION 'what the jobs of team % reserve or release does not have the next number', of_team
            USING ERRCODE = 'SL009', HINT = 'Leave out hold_no and release_no.';
    END IF;
END
$$;

CREATE FUNCTION reserve_credits() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM public.move_reservation(team_id, jobs, first_no, last_no)
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

CREATE FUNCTION release_credits() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM new_rows WHERE release_no IS NOT NULL) THEN
        RETURN NULL; -- as is most often the case
    END IF;
    PERFORM public.move_reservation(team_id, - jobs, first_no, last_no)
    FROM (
        SELECT n.team_id, count(*) AS jobs, min(n.release_no) AS first_no, max(n.release_no) AS last_no
        FROM new_rows n
        JOIN old_rows o USING (job_id)
        WHERE n.release_no IS NOT NULL AND o.release_no IS NULL
        GROUP BY n.team_id
        ORDER BY n.team_id
    ) AS ended;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_release_credits AFTER UPDATE ON jobs
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION release_credits();

-- It may also become what a count of all says: so it is repaired. (While a balance is, it may be too low for all of them.)
CREATE FUNCTION guard_reservation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
DECLARE
    begun       bigint := 0; -- jobs of its new number
    ended       bigint := 0;
    charged     bigint := 0;
    is_restored boolean;
BEGIN
    IF NEW.last_hold_no <> OLD.last_hold_no THEN
        -- None has a higher one. In this order, which only one index has, few are read whatever else the team has.
        SELECT count(*) INTO begun
        FROM (
            SELECT FROM ONLY public.jobs
            WHERE team_id = OLD.team_id AND hold_no >= NEW.last_hold_no
            ORDER BY hold_no
            OFFSET 0
        ) AS job;
        SELECT count(*) INTO ended
        FROM (
            SELECT FROM ONLY public.jobs
            WHERE team_id = OLD.team_id AND release_no >= NEW.last_hold_no
            ORDER BY release_no
            OFFSET 0
        ) AS job;
    END IF;
    IF NEW.last_entry_no <> OLD.last_entry_no THEN
        SELECT count(*) INTO charged
        FROM (
            SELECT transaction_type
            FROM ONLY public.credit_transactions
            WHERE team_id = OLD.team_id AND entry_no > OLD.last_entry_no AND entry_no <= NEW.last_entry_no
            ORDER BY entry_no
            OFFSET 0
        ) AS entry
        WHERE transaction_type = 'deduction';
    END IF;
    IF NEW.credits_reserved - OLD.credits_reserved = begun - ended - charged
       AND NEW.last_hold_no - OLD.last_hold_no = sign(begun + ended) THEN
        RETURN NULL;
    END IF;

    SELECT NEW.credits_reserved = least(count(*) FILTER (WHERE completed_at IS NULL), NEW.credits_remaining)
           AND NEW.last_hold_no = coalesce(greatest(max(hold_no), max(release_no)), 0)
    INTO is_restored
    FROM ONLY public.jobs
    WHERE team_id = OLD.team_id;

    IF NOT is_restored THEN
        RAISE EXCEPTION 'what is reserved of team % can change only with its jobs', OLD.team_id
            USING ERRCODE = 'SL009', HINT = 'Insert a job, or end one.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER team_credits_guard_reservation AFTER UPDATE ON team_credits
    FOR EACH ROW
    WHEN ((OLD.credits_reserved, OLD.last_hold_no) IS DISTINCT FROM (NEW.credits_reserved, NEW.last_hold_no))
    EXECUTE FUNCTION guard_reservation();


-- A job completes together with its charge. Many are settled by one statement: what each of them is checked for is
-- asked once and not job by job, and each charge is looked up by the one index that names it alone. That a completed
-- job was charged holds before its update as well as after it.

CREATE FUNCTION require_charge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
DECLARE
    uncharged text;
BEGIN
    SELECT min(job.job_id::text) INTO uncharged
    FROM new_rows job
    WHERE job.status = 'completed'
      AND job.team_id IS DISTINCT FROM (
          SELECT c.team_id
          FROM ONLY public.credit_transactions c
          WHERE c.job_id = job.job_id AND c.transaction_type = 'deduction'
      );

    IF uncharged IS NOT NULL THEN
        RAISE EXCEPTION 'job % cannot be completed without its deduction', uncharged
            USING ERRCODE = 'SL003', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_complete_with_charge AFTER UPDATE ON jobs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_charge();

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
