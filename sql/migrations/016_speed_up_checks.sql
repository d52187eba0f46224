-- Many jobs are settled by one statement: what each of them is checked for is asked once, and not job by job; and always
-- by index. (A count of 0 is what NOT EXISTS says, but no anti join, which would read a whole table.)

DROP TRIGGER jobs_complete_with_charge ON jobs;

CREATE OR REPLACE FUNCTION require_charge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    uncharged text;
BEGIN
    SELECT min(job.job_id::text) INTO uncharged
    FROM new_rows job
    JOIN old_rows before USING (job_id)
    WHERE job.status = 'completed'
      AND before.status <> 'completed'
      AND (
          SELECT count(*)
          FROM ONLY public.credit_transactions c
          WHERE c.job_id = job.job_id AND c.transaction_type = 'deduction' AND c.team_id = job.team_id
      ) = 0;

    IF uncharged IS NOT NULL THEN
        RAISE EXCEPTION 'job % completes only together with its deduction', uncharged
            USING ERRCODE = 'SL003', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER jobs_complete_with_charge AFTER UPDATE ON jobs
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_charge();

CREATE OR REPLACE FUNCTION move_balances() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    refused text;
BEGIN
    WITH linked AS (
        SELECT
            team_id, entry_no, transaction_type, credits_amount, credits_before,
            lag(entry_no) OVER chain AS previous_no,
            lag(credits_after) OVER chain AS previous_after
        FROM new_entries
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
            count(*) FILTER (WHERE transaction_type = 'deduction') AS released
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
    SELECT min(team_id::text) INTO refused
    FROM movement
    WHERE team_id NOT IN (SELECT team_id FROM moved);

    IF refused IS NOT NULL THEN
        RAISE EXCEPTION 'the new entries of team % do not continue its ledger', refused
            USING ERRCODE = 'SL005',
                  DETAIL = 'Each entry_no is the last one plus 1, each credits_before the last credits_after.',
                  HINT = 'Lock the row of team_credits first and continue from its last_entry_no and credits_remaining.';
    END IF;

    SELECT min(entry.job_id::text) INTO refused
    FROM new_entries entry
    WHERE entry.job_id IS NOT NULL
      AND (
          SELECT count(*)
          FROM ONLY public.jobs
          WHERE jobs.job_id = entry.job_id AND jobs.team_id = entry.team_id AND jobs.status = 'completed'
      ) = 0;

    IF refused IS NOT NULL THEN
        RAISE EXCEPTION 'job % is not a completed job of the team that is to be charged for it', refused
            USING ERRCODE = 'SL005', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION guard_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    newest       bigint;  -- the number of the last entry
    is_explained boolean; -- by its new entries
    was_right    boolean; -- what remained after its last entry
    is_restored  boolean; -- to what all of its entries say
BEGIN
    SELECT coalesce(max(entry_no), 0) INTO newest FROM ONLY public.credit_transactions WHERE team_id = OLD.team_id;

    -- Number by number: of "those behind the last" the planner thinks that they are a third of all that the team has.
    SELECT NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = newest
           AND count(*) = NEW.last_entry_no - OLD.last_entry_no
           AND NEW.credits_allocated - OLD.credits_allocated
               = coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0)
           AND NEW.credits_used - OLD.credits_used
               = coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0),
           OLD.credits_remaining IS NOT DISTINCT FROM CASE OLD.last_entry_no
               WHEN 0 THEN 0
               ELSE (
                   SELECT credits_after
                   FROM ONLY public.credit_transactions
                   WHERE team_id = OLD.team_id AND entry_no = OLD.last_entry_no
               )
           END
    INTO is_explained, was_right
    FROM generate_series(OLD.last_entry_no + 1, newest) AS no
    CROSS JOIN LATERAL (
        SELECT transaction_type, credits_amount
        FROM ONLY public.credit_transactions
        WHERE team_id = OLD.team_id AND entry_no = no
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

-- The plans of these functions last as long as their session: one that reads a whole table, because that was empty or
-- because one team has most of its rows, would become slower and slower.
ALTER FUNCTION require_charge() SET enable_seqscan = off;
ALTER FUNCTION move_balances() SET enable_seqscan = off;
ALTER FUNCTION move_balances() SET enable_mergejoin = off; -- it is thought to end early where one team has most rows
ALTER FUNCTION guard_balance() SET enable_seqscan = off;
ALTER FUNCTION require_no_history() SET enable_seqscan = off;

-- A call belongs to a job, and that to a team that is there.
ALTER TABLE llm_calls DROP CONSTRAINT llm_calls_team_id_fkey;
