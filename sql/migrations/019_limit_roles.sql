-- What roles that do not own the tables may do; sql/roles.sql grants it.
--
-- No function acts with its owner's rights: whoever may call one could hang it on a table of his own and have it
-- evaluate what he likes. So who runs jobs may move balances, and the ledger decides by how much; what teams are given
-- is for those who may change teams.

CREATE OR REPLACE FUNCTION move_balances() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_mergejoin = off AS $$
DECLARE
    refused_team text;
    refused_job  text;
    is_given     boolean; -- something else than what jobs cost
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
            min(wrong_job_id::text) AS wrong_job_id,
            bool_or(transaction_type <> 'deduction') AS is_given
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
    SELECT
        min(team_id::text) FILTER (WHERE team_id NOT IN (SELECT team_id FROM moved)), min(wrong_job_id), bool_or(movement.is_given)
    INTO refused_team, refused_job, is_given
    FROM movement;

    IF is_given AND NOT has_table_privilege('public.teams', 'UPDATE') THEN
        RAISE EXCEPTION 'who may not change teams enters what jobs cost, and nothing else'
            USING ERRCODE = 'insufficient_privilege';
    ELSIF refused_team IS NOT NULL THEN
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

-- Times that no client can read would make the lists with them unreadable, too.
ALTER TABLE jobs ADD CONSTRAINT jobs_times CHECK (
    created_at >= '1970-01-01' AND created_at < '9999-01-01'
    AND started_at >= '1970-01-01' AND started_at < '9999-01-01'
    AND completed_at >= '1970-01-01' AND completed_at < '9999-01-01'
    AND lease_expires_at >= '1970-01-01' AND lease_expires_at < '9999-01-01'
) NOT VALID;
ALTER TABLE llm_calls
    ADD CONSTRAINT llm_calls_time CHECK (created_at >= '1970-01-01' AND created_at < '9999-01-01') NOT VALID;
