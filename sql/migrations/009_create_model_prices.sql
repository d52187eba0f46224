-- What models cost us where litellm knows no price, or another one: US dollars per million tokens.

-- 'NaN' is greater than every number, so a lower bound alone would let it in. With nine decimals, the cost of a call is
-- exact in 28 digits, however many tokens it has.
CREATE DOMAIN usd_per_million AS numeric
    CONSTRAINT usd_per_million_range CHECK (VALUE >= 0 AND VALUE <= 1000000)
    CONSTRAINT usd_per_million_decimals CHECK (VALUE = round(VALUE, 9));

-- A price belongs to a name, whether a group has a model of it or not. Tokens that have no price of their own (read
-- from the provider's cache, written to it, spent on reasoning) cost what the others of the prompt or of the answer do.
CREATE TABLE model_prices (
    model_name                  text COLLATE "C" PRIMARY KEY,
    input_usd_per_million       usd_per_million  NOT NULL,
    output_usd_per_million      usd_per_million  NOT NULL,
    cache_read_usd_per_million  usd_per_million,
    cache_write_usd_per_million usd_per_million,
    reasoning_usd_per_million   usd_per_million,
    created_at                  timestamptz      NOT NULL DEFAULT now(),
    updated_at                  timestamptz      NOT NULL DEFAULT now(),
    CONSTRAINT model_prices_name CHECK (model_name ~ '^[^\s[:cntrl:]]{1,255}$')
);
