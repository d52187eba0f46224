-- Who buys: organizations (customers) and their teams.

CREATE TABLE organizations (
    organization_id identifier      PRIMARY KEY,
    name            text            NOT NULL,
    status          text            NOT NULL DEFAULT 'active',
    metadata        metadata_object NOT NULL DEFAULT '{}',
    created_at      timestamptz     NOT NULL DEFAULT now(),
    updated_at      timestamptz     NOT NULL DEFAULT now(),
    CONSTRAINT organizations_name CHECK (name <> '' AND length(name) <= 255),
    CONSTRAINT organizations_status CHECK (status IN ('active', 'suspended'))
);

CREATE TABLE teams (
    team_id         identifier      PRIMARY KEY,
    organization_id identifier      NOT NULL REFERENCES organizations,
    team_alias      text            NOT NULL,
    status          text            NOT NULL DEFAULT 'active',
    metadata        metadata_object NOT NULL DEFAULT '{}',
    created_at      timestamptz     NOT NULL DEFAULT now(),
    updated_at      timestamptz     NOT NULL DEFAULT now(),
    CONSTRAINT teams_alias CHECK (team_alias <> '' AND length(team_alias) <= 255),
    CONSTRAINT teams_status CHECK (status IN ('active', 'suspended')),
    -- What belongs to a team refers to both, so that it can never name another organization than its team's.
    CONSTRAINT teams_organization UNIQUE (organization_id, team_id)
);

-- Lists are read page by page, each beginning behind the last row of the one before. Most records are active and have
-- no metadata: the indexes for the others hold only those, and cost little.
CREATE INDEX organizations_by_time ON organizations (created_at, organization_id);
CREATE INDEX organizations_not_active ON organizations (organization_id) WHERE status <> 'active';
CREATE INDEX organizations_metadata ON organizations USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}';
CREATE INDEX teams_by_time ON teams (created_at, team_id);
CREATE INDEX teams_not_active ON teams (team_id) WHERE status <> 'active';
CREATE INDEX teams_metadata ON teams USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}';
