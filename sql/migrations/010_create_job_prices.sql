-- What jobs cost: prices in versions. What keeps them as they are: sql/definitions/charges.sql.

-- A rate: credits per dollar, per thousand tokens, or a markup in percent. 'NaN' is greater than every number, so a
-- lower bound alone would let it in.
CREATE DOMAIN price_rate AS numeric
    CONSTRAINT price_rate_range CHECK (VALUE >= 0 AND VALUE <= 1000000000)
    CONSTRAINT price_rate_decimals CHECK (VALUE = round(VALUE, 9));

-- A price is for everywhere, an organization or a team, and there for every job, a job type or a group. A job pays
-- `credits`, what its answers cost us by `credits_per_usd` with the markup on it, and its tokens by the thousand,
-- rounded up once, and between minimum and maximum. `hold` is what it reserves at its beginning.
CREATE TABLE job_prices (
    price_id                           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    organization_id                    identifier  REFERENCES organizations ON DELETE CASCADE,
    team_id                            identifier  REFERENCES teams ON DELETE CASCADE,
    group_name                         identifier, -- the name: a price outlives a group that is deleted, closed
    job_type                           text,
    credits                            bigint      NOT NULL DEFAULT 0,
    credits_per_usd                    price_rate  NOT NULL DEFAULT 0,
    markup_percent                     price_rate  NOT NULL DEFAULT 0,
    credits_per_1000_prompt_tokens     price_rate  NOT NULL DEFAULT 0,
    credits_per_1000_completion_tokens price_rate  NOT NULL DEFAULT 0,
    minimum                            bigint      NOT NULL DEFAULT 0,
    maximum                            bigint,
    hold                               bigint      NOT NULL,
    created_at                         timestamptz NOT NULL DEFAULT now(),
    closed_at                          timestamptz, -- by another version, or because it was removed
    CONSTRAINT job_prices_where CHECK (num_nonnulls(organization_id, team_id) <= 1),
    CONSTRAINT job_prices_what CHECK (num_nonnulls(group_name, job_type) <= 1),
    CONSTRAINT job_prices_job_type CHECK (job_type <> '' AND length(job_type) <= 255),
    CONSTRAINT job_prices_credits CHECK (credits BETWEEN 0 AND 1000000000000000),
    CONSTRAINT job_prices_minimum CHECK (minimum BETWEEN 0 AND 1000000000000000),
    CONSTRAINT job_prices_maximum CHECK (maximum BETWEEN greatest(credits, minimum) AND 1000000000000000),
    -- What a job costs in any case is held from its beginning.
    CONSTRAINT job_prices_hold CHECK (hold BETWEEN greatest(credits, minimum) AND coalesce(maximum, 1000000000000000)),
    CONSTRAINT job_prices_markup CHECK (markup_percent = 0 OR credits_per_usd > 0),
    CONSTRAINT job_prices_closed_at CHECK (closed_at >= created_at AND closed_at < '9999-01-01')
);

-- One version is current. A job looks for it in three places: its team, its organization and everywhere.
CREATE UNIQUE INDEX job_prices_current ON job_prices (
    coalesce(team_id, organization_id, ''), (team_id IS NOT NULL), coalesce(group_name, ''), coalesce(job_type, '')
) WHERE closed_at IS NULL;
CREATE INDEX job_prices_by_team ON job_prices (team_id) WHERE team_id IS NOT NULL;
CREATE INDEX job_prices_by_organization ON job_prices (organization_id) WHERE organization_id IS NOT NULL;
CREATE INDEX job_prices_by_group ON job_prices (group_name) WHERE group_name IS NOT NULL AND closed_at IS NULL;
