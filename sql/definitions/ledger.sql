-- Credits: a ledger that only grows, and the balances that follow from it.
--
-- Statements insert ledger rows and nothing else. One trigger moves the balances by what was inserted, and a guard on
-- the balances asks the ledger whether a movement is explained by its rows. It asks the data, not who is asking: a
-- setting or a trigger depth could be faked by any client. The functions see pg_catalog alone and name their tables in
-- full, with ONLY: a temporary table, a function of somebody's or a child table cannot stand in for the real one. A
-- function of ours is given just the types that it takes: a domain's own would be preferred, where somebody makes one.
-- With row_security = off they fail where a policy would hide rows from them.
--
-- What they check is what was written: before a row is, a trigger of somebody else's may still change it.
--
-- No function acts with its owner's rights: whoever may call one could hang it on a table of his own and have it
-- evaluate what he likes. So who runs jobs may move balances, and the ledger decides by how much; what teams are given
-- is for those who may change teams.
--
-- Their plans last as long as their session: one that reads a whole table, because that was empty or because one team
-- has most of its rows, would become slower and slower. Hence enable_seqscan = off, and enable_mergejoin = off where a
-- merge is thought to end early. And jit = off: what a plan for anybody is thought to cost may be a thousand times too
-- much (each grant of a team might meet each), and then the server compiled it for seconds, each time anew.


-- The ledger is append-only. (What leaves it, leaves with its whole team: purge.sql.)

CREATE FUNCTION refuse_ledger_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'credit_transactions is append-only: % is not allowed', TG_OP
        USING ERRCODE = 'SL004', HINT = 'To correct a balance, add another entry.';
END
$$;

CREATE TRIGGER credit_transactions_append_only BEFORE UPDATE OR TRUNCATE ON credit_transactions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_ledger_change();

-- Triggers of statements do not fire for what comes through a parent table. This one can have none: PostgreSQL gives no
-- parent to a table with such a trigger of rows, which itself never fires.
CREATE TRIGGER credit_transactions_has_no_parent AFTER UPDATE ON credit_transactions
    REFERENCING OLD TABLE AS old_rows
    FOR EACH ROW WHEN (false) EXECUTE FUNCTION refuse_ledger_change();


-- Ledger rows move the balances: deductions and refunds credits_used, the others credits_allocated. The rows of a team
-- must continue its chain, and what a job costs, or gets back, must be what a completed job of that team was charged.
--
-- Their times are the database's, whoever writes: an entry of an earlier month would change what that month has cost,
-- and one of no month at all (infinity) could not be read.
--
-- What it has moved outlives a crash from its commit on, also where the server, the role or the session does without.

CREATE FUNCTION move_balances() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_mergejoin = off AS $$
DECLARE
    refused_team text;
    refused_job  text;
    is_given     boolean; -- something other than what jobs cost, and what has expired
    is_misdated  boolean;
    is_of_grants boolean; -- to be attributed at once (credit_grants.sql)
    entries      public.credit_transactions[];
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;

    WITH linked AS (
        SELECT
            team_id, entry_no, transaction_type, credits_amount, credits_before,
            lag(entry_no) OVER chain AS previous_no,
            lag(credits_after) OVER chain AS previous_after,
            created_at, job.credits_held,
            CASE WHEN job_id IS NOT NULL AND job.is_charged_so IS NOT TRUE THEN job_id END AS wrong_job_id,
            created_at NOT BETWEEN transaction_timestamp() AND clock_timestamp() AS is_misdated
        FROM new_entries AS entry
        LEFT JOIN LATERAL (
            SELECT
                j.credits_held,
                (j.team_id, j.status, j.credits_charged) = (entry.team_id, 'completed', abs(entry.credits_amount))
                    AS is_charged_so
            FROM ONLY public.jobs j
            WHERE j.job_id = entry.job_id
            OFFSET 0
        ) AS job ON true
        WINDOW chain AS (PARTITION BY team_id ORDER BY entry_no)
    ),
    movement AS (
        SELECT
            team_id,
            min(entry_no) AS first_no,
            max(entry_no) AS last_no,
            min(credits_before) FILTER (WHERE previous_no IS NULL) AS opening,
            bool_and(previous_no IS NULL OR (entry_no, credits_before) = (previous_no + 1, previous_after)) AS unbroken,
            coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0)
                AS allocated,
            coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0) AS used,
            -- Each job has reserved what it holds (jobs.sql): the charge takes the place of the reservation.
            coalesce(sum(credits_held) FILTER (WHERE transaction_type = 'deduction'), 0) AS released,
            max(created_at) AS last_at,
            min(wrong_job_id::text) AS wrong_job_id,
            bool_or(transaction_type NOT IN ('deduction', 'expiry')) AS is_given,
            bool_or(transaction_type <> 'deduction') AS is_of_grants,
            bool_or(linked.is_misdated) AS is_misdated
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
        RETURNING
            c.team_id, c.last_entry_no,
            c.held_expired_at IS NOT NULL OR c.next_expiry_at <= movement.last_at AS is_of_grants
    )
    SELECT
        min(team_id::text) FILTER (WHERE (team_id, last_no) NOT IN (SELECT team_id, last_entry_no FROM moved)),
        min(wrong_job_id),
        bool_or(movement.is_given),
        bool_or(movement.is_misdated),
        bool_or(movement.is_of_grants) OR (SELECT bool_or(moved.is_of_grants) FROM moved)
    INTO refused_team, refused_job, is_given, is_misdated, is_of_grants
    FROM movement;

    IF is_given AND NOT has_table_privilege('public.teams', 'UPDATE') THEN
        RAISE EXCEPTION 'a role that cannot change teams can enter only what jobs are charged, and what has expired'
            USING ERRCODE = 'insufficient_privilege';
    ELSIF is_misdated THEN
        RAISE EXCEPTION 'an entry must be dated by the clock of the database'
            USING ERRCODE = 'SL005', HINT = 'Leave out created_at.';
    ELSIF refused_team IS NOT NULL THEN
        RAISE EXCEPTION 'the new entries of team % do not continue its ledger', refused_team
            USING ERRCODE = 'SL005',
                  DETAIL = 'Each entry_no must be the last one plus 1, and each credits_before the last credits_after.',
                  HINT = 'Lock the row of team_credits, and continue from its last_entry_no and credits_remaining.';
    ELSIF refused_job IS NOT NULL THEN
        RAISE EXCEPTION 'job % is not a completed job of the team that was charged so much', refused_job
            USING ERRCODE = 'SL005', HINT = 'Complete the job and charge its team in one statement.';
    END IF;
    IF is_of_grants THEN
        entries := ARRAY(SELECT entry::public.credit_transactions FROM new_entries AS entry);
        PERFORM public.attribute_entries(entries);
        PERFORM public.expire_uncharged(entries);
        PERFORM public.tell_of_entries(entries);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER credit_transactions_move_balances AFTER INSERT ON credit_transactions
    REFERENCING NEW TABLE AS new_entries
    FOR EACH STATEMENT EXECUTE FUNCTION move_balances();


-- No balance moves without its ledger rows, and what is reserved of it does not without the jobs that hold it.
--
-- A balance can be wrong only where somebody has changed it with the triggers off. Then it does not move any more, for
-- that would carry the fault into the ledger, until it is repaired: the guard also lets a balance become what the whole
-- ledger and all open jobs of its team say. Nobody gains a credit by that which the ledger does not have.
--
-- What is new is read in the order of its numbers, which only one index has: few rows, whatever else the team has.
-- plan_cache_mode: else it is planned anew for each row, as the entries behind a number are thought to be many.

CREATE FUNCTION guard_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    is_explained boolean := true; -- by its new entries, and by jobs
    was_right    boolean := true; -- what remained after its last entry
    is_restored  boolean; -- to what all of its entries and open jobs say
    charged      bigint := 0; -- what the jobs held that were charged: they hold nothing any more
    held         bigint; -- by which other jobs have changed what is reserved
    explained    bigint := 0; -- of that
BEGIN
    IF NEW.credits_remaining < OLD.credits_remaining
        AND (NEW.low_credits <> '{}' OR NEW.credits_remaining + NEW.credits_overdraft <= 0)
    THEN
        PERFORM public.tell_of_balance(OLD, NEW);
    END IF;

    IF (OLD.team_id, OLD.credits_allocated, OLD.credits_used, OLD.last_entry_no)
        IS DISTINCT FROM (NEW.team_id, NEW.credits_allocated, NEW.credits_used, NEW.last_entry_no)
    THEN
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
               END,
               coalesce(
                   sum(
                       CASE
                           WHEN is_new AND transaction_type = 'deduction' THEN (
                               SELECT j.credits_held FROM ONLY public.jobs j WHERE j.job_id = entry.job_id
                           )
                       END
                   ),
                   0
               )
        INTO is_explained, was_right, charged
        FROM (
            SELECT
                entry_no, transaction_type, credits_amount, credits_after, job_id,
                entry_no > OLD.last_entry_no AS is_new,
                transaction_type IN ('deduction', 'refund') AS is_of_job
            FROM ONLY public.credit_transactions
            WHERE team_id = OLD.team_id AND entry_no >= OLD.last_entry_no
            ORDER BY entry_no
            OFFSET 0
        ) AS entry;
    END IF;

    held := NEW.credits_reserved - OLD.credits_reserved + charged;
    IF NEW.last_hold_no = OLD.last_hold_no + 1 THEN
        explained := NULL;
        IF held >= 0 THEN
            -- New jobs have the time of their transaction. Where somebody gives them another, all are counted below.
            SELECT sum(credits_held) INTO explained
            FROM (
                SELECT hold_no, credits_held
                FROM ONLY public.jobs
                WHERE team_id = OLD.team_id AND created_at >= transaction_timestamp()
                ORDER BY created_at
                OFFSET 0
            ) AS job
            WHERE hold_no = NEW.last_hold_no;
        END IF;
        IF explained IS NULL AND held >= 0 THEN
            SELECT sum(credits_raised) INTO explained
            FROM (
                SELECT raise_no, credits_raised
                FROM ONLY public.jobs
                WHERE team_id = OLD.team_id AND raise_no >= NEW.last_hold_no AND completed_at IS NULL
                ORDER BY raise_no
                OFFSET 0
            ) AS job
            WHERE raise_no = NEW.last_hold_no;
        END IF;
        IF explained IS NULL AND held <= 0 THEN
            SELECT - sum(credits_held) INTO explained
            FROM (
                SELECT release_no, credits_held
                FROM ONLY public.jobs
                WHERE team_id = OLD.team_id AND release_no >= NEW.last_hold_no
                ORDER BY release_no
                OFFSET 0
            ) AS job
            WHERE release_no = NEW.last_hold_no; -- one that has a later number would be counted again with that
        END IF;
    ELSIF NEW.last_hold_no <> OLD.last_hold_no THEN
        explained := NULL;
    END IF;

    IF is_explained AND was_right AND held = explained THEN
        RETURN NULL;
    ELSIF is_explained AND NOT was_right THEN
        RAISE EXCEPTION 'the balance of team % does not match its ledger', OLD.team_id
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
        RAISE EXCEPTION 'the credits of team % can change only through its ledger', OLD.team_id
            USING ERRCODE = 'SL006', HINT = 'Insert into credit_transactions, as saasllm credits add does.';
    END IF;

    -- While one that was wrong is repaired, it may be too low for all of them.
    SELECT NEW.credits_reserved = least(
               coalesce(sum(credits_held) FILTER (WHERE completed_at IS NULL), 0),
               CASE
                   WHEN NOT (is_explained AND was_right) THEN greatest(NEW.credits_remaining + NEW.credits_overdraft, 0)
               END
           )
           AND NEW.last_hold_no = coalesce(greatest(max(hold_no), max(raise_no), max(release_no)), 0)
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

CREATE TRIGGER team_credits_guard AFTER UPDATE ON team_credits
    FOR EACH ROW
    WHEN (
        (
            OLD.team_id, OLD.credits_allocated, OLD.credits_used, OLD.credits_reserved, OLD.last_entry_no,
            OLD.last_hold_no
        )
        IS DISTINCT FROM (
            NEW.team_id, NEW.credits_allocated, NEW.credits_used, NEW.credits_reserved, NEW.last_entry_no,
            NEW.last_hold_no
        )
    )
    EXECUTE FUNCTION guard_balance();


-- A balance begins empty with its team and goes with it, never on its own. A history does not pass to another team of
-- the same id: else a statement could take the team away, have a function remove a part of the history, and put the
-- team back before anybody has looked. Only its opening credits may be there already: they are of the same statement.

CREATE FUNCTION open_balances() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
DECLARE
    with_history text;
    opened       bigint;
BEGIN
    SELECT min(t.team_id::text) INTO with_history
    FROM new_teams n
    JOIN ONLY public.teams t ON t.team_id = n.team_id
    WHERE EXISTS (SELECT FROM ONLY public.jobs j WHERE j.team_id = t.team_id)
       OR EXISTS (
           SELECT
           FROM ONLY public.credit_transactions c
           WHERE c.team_id = t.team_id AND NOT (c.xmin = t.xmin AND c.cmin = t.cmin)
       );
    IF with_history IS NOT NULL THEN
        RAISE EXCEPTION 'an earlier team % has left history', with_history
            USING ERRCODE = 'SL008', HINT = 'Choose another ID.';
    END IF;

    INSERT INTO public.team_credits (team_id) SELECT team_id FROM new_teams;
    GET DIAGNOSTICS opened = ROW_COUNT;
    IF opened <> (SELECT count(*) FROM new_teams) THEN
        RAISE EXCEPTION 'a team has no balance: one is created only with its team'
            USING ERRCODE = 'SL006', HINT = 'Drop the trigger that keeps rows out of team_credits.';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER teams_open_balances AFTER INSERT ON teams
    REFERENCING NEW TABLE AS new_teams
    FOR EACH STATEMENT EXECUTE FUNCTION open_balances();

CREATE FUNCTION refuse_balance_without_team() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    -- When a team is deleted, its row here follows: by then the team is gone.
    IF TG_OP = 'DELETE' AND NOT EXISTS (SELECT FROM ONLY public.teams WHERE team_id = OLD.team_id) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'a balance is created and deleted only with its team: % is not allowed', TG_OP
        USING ERRCODE = 'SL006', HINT = 'Insert into credit_transactions, as saasllm credits add does.';
END
$$;

CREATE TRIGGER team_credits_begin_empty AFTER INSERT ON team_credits
    FOR EACH ROW
    WHEN (
        (NEW.credits_allocated, NEW.credits_used, NEW.credits_reserved, NEW.last_entry_no, NEW.last_hold_no)
        <> (0, 0, 0, 0, 0)
    )
    EXECUTE FUNCTION refuse_balance_without_team();
CREATE TRIGGER team_credits_stay AFTER DELETE ON team_credits
    FOR EACH ROW EXECUTE FUNCTION refuse_balance_without_team();
CREATE TRIGGER team_credits_no_truncate BEFORE TRUNCATE ON team_credits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_balance_without_team();


-- Who waits for a balance does so in a statement of its own, which sees then what is there by now. A larger one would
-- have to begin a part of its plan anew for the row that has changed meanwhile, while the others wait. What has expired
-- by now is entered first. Usable is what jobs may still reserve: what is free, and the overdraft.

CREATE FUNCTION lock_balance(
    of_team text, OUT last_entry_no bigint, OUT credits_remaining bigint, OUT credits_usable numeric,
    OUT last_hold_no bigint
)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET enable_seqscan = off AS $$
DECLARE
    next_expiry_at timestamptz;
    tried_at       timestamptz;
BEGIN
    LOOP
        SELECT
            c.last_entry_no,
            c.credits_remaining,
            c.credits_remaining - c.credits_reserved + coalesce(c.credits_overdraft::numeric, 'Infinity'),
            c.last_hold_no,
            c.next_expiry_at
        INTO last_entry_no, credits_remaining, credits_usable, last_hold_no, next_expiry_at
        FROM public.team_credits c
        WHERE c.team_id = of_team
        FOR UPDATE;

        -- By the time at which it has the lock: what is selected may be from before it waited.
        EXIT WHEN (next_expiry_at <= clock_timestamp()) IS NOT TRUE OR next_expiry_at = tried_at;
        tried_at := next_expiry_at; -- which it remains where nothing may be entered
        PERFORM public.expire_credits(ARRAY[of_team]);
    END LOOP;
END
$$;


-- Balances as they are entered, and whether each is that of its last entry: where it is not, the guard lets it move no
-- more, so that nothing can be charged.
CREATE VIEW checked_balances AS
SELECT
    c.team_id,
    c.credits_allocated,
    c.credits_reserved,
    c.credits_remaining,
    c.credits_overdraft,
    c.credits_owed,
    c.last_entry_no,
    (c.last_entry_no, c.credits_remaining)
        IS NOT DISTINCT FROM (coalesce(last.entry_no, 0), coalesce(last.credits_after, 0)) AS is_sound
FROM team_credits c
LEFT JOIN LATERAL (
    SELECT entry_no, credits_after
    FROM credit_transactions
    WHERE team_id = c.team_id
    ORDER BY entry_no DESC
    LIMIT 1
) last ON true;
