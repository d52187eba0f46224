-- Who changed what: every change of an organization, a team, a group, an assignment, a schedule, a price, a limit, a
-- webhook, a credential or a key, written by the database in the transaction of the change, whatever client makes it.
-- Times in the records are in UTC, whatever the session's zone.


-- The audit log is append-only. (A purge may redact what it keeps of its tenant: purge.sql.)

CREATE FUNCTION refuse_audit_log_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'audit_log is append-only: % is not allowed', TG_OP USING ERRCODE = 'SL007';
END
$$;

CREATE TRIGGER audit_log_append_only BEFORE DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_log_change();
-- As with the ledger, nothing comes through a parent table, for which triggers of statements would not fire.
CREATE TRIGGER audit_log_has_no_parent AFTER DELETE ON audit_log
    REFERENCING OLD TABLE AS old_rows
    FOR EACH ROW WHEN (false) EXECUTE FUNCTION refuse_audit_log_change();


-- Its times are the database's, whoever writes.

CREATE FUNCTION refuse_other_time() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'a record must be dated by the clock of the database'
        USING ERRCODE = 'SL007', HINT = 'Leave out created_at.';
END
$$;

CREATE TRIGGER audit_log_is_dated AFTER INSERT ON audit_log
    FOR EACH ROW WHEN (NEW.created_at NOT BETWEEN transaction_timestamp() AND clock_timestamp())
    EXECUTE FUNCTION refuse_other_time();


-- Organizations, teams, assignments, prices and limits: row by row, what it was and what it is. The arguments are the
-- noun and the column by which a row is found again after an update; without one, an update is a delete and a create.
-- What is marked as removed is deleted by that.
-- What a purge removes is told by its one record: what is gone with the team or the organization that it names, unless
-- it was made after that record.

CREATE FUNCTION audit_rows() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET timezone = 'UTC' AS $$
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
        SELECT TG_ARGV[0], 'delete', organization_id, team_id, group_name, record
        FROM (
            SELECT
                coalesce(
                    record ->> 'organization_id',
                    (SELECT t.organization_id FROM public.teams t WHERE t.team_id = record ->> 'team_id'),
                    -- Where the team is going with it, its last record knows.
                    (
                        SELECT l.organization_id
                        FROM public.audit_log l
                        WHERE l.noun = 'team' AND l.team_id = record ->> 'team_id'
                        ORDER BY l.audit_id DESC
                        LIMIT 1
                    )
                ) AS organization_id,
                record ->> 'team_id' AS team_id,
                record ->> 'group_name' AS group_name,
                record
            FROM (SELECT to_jsonb(old_rows) AS record FROM old_rows) o
        ) gone
        WHERE record ->> 'removed_at' IS NULL
          AND NOT EXISTS (
            SELECT
            FROM public.purges_of_transaction p
            WHERE p.is_done
              AND p.organization_id = gone.organization_id
              AND (p.team_id IS NULL OR p.team_id = gone.team_id)
              AND NOT EXISTS (
                  SELECT
                  FROM public.audit_log l
                  WHERE l.organization_id = gone.organization_id
                    AND l.audit_id > p.audit_id
                    AND (l.noun, l.action) = (TG_ARGV[0], 'create')
                    AND (l.team_id, l.group_name) IS NOT DISTINCT FROM (gone.team_id, gone.group_name)
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
        FULL JOIN (
            SELECT record
            FROM (SELECT to_jsonb(new_rows) AS record FROM new_rows) AS changed
            WHERE record ->> 'removed_at' IS NULL
        ) n ON o.record ->> key = n.record ->> key
        -- An update that changes nothing but its own time is none.
        WHERE o.record - 'updated_at' IS DISTINCT FROM n.record - 'updated_at';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER organizations_audit_create AFTER INSERT ON organizations
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('organization', 'organization_id');
CREATE TRIGGER organizations_audit_update AFTER UPDATE ON organizations
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('organization', 'organization_id');
CREATE TRIGGER organizations_audit_delete AFTER DELETE ON organizations
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('organization', 'organization_id');

CREATE TRIGGER teams_audit_create AFTER INSERT ON teams
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('team', 'team_id');
CREATE TRIGGER teams_audit_update AFTER UPDATE ON teams
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('team', 'team_id');
CREATE TRIGGER teams_audit_delete AFTER DELETE ON teams
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('team', 'team_id');

CREATE TRIGGER team_model_groups_audit_create AFTER INSERT ON team_model_groups
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('assignment');
CREATE TRIGGER team_model_groups_audit_update AFTER UPDATE ON team_model_groups
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('assignment');
CREATE TRIGGER team_model_groups_audit_delete AFTER DELETE ON team_model_groups
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('assignment');

CREATE TRIGGER model_prices_audit_create AFTER INSERT ON model_prices
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('model', 'model_name');
CREATE TRIGGER model_prices_audit_update AFTER UPDATE ON model_prices
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('model', 'model_name');
CREATE TRIGGER model_prices_audit_delete AFTER DELETE ON model_prices
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('model', 'model_name');

CREATE TRIGGER job_prices_audit_create AFTER INSERT ON job_prices
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('price', 'price_id');
CREATE TRIGGER job_prices_audit_update AFTER UPDATE ON job_prices
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('price', 'price_id');
CREATE TRIGGER job_prices_audit_delete AFTER DELETE ON job_prices
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('price', 'price_id');

CREATE TRIGGER limits_audit_create AFTER INSERT ON limits
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('limit', 'limit_id');
CREATE TRIGGER limits_audit_update AFTER UPDATE ON limits
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('limit', 'limit_id');
CREATE TRIGGER limits_audit_delete AFTER DELETE ON limits
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('limit', 'limit_id');

CREATE TRIGGER webhooks_audit_create AFTER INSERT ON webhooks
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('webhook', 'webhook_id');
CREATE TRIGGER webhooks_audit_update AFTER UPDATE ON webhooks
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('webhook', 'webhook_id');
CREATE TRIGGER webhooks_audit_delete AFTER DELETE ON webhooks
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('webhook', 'webhook_id');

CREATE TRIGGER credentials_audit_create AFTER INSERT ON credentials
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('credential', 'credential_id');
CREATE TRIGGER credentials_audit_update AFTER UPDATE ON credentials
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('credential', 'credential_id');
CREATE TRIGGER credentials_audit_delete AFTER DELETE ON credentials
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('credential', 'credential_id');

CREATE TRIGGER proxy_keys_audit_create AFTER INSERT ON proxy_keys
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('key', 'key_id');
CREATE TRIGGER proxy_keys_audit_update AFTER UPDATE ON proxy_keys
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('key', 'key_id');
CREATE TRIGGER proxy_keys_audit_delete AFTER DELETE ON proxy_keys
    REFERENCING OLD TABLE AS old_rows
    FOR EACH STATEMENT EXECUTE FUNCTION audit_rows('key', 'key_id');


-- A group is one thing with its models, though they are rows of another table: what it is now is compared with what
-- the last record says, so that one statement that changes both, or replaces the models, writes one record.

CREATE FUNCTION audit_groups() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET timezone = 'UTC' AS $$
DECLARE
    changed text[];
BEGIN
    IF TG_OP = 'INSERT' THEN
        changed := ARRAY(SELECT DISTINCT group_name::text FROM new_rows);
    ELSIF TG_OP = 'DELETE' THEN
        changed := ARRAY(SELECT DISTINCT group_name::text FROM old_rows);
    ELSE
        changed := ARRAY(SELECT group_name::text FROM old_rows UNION SELECT group_name::text FROM new_rows);
    END IF;

    INSERT INTO public.audit_log (noun, action, group_name, before, after)
    SELECT
        'group',
        CASE WHEN last.state IS NULL THEN 'create' WHEN now_is.state IS NULL THEN 'delete' ELSE 'update' END,
        changed_group.group_name,
        last.state,
        now_is.state
    FROM unnest(changed) AS changed_group (group_name)
    LEFT JOIN LATERAL (
        SELECT l.after AS state
        FROM public.audit_log l
        WHERE l.noun = 'group' AND l.group_name = changed_group.group_name
        ORDER BY l.audit_id DESC
        LIMIT 1
    ) last ON true
    LEFT JOIN LATERAL (
        SELECT to_jsonb(d) - 'price' - 'created_at' - 'updated_at' AS state
        FROM public.model_group_details d
        WHERE d.group_name = changed_group.group_name
    ) now_is ON true
    WHERE last.state IS DISTINCT FROM now_is.state;
    RETURN NULL;
END
$$;

CREATE TRIGGER model_groups_audit_create AFTER INSERT ON model_groups
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION audit_groups();
CREATE TRIGGER model_groups_audit_update AFTER UPDATE ON model_groups
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION audit_groups();
CREATE TRIGGER model_groups_audit_delete AFTER DELETE ON model_groups
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION audit_groups();
CREATE TRIGGER model_group_models_audit_create AFTER INSERT ON model_group_models
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION audit_groups();
CREATE TRIGGER model_group_models_audit_update AFTER UPDATE ON model_group_models
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION audit_groups();
CREATE TRIGGER model_group_models_audit_delete AFTER DELETE ON model_group_models
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION audit_groups();


-- How far a team may go below zero, and when its credits are low, stands with its balance, and belongs to the team.

CREATE FUNCTION audit_balance() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    INSERT INTO public.audit_log (noun, action, organization_id, team_id, before, after)
    SELECT 'team', 'update', t.organization_id, t.team_id, changed.before, changed.after
    FROM public.teams t
    CROSS JOIN (
        SELECT jsonb_object_agg(name, was) AS before, jsonb_object_agg(name, is_now) AS after
        FROM (
            VALUES
                ('credits_overdraft', to_jsonb(OLD.credits_overdraft), to_jsonb(NEW.credits_overdraft)),
                ('low_credits', to_jsonb(OLD.low_credits), to_jsonb(NEW.low_credits))
        ) AS field (name, was, is_now)
        WHERE was IS DISTINCT FROM is_now
    ) AS changed
    WHERE t.team_id = NEW.team_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER team_credits_audit AFTER UPDATE OF credits_overdraft, low_credits ON team_credits
    FOR EACH ROW
    WHEN (OLD.credits_overdraft IS DISTINCT FROM NEW.credits_overdraft OR OLD.low_credits <> NEW.low_credits)
    EXECUTE FUNCTION audit_balance();


-- What a schedule is, is audited; that it has moved on to its next period, the ledger tells.

CREATE FUNCTION audit_schedule() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off SET timezone = 'UTC' AS $$
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


-- A TRUNCATE has no rows to tell of. (Organizations and teams have none without the ledger, which refuses it.)

CREATE FUNCTION refuse_truncate() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% is audited row by row: TRUNCATE is not allowed', TG_TABLE_NAME
        USING ERRCODE = 'SL007', HINT = 'Delete the rows.';
END
$$;

CREATE TRIGGER team_model_groups_no_truncate BEFORE TRUNCATE ON team_model_groups
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER model_group_models_no_truncate BEFORE TRUNCATE ON model_group_models
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER model_prices_no_truncate BEFORE TRUNCATE ON model_prices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER job_prices_no_truncate BEFORE TRUNCATE ON job_prices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER limits_no_truncate BEFORE TRUNCATE ON limits
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER webhooks_no_truncate BEFORE TRUNCATE ON webhooks
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER credentials_no_truncate BEFORE TRUNCATE ON credentials
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER proxy_keys_no_truncate BEFORE TRUNCATE ON proxy_keys
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
CREATE TRIGGER credit_schedules_no_truncate BEFORE TRUNCATE ON credit_schedules
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_truncate();
