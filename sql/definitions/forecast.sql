-- When credits run out.

-- For how many days what a team has lasts, with its overdraft: used at this rate in the order of use, gone where it
-- expires, and granted as scheduled. NULL where that is for more than a year. And how much expires next, and when.
--
-- It goes from event to event: the end of a grant, or the beginning of a period. Both are counted in days from the
-- beginning of today, which is used as a whole. The arrays are of the grants in the order of use; what is scheduled is
-- one more among them, which stands behind those whose `bounds` are not later than its end.
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
    rolling   integer; -- the place of the one whose rest may roll over to the next period
    place     integer; -- of what is scheduled
    first     integer := 1; -- that has something left
    day       double precision := 0;
    following double precision; -- event
    next_day  double precision := never; -- of the schedule
    next_end  double precision := 0; -- of a grant
    total     double precision; -- of what is left
    lasting   double precision; -- of that, what does not expire
    rest      double precision := 0; -- of the last period
    granted   double precision;
    used      double precision;
    shortage  double precision; -- of what is scheduled, for a period
    periods   integer;
    longest   integer; -- period
    is_enough boolean; -- what is scheduled, for that
BEGIN
    SELECT
        c.credits_overdraft,
        coalesce(sum(g.credits_left), 0) - c.credits_remaining,
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
    LEFT JOIN LATERAL (
        SELECT
            now.*,
            (SELECT priority FROM public.credit_grants WHERE grant_id = now.grant_id) AS priority,
            CASE
                WHEN now.expires_at IS NULL THEN never
                WHEN now.expires_at <= clock_timestamp() THEN 0
                ELSE EXTRACT(epoch FROM now.expires_at - current_date) / 86400
            END AS ends_in,
            min(now.expires_at) FILTER (WHERE now.expires_at > clock_timestamp()) OVER () AS next_at
        FROM public.grants_at(of_team, c.credits_remaining, c.credits_owed) AS now
        WHERE now.credits_left > 0
    ) AS g ON true
    WHERE c.team_id = of_team
    GROUP BY c.team_id;

    IF overdraft IS NULL THEN
        RETURN;
    ELSIF grant_ids = '{NULL}' THEN
        grant_ids := '{}';
        credits := '{}';
        ends := '{}';
        bounds := '{}';
        included := '{}';
    END IF;

    SELECT * INTO schedule FROM public.credit_schedules WHERE team_id = of_team;
    IF FOUND THEN
        -- What is overdue is granted today.
        schedule.next_on := greatest(schedule.next_on, public.period_start(schedule.every, current_date));
        next_day := schedule.next_on - current_date;
        longest := CASE schedule.every WHEN 'daily' THEN 1 WHEN 'weekly' THEN 7 ELSE 31 END;
        is_enough := schedule.credits_amount >= credits_per_day * longest;
        place := 1;
        credits := 0::double precision || credits;
        ends := never || ends;
        bounds := never || bounds;
        included := true || included;
        IF schedule.rollover IS NOT NULL THEN
            SELECT 1 + array_position(grant_ids, transaction_id) INTO rolling
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
            lasting := 0;
            FOR number IN 1 .. cardinality(credits) LOOP
                IF ends[number] <= day THEN
                    IF number = rolling THEN
                        rest := credits[number];
                    END IF;
                    credits[number] := 0;
                ELSIF ends[number] < never THEN
                    next_end := least(next_end, ends[number]);
                ELSIF number <> place OR schedule.mode <> 'reset' THEN
                    lasting := lasting + credits[number];
                END IF;
                total := total + credits[number];
            END LOOP;
            IF lasting + overdraft - owed > credits_per_day * (last_day - day) THEN
                RETURN;
            END IF;
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
            used := least(granted, owed); -- it pays first what is owed
            owed := owed - used;
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
            credits[place] := credits[place] + granted - used;
            total := total + granted - used;
            IF is_enough AND (schedule.mode = 'reset' OR next_end = never) THEN
                RETURN;
            END IF;
            -- Where what is scheduled is used first, and up, each period takes as much of the others, as long as they
            -- last and do not end: so many periods go at once, for there are many days in a year.
            IF schedule.every <> 'monthly' AND next_day - day = longest AND NOT is_enough
                AND granted = schedule.credits_amount AND first = place AND owed = 0
            THEN
                shortage := credits_per_day * longest - granted;
                periods := floor(
                    least(
                        (total - granted) / shortage,
                        -- Its own end must not reach that of another, which would then be used before.
                        (least(next_end, last_day) - day) / longest - 1 - tolerance
                    )
                );
                IF periods > 0 THEN
                    schedule.next_on := schedule.next_on + periods * longest;
                    next_day := next_day + periods * longest;
                    day := day + periods * longest;
                    total := total - periods * shortage;
                    used := least(periods * shortage, credits[place] - granted);
                    credits[place] := credits[place] - used;
                    used := periods * shortage - used;
                    FOR number IN place + 1 .. cardinality(credits) LOOP
                        granted := least(used, credits[number]);
                        credits[number] := credits[number] - granted;
                        used := used - granted;
                    END LOOP;
                END IF;
            END IF;
        END IF;

        following := least(next_day, next_end, last_day);
        IF total + overdraft - owed <= tolerance
            OR total + overdraft - owed < credits_per_day * (following - day - tolerance)
        THEN
            days_left := floor(day + greatest(total + overdraft - owed, 0) / greatest(credits_per_day, tolerance) + tolerance);
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
