-- Our own prices of models.

-- name: set(model_name, input_usd_per_million, output_usd_per_million, cache_read_usd_per_million, cache_write_usd_per_million, reasoning_usd_per_million) :none
-- The whole price, in the place of the one that it had. The same again is no change.
INSERT INTO model_prices AS price (
    model_name, input_usd_per_million, output_usd_per_million, cache_read_usd_per_million, cache_write_usd_per_million,
    reasoning_usd_per_million
)
VALUES (
    %(model_name)s, %(input_usd_per_million)s, %(output_usd_per_million)s, %(cache_read_usd_per_million)s,
    %(cache_write_usd_per_million)s, %(reasoning_usd_per_million)s
)
ON CONFLICT (model_name) DO UPDATE
SET input_usd_per_million = excluded.input_usd_per_million,
    output_usd_per_million = excluded.output_usd_per_million,
    cache_read_usd_per_million = excluded.cache_read_usd_per_million,
    cache_write_usd_per_million = excluded.cache_write_usd_per_million,
    reasoning_usd_per_million = excluded.reasoning_usd_per_million,
    updated_at = now()
WHERE (
    price.input_usd_per_million, price.output_usd_per_million, price.cache_read_usd_per_million,
    price.cache_write_usd_per_million, price.reasoning_usd_per_million
) IS DISTINCT FROM (
    excluded.input_usd_per_million, excluded.output_usd_per_million, excluded.cache_read_usd_per_million,
    excluded.cache_write_usd_per_million, excluded.reasoning_usd_per_million
);

-- name: get(model_name) :maybe
SELECT
    model_name, input_usd_per_million, output_usd_per_million, cache_read_usd_per_million, cache_write_usd_per_million,
    reasoning_usd_per_million, created_at, updated_at
FROM model_prices
WHERE model_name = %(model_name)s;

-- name: list(after, row_limit) :many
-- By the name; behind the model `after`.
SELECT
    model_name, input_usd_per_million, output_usd_per_million, cache_read_usd_per_million, cache_write_usd_per_million,
    reasoning_usd_per_million, created_at, updated_at
FROM model_prices
WHERE %(after)s::text IS NULL OR model_name > %(after)s
ORDER BY model_name
LIMIT %(row_limit)s;

-- name: remove(model_names, if_exists) :one
-- All of them or, where one has no price and that is not allowed, none.
WITH missing AS (
    SELECT asked.model_name
    FROM unnest(%(model_names)s::text[]) AS asked (model_name)
    WHERE NOT EXISTS (SELECT FROM model_prices p WHERE p.model_name = asked.model_name)
),
removed AS (
    DELETE FROM model_prices
    WHERE model_name = ANY (%(model_names)s::text[]) AND (%(if_exists)s OR NOT EXISTS (SELECT FROM missing))
    RETURNING model_name
)
SELECT
    ARRAY(SELECT model_name FROM missing ORDER BY model_name) AS missing,
    ARRAY(SELECT model_name FROM removed ORDER BY model_name) AS removed;

-- name: priced(model_names) :many
-- Those of the models that have a price of our own.
SELECT model_name FROM model_prices WHERE model_name = ANY (%(model_names)s::text[]);

-- name: complete(prefix) :many
-- The first models that have a price, or that a group has, whose names begin so, for a shell.
SELECT model_name AS id FROM model_prices WHERE starts_with(model_name, %(prefix)s)
UNION
SELECT model_name FROM model_group_models WHERE starts_with(model_name, %(prefix)s)
ORDER BY id
LIMIT 100;
