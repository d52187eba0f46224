-- A purge removes a team, or an organization with all its teams, together with its history: jobs, calls and ledger.
--
-- It is one statement that deletes all of that and leaves one record in the audit log. The database admits no other
-- DELETE of jobs and ledger rows: their team must be gone when the statement ends, so that no part of a ledger can be
-- taken out of it, and the record must name it. With the same record, names and metadata leave the audit log.


-- The record is signed with its transaction, and written while there is something to purge: what is gone afterwards has
-- gone in this transaction.

CREATE FUNCTION sign_purge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    IF NOT EXISTS (
        SELECT
        FROM ONLY public.organizations o
        WHERE o.organization_id = NEW.organization_id
          AND (
              NEW.team_id IS NULL
              OR EXISTS (
                  SELECT
                  FROM ONLY public.teams t
                  WHERE t.team_id = NEW.team_id AND t.organization_id = NEW.organization_id
              )
          )
    ) THEN
        RAISE EXCEPTION 'there is no % % to purge', NEW.noun, coalesce(NEW.team_id, NEW.organization_id)
            USING ERRCODE = 'SL007';
    END IF;
    NEW.purged_by := pg_current_xact_id(); -- whatever a client has put there
    RETURN NEW;
END
$$;

CREATE TRIGGER audit_log_sign_purge BEFORE INSERT ON audit_log
    FOR EACH ROW WHEN (NEW.action = 'purge') EXECUTE FUNCTION sign_purge();

-- The records of this transaction, and whether what they name is gone. The signature alone does not say whose they are:
-- a restore brings it along, and in a cluster that is younger its number is still to come. So the row must also be no
-- older than the transaction: by the number that wrote it (a savepoint has one of its own, and a later one), and, as
-- those come round again, by its time.

CREATE VIEW purges_of_transaction AS
SELECT
    audit_id, organization_id, team_id, before,
    CASE
        WHEN team_id IS NULL THEN NOT EXISTS (
            SELECT FROM ONLY organizations o WHERE o.organization_id = p.organization_id
        )
        ELSE NOT EXISTS (SELECT FROM ONLY teams t WHERE t.team_id = p.team_id)
    END AS is_done
FROM ONLY audit_log p
WHERE action = 'purge'
  AND purged_by = pg_current_xact_id()
  AND age(xmin) <= 0
  AND created_at >= transaction_timestamp();


-- What is history leaves only in a purge.

CREATE FUNCTION require_purge() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
DECLARE
    kept text;
BEGIN
    SELECT min(gone.team_id::text) INTO kept
    FROM (SELECT DISTINCT team_id, organization_id FROM old_rows) gone
    WHERE EXISTS (SELECT FROM ONLY public.teams t WHERE t.team_id = gone.team_id)
       OR NOT EXISTS (
           SELECT
           FROM public.purges_of_transaction p
           WHERE p.is_done
             AND p.organization_id = gone.organization_id
             AND (p.team_id IS NULL OR p.team_id = gone.team_id)
       );

    IF kept IS NOT NULL THEN
        RAISE EXCEPTION '% holds the history of team %: DELETE is not allowed', TG_TABLE_NAME, kept
            USING ERRCODE = TG_ARGV[0], HINT = 'To delete the whole team, run: saasllm team delete TEAM --purge';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER credit_transactions_stay AFTER DELETE ON credit_transactions
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_purge('SL004');
CREATE TRIGGER jobs_stay AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_purge('SL003');


-- A team keeps its ids, for its history names them.

CREATE FUNCTION refuse_other_id() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the ID and the organization of team % cannot be changed', OLD.team_id
        USING ERRCODE = 'SL008', HINT = 'Create another team.';
END
$$;

CREATE TRIGGER teams_keep_id AFTER UPDATE ON teams
    FOR EACH ROW
    WHEN ((OLD.team_id, OLD.organization_id) IS DISTINCT FROM (NEW.team_id, NEW.organization_id))
    EXECUTE FUNCTION refuse_other_id();


-- What a purge may take out of the audit log: names, aliases, metadata and the URLs of webhooks. Who changed which record when, and by which
-- command, stays; of the command its noun and verb, for a name may be among the other words.

CREATE FUNCTION redacted_record(record jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN record - ARRAY['name', 'team_alias', 'metadata', 'url'];

CREATE FUNCTION redacted_command(command text) RETURNS text
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN coalesce(substring(command FROM '^saasllm(?: [a-z][a-z-]*){1,2}(?= |$)') || ' ', '') || '[redacted]';

CREATE FUNCTION require_redaction() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    IF EXISTS (
        SELECT
        FROM (SELECT *, to_jsonb(old_rows) AS record FROM old_rows) o
        FULL JOIN (SELECT audit_id, to_jsonb(new_rows) AS record FROM new_rows) n USING (audit_id)
        WHERE n.record IS DISTINCT FROM o.record || jsonb_build_object(
                'command', public.redacted_command(o.command),
                'before', public.redacted_record(o.before),
                'after', public.redacted_record(o.after)
            )
           OR o.record ->> 'action' = 'purge'
           OR NOT EXISTS (
               SELECT
               FROM public.purges_of_transaction p
               WHERE p.before ? 'audit_records' -- it says that it has redacted some
                 AND p.is_done
                 AND p.organization_id = o.organization_id
                 AND (p.team_id IS NULL OR p.team_id = o.team_id)
           )
    ) THEN
        RAISE EXCEPTION 'audit_log is append-only: UPDATE is not allowed'
            USING ERRCODE = 'SL007',
                  HINT = 'To redact it, delete the tenant: saasllm team delete TEAM --purge --redact';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER audit_log_redact AFTER UPDATE ON audit_log
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION require_redaction();
