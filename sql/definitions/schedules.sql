-- The periods of schedules: days, ISO weeks and months, in UTC.

-- The first day of the period in which a day lies.
CREATE FUNCTION period_start(every text, day date) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE every
    WHEN 'weekly' THEN date_trunc('week', day::timestamp)::date
    WHEN 'monthly' THEN date_trunc('month', day::timestamp)::date
    ELSE day
END;

-- The first day of the period that is so many later.
CREATE FUNCTION period_after(every text, first_day date, periods integer) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE every
    WHEN 'weekly' THEN first_day + 7 * periods
    WHEN 'monthly' THEN (first_day + periods * interval '1 month')::date
    ELSE first_day + periods
END;

-- The name of a period: 2026-11-22, 2026-W47 or 2026-11.
CREATE FUNCTION period_name(every text, first_day date) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE every
    WHEN 'weekly' THEN to_char(first_day, 'IYYY-"W"IW')
    WHEN 'monthly' THEN to_char(first_day, 'YYYY-MM')
    ELSE to_char(first_day, 'YYYY-MM-DD')
END;
