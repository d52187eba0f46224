-- A balance can be wrong only where somebody has changed it with the triggers off. Then it does not move any more, for
-- that would carry the fault into the ledger, until it is repaired: the guard also lets a balance become what the whole
-- ledger of its team says. Nobody gains a credit by that which the ledger does not have.

CREATE OR REPLACE FUNCTION guard_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
-- Else it is planned anew for each row: the entries behind a number are thought to be many, and are one.
SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    is_explained boolean; -- by its new entries
    was_right    boolean; -- what remained after its last entry
    is_restored  boolean; -- to what all of its entries say
BEGIN
    SELECT NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = OLD.last_entry_no + count(*)
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
    FROM ONLY public.credit_transactions
    WHERE team_id = OLD.team_id AND entry_no > OLD.last_entry_no;

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

-- What remained after an entry. Volatile, so it sees also what was committed while its statement waited for a lock.
CREATE FUNCTION credits_after_entry(of_team text, no bigint) RETURNS bigint
LANGUAGE sql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
    SELECT credits_after FROM ONLY public.credit_transactions WHERE team_id = of_team AND entry_no = no
$$;


-- Triggers of statements do not fire for what comes through a parent table. These tables can have none: PostgreSQL
-- gives no parent to a table with such a trigger of rows, which itself never fires.

CREATE TRIGGER credit_transactions_has_no_parent AFTER UPDATE ON credit_transactions
    REFERENCING OLD TABLE AS old_rows
    FOR EACH ROW WHEN (false) EXECUTE FUNCTION refuse_ledger_change();
CREATE TRIGGER jobs_have_no_parent AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS old_rows
    FOR EACH ROW WHEN (false) EXECUTE FUNCTION refuse_job_change();
CREATE TRIGGER audit_log_has_no_parent AFTER DELETE ON audit_log
    REFERENCING OLD TABLE AS old_rows
    FOR EACH ROW WHEN (false) EXECUTE FUNCTION refuse_audit_log_change();
