-- What jobs are charged: which price holds, and what a job pays by it.


-- A price is a version: it is closed, once, and nothing else of it changes, for jobs that were charged by it name it.
-- They do so without a foreign key, as each job would lock the row of its price. It leaves only with its team or
-- organization, which has no jobs any more.

CREATE FUNCTION refuse_price_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    IF TG_OP = 'DELETE'
        AND num_nonnulls(OLD.team_id, OLD.organization_id) = 1
        AND NOT EXISTS (SELECT FROM ONLY public.teams WHERE team_id = OLD.team_id)
        AND NOT EXISTS (SELECT FROM ONLY public.organizations WHERE organization_id = OLD.organization_id)
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'price % is a version that stays: % is not allowed', OLD.price_id, TG_OP
        USING ERRCODE = 'SL012', HINT = 'Close it by its closed_at, and insert another.';
END
$$;

CREATE TRIGGER job_prices_stay AFTER DELETE ON job_prices
    FOR EACH ROW EXECUTE FUNCTION refuse_price_change();
CREATE TRIGGER job_prices_close_once AFTER UPDATE ON job_prices
    FOR EACH ROW
    WHEN (OLD.closed_at IS NOT NULL OR to_jsonb(OLD) - 'closed_at' <> to_jsonb(NEW) - 'closed_at')
    EXECUTE FUNCTION refuse_price_change();


-- The prices of a group end with it: another of the same name would have them else. A new one holds its group, as a
-- foreign key would.

CREATE FUNCTION require_group() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    PERFORM FROM ONLY public.model_groups WHERE group_name = NEW.group_name FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'there is no group %', NEW.group_name USING ERRCODE = 'foreign_key_violation';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER job_prices_require_group AFTER INSERT ON job_prices
    FOR EACH ROW WHEN (NEW.group_name IS NOT NULL AND NEW.closed_at IS NULL) EXECUTE FUNCTION require_group();

CREATE FUNCTION close_prices() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET row_security = off AS $$
BEGIN
    UPDATE ONLY public.job_prices
    SET closed_at = greatest(created_at, now())
    WHERE group_name = OLD.group_name AND closed_at IS NULL;
    RETURN NULL;
END
$$;

CREATE TRIGGER model_groups_close_prices AFTER DELETE ON model_groups
    FOR EACH ROW EXECUTE FUNCTION close_prices();
CREATE TRIGGER model_groups_move_prices AFTER UPDATE ON model_groups
    FOR EACH ROW WHEN (OLD.group_name <> NEW.group_name) EXECUTE FUNCTION close_prices();


-- The price that holds for a job: the one of its team before that of its organization before that of everywhere; and
-- there that of its type before that of its group before that of every job. None where a job costs one credit. (The
-- table is named with its schema, as triggers that read a group's price have no search path.)
CREATE FUNCTION price_of(of_team text, of_organization text, of_group text, of_job_type text) RETURNS SETOF job_prices
LANGUAGE sql STABLE PARALLEL SAFE ROWS 1 AS $$
    SELECT *
    FROM public.job_prices
    WHERE closed_at IS NULL
      AND coalesce(team_id, organization_id, '') IN (of_team, of_organization, '')
      AND (team_id IS NULL OR team_id = of_team)
      AND (organization_id IS NULL OR organization_id = of_organization)
      AND (group_name IS NULL OR group_name = of_group)
      AND (job_type IS NULL OR job_type = of_job_type)
    ORDER BY team_id IS NULL, organization_id IS NULL, job_type IS NULL, group_name IS NULL
    LIMIT 1
$$;


-- What a job costs, as a field of what it is told of.
CREATE FUNCTION price_terms(price job_prices) RETURNS json
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT json_build_object(
        'price_id', price.price_id,
        'organization_id', price.organization_id,
        'team_id', price.team_id,
        'group_name', price.group_name,
        'job_type', price.job_type,
        'credits', price.credits,
        'credits_per_usd', price.credits_per_usd,
        'markup_percent', price.markup_percent,
        'credits_per_1000_prompt_tokens', price.credits_per_1000_prompt_tokens,
        'credits_per_1000_completion_tokens', price.credits_per_1000_completion_tokens,
        'minimum', price.minimum,
        'maximum', price.maximum,
        'hold', price.hold
    )
$$;


-- What a job that completes has to pay: by the dearest of its prices, from what its answers cost us and their tokens.
-- `calls` are those that are just being written. What nobody knows counts nothing, and is told. A price that is missing
-- (NULL) is one credit; of a job without any it is not asked: its array is NULL.
CREATE FUNCTION charge_of(of_prices bigint[], of_job uuid, calls jsonb)
RETURNS TABLE (price_id bigint, credits_due bigint, is_unpriced boolean)
LANGUAGE plpgsql STABLE STRICT ROWS 1 AS $$
BEGIN
    RETURN QUERY
    WITH answer AS (
        SELECT c.cost_usd, c.prompt_tokens, c.completion_tokens
        FROM llm_calls c
        WHERE c.job_id = of_job AND c.error IS NULL
        UNION ALL
        SELECT c.cost_usd, c.prompt_tokens, c.completion_tokens
        FROM call_rows(calls) c
        WHERE c.error IS NULL
    ),
    used AS (
        SELECT
            coalesce(sum(cost_usd), 0) AS cost_usd,
            coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
            coalesce(sum(completion_tokens), 0) AS completion_tokens,
            count(*) FILTER (WHERE cost_usd IS NULL) > 0 AS is_cost_unknown,
            count(*) FILTER (WHERE prompt_tokens IS NULL) > 0 AS is_prompt_unknown,
            count(*) FILTER (WHERE completion_tokens IS NULL) > 0 AS is_completion_unknown
        FROM answer
    ),
    due AS (
        SELECT
            p.price_id,
            CASE
                WHEN p.price_id IS NULL THEN 1
                ELSE least(
                    greatest(
                        ceil(
                            p.credits
                            + used.cost_usd * p.credits_per_usd * (1 + p.markup_percent * 0.01)
                            + used.prompt_tokens * p.credits_per_1000_prompt_tokens * 0.001
                            + used.completion_tokens * p.credits_per_1000_completion_tokens * 0.001
                        ),
                        p.minimum
                    ),
                    coalesce(p.maximum, 1000000000000000)
                )
            END AS credits,
            (p.credits_per_usd > 0 AND used.is_cost_unknown)
            OR (p.credits_per_1000_prompt_tokens > 0 AND used.is_prompt_unknown)
            OR (p.credits_per_1000_completion_tokens > 0 AND used.is_completion_unknown) AS is_unpriced
        FROM unnest(of_prices) AS of_job (price_id)
        LEFT JOIN job_prices p ON p.price_id = of_job.price_id
        CROSS JOIN used
    )
    SELECT
        (array_agg(due.price_id ORDER BY due.credits DESC, due.price_id))[1],
        max(due.credits)::bigint,
        coalesce(bool_or(due.is_unpriced), false)
    FROM due;
END
$$;


-- The margins of jobs that were priced by money, as what they add up to: what each brought, and less what each of its
-- calls cost us, also one that failed. A job that was refunded brought nothing; one whose cost nobody knows has no
-- margin. (Row by row, as a million jobs would have to be sorted to be summed up one by one. The quotient has a fixed
-- scale, so that the parts of a report add up to the whole.)
CREATE VIEW margin_parts AS
WITH job AS NOT MATERIALIZED (
    SELECT j.job_id, j.team_id, j.organization_id, j.job_type, j.created_at, j.credits_charged, p.credits_per_usd
    FROM jobs j
    JOIN job_prices p ON p.price_id = j.price_id AND p.credits_per_usd > 0
    WHERE NOT j.is_unpriced
)
SELECT
    job.job_id,
    job.team_id,
    job.organization_id,
    job.job_type,
    job.created_at,
    CASE WHEN r.job_id IS NULL THEN round(job.credits_charged / job.credits_per_usd, 9) ELSE 0 END AS amount_usd
FROM job
LEFT JOIN credit_transactions r ON r.job_id = job.job_id AND r.transaction_type = 'refund'
UNION ALL
SELECT job.job_id, job.team_id, job.organization_id, job.job_type, job.created_at, - c.cost_usd
FROM job
JOIN llm_calls c ON c.job_id = job.job_id;
