-- Grants: what is left of each, and what of them has expired.
--
-- Credits are used in an order: by priority, then what expires first, then promotional before included before paid,
-- then what was granted earlier. As long as no grant comes or goes, what each has left follows from how far the balance
-- has fallen. So what a job is charged writes nothing here: it is attributed to the grants with the next entry of
-- another kind.
--
-- A grant may be used by jobs that begin before it expires. What it has left then expires at once, by the clock of the
-- database, but for what open jobs hold: together they hold what would be used first. That is used before all else by
-- jobs that still may, each charge being attributed at once, and expires when they hold it no more. Who locks the
-- balance enters what has expired before anything else (lock_balance).


-- The grants of a team that have something left, in the order of their use, as its ledger had it at a balance. What is
-- recorded here is that of an earlier one: `credits_taken` have been used since.
CREATE FUNCTION grants_at(of_team text, balance bigint, owed bigint) RETURNS TABLE (
    place bigint, grant_id bigint, category text, created_at timestamptz, expires_at timestamptz,
    credits_taken bigint, credits_left bigint
)
LANGUAGE sql STABLE AS $$
    SELECT
        place, grant_id, category, created_at, expires_at, (recorded - credits_left)::bigint, credits_left::bigint
    FROM (
        SELECT
            g.grant_id,
            g.category,
            g.created_at,
            g.expires_at,
            g.credits_left AS recorded,
            row_number() OVER in_order AS place,
            sum(g.credits_left) OVER in_order AS credits_to,
            sum(g.credits_left) OVER () - owed - balance AS credits_used
        FROM public.credit_grants g
        WHERE g.team_id = of_team AND g.credits_left > 0
        WINDOW in_order AS (
            ORDER BY
                g.priority,
                g.expires_at,
                array_position('{promotional,included,paid}', g.category::text),
                g.grant_id
        )
    ) AS open
    CROSS JOIN LATERAL (SELECT least(recorded, greatest(credits_to - credits_used, 0)) AS credits_left) AS now
    ORDER BY place
$$;

-- How much is taken of each, one after the other, while all that is taken stays within the bound of each.
CREATE FUNCTION take_in_turn(credits bigint[], bounds bigint[]) RETURNS bigint[]
LANGUAGE plpgsql IMMUTABLE STRICT AS $$
DECLARE
    taken bigint[] := '{}';
    total bigint := 0;
BEGIN
    FOR number IN 1 .. cardinality(credits) LOOP
        taken[number] := least(credits[number], greatest(bounds[number] - total, 0));
        total := total + taken[number];
    END LOOP;
    RETURN taken;
END
$$;


-- The same of several teams as they are now, with what open jobs hold of each: together they hold what would be used
-- first, and before that what they held as it expired (`was_held`).
CREATE FUNCTION grants_now(of_teams text[]) RETURNS TABLE (
    team_id text, place bigint, grant_id bigint, category text, created_at timestamptz,
    expires_at timestamptz, credits_taken bigint, credits_left bigint, was_held boolean, credits_held bigint
)
LANGUAGE sql STABLE AS $$
    SELECT
        g.team_id, g.place, g.grant_id, g.category, g.created_at, g.expires_at, g.credits_taken, g.credits_left,
        g.was_held,
        CASE
            WHEN g.is_usable THEN least(
                g.credits_left,
                greatest(
                    g.credits_reserved - sum(g.credits_left) FILTER (WHERE g.is_usable) OVER use + g.credits_left, 0
                )
            )
            ELSE 0
        END::bigint
    FROM (
        SELECT
            c.team_id,
            c.credits_reserved,
            now.*,
            coalesce(now.expires_at <= c.held_expired_at, false) AND is_usable AS was_held,
            is_usable
        FROM unnest(of_teams) AS asked (team_id)
        JOIN public.team_credits c ON c.team_id = asked.team_id
        CROSS JOIN LATERAL public.grants_at(c.team_id::text, c.credits_remaining, c.credits_owed) AS now
        -- One that had expired as it came is not.
        CROSS JOIN LATERAL (SELECT coalesce(now.expires_at > now.created_at, true) AS is_usable) AS one
    ) AS g
    WINDOW use AS (PARTITION BY g.team_id ORDER BY NOT g.was_held, g.place)
$$;


-- What has expired and is still in the balances of teams: what no job holds. What jobs held as it expired, and those of
-- them that are open do not hold any more, is looked at only where jobs may have ended (`and_released`). An end that
-- could not be entered before other jobs began is none of theirs.
CREATE FUNCTION due_expiries(of_teams text[], and_released boolean DEFAULT false) RETURNS TABLE (
    team_id text, place bigint, grant_id bigint, credits bigint
)
LANGUAGE sql STABLE AS $$
    WITH expired AS MATERIALIZED (
        SELECT
            g.*,
            c.usable,
            g.was_held
            OR (
                g.created_at < g.expires_at
                AND (
                    SELECT j.created_at
                    FROM public.jobs j
                    WHERE j.team_id = g.team_id
                      AND j.created_at >= g.expires_at
                      AND j.status IN ('pending', 'in_progress')
                    ORDER BY j.created_at DESC
                    LIMIT 1
                ) IS NOT NULL
            ) AS is_of_former
        FROM public.grants_now(of_teams) g
        CROSS JOIN LATERAL (
            SELECT credits_remaining - credits_reserved + coalesce(credits_overdraft::numeric, 'Infinity') AS usable
            FROM public.team_credits
            WHERE team_id = g.team_id
            OFFSET 0
        ) AS c
        WHERE g.expires_at <= clock_timestamp() AND (and_released OR NOT g.was_held)
    ),
    held AS MATERIALIZED (
        SELECT grants.grant_id, grants.credits
        FROM (
            SELECT
                array_agg(e.grant_id ORDER BY e.expires_at, e.place) AS grant_ids,
                public.take_in_turn(
                    array_agg(e.credits_left ORDER BY e.expires_at, e.place),
                    array_agg(jobs.credits_held ORDER BY e.expires_at, e.place)
                ) AS credits
            FROM expired e
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(j.credits_held), 0)::bigint AS credits_held
                FROM public.jobs j
                WHERE j.team_id = e.team_id
                  AND j.status IN ('pending', 'in_progress')
                  AND j.created_at < e.expires_at
            ) AS jobs
            WHERE e.is_of_former
            GROUP BY e.team_id
        ) AS team
        CROSS JOIN LATERAL unnest(team.grant_ids, team.credits) AS grants (grant_id, credits)
    ),
    unheld AS (
        SELECT
            e.team_id, e.grant_id, e.usable,
            row_number() OVER (PARTITION BY e.team_id ORDER BY e.expires_at, e.place) AS place,
            e.credits_left - CASE
                WHEN e.is_of_former THEN (SELECT held.credits FROM held WHERE held.grant_id = e.grant_id)
                ELSE e.credits_held
            END AS credits
        FROM expired e
    )
    SELECT due.team_id, due.place, due.grant_id, due.credits::bigint
    FROM (
        SELECT
            team_id,
            place,
            grant_id,
            -- Never what jobs have reserved, whatever they may have been given to hold.
            least(
                credits, greatest(usable - sum(credits) OVER (PARTITION BY team_id ORDER BY place) + credits, 0)
            ) AS credits
        FROM unheld
    ) AS due
    WHERE due.credits > 0
$$;

-- What could expire now of a grant that has not expired yet; NULL where it has, or has nothing left.
CREATE FUNCTION unheld_credits(of_team text, of_grant bigint, OUT credits bigint)
LANGUAGE plpgsql AS $$
BEGIN
    SELECT g.credits_left - g.credits_held INTO credits
    FROM public.grants_now(ARRAY[of_team]) g
    WHERE g.grant_id = of_grant AND g.credits_left > 0 AND (g.expires_at > clock_timestamp()) IS NOT FALSE;
END
$$;

-- Enters what has expired, and says how much that is of each team. The balances are locked. One that is not that of its
-- last entry keeps what has expired for later: until it is repaired, or until the entries of the same statement are
-- counted.
CREATE FUNCTION expire_credits(of_teams text[], and_released boolean DEFAULT false) RETURNS TABLE (
    team_id text, credits bigint
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    until timestamptz := clock_timestamp(); -- what expires meanwhile, comes next
BEGIN
    of_teams := ARRAY(
        SELECT c.team_id::text
        FROM public.team_credits c
        CROSS JOIN LATERAL (SELECT is_sound FROM public.checked_balances WHERE team_id = c.team_id OFFSET 0) AS b
        WHERE c.team_id = ANY (of_teams)
          AND (c.next_expiry_at <= clock_timestamp() OR c.held_expired_at IS NOT NULL)
          AND b.is_sound
    );
    RETURN QUERY WITH entry AS (
        INSERT INTO public.credit_transactions AS e (
            team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after,
            reason, grant_id
        )
        SELECT
            t.team_id, t.organization_id, b.last_entry_no + row_number() OVER in_order, 'expiry', - due.credits,
            b.credits_remaining - sum(due.credits) OVER in_order + due.credits,
            b.credits_remaining - sum(due.credits) OVER in_order, 'Expired', due.grant_id
        FROM public.due_expiries(of_teams, and_released) due
        CROSS JOIN LATERAL (SELECT * FROM public.teams WHERE team_id = due.team_id OFFSET 0) AS t
        CROSS JOIN LATERAL (SELECT * FROM public.team_credits WHERE team_id = due.team_id OFFSET 0) AS b
        WINDOW in_order AS (PARTITION BY t.team_id ORDER BY due.place)
        RETURNING e.team_id, e.credits_amount
    )
    SELECT entry.team_id::text, - sum(entry.credits_amount)::bigint FROM entry GROUP BY entry.team_id;

    UPDATE public.team_credits c
    SET next_expiry_at = open.next_at,
        held_expired_at = open.held_at
    FROM unnest(of_teams) AS asked (team_id)
    CROSS JOIN LATERAL (
        SELECT
            min(g.expires_at) FILTER (WHERE g.expires_at > until) AS next_at,
            max(g.expires_at) FILTER (WHERE g.expires_at <= until) AS held_at
        FROM public.credit_grants g
        WHERE g.team_id = asked.team_id AND g.credits_left > 0
    ) AS open
    WHERE c.team_id = asked.team_id
      AND (c.next_expiry_at, c.held_expired_at) IS DISTINCT FROM (open.next_at, open.held_at);
END
$$;


-- Attributes entries to the grants of their teams, and before them what was used since the last ones. For the trigger
-- of the ledger, whose settings hold for it, and which moves the balances.
CREATE FUNCTION attribute_entries(entries credit_transactions[]) RETURNS void
LANGUAGE plpgsql SET enable_hashjoin = off AS $$
DECLARE
    mixed    text;
    kinds    text[];
    found_no bigint;
BEGIN
    SELECT min(team_id) FILTER (WHERE cardinality(of_team) > 1), array_agg(DISTINCT of_team[1])
    INTO mixed, kinds
    FROM (
        SELECT
            e.team_id::text,
            array_agg(
                DISTINCT CASE
                    WHEN e.transaction_type IN ('deduction', 'expiry', 'refund') THEN e.transaction_type
                    WHEN e.credits_amount > 0 THEN 'grant'
                    ELSE 'adjustment'
                END
            ) AS of_team
        FROM unnest(entries) AS e
        GROUP BY e.team_id
    ) AS team;
    IF mixed IS NOT NULL THEN
        RAISE EXCEPTION 'the new entries of team % grant, use, give back or expire credits in one statement', mixed
            USING ERRCODE = 'SL005', HINT = 'Enter them in separate statements.';
    END IF;

    -- What was used: first since the last entries that were attributed (the tail), then by these.
    WITH movement AS MATERIALIZED (
        SELECT e.*, c.credits_owed
        FROM (
            SELECT
                team_id,
                min(entry_no) - 1 AS tail_no,
                max(entry_no) AS last_no,
                max(created_at) AS at,
                (array_agg(credits_before ORDER BY entry_no))[1] AS opening,
                -- The charges of jobs, or adjustments.
                bool_or(transaction_type = 'deduction') AS is_charge,
                coalesce(-sum(credits_amount) FILTER (WHERE transaction_type <> 'expiry' AND credits_amount < 0), 0)
                    AS used
            FROM unnest(entries)
            GROUP BY team_id
        ) AS e
        CROSS JOIN LATERAL (SELECT credits_owed FROM public.team_credits WHERE team_id = e.team_id OFFSET 0) AS c
    ),
    open AS MATERIALIZED (
        SELECT m.*, g.*, coalesce(g.expires_at <= m.at, false) AS is_expired
        FROM movement m
        LEFT JOIN LATERAL public.grants_at(m.team_id::text, m.opening, m.credits_owed) g ON true
    ),
    held AS MATERIALIZED (
        SELECT team.team_id, grants.grant_id, grants.credits
        FROM (
            SELECT
                o.team_id,
                array_agg(o.grant_id ORDER BY o.expires_at, o.place) AS grant_ids,
                public.take_in_turn(
                    array_agg(o.credits_left ORDER BY o.expires_at, o.place),
                    array_agg(jobs.credits ORDER BY o.expires_at, o.place)
                ) AS credits
            FROM open o
            CROSS JOIN LATERAL (
                SELECT coalesce(-sum(e.credits_amount), 0)::bigint AS credits
                FROM unnest(entries) AS e
                JOIN ONLY public.jobs j ON j.job_id = e.job_id
                WHERE e.team_id = o.team_id
                  AND e.transaction_type = 'deduction'
                  AND j.created_at < o.expires_at
                  AND o.created_at < o.expires_at
            ) AS jobs
            WHERE o.is_expired AND o.used > 0
            GROUP BY o.team_id
        ) AS team
        CROSS JOIN LATERAL unnest(team.grant_ids, team.credits) AS grants (grant_id, credits)
    ),
    used AS MATERIALIZED (
        SELECT
            o.*,
            CASE
                WHEN o.used = 0 THEN 0
                WHEN o.is_expired THEN (SELECT h.credits FROM held h WHERE h.grant_id = o.grant_id)
                ELSE least(
                    o.credits_left,
                    greatest(
                        o.used
                        - coalesce((SELECT sum(h.credits) FROM held h WHERE h.team_id = o.team_id), 0)
                        - sum(o.credits_left) FILTER (WHERE NOT o.is_expired) OVER in_order
                        + o.credits_left,
                        0
                    )
                )
            END AS credits_used
        FROM open o
        WINDOW in_order AS (PARTITION BY o.team_id ORDER BY o.place)
    ),
    attributed AS (
        UPDATE ONLY public.credit_grants g
        SET credits_used = g.credits_used + used.credits_taken + used.credits_used,
            last_used_no = used.last_no
        FROM used
        WHERE g.grant_id = used.grant_id
          AND g.grant_id = ANY (ARRAY(SELECT grant_id FROM used WHERE credits_taken + credits_used > 0))
    ),
    overdrawn AS (
        SELECT
            team_id, tail_no, last_no, is_charge,
            coalesce(sum(credits_left), 0) - credits_owed - opening AS credits_taken,
            used - coalesce(sum(credits_used), 0) AS credits_used
        FROM used
        GROUP BY team_id, tail_no, last_no, is_charge, credits_owed, opening, used
    )
    INSERT INTO public.credit_uses (team_id, last_no, grant_id, credits)
    SELECT team_id, last_no, grant_id, credits
    FROM (
        SELECT team_id, tail_no AS last_no, grant_id, credits_taken AS credits, place, false AS is_lasting
        FROM used
        UNION ALL
        SELECT team_id, tail_no, NULL, credits_taken, NULL, NULL FROM overdrawn
        UNION ALL
        SELECT team_id, last_no, grant_id, credits_used, place, NOT is_expired FROM used WHERE is_charge
        UNION ALL
        SELECT team_id, last_no, NULL, credits_used, NULL, NULL FROM overdrawn WHERE is_charge
    ) AS use
    WHERE credits > 0
    ORDER BY team_id, last_no, is_lasting, place;

    IF 'expiry' = ANY (kinds) THEN
        -- One that is revoked expires now, before what has expired and is not entered yet.
        IF has_table_privilege('public.teams', 'UPDATE') THEN
            UPDATE ONLY public.credit_grants g
            SET expires_at = least(e.created_at, c.next_expiry_at - interval '1 microsecond')
            FROM unnest(entries) AS e
            CROSS JOIN LATERAL (SELECT next_expiry_at FROM public.team_credits WHERE team_id = e.team_id OFFSET 0) AS c
            WHERE g.grant_id = e.grant_id AND g.team_id = e.team_id AND (g.expires_at <= e.created_at) IS NOT TRUE;
        END IF;
        UPDATE ONLY public.credit_grants g
        SET credits_expired = g.credits_expired - e.credits_amount
        FROM unnest(entries) AS e
        WHERE g.grant_id = e.grant_id AND g.team_id = e.team_id AND g.expires_at <= e.created_at;
        GET DIAGNOSTICS found_no = ROW_COUNT;
        IF found_no <> (SELECT count(*) FROM unnest(entries) AS e WHERE e.transaction_type = 'expiry') THEN
            RAISE EXCEPTION 'an expiry does not name a grant of its team that has expired'
                USING ERRCODE = 'SL005', HINT = 'Give the grant_id of an allocation of the team, each in one entry.';
        END IF;
    END IF;

    IF 'grant' = ANY (kinds) THEN
        -- What was granted pays first what is owed.
        INSERT INTO public.credit_grants (
            grant_id, team_id, category, priority, created_at, expires_at, credits_amount, credits_used, last_used_no
        )
        SELECT
            e.transaction_id, e.team_id, coalesce(e.category, 'paid'), coalesce(e.priority, 50), e.created_at,
            e.expires_at, e.credits_amount, paid.credits, CASE WHEN paid.credits > 0 THEN e.entry_no END
        FROM unnest(entries) AS e
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(g.credits_left), 0) - e.credits_before AS credits
            FROM ONLY public.credit_grants g
            WHERE g.team_id = e.team_id AND g.credits_left > 0
        ) AS owed
        CROSS JOIN LATERAL (SELECT greatest(least(e.credits_amount, owed.credits), 0) AS credits) AS paid
        WHERE e.credits_amount > 0 AND e.transaction_type <> 'refund';
    END IF;

    IF 'refund' = ANY (kinds) THEN
        -- What was given back goes to what is owed, then to what was used last and has not expired; the rest lasts.
        WITH refund AS (
            SELECT
                e.team_id,
                min(e.transaction_id) AS transaction_id,
                max(e.created_at) AS at,
                sum(e.credits_amount) - greatest(
                    coalesce(
                        (
                            SELECT sum(g.credits_left)
                            FROM ONLY public.credit_grants g
                            WHERE g.team_id = e.team_id AND g.credits_left > 0
                        ),
                        0
                    ) - min(e.credits_before),
                    0
                ) AS credits
            FROM unnest(entries) AS e
            WHERE e.transaction_type = 'refund'
            GROUP BY e.team_id
        ),
        back AS (
            UPDATE ONLY public.credit_grants g
            SET credits_used = g.credits_used - given.credits
            FROM (
                SELECT
                    used.grant_id,
                    least(
                        used.credits_used,
                        r.credits - sum(used.credits_used) OVER last_first + used.credits_used
                    ) AS credits
                FROM refund r
                JOIN public.credit_grants used ON used.team_id = r.team_id
                WHERE used.credits_used > 0 AND (used.expires_at IS NULL OR used.expires_at > r.at)
                WINDOW last_first AS (
                    PARTITION BY r.team_id
                    ORDER BY
                        used.last_used_no DESC,
                        -- and the other way round than they are used
                        used.priority DESC,
                        used.expires_at DESC,
                        array_position('{promotional,included,paid}', used.category::text) DESC,
                        used.grant_id DESC
                )
            ) AS given
            WHERE g.grant_id = given.grant_id AND given.credits > 0
            RETURNING g.team_id, given.credits
        )
        INSERT INTO public.credit_grants (grant_id, team_id, created_at, credits_amount)
        SELECT r.transaction_id, r.team_id, r.at, r.credits - coalesce(given.credits, 0)
        FROM refund r
        CROSS JOIN LATERAL (SELECT sum(back.credits) AS credits FROM back WHERE back.team_id = r.team_id) AS given
        WHERE r.credits > coalesce(given.credits, 0);
    END IF;

    UPDATE ONLY public.team_credits c
    SET credits_owed = now.credits_owed,
        next_expiry_at = now.next_expiry_at,
        held_expired_at = now.held_expired_at
    FROM (
        SELECT
            entered.team_id,
            open.credits - entered.credits AS credits_owed,
            -- Of those that were granted, or were given something back; and what has expired and is not entered yet.
            least(before.next_expiry_at, entered.next_expiry_at, open.next_expiry_at) AS next_expiry_at,
            open.held_expired_at
        FROM (
            SELECT
                e.team_id,
                (array_agg(e.credits_after ORDER BY e.entry_no DESC))[1] AS credits,
                max(e.created_at) AS at,
                min(e.expires_at) AS next_expiry_at,
                array_agg(e.grant_id) AS expired
            FROM unnest(entries) AS e
            GROUP BY e.team_id
        ) AS entered
        CROSS JOIN LATERAL (
            SELECT next_expiry_at, held_expired_at
            FROM public.team_credits
            WHERE team_id = entered.team_id
            OFFSET 0
        ) AS before
        CROSS JOIN LATERAL (
            SELECT
                coalesce(sum(g.credits_left), 0) AS credits,
                min(g.expires_at) FILTER (WHERE g.expires_at > entered.at) AS next_expiry_at,
                max(g.expires_at) FILTER (
                    WHERE g.expires_at <= before.held_expired_at OR g.grant_id = ANY (entered.expired)
                ) AS held_expired_at
            FROM ONLY public.credit_grants g
            WHERE g.team_id = entered.team_id AND g.credits_left > 0
        ) AS open
    ) AS now
    WHERE c.team_id = now.team_id
      AND (c.credits_owed, c.next_expiry_at, c.held_expired_at)
          IS DISTINCT FROM (now.credits_owed, now.next_expiry_at, now.held_expired_at);
END
$$;


-- After charges: what jobs held of expired grants and were not charged, also those that ended without a charge by the
-- same statement.
CREATE FUNCTION expire_uncharged(entries credit_transactions[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    of_teams text[] := ARRAY(
        SELECT DISTINCT e.team_id::text
        FROM unnest(entries) AS e
        JOIN ONLY public.jobs j ON j.job_id = e.job_id
        JOIN ONLY public.team_credits c ON c.team_id = e.team_id
        WHERE e.transaction_type = 'deduction'
          AND c.held_expired_at IS NOT NULL
          AND (
              (j.credits_held > - e.credits_amount AND j.created_at < c.held_expired_at)
              OR EXISTS (
                  SELECT
                  FROM ONLY public.jobs freed
                  WHERE freed.team_id = c.team_id
                    AND freed.release_no = c.last_hold_no
                    AND freed.completed_at >= transaction_timestamp()
              )
          )
    );
BEGIN
    IF of_teams <> '{}' THEN
        PERFORM public.expire_credits(of_teams, and_released => true);
    END IF;
END
$$;


-- Builds the grants of a team anew from its ledger, and enters what of them has expired. The balance is locked.
CREATE FUNCTION rebuild_grants(of_team text) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_mergejoin = off AS $$
DECLARE
    entries public.credit_transactions[];
    ends    timestamptz[] := ARRAY(
        SELECT DISTINCT expires_at
        FROM public.credit_transactions
        WHERE team_id = of_team AND expires_at IS NOT NULL
        ORDER BY expires_at
    );
    held_at timestamptz; -- what expired until then is entered, but for what jobs hold
BEGIN
    SELECT least(held_expired_at, clock_timestamp()) INTO held_at
    FROM public.team_credits
    WHERE team_id = of_team AND held_expired_at IS NOT NULL;
    DELETE FROM public.credit_uses WHERE team_id = of_team;
    DELETE FROM public.credit_grants WHERE team_id = of_team;
    UPDATE public.team_credits
    SET credits_owed = 0, next_expiry_at = NULL, held_expired_at = NULL
    WHERE team_id = of_team;
    -- Charges between which nothing else was entered and nothing ended go at once: each update of a grant leaves a
    -- version of it behind, which the next one would have to pass.
    FOR entries IN
        SELECT array_agg(entry ORDER BY entry_no)
        FROM (
            SELECT
                e AS entry,
                e.entry_no,
                e.transaction_type = 'deduction' AS is_charge,
                count(*) FILTER (WHERE e.transaction_type <> 'deduction') OVER (ORDER BY e.entry_no) AS changes,
                width_bucket(e.created_at, ends) AS ended
            FROM public.credit_transactions e
            WHERE e.team_id = of_team
        ) AS numbered
        GROUP BY changes, is_charge, ended
        ORDER BY min(entry_no)
    LOOP
        IF entries[1].transaction_type <> 'deduction'
            OR EXISTS (
                SELECT
                FROM public.credit_grants
                WHERE team_id = of_team AND credits_left > 0 AND expires_at <= entries[1].created_at
            )
        THEN
            PERFORM public.attribute_entries(entries);
        END IF;
    END LOOP;
    UPDATE public.team_credits
    SET next_expiry_at = open.next_at,
        held_expired_at = open.held_at
    FROM (
        SELECT
            min(expires_at) FILTER (WHERE (expires_at <= held_at) IS NOT TRUE) AS next_at,
            max(expires_at) FILTER (WHERE expires_at <= held_at) AS held_at
        FROM public.credit_grants
        WHERE team_id = of_team AND credits_left > 0
    ) AS open
    WHERE team_id = of_team;
    PERFORM public.expire_credits(ARRAY[of_team], and_released => true);
END
$$;


-- What of a balance has expired. In plpgsql, as what is hardly ever needed is then not planned each time.
CREATE FUNCTION expired_credits(of_team text) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT coalesce(sum(due.credits), 0) FROM public.due_expiries(ARRAY[of_team]) due);
END
$$;

-- Balances without what has expired, also where that is not entered yet.
CREATE VIEW current_balances AS
SELECT
    c.team_id,
    c.credits_allocated - expired.credits AS credits_allocated,
    c.credits_used,
    c.credits_reserved,
    c.credits_remaining - expired.credits AS credits_remaining,
    c.credits_overdraft,
    c.low_credits
FROM team_credits c
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.next_expiry_at <= clock_timestamp() THEN expired_credits(c.team_id::text) ELSE 0 END AS credits
) AS expired;
