-- Who changed what. What writes it: sql/definitions/audit.sql.
--
-- A client says who it acts for by the settings saasllm.actor and saasllm.command; else it is the role of its session.
-- It may say what it likes: the role with which it has logged in stands beside it.
-- Nothing refers to the tables, for a record outlives what it tells of.

CREATE TABLE audit_log (
    audit_id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    created_at      timestamptz NOT NULL DEFAULT now(),
    actor           text        NOT NULL
        DEFAULT coalesce(nullif(current_setting('saasllm.actor', true), ''), session_user),
    role            text        NOT NULL DEFAULT session_user,
    command         text        DEFAULT nullif(current_setting('saasllm.command', true), ''),
    noun            text        NOT NULL,
    action          text        NOT NULL,
    organization_id text,
    team_id         text,
    group_name      text,
    before          jsonb,
    after           jsonb,
    purged_by       xid8, -- the transaction of a purge
    CONSTRAINT audit_log_noun CHECK (
        noun IN ('organization', 'team', 'group', 'assignment', 'schedule', 'model', 'price', 'limit')
    ),
    CONSTRAINT audit_log_action CHECK (
        CASE action
            WHEN 'create' THEN before IS NULL AND after IS NOT NULL
            WHEN 'update' THEN before IS NOT NULL AND after IS NOT NULL
            WHEN 'delete' THEN before IS NOT NULL AND after IS NULL
            WHEN 'purge' THEN before IS NOT NULL AND after IS NULL
            ELSE false
        END
    ),
    CONSTRAINT audit_log_purge CHECK (
        (action = 'purge') = (purged_by IS NOT NULL)
        AND (
            action <> 'purge'
            OR (noun = 'team' AND team_id IS NOT NULL AND organization_id IS NOT NULL)
            OR (noun = 'organization' AND team_id IS NULL AND organization_id IS NOT NULL)
        )
    )
);

CREATE INDEX audit_log_by_organization ON audit_log (organization_id, audit_id);
CREATE INDEX audit_log_by_team ON audit_log (team_id, audit_id);
CREATE INDEX audit_log_by_group ON audit_log (group_name, audit_id);
CREATE INDEX audit_log_by_time ON audit_log (created_at);
CREATE INDEX audit_log_purges ON audit_log (purged_by) WHERE action = 'purge';
