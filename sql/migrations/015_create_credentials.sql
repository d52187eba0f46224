-- Keys of model providers: an organization's or a team's own, and those of teams at a LiteLLM proxy.

-- Whether its jobs may use its own keys alone, and not those of the environment.
ALTER TABLE organizations ADD COLUMN own_keys_only boolean NOT NULL DEFAULT false;

-- Each is a version: another value is another credential. What belongs to nobody is the master key of the proxy.
CREATE TABLE credentials (
    credential_id   bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    organization_id identifier  REFERENCES organizations ON DELETE CASCADE,
    team_id         identifier  REFERENCES teams ON DELETE CASCADE,
    provider        identifier  NOT NULL, -- as litellm names it
    api_base        text, -- where not the provider's usual one
    last_four       text, -- of its value, where that is long enough not to be told by them
    created_at      timestamptz NOT NULL DEFAULT now(),
    removed_at      timestamptz,
    CONSTRAINT credentials_owner CHECK (
        CASE
            WHEN organization_id IS NULL THEN team_id IS NULL AND provider = 'litellm_proxy' AND api_base IS NULL
            ELSE true
        END
    ),
    CONSTRAINT credentials_api_base CHECK (
        api_base ~ '^https?://[^[:space:][:cntrl:]]+$' AND length(api_base) <= 2000
    ),
    CONSTRAINT credentials_last_four CHECK (length(last_four) = 4),
    CONSTRAINT credentials_time CHECK (removed_at >= '1970-01-01' AND removed_at < '9999-01-01')
);

CREATE UNIQUE INDEX credentials_once ON credentials (coalesce(organization_id, ''), coalesce(team_id, ''), provider)
    WHERE removed_at IS NULL;
CREATE INDEX credentials_by_organization ON credentials (organization_id);
CREATE INDEX credentials_by_team ON credentials (team_id);

-- Its value, encrypted by a key that the database does not have; gone when it is removed.
CREATE TABLE credential_secrets (
    credential_id bigint PRIMARY KEY REFERENCES credentials ON DELETE CASCADE,
    secret        text   NOT NULL
);

ALTER TABLE llm_calls
    ADD COLUMN credential_id bigint, -- with which it was made; none where with the environment's key
    ADD CONSTRAINT llm_calls_credential_id_fkey FOREIGN KEY (credential_id) REFERENCES credentials;
CREATE INDEX llm_calls_by_credential ON llm_calls (credential_id, created_at) WHERE credential_id IS NOT NULL;

-- A team's virtual keys at the proxy: the one that is used, and those before it until they expire.
CREATE TABLE proxy_keys (
    key_id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    team_id       identifier  NOT NULL REFERENCES teams ON DELETE CASCADE,
    credential_id bigint      NOT NULL REFERENCES credentials ON DELETE CASCADE,
    token         text        NOT NULL, -- by which the proxy knows it: the SHA-256 of its value
    is_blocked    boolean     NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz,
    CONSTRAINT proxy_keys_token CHECK (token ~ '^[0-9a-f]{64}$'),
    CONSTRAINT proxy_keys_time CHECK (expires_at >= '1970-01-01' AND expires_at < '9999-01-01')
);

CREATE UNIQUE INDEX proxy_keys_once ON proxy_keys (team_id) WHERE expires_at IS NULL;
CREATE UNIQUE INDEX proxy_keys_by_token ON proxy_keys (token);
CREATE INDEX proxy_keys_by_team ON proxy_keys (team_id);
CREATE INDEX proxy_keys_by_credential ON proxy_keys (credential_id);

-- By which the keys of this database are told from those of others at the same proxy.
CREATE TABLE installation (
    installation_id uuid    NOT NULL DEFAULT gen_random_uuid(),
    is_only         boolean PRIMARY KEY DEFAULT true,
    CONSTRAINT installation_is_only CHECK (is_only)
);

INSERT INTO installation DEFAULT VALUES;

INSERT INTO duties (duty) VALUES ('keys');

ALTER TABLE audit_log
    DROP CONSTRAINT audit_log_noun,
    ADD CONSTRAINT audit_log_noun CHECK (
        noun IN (
            'organization', 'team', 'group', 'assignment', 'schedule', 'model', 'price', 'limit', 'webhook',
            'credential', 'key'
        )
    );
