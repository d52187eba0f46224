-- What `--search` is answered from. The functions stand here and not among the definitions: the indexes hold what they
-- have computed, so that a change of one of them is a further migration, which builds the indexes anew.

-- Text is searched by its words, which begin after any space or ASCII punctuation: team_engineering has two.
CREATE FUNCTION search_words(words text) RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN array_remove(
    string_to_array(lower(translate(words, E' \t\n\r!"#$%&''()*+,-./:;<=>?@[\\]^_`{|}~', repeat(' ', 36))), ' '), ''
);

CREATE FUNCTION search_vector(id text, name text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN array_to_tsvector(search_words(id || ' ' || name));

CREATE INDEX organizations_search ON organizations USING gin (search_vector(organization_id, name));
CREATE INDEX teams_search ON teams USING gin (search_vector(team_id, team_alias));
CREATE INDEX model_groups_search ON model_groups USING gin (search_vector(group_name, display_name));
