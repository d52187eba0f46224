-- Which team may use which group.

CREATE TABLE team_model_groups (
    team_id     identifier  NOT NULL REFERENCES teams ON DELETE CASCADE,
    group_name  identifier  NOT NULL REFERENCES model_groups,
    assigned_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (team_id, group_name)
);

CREATE INDEX team_model_groups_by_group ON team_model_groups (group_name);
