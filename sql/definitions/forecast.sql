-- When credits run out.

-- For how many days what a team has lasts, with its overdraft: used at this rate in the order of use, gone where it
-- expires, and granted as scheduled. NULL where that is for more than a year. And how much expires next, and when.
--
-- It goes from event to event: the end of a grant, or the beginning of a period. Both are counted in days from the
-- beginning of today, which is used as a whole. The arrays are of the grants in the order of use. Among them, at
-- `place`, is what is scheduled: it stands behind those whose `bounds` are not later than its end.
CREATE FUNCTION forecast_team(
    of_team text, credits_per_day double precision,
    OUT days_left integer, OUT next_expiry_at timestamptz, OUT credits_expiring bigint
)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    last_day  CONSTANT integer := 365;
    tolerance CONSTANT double precision := 0.000001; -- the rate is rounded, and so is what it divides
    never     CONSTANT double precision := 'Infinity';
    schedule  public.credit_schedules;
    overdraft double precision;
    owed      double precision;
    grant_ids bigint[];
    credits   double precision[]; -- what is left of each
    ends      double precision[];
    bounds    double precision[];
    included  boolean[];
    place     integer := 1;
    first     integer := 1; -- that has something left
    rolling   integer; -- the place of the one whose rest may roll over to the next period
    rest      double precision := 0; -- of the last period
    day       double precision := 0;
    next_day  double precision := never; -- of the schedule
    next_end  double precision := 0; -- of a grant
    following double precision; -- event
    total     double precision; -- of what is left
    usable    double precision; -- with the overdraft
    granted   double precision;
    paid      double precision; -- of what is owed
    used      double precision;
    is_enough boolean; -- what is scheduled, for the longest period
BEGIN
    SELECT
        c.credits_overdraft,
        sum(g.credits_left) - c.credits_remaining,
        array_agg(g.grant_id ORDER BY g.place),
        array_agg(g.credits_left ORDER BY g.place),
        array_agg(g.ends_in ORDER BY g.place),
        array_agg(
            CASE
                WHEN g.priority < 50 THEN 0
                WHEN g.priority > 50 THEN 'NaN' -- which is more than never
                WHEN g.category <> 'paid' THEN g.ends_in
                WHEN g.ends_in < never THEN g.ends_in + tolerance
                ELSE 'NaN'
            END
            ORDER BY g.place
        ),
        array_agg(g.category = 'included' ORDER BY g.place),
        max(g.next_at),
        sum(g.credits_left) FILTER (WHERE g.expires_at = g.next_at)
    INTO overdraft, owed, grant_ids, credits, ends, bounds, included, next_expiry_at, credits_expiring
    FROM public.team_credits c
    CROSS JOIN LATERAL (
        SELECT
            0 AS place, NULL AS grant_id, 'included' AS category, 50 AS priority, 0 AS credits_left,
            NULL AS expires_at, never AS ends_in, NULL AS next_at
        UNION ALL
        SELECT
            now.place, now.grant_id, now.category,
            (SELECT priority FROM public.credit_grants WHERE grant_id = now.grant_id),
            now.credits_left, now.expires_at,
            CASE
                WHEN now.expires_at IS NULL THEN never
                WHEN now.expires_at <= clock_timestamp() THEN 0
                ELSE EXTRACT(epoch FROM now.expires_at - current_date) / 86400
            END,
            min(now.expires_at) FILTER (WHERE now.expires_at > clock_timestamp()) OVER ()
        FROM public.grants_at(of_team, c.credits_remaining, c.credits_owed) AS now
        WHERE now.credits_left > 0
    ) AS g
    WHERE c.team_id = of_team
    GROUP BY c.team_id;

    IF overdraft IS NULL THEN
        RETURN;
    END IF;
    -- All are looked at each time when one ends: of very many, at the end of each day.
    IF cardinality(ends) > 500 THEN
        ends := ARRAY(
            SELECT ceil(ends_in) FROM unnest(ends) WITH ORDINALITY AS grants (ends_in, number) ORDER BY number
        );
    END IF;

    SELECT * INTO schedule FROM public.credit_schedules WHERE team_id = of_team;
    IF FOUND THEN
        -- What is overdue is granted today.
        schedule.next_on := greatest(schedule.next_on, public.period_start(schedule.every, current_date));
        next_day := schedule.next_on - current_date;
        is_enough := schedule.credits_amount
            >= credits_per_day * CASE schedule.every WHEN 'daily' THEN 1 WHEN 'weekly' THEN 7 ELSE 31 END;
        IF schedule.rollover IS NOT NULL THEN
            SELECT array_position(grant_ids, transaction_id) INTO rolling
            FROM public.credit_transactions
            WHERE team_id = of_team
              AND period = public.period_name(
                  schedule.every, public.period_after(schedule.every, schedule.next_on, -1)
              );
        END IF;
    END IF;

    LOOP
        IF next_end <= day THEN
            next_end := never;
            total := 0;
            FOR number IN 1 .. cardinality(credits) LOOP
                IF ends[number] <= day THEN
                    IF number = rolling THEN
                        rest := credits[number];
                    END IF;
                    credits[number] := 0;
                ELSE
                    next_end := least(next_end, ends[number]);
                END IF;
                total := total + credits[number];
            END LOOP;
        END IF;

        IF next_day <= day THEN
            schedule.next_on := public.period_after(schedule.every, schedule.next_on, 1);
            next_day := schedule.next_on - current_date;
            CASE schedule.mode
                WHEN 'reset' THEN
                    rest := rest + credits[place];
                    total := total - credits[place];
                    credits[place] := 0;
                    granted := schedule.credits_amount + least(rest, coalesce(schedule.rollover, 0));
                    rest := 0;
                    rolling := NULL;
                WHEN 'top-up' THEN
                    granted := schedule.credits_amount + owed;
                    FOR number IN 1 .. cardinality(credits) LOOP
                        IF included[number] THEN
                            granted := granted - credits[number];
                        END IF;
                    END LOOP;
                ELSE
                    granted := least(schedule.credits_amount, schedule.credits_max - total + owed);
            END CASE;
            granted := greatest(granted, 0);
            paid := least(granted, owed);
            owed := owed - paid;
            -- The later it ends, the more of the others are used before.
            first := least(first, place);
            WHILE bounds[place + 1] <= CASE schedule.mode WHEN 'reset' THEN next_day ELSE never END LOOP
                credits[place] := credits[place + 1];
                ends[place] := ends[place + 1];
                included[place] := included[place + 1];
                place := place + 1;
                credits[place] := 0;
                ends[place] := never;
                included[place] := true;
            END LOOP;
            credits[place] := credits[place] + granted - paid;
            total := total + granted - paid;
            IF is_enough AND (schedule.mode = 'reset' OR next_end = never) THEN
                RETURN;
            END IF;
        END IF;

        usable := total + overdraft - owed;
        following := least(next_day, next_end, last_day);
        IF usable <= tolerance OR usable < credits_per_day * (following - day - tolerance) THEN
            days_left := floor(day + greatest(usable, 0) / greatest(credits_per_day, tolerance) + tolerance);
            RETURN;
        ELSIF day >= last_day THEN
            RETURN;
        END IF;
        used := credits_per_day * (following - day);
        total := greatest(total - used, 0);
        WHILE used > 0 AND first <= cardinality(credits) LOOP
            IF credits[first] > used THEN
                credits[first] := credits[first] - used;
                used := 0;
            ELSE
                used := used - credits[first];
                credits[first] := 0;
                first := first + 1;
            END IF;
        END LOOP;
        owed := owed + used;
        day := following;
    END LOOP;
END
$$;
