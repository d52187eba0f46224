-- What is called: a group is a name for an ordered list of models, the primary (priority 0) and its fallbacks.

CREATE TABLE model_groups (
    group_name   identifier  PRIMARY KEY,
    display_name text        NOT NULL,
    description  text,
    status       text        NOT NULL DEFAULT 'active',
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT model_groups_display_name CHECK (display_name <> '' AND length(display_name) <= 255),
    CONSTRAINT model_groups_status CHECK (status IN ('active', 'inactive'))
);

CREATE TABLE model_group_models (
    group_name identifier NOT NULL REFERENCES model_groups ON DELETE CASCADE,
    model_name text       NOT NULL,
    priority   integer    NOT NULL,
    is_active  boolean    NOT NULL DEFAULT true,
    PRIMARY KEY (group_name, priority),
    CONSTRAINT model_group_models_once UNIQUE (group_name, model_name),
    CONSTRAINT model_group_models_name CHECK (model_name ~ '^[^\s[:cntrl:]]{1,255}$'),
    CONSTRAINT model_group_models_priority CHECK (priority >= 0)
);

CREATE INDEX model_groups_by_time ON model_groups (created_at, group_name);
