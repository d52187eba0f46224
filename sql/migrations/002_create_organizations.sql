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
