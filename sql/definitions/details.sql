-- The shape in which people and scripts meet the records: column for column what a command shows.

CREATE VIEW organization_details AS
SELECT organization_id, name, status, own_keys_only, metadata, created_at, updated_at FROM organizations;

-- With what a job of the usual type costs there everywhere; NULL where no price says so.
CREATE VIEW model_group_details AS
SELECT
    g.group_name,
    g.display_name,
    g.description,
    g.status,
    m.models,
    (SELECT price_terms(p) FROM price_of(NULL, NULL, g.group_name::text, 'completion') p) AS price,
    g.created_at,
    g.updated_at
FROM model_groups g
CROSS JOIN LATERAL (
    SELECT coalesce(
        json_agg(
            json_build_object('model_name', model_name, 'priority', priority, 'is_active', is_active)
            ORDER BY priority
        ),
        '[]'
    ) AS models
    FROM model_group_models
    WHERE group_name = g.group_name
) m;

-- A team is shown with its schedule. Its balance is looked up team by team (the OFFSET says so): joined by merging, a
-- page in the middle of a list would read all balances before it.
CREATE VIEW team_details AS
SELECT
    t.team_id,
    t.organization_id,
    t.team_alias,
    t.status,
    -- Where it is suspended, so is the team, whatever its own status.
    (SELECT o.status FROM organizations o WHERE o.organization_id = t.organization_id) AS organization_status,
    ARRAY(
        SELECT a.group_name::text FROM team_model_groups a WHERE a.team_id = t.team_id ORDER BY a.group_name
    ) AS model_groups,
    c.credits_allocated,
    c.credits_used,
    c.credits_reserved,
    c.credits_remaining,
    c.credits_overdraft,
    c.low_credits,
    t.metadata,
    t.created_at,
    t.updated_at,
    (
        SELECT json_build_object(
            'credits_amount', s.credits_amount, 'every', s.every, 'mode', s.mode, 'credits_max', s.credits_max,
            'rollover', s.rollover, 'next_on', s.next_on
        )
        FROM credit_schedules s
        WHERE s.team_id = t.team_id
    ) AS schedule
FROM teams t
CROSS JOIN LATERAL (
    SELECT credits_allocated, credits_used, credits_reserved, credits_remaining, credits_overdraft, low_credits
    FROM current_balances
    WHERE team_id = t.team_id
    OFFSET 0
) c;

-- Free to start jobs are also the credits of expired leases, which the next job that needs them takes back; but of one
-- that a worker ran, another may.
CREATE VIEW credit_details AS
SELECT
    t.team_id,
    t.organization_id,
    c.credits_allocated,
    c.credits_used,
    c.credits_reserved,
    c.credits_remaining,
    c.credits_overdraft,
    c.credits_remaining - c.credits_reserved + expired.credits AS credits_free
FROM teams t
JOIN current_balances c USING (team_id)
CROSS JOIN LATERAL (
    SELECT coalesce(sum(j.credits_held), 0)::bigint AS credits
    FROM jobs j
    WHERE j.team_id = t.team_id
      AND j.status IN ('pending', 'in_progress')
      AND j.lease_expires_at <= statement_timestamp() -- by the index
      AND NOT (j.is_queued AND j.status = 'in_progress')
) expired;

CREATE VIEW job_details AS
SELECT
    job_id,
    team_id,
    organization_id,
    job_type,
    status,
    model_groups_used,
    external_task_id,
    credits_held,
    credits_charged,
    credits_short,
    coalesce(credits_charged > 0, false) AS credit_applied,
    price_id,
    is_unpriced,
    error_message,
    metadata,
    is_queued,
    created_at,
    started_at,
    completed_at,
    lease_expires_at
FROM jobs;

CREATE VIEW job_refusal_details AS
SELECT
    r.refusal_id,
    r.team_id,
    t.organization_id,
    r.group_name,
    r.reason,
    r.refusals,
    r.first_at,
    r.last_at
FROM job_refusals r
JOIN teams t USING (team_id);

CREATE VIEW llm_call_details AS
SELECT
    call_id,
    job_id,
    model_group_used,
    resolved_model,
    attempt,
    prompt_tokens,
    completion_tokens,
    total_tokens,
    cost_usd,
    latency_ms,
    purpose,
    finish_reason,
    error,
    created_at,
    credential_id,
    prompt,
    answer
FROM llm_calls;
