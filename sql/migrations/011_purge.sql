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
             AND (p.team_id IS NULL OR p.team_id = gone.team_id)
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
