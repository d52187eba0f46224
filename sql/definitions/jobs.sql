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


-- A job keeps its id and stays with its team, for a charge names both. (Its organization is the team's: a foreign key.)

CREATE FUNCTION refuse_other_job() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'job % cannot change its ID or be moved from team %', OLD.job_id, OLD.team_id
        USING ERRCODE = 'SL003', HINT = 'Start a new job.';
END
$$;

CREATE TRIGGER jobs_keep_id AFTER UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.job_id <> NEW.job_id OR OLD.team_id <> NEW.team_id)
    EXECUTE FUNCTION refuse_other_job();


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
