-- Credits that come by themselves: a schedule says what a team is granted for each day, ISO week or month, in UTC.

ALTER TABLE credit_transactions
    ADD COLUMN period text, -- what it was granted for: 2026-11-22, 2026-W47 or 2026-11
    ADD CONSTRAINT credit_transactions_period CHECK (period IS NULL OR transaction_type IN ('allocation', 'expiry'));

-- A period is granted at most once; what expires as it begins is an entry of its own.
CREATE UNIQUE INDEX credit_transactions_once_a_period ON credit_transactions (team_id, period, transaction_type)
    WHERE period IS NOT NULL;

CREATE TABLE credit_schedules (
    team_id        identifier  PRIMARY KEY REFERENCES teams ON DELETE CASCADE,
    credits_amount bigint      NOT NULL,
    every          text        NOT NULL,
    mode           text        NOT NULL,
    credits_max    bigint,
    next_on        date        NOT NULL, -- the first day of the first period that was not granted yet
    created_at     timestamptz NOT NULL DEFAULT now(),
    updated_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT credit_schedules_amount CHECK (credits_amount BETWEEN 1 AND 1000000000000000),
    CONSTRAINT credit_schedules_every CHECK (every IN ('daily', 'weekly', 'monthly')),
    CONSTRAINT credit_schedules_mode CHECK (mode IN ('add', 'reset', 'top-up')),
    CONSTRAINT credit_schedules_max CHECK (credits_max IS NULL OR (mode = 'add' AND credits_max >= credits_amount)),
    CONSTRAINT credit_schedules_next_on CHECK (
        CASE every
            WHEN 'weekly' THEN EXTRACT(isodow FROM next_on) = 1
            WHEN 'monthly' THEN EXTRACT(day FROM next_on) = 1
            ELSE true
        END
    )
) WITH (fillfactor = 50); -- each allocation updates next_on: room on the page keeps that off the index

-- The first day of the period of a day, of the one that is some periods later, and its name.
CREATE FUNCTION period_start(every text, day date) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE every
    WHEN 'weekly' THEN date_trunc('week', day::timestamp)::date
    WHEN 'monthly' THEN date_trunc('month', day::timestamp)::date
    ELSE day
END;

CREATE FUNCTION period_after(every text, first_day date, periods integer) RETURNS date
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN CASE every
    WHEN 'weekly' THEN first_day + 7 * periods
    WHEN 'monthly' THEN (first_day + periods * interval '1 month')::date
    ELSE first_day + periods
END;

CREATE FUNCTION period_name(every text, first_day date) RETURNS text
LANGUAGE sql STABLE PARALLEL SAFE
RETURN CASE every
    WHEN 'weekly' THEN to_char(first_day, 'IYYY-"W"IW')
    WHEN 'monthly' THEN to_char(first_day, 'YYYY-MM')
    ELSE to_char(first_day, 'YYYY-MM-DD')
END;


-- What a schedule is, is audited; that it has moved on to its next period, the ledger tells.

ALTER TABLE audit_log
    DROP CONSTRAINT audit_log_noun,
    ADD CONSTRAINT audit_log_noun CHECK (noun IN ('organization', 'team', 'group', 'assignment', 'schedule'));

CREATE FUNCTION audit_schedule() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
    -- With its whole team it is told by the record of the purge, or by that of the team.
    IF TG_OP = 'DELETE' AND NOT EXISTS (SELECT FROM ONLY public.teams WHERE team_id = OLD.team_id) THEN
        RETURN NULL;
    END IF;
    INSERT INTO public.audit_log (noun, action, organization_id, team_id, before, after)
    SELECT
        'schedule',
        CASE TG_OP WHEN 'INSERT' THEN 'create' WHEN 'UPDATE' THEN 'update' ELSE 'delete' END,
        t.organization_id,
        t.team_id,
        CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END,
        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END
    FROM public.teams t
    WHERE t.team_id = coalesce(NEW.team_id, OLD.team_id);
    RETURN NULL;
END
$$;

CREATE TRIGGER credit_schedules_audit AFTER INSERT OR DELETE ON credit_schedules
    FOR EACH ROW EXECUTE FUNCTION audit_schedule();
CREATE TRIGGER credit_schedules_audit_update AFTER UPDATE ON credit_schedules
    FOR EACH ROW
    WHEN (
        (OLD.team_id, OLD.credits_amount, OLD.every, OLD.mode, OLD.credits_max)
        IS DISTINCT FROM (NEW.team_id, NEW.credits_amount, NEW.every, NEW.mode, NEW.credits_max)
    )
    EXECUTE FUNCTION audit_schedule();


-- A team is shown with its schedule. Its balance is looked up team by team (the OFFSET says so): joined by merging, a
-- page in the middle of a list would read all balances before it.
CREATE OR REPLACE VIEW team_details AS
SELECT
    t.team_id,
    t.organization_id,
    t.team_alias,
    t.status,
    ARRAY(
        SELECT a.group_name::text FROM team_model_groups a WHERE a.team_id = t.team_id ORDER BY a.group_name
    ) AS model_groups,
    c.credits_allocated,
    c.credits_used,
    c.credits_reserved,
    c.credits_remaining,
    t.metadata,
    t.created_at,
    t.updated_at,
    (
        SELECT json_build_object(
            'credits_amount', s.credits_amount, 'every', s.every, 'mode', s.mode, 'credits_max', s.credits_max,
            'next_on', s.next_on
        )
        FROM credit_schedules s
        WHERE s.team_id = t.team_id
    ) AS schedule
FROM teams t
CROSS JOIN LATERAL (
    SELECT credits_allocated, credits_used, credits_reserved, credits_remaining
    FROM team_credits
    WHERE team_id = t.team_id
    OFFSET 0
) c;
