-- A purge removes a team, or an organization with all its teams, together with its history: jobs, calls and ledger.
--
-- It is one statement that deletes all of that and leaves one record in the audit log. The database admits no other
-- DELETE of jobs and ledger rows: their team must be gone when the statement ends, so that no part of a ledger can be
-- taken out of it, and the record must name it.

ALTER TABLE audit_log
    ADD COLUMN purged_by xid8, -- the transaction
    ADD CONSTRAINT audit_log_purge CHECK (
        (action = 'purge') = (purged_by IS NOT NULL)
        AND (
            action <> 'purge'
            OR (noun = 'team' AND team_id IS NOT NULL AND organization_id IS NOT NULL)
            OR (noun = 'organization' AND team_id IS NULL AND organization_id IS NOT NULL)
        )
    ),
    DROP CONSTRAINT audit_log_action,
    ADD CONSTRAINT audit_log_action CHECK (
        CASE action
            WHEN 'create' THEN before IS NULL AND after IS NOT NULL
            WHEN 'update' THEN before IS NOT NULL AND after IS NOT NULL
            WHEN 'delete' THEN before IS NOT NULL AND after IS NULL
            WHEN 'purge' THEN before IS NOT NULL AND after IS NULL
            ELSE false
        END
    );

CREATE INDEX audit_log_purges ON audit_log (purged_by) WHERE action = 'purge';

CREATE FUNCTION sign_purge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.purged_by := pg_current_xact_id(); -- whatever a client has put there
    RETURN NEW;
END
$$;

CREATE TRIGGER audit_log_sign_purge BEFORE INSERT ON audit_log
    FOR EACH ROW WHEN (NEW.action = 'purge') EXECUTE FUNCTION sign_purge();

CREATE FUNCTION require_purge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kept text;
BEGIN
    SELECT min(gone.team_id::text) INTO kept
    FROM (SELECT DISTINCT team_id, organization_id FROM old_rows) gone
    WHERE EXISTS (SELECT FROM ONLY public.teams t WHERE t.team_id = gone.team_id)
       OR NOT EXISTS (
           SELECT
           FROM ONLY public.audit_log p
           WHERE p.action = 'purge'
             AND p.purged_by = pg_current_xact_id()
             AND p.organization_id = gone.organization_id
             AND (
                 p.team_id = gone.team_id
                 OR (
                     p.team_id IS NULL
                     AND NOT EXISTS (
                         SELECT FROM ONLY public.organizations o WHERE o.organization_id = gone.organization_id
                     )
                 )
             )
       );

    IF kept IS NOT NULL THEN
        RAISE EXCEPTION '% is the history of team %: DELETE is refused', TG_TABLE_NAME, kept
            USING ERRCODE = TG_ARGV[0], HINT = 'It leaves only with its whole team: saasllm team delete --purge.';
    END IF;
    RETURN NULL;
END
$$;

DROP TRIGGER credit_transactions_append_only ON credit_transactions;
CREATE TRIGGER credit_transactions_append_only BEFORE UPDATE OR TRUNCATE ON credit_transactions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_ledger_change();
CREATE TRIGGER credit_transactions_stay AFTER DELETE ON credit_transactions
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_purge('SL004');

DROP TRIGGER jobs_stay ON jobs;
CREATE TRIGGER jobs_stay AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_purge('SL003');


-- A team keeps its ids, and its history does not pass to another of the same id: else a statement could take the team
-- away, have a function remove a part of the history, and put the team back before anybody has looked.

CREATE FUNCTION refuse_other_id() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'team % keeps its id and its organization', OLD.team_id
        USING ERRCODE = 'SL008', HINT = 'Create another team.';
END
$$;

CREATE TRIGGER teams_keep_id BEFORE UPDATE ON teams
    FOR EACH ROW
    WHEN ((OLD.team_id, OLD.organization_id) IS DISTINCT FROM (NEW.team_id, NEW.organization_id))
    EXECUTE FUNCTION refuse_other_id();

CREATE FUNCTION require_no_history() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF (
        EXISTS (SELECT FROM ONLY public.credit_transactions WHERE team_id = NEW.team_id)
        OR EXISTS (SELECT FROM ONLY public.jobs WHERE team_id = NEW.team_id)
    )
        -- That there is such a team is for the primary key to say.
        AND NOT EXISTS (SELECT FROM ONLY public.teams WHERE team_id = NEW.team_id)
    THEN
        RAISE EXCEPTION 'there is history of another team %', NEW.team_id
            USING ERRCODE = 'SL008', HINT = 'Purge that team as a whole, or choose another id.';
    END IF;
    RETURN NEW;
END
$$;

-- Before each row: at the end of the statement a new team may have its opening credits already.
CREATE TRIGGER teams_begin_without_history BEFORE INSERT ON teams
    FOR EACH ROW EXECUTE FUNCTION require_no_history();


-- What a purge removes is told by its one record. And the times in all records are in UTC, whatever the session's zone.

CREATE OR REPLACE FUNCTION audit_rows() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    key constant text := TG_ARGV[1];
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO public.audit_log (noun, action, organization_id, team_id, group_name, after)
        SELECT
            TG_ARGV[0], 'create',
            coalesce(
                n.record ->> 'organization_id',
                (SELECT t.organization_id FROM public.teams t WHERE t.team_id = n.record ->> 'team_id')
            ),
            n.record ->> 'team_id', n.record ->> 'group_name', n.record
        FROM (SELECT to_jsonb(new_rows) AS record FROM new_rows) n;
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO public.audit_log (noun, action, organization_id, team_id, group_name, before)
        SELECT
            TG_ARGV[0], 'delete',
            coalesce(
                o.record ->> 'organization_id',
                (SELECT t.organization_id FROM public.teams t WHERE t.team_id = o.record ->> 'team_id'),
                -- Where the team is going with it, its last record knows.
                (
                    SELECT l.organization_id
                    FROM public.audit_log l
                    WHERE l.noun = 'team' AND l.team_id = o.record ->> 'team_id'
                    ORDER BY l.audit_id DESC
                    LIMIT 1
                )
            ),
            o.record ->> 'team_id', o.record ->> 'group_name', o.record
        FROM (SELECT to_jsonb(old_rows) AS record FROM old_rows) o
        WHERE NOT EXISTS (
            SELECT
            FROM public.audit_log p
            WHERE p.action = 'purge'
              AND p.purged_by = pg_current_xact_id()
              AND (
                  p.team_id = o.record ->> 'team_id'
                  OR (p.team_id IS NULL AND p.organization_id = o.record ->> 'organization_id')
                  -- An assignment does not know its organization: it is gone with its team.
                  OR (
                      p.team_id IS NULL
                      AND TG_ARGV[0] = 'assignment'
                      AND NOT EXISTS (SELECT FROM public.teams t WHERE t.team_id = o.record ->> 'team_id')
                  )
              )
        );
    ELSE
        INSERT INTO public.audit_log (noun, action, organization_id, team_id, group_name, before, after)
        SELECT
            TG_ARGV[0],
            CASE WHEN o.record IS NULL THEN 'create' WHEN n.record IS NULL THEN 'delete' ELSE 'update' END,
            coalesce(n.record, o.record) ->> 'organization_id',
            coalesce(n.record, o.record) ->> 'team_id',
            coalesce(n.record, o.record) ->> 'group_name',
            o.record,
            n.record
        FROM (SELECT to_jsonb(old_rows) AS record FROM old_rows) o
        FULL JOIN (SELECT to_jsonb(new_rows) AS record FROM new_rows) n ON o.record ->> key = n.record ->> key
        -- An update that changes nothing but its own time is none.
        WHERE o.record - 'updated_at' IS DISTINCT FROM n.record - 'updated_at';
    END IF;
    RETURN NULL;
END
$$;

ALTER FUNCTION audit_groups() SET timezone = 'UTC';
