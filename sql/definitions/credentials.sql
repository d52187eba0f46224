-- Keys of model providers: which of them a job calls with, and how they are shown.


-- With which keys a team calls models, by the provider: its own, else its organization's; as they are stored, to be
-- decrypted by whoever calls. NULL where it has none and may use those of the environment. One whose secret is missing
-- is there all the same: it does not decrypt, and no other is used instead.
CREATE FUNCTION keys_of(of_team text, of_organization text) RETURNS jsonb
LANGUAGE plpgsql STABLE AS $$
DECLARE
    keys jsonb;
BEGIN
    SELECT jsonb_object_agg(provider, to_jsonb(own))
    INTO keys
    FROM (
        SELECT DISTINCT ON (c.provider)
            c.credential_id, c.organization_id, c.team_id, c.provider, c.api_base, coalesce(s.secret, '') AS secret
        FROM credentials c
        LEFT JOIN credential_secrets s USING (credential_id)
        WHERE coalesce(c.organization_id, '') = of_organization
          AND coalesce(c.team_id, '') IN ('', of_team)
          AND c.removed_at IS NULL
        ORDER BY c.provider, c.team_id NULLS LAST
    ) AS own;
    IF EXISTS (SELECT FROM organizations WHERE organization_id = of_organization AND own_keys_only) THEN
        RETURN jsonb_build_object('own', coalesce(keys, '{}'), 'own_keys_only', of_organization);
    END IF;
    RETURN CASE WHEN keys IS NOT NULL THEN jsonb_build_object('own', keys) END;
END
$$;

CREATE VIEW credential_details AS
SELECT
    c.credential_id,
    c.organization_id,
    c.team_id,
    c.provider,
    c.api_base,
    c.last_four,
    c.created_at,
    (SELECT max(l.created_at) FROM llm_calls l WHERE l.credential_id = c.credential_id) AS used_at
FROM credentials c
WHERE c.removed_at IS NULL;


-- Virtual keys at the proxy. One that has expired is no more.

CREATE VIEW key_details AS
SELECT
    k.key_id,
    k.team_id,
    t.organization_id,
    k.team_id || '-' || k.key_id AS key_alias,
    c.last_four,
    CASE
        WHEN k.is_blocked THEN 'blocked'
        WHEN t.status <> 'active' OR o.status <> 'active' THEN 'suspended'
        WHEN k.expires_at IS NOT NULL THEN 'expiring'
        ELSE 'active'
    END AS status,
    k.created_at,
    k.expires_at,
    k.token
FROM proxy_keys k
JOIN teams t USING (team_id)
JOIN organizations o USING (organization_id)
JOIN credentials c USING (credential_id)
WHERE k.expires_at IS NULL OR k.expires_at > statement_timestamp();

CREATE VIEW team_limits AS
SELECT team_id, measure, per, amount FROM limits WHERE team_id IS NOT NULL AND group_name IS NULL AND is_hard;

-- What the proxy is to know of each: the models of its team's groups, and those of its team's hard limits that can be
-- said there. A request of the proxy stands for a job; of the limits of cost, there is room for one: that of the
-- longest period.
CREATE VIEW wanted_keys AS
SELECT
    k.key_id,
    k.team_id,
    k.organization_id,
    k.token,
    k.key_alias,
    ARRAY(
        SELECT DISTINCT regexp_replace(m.model_name, '^litellm_proxy/', '')
        FROM team_model_groups a
        JOIN model_groups g USING (group_name)
        JOIN model_group_models m USING (group_name)
        WHERE a.team_id = k.team_id AND g.status = 'active' AND m.is_active AND m.model_name NOT LIKE 'offline/%'
        ORDER BY 1
    ) AS models,
    budget.amount AS max_budget,
    CASE budget.per WHEN 'day' THEN '1d' WHEN 'week' THEN '7d' WHEN 'month' THEN '1mo' END AS budget_duration,
    (SELECT amount FROM team_limits l WHERE l.team_id = k.team_id AND (l.measure, l.per) = ('jobs', 'minute'))
        AS rpm_limit,
    (SELECT amount FROM team_limits l WHERE l.team_id = k.team_id AND (l.measure, l.per) = ('tokens', 'minute'))
        AS tpm_limit,
    (
        SELECT least(amount, 2147483647) -- the most that it can count to
        FROM team_limits l
        WHERE l.team_id = k.team_id AND (l.measure, l.per) = ('jobs', 'concurrent')
    ) AS max_parallel_requests,
    k.status IN ('blocked', 'suspended') AS blocked,
    k.expires_at,
    jsonb_build_object(
        'saasllm_installation', i.installation_id,
        'saasllm_organization_id', k.organization_id,
        'saasllm_team_id', k.team_id,
        'saasllm_key_id', k.key_id
    ) AS metadata
FROM key_details k
CROSS JOIN installation i
LEFT JOIN LATERAL (
    SELECT l.amount, l.per
    FROM team_limits l
    WHERE l.team_id = k.team_id AND l.measure = 'cost_usd' AND l.per IN ('day', 'week', 'month', 'total')
    ORDER BY array_position(ARRAY['total', 'month', 'week', 'day'], l.per)
    LIMIT 1
) AS budget ON true;
