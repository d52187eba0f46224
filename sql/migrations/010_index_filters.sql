-- What lists are filtered and sorted by, so that a page is found without reading the whole table.

-- Text is searched by its words, which begin after any space or ASCII punctuation: team_engineering has two.
CREATE FUNCTION search_words(words text) RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN array_remove(
    string_to_array(lower(translate(words, E' \t\n\r!"#$%&''()*+,-./:;<=>?@[\\]^_`{|}~', repeat(' ', 36))), ' '), ''
);

CREATE FUNCTION search_vector(id text, name text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN array_to_tsvector(search_words(id || ' ' || name));

-- Each word of the query begins a word of what is found.
CREATE FUNCTION search_query(words text) RETURNS tsquery
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (SELECT string_agg(quote_literal(word) || ':*', ' & ')::tsquery FROM unnest(search_words(words)) AS word);

CREATE INDEX organizations_search ON organizations USING gin (search_vector(organization_id, name));
CREATE INDEX teams_search ON teams USING gin (search_vector(team_id, team_alias));
CREATE INDEX model_groups_search ON model_groups USING gin (search_vector(group_name, display_name));

CREATE INDEX organizations_by_time ON organizations (created_at, organization_id);
CREATE INDEX teams_by_time ON teams (created_at, team_id);
CREATE INDEX model_groups_by_time ON model_groups (created_at, group_name);

-- Most records are active, have succeeded, are of the usual type and have no metadata: these indexes hold only the
-- others, and cost little.
CREATE INDEX organizations_not_active ON organizations (organization_id) WHERE status <> 'active';
CREATE INDEX teams_not_active ON teams (team_id) WHERE status <> 'active';
CREATE INDEX organizations_metadata ON organizations USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}';
CREATE INDEX teams_metadata ON teams USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}';
CREATE INDEX jobs_metadata ON jobs USING gin (metadata jsonb_path_ops) WHERE metadata <> '{}';
CREATE INDEX jobs_not_completed ON jobs (status, created_at, job_id) WHERE status IN ('failed', 'cancelled');
CREATE INDEX jobs_by_type ON jobs (job_type, created_at, job_id) WHERE job_type <> 'completion';

-- What a team was charged and has called in a period.
CREATE INDEX credit_transactions_by_time ON credit_transactions (team_id, created_at);
CREATE INDEX llm_calls_by_team ON llm_calls (team_id, created_at);
