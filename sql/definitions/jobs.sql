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

CREATE FUNCTION move_reservations() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
DECLARE
    refused text;
BEGIN
    IF TG_OP = 'UPDATE' AND NOT EXISTS (SELECT FROM new_rows WHERE release_no IS NOT NULL) THEN
        RETURN NULL;
    END IF;

    WITH movement AS (
        SELECT
            c.team_id,
            c.last_hold_no + 1 AS number,
            CASE TG_OP WHEN 'INSERT' THEN count(*) ELSE - count(*) END AS credits,
            bool_and(job.number = c.last_hold_no + 1) AS is_next
        FROM (
            SELECT team_id, CASE TG_OP WHEN 'INSERT' THEN hold_no ELSE release_no END AS number
            FROM new_rows
        ) AS job
        JOIN ONLY public.team_credits c ON c.team_id = job.team_id
        -- One that has ended before has an earlier one.
        WHERE job.number > c.last_hold_no OR TG_OP = 'INSERT'
        GROUP BY c.team_id
    ),
    moved AS (
        UPDATE ONLY public.team_credits c
        SET credits_reserved = c.credits_reserved + movement.credits,
            last_hold_no = movement.number
        FROM movement
        WHERE c.team_id = movement.team_id
          AND movement.is_next
          AND c.last_hold_no = movement.number - 1
        RETURNING c.team_id
    )
    SELECT min(team_id::text) INTO refused
    FROM movement
    WHERE team_id NOT IN (SELECT team_id FROM moved);

    IF refused IS NOT NULL THEN
        RAISE EXCEPTION 'what the jobs of team % reserve or release does not have the next number', refused
            USING ERRCODE = 'SL009', HINT = 'Leave out hold_no and release_no.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_reserve AFTER INSERT ON jobs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION move_reservations();
CREATE TRIGGER jobs_release AFTER UPDATE ON jobs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION move_reservations();

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
        SELECT count(*) INTO begun
        FROM ONLY public.jobs
        WHERE team_id = OLD.team_id AND hold_no = NEW.last_hold_no;
        SELECT count(*) INTO ended
        FROM ONLY public.jobs
        WHERE team_id = OLD.team_id AND release_no = NEW.last_hold_no;
    END IF;
    IF NEW.last_entry_no <> OLD.last_entry_no THEN
        SELECT count(*) INTO charged
        FROM ONLY public.credit_transactions
        WHERE team_id = OLD.team_id
          AND entry_no > OLD.last_entry_no
          AND entry_no <= NEW.last_entry_no
          AND transaction_type = 'deduction';
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
