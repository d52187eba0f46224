-- Credits: a ledger that only grows, and the balances that follow from it.
--
-- Statements insert ledger rows and nothing else. One trigger moves the balances by what was inserted, and a guard
-- on the balances asks the ledger whether a movement is explained by its rows. It asks the data, not who is asking:
-- a setting or a trigger depth could be faked by any client. The functions see pg_catalog alone and name their tables
-- in full, with ONLY: a temporary table, a function of somebody's or a child table cannot stand in for the real one.

CREATE TABLE team_credits (
    team_id           identifier PRIMARY KEY REFERENCES teams ON DELETE CASCADE,
    credits_allocated bigint     NOT NULL DEFAULT 0,
    credits_used      bigint     NOT NULL DEFAULT 0,
    credits_reserved  bigint     NOT NULL DEFAULT 0,
    credits_remaining bigint     GENERATED ALWAYS AS (credits_allocated - credits_used) STORED,
    last_entry_no     bigint     NOT NULL DEFAULT 0,
    CONSTRAINT team_credits_used CHECK (credits_used >= 0),
    CONSTRAINT team_credits_reserved CHECK (credits_reserved >= 0),
    CONSTRAINT team_credits_free CHECK (credits_allocated - credits_used >= credits_reserved)
) WITH (fillfactor = 50); -- every job updates its team's row twice: room on the page keeps those updates off the index

CREATE TABLE credit_transactions (
    transaction_id   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    team_id          identifier  NOT NULL,
    organization_id  identifier  NOT NULL,
    entry_no         bigint      NOT NULL,
    job_id           uuid        REFERENCES jobs,
    transaction_type text        NOT NULL,
    credits_amount   bigint      NOT NULL,
    credits_before   bigint      NOT NULL,
    credits_after    bigint      NOT NULL,
    reason           text,
    idempotency_key  text,
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT credit_transactions_chain UNIQUE (team_id, entry_no),
    CONSTRAINT credit_transactions_team FOREIGN KEY (organization_id, team_id)
        REFERENCES teams (organization_id, team_id),
    CONSTRAINT credit_transactions_sum CHECK (credits_after = credits_before + credits_amount),
    CONSTRAINT credit_transactions_not_negative CHECK (credits_before >= 0 AND credits_after >= 0),
    CONSTRAINT credit_transactions_sign CHECK (
        CASE transaction_type
            WHEN 'allocation' THEN credits_amount > 0
            -- A job costs one credit.
            WHEN 'deduction' THEN credits_amount = -1
            WHEN 'refund' THEN credits_amount = 1
            WHEN 'expiry' THEN credits_amount < 0
            WHEN 'adjustment' THEN credits_amount <> 0
            ELSE false
        END
    ),
    CONSTRAINT credit_transactions_names_job CHECK (
        (transaction_type IN ('deduction', 'refund')) = (job_id IS NOT NULL)
    )
);

-- A job is charged at most once, and given back at most once.
CREATE UNIQUE INDEX credit_transactions_once_a_job ON credit_transactions (job_id, transaction_type)
    WHERE job_id IS NOT NULL;
CREATE UNIQUE INDEX credit_transactions_idempotency_key ON credit_transactions (idempotency_key)
    WHERE idempotency_key IS NOT NULL;


-- The ledger is append-only.

CREATE FUNCTION refuse_ledger_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'credit_transactions is append-only: % is refused', TG_OP
        USING ERRCODE = 'SL004', HINT = 'A balance is corrected by a further entry.';
END
$$;

CREATE TRIGGER credit_transactions_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_transactions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_ledger_change();


-- Ledger rows move the balances: deductions and refunds credits_used, the others credits_allocated.

CREATE FUNCTION move_balances() RETURNS trigger
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
    WHERE NOT EXISTS (SELECT FROM moved WHERE moved.team_id = movement.team_id);

    IF refused IS NOT NULL THEN
        RAISE EXCEPTION 'the new entries of team % do not continue its ledger', refused
            USING ERRCODE = 'SL005',
                  DETAIL = 'Each entry_no is the last one plus 1, each credits_before the last credits_after.',
                  HINT = 'Lock the row of team_credits first and continue from its last_entry_no and credits_remaining.';
    END IF;

    SELECT min(entry.job_id::text) INTO refused
    FROM new_entries entry
    WHERE entry.job_id IS NOT NULL
      AND NOT EXISTS (
          SELECT
          FROM ONLY public.jobs
          WHERE jobs.job_id = entry.job_id AND jobs.team_id = entry.team_id AND jobs.status = 'completed'
      );

    IF refused IS NOT NULL THEN
        RAISE EXCEPTION 'job % is not a completed job of the team that is to be charged for it', refused
            USING ERRCODE = 'SL005', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER credit_transactions_move_balances AFTER INSERT ON credit_transactions
    REFERENCING NEW TABLE AS new_entries
    FOR EACH STATEMENT EXECUTE FUNCTION move_balances();


-- No balance moves without its ledger rows.

CREATE FUNCTION guard_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    explained boolean;
BEGIN
    SELECT NEW.team_id = OLD.team_id
           AND NEW.last_entry_no = OLD.last_entry_no + count(*)
           AND NEW.credits_allocated - OLD.credits_allocated
               = coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0)
           AND NEW.credits_used - OLD.credits_used
               = coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0)
    INTO explained
    FROM ONLY public.credit_transactions
    WHERE team_id = OLD.team_id AND entry_no > OLD.last_entry_no;

    IF NOT explained THEN
        RAISE EXCEPTION 'the credits of team % move only with their ledger rows', OLD.team_id
            USING ERRCODE = 'SL006', HINT = 'Insert into credit_transactions, as saasllm credits add does.';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER team_credits_guard BEFORE UPDATE ON team_credits
    FOR EACH ROW
    WHEN (
        (OLD.team_id, OLD.credits_allocated, OLD.credits_used, OLD.last_entry_no)
        IS DISTINCT FROM (NEW.team_id, NEW.credits_allocated, NEW.credits_used, NEW.last_entry_no)
    )
    EXECUTE FUNCTION guard_balance();

-- A balance begins empty with its team and goes with it, never on its own.

CREATE FUNCTION refuse_balance_without_team() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- When a team is deleted, its row here follows: by then the team is gone.
    IF TG_OP = 'DELETE' AND NOT EXISTS (SELECT FROM public.teams WHERE team_id = OLD.team_id) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'the balance of a team begins empty and goes with its team: % is refused', TG_OP
        USING ERRCODE = 'SL006', HINT = 'A team that is created has its balance; saasllm credits add moves it.';
END
$$;

CREATE TRIGGER team_credits_begin_empty BEFORE INSERT ON team_credits
    FOR EACH ROW
    WHEN ((NEW.credits_allocated, NEW.credits_used, NEW.credits_reserved, NEW.last_entry_no) <> (0, 0, 0, 0))
    EXECUTE FUNCTION refuse_balance_without_team();
CREATE TRIGGER team_credits_stay BEFORE DELETE ON team_credits
    FOR EACH ROW EXECUTE FUNCTION refuse_balance_without_team();
CREATE TRIGGER team_credits_no_truncate BEFORE TRUNCATE ON team_credits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_balance_without_team();

CREATE FUNCTION open_balances() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.team_credits (team_id) SELECT team_id FROM new_teams;
    RETURN NULL;
END
$$;

CREATE TRIGGER teams_open_balances AFTER INSERT ON teams
    REFERENCING NEW TABLE AS new_teams
    FOR EACH STATEMENT EXECUTE FUNCTION open_balances();
