-- Jobs are begun and settled faster; what is enforced stays the same.

-- The same rule: a bounded repetition takes a regular expression ten times as long.
ALTER DOMAIN identifier DROP CONSTRAINT identifier_form;
ALTER DOMAIN identifier ADD CONSTRAINT identifier_form
    CHECK (VALUE ~ '^[A-Za-z0-9][A-Za-z0-9._-]*$' AND length(VALUE) <= 128);

-- A call is found by its job: one index for both.
ALTER TABLE llm_calls DROP CONSTRAINT llm_calls_pkey;
ALTER TABLE llm_calls ADD CONSTRAINT llm_calls_pkey PRIMARY KEY (job_id, call_id);
DROP INDEX llm_calls_by_job;

-- What a statement does not set it does not change: then the condition is not even read, which takes longer than to
-- evaluate it.
DROP TRIGGER jobs_finish_once ON jobs;
DROP TRIGGER jobs_stay_with_team ON jobs;
CREATE TRIGGER jobs_finish_once BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.completed_at IS NOT NULL AND NEW.status <> OLD.status)
    EXECUTE FUNCTION refuse_job_change();
CREATE TRIGGER jobs_keep_id BEFORE UPDATE OF job_id ON jobs
    FOR EACH ROW WHEN (NEW.job_id <> OLD.job_id)
    EXECUTE FUNCTION refuse_job_change();
CREATE TRIGGER jobs_stay_with_team BEFORE UPDATE OF team_id, organization_id ON jobs
    FOR EACH ROW
    WHEN ((OLD.team_id, OLD.organization_id) IS DISTINCT FROM (NEW.team_id, NEW.organization_id))
    EXECUTE FUNCTION refuse_other_team();


-- Checks look up each row by the one index that names it alone. Of two that the planner thinks to be as good, because
-- each team had one entry when it last looked, it may take the one by team, and read all that a busy team has by now.

-- That a completed job was charged holds before its update as well as after it.
DROP TRIGGER jobs_complete_with_charge ON jobs;

CREATE OR REPLACE FUNCTION require_charge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
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
        RAISE EXCEPTION 'job % completes only together with its deduction', uncharged
            USING ERRCODE = 'SL003', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_complete_with_charge AFTER UPDATE ON jobs
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_charge();

CREATE OR REPLACE FUNCTION move_balances() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_mergejoin = off AS $$
DECLARE
    refused_team text;
    refused_job  text;
BEGIN
    WITH linked AS (
        SELECT
            team_id, entry_no, transaction_type, credits_amount, credits_before,
            lag(entry_no) OVER chain AS previous_no,
            lag(credits_after) OVER chain AS previous_after,
            CASE
                WHEN job_id IS NOT NULL AND (
                    SELECT j.team_id = entry.team_id AND j.status = 'completed'
                    FROM ONLY public.jobs j
                    WHERE j.job_id = entry.job_id
                ) IS NOT TRUE THEN job_id
            END AS wrong_job_id
        FROM new_entries AS entry
        WINDOW chain AS (PARTITION BY team_id ORDER BY entry_no)
    ),
    movement AS (
        SELECT
            team_id,
            min(entry_no) AS first_no,
            max(entry_no) AS last_no,
            min(credits_before) FILTER (WHERE previous_no IS NULL) AS opening,
            bool_and(previous_no IS NULL OR (entry_no, credits_before) = (previous_no + 1, previous_after)) AS unbroken,
            coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0) AS allocated,
            coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0) AS used,
            -- Each job that is charged has reserved its credit: the charge takes the place of the reservation.
            count(*) FILTER (WHERE transaction_type = 'deduction') AS released,
            min(wrong_job_id::text) AS wrong_job_id
        FROM linked
        GROUP BY team_id
    ),
    moved AS (
        UPDATE ONLY public.team_credits c
        SET credits_allocated = c.credits_allocated + movement.allocated,
            credits_used = c.credits_used + movement.used,
            credits_reserved = c.credits_reserved - movement.released,
            last_entry_no = movement.last_no
        FROM movement
        WHERE c.team_id = movement.team_id
          AND movement.unbroken
          AND movement.first_no = c.last_entry_no + 1
          AND movement.opening = c.credits_remaining
        RETURNING c.team_id
    )
    SELECT min(team_id::text) FILTER (WHERE team_id NOT IN (SELECT team_id FROM moved)), min(wrong_job_id)
    INTO refused_team, refused_job
    FROM movement;

    IF refused_team IS NOT NULL THEN
        RAISE EXCEPTION 'the new entries of team % do not continue its ledger', refused_team
            USING ERRCODE = 'SL005',
                  DETAIL = 'Each entry_no is the last one plus 1, each credits_before the last credits_after.',
                  HINT = 'Lock the row of team_credits first and continue from its last_entry_no and credits_remaining.';
    ELSIF refused_job IS NOT NULL THEN
        RAISE EXCEPTION 'job % is not a completed job of the team that is to be charged for it', refused_job
            USING ERRCODE = 'SL005', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION guard_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
DECLARE
    is_explained boolean; -- by its new entries
    was_right    boolean; -- what remained after its last entry
    is_restored  boolean; -- to what all of its entries say
BEGIN
    -- From its last entry on, in their order, which only one index has.
    SELECT NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = coalesce(max(entry_no), 0)
           AND NEW.last_entry_no - OLD.last_entry_no = count(*) FILTER (WHERE is_new)
           AND NEW.credits_allocated - OLD.credits_allocated
               = coalesce(sum(credits_amount) FILTER (WHERE is_new AND NOT is_of_job), 0)
           AND NEW.credits_used - OLD.credits_used
               = coalesce(-sum(credits_amount) FILTER (WHERE is_new AND is_of_job), 0),
           OLD.credits_remaining IS NOT DISTINCT FROM CASE OLD.last_entry_no
               WHEN 0 THEN 0
               ELSE min(credits_after) FILTER (WHERE NOT is_new)
           END
    INTO is_explained, was_right
    FROM (
        SELECT
            entry_no, credits_amount, credits_after,
            entry_no > OLD.last_entry_no AS is_new,
            transaction_type IN ('deduction', 'refund') AS is_of_job
        FROM ONLY public.credit_transactions
        WHERE team_id = OLD.team_id AND entry_no >= OLD.last_entry_no
        ORDER BY entry_no
        OFFSET 0
    ) AS entry;

    IF is_explained AND was_right THEN
        RETURN NEW;
    ELSIF is_explained THEN
        RAISE EXCEPTION 'the balance of team % is not what its ledger says', OLD.team_id
            USING ERRCODE = 'SL006', HINT = format('Run: saasllm credits verify %s --repair', OLD.team_id);
    END IF;

    SELECT NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = coalesce(max(entry_no), 0)
           AND NEW.credits_allocated
               = coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0)
           AND NEW.credits_used
               = coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0)
    INTO is_restored
    FROM ONLY public.credit_transactions
    WHERE team_id = OLD.team_id;

    IF NOT is_restored THEN
        RAISE EXCEPTION 'the credits of team % move only with their ledger rows', OLD.team_id
            USING ERRCODE = 'SL006', HINT = 'Insert into credit_transactions, as saasllm credits add does.';
    END IF;
    RETURN NEW;
END
$$;


-- Who waits for a balance does so in a statement of its own, which sees then what is there by now. A larger one would
-- have to begin a part of its plan anew for the row that has changed meanwhile, while the others wait.

CREATE FUNCTION lock_balance(of_team text, OUT last_entry_no bigint, OUT credits_remaining bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    SELECT c.last_entry_no, c.credits_remaining
    INTO last_entry_no, credits_remaining
    FROM public.team_credits c
    WHERE c.team_id = of_team
    FOR UPDATE;
END
$$;

-- Reserves so many credits of a team, or as many as it has free, and says how many.
CREATE FUNCTION reserve_credits(of_team text, wanted bigint) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    free bigint;
BEGIN
    UPDATE public.team_credits
    SET credits_reserved = credits_reserved + wanted
    WHERE team_id = of_team AND credits_remaining - credits_reserved >= wanted;
    IF FOUND THEN
        RETURN wanted;
    END IF;

    -- By now there may be more than there was.
    SELECT least(wanted, credits_remaining - credits_reserved) INTO free
    FROM public.team_credits
    WHERE team_id = of_team
    FOR UPDATE;
    UPDATE public.team_credits SET credits_reserved = credits_reserved + free WHERE team_id = of_team AND free > 0;
    RETURN free;
END
$$;
