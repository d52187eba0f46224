-- Who changed what: every change of an organization, a team, a group or an assignment, written by the database in the
-- transaction of the change, whatever client makes it.
--
-- A client says who it acts for by the settings saasllm.actor and saasllm.command; else it is the role of its session.
-- Nothing refers to the tables, for a record outlives what it tells of.

CREATE TABLE audit_log (
    audit_id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at      timestamptz NOT NULL DEFAULT now(),
    actor           text        NOT NULL
        DEFAULT coalesce(nullif(current_setting('saasllm.actor', true), ''), session_user),
    command         text        DEFAULT nullif(current_setting('saasllm.command', true), ''),
    noun            text        NOT NULL,
    action          text        NOT NULL,
    organization_id text,
    team_id         text,
    group_name      text,
    before          jsonb,
    after           jsonb,
    CONSTRAINT audit_log_noun CHECK (noun IN ('organization', 'team', 'group', 'assignment')),
    CONSTRAINT audit_log_action CHECK (
        CASE action
            WHEN 'create' THEN before IS NULL AND after IS NOT NULL
            WHEN 'update' THEN before IS NOT NULL AND after IS NOT NULL
            WHEN 'delete' THEN before IS NOT NULL AND after IS NULL
            ELSE false
        END
    )
);

CREATE INDEX audit_log_by_organization ON audit_log (organization_id, audit_id);
CREATE INDEX audit_log_by_team ON audit_log (team_id, audit_id);
CREATE INDEX audit_log_by_group ON audit_log (group_name, audit_id);
CREATE INDEX audit_log_by_time ON audit_log (created_at);

CREATE FUNCTION refuse_audit_log_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'audit_log is append-only: % is refused', TG_OP USING ERRCODE = 'SL007';
END
$$;

CREATE TRIGGER audit_log_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_log_change();


-- Organizations, teams and assignments: row by row, what it was and what it is. The arguments are the noun and the
-- column by which a row is found again after an update; what has no such column has left and come.

CREATE FUNCTION audit_rows() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
        FROM (SELECT to_jsonb(old_rows) AS record FROM old_rows) o;
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


-- A group is one thing with its models, though they are rows of another table: what it is now is compared with what
-- the last record says, so that one statement that changes both, or replaces the models, writes one record.

CREATE FUNCTION audit_groups() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
        SELECT to_jsonb(d) - 'created_at' - 'updated_at' AS state
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
