-- What was used in a period: of all, of an organization or of a team.
--
-- Everything is counted by its own time in UTC: a job when it was created, by what has become of it since; a call when
-- it was made; a credit when it moved. So the credits of a closed month stay what they are, unless it is purged. How it
-- is counted is in sql/definitions/usage.sql. A sum of costs is of what is known, of failed calls too, and NULL where
-- there were answers and none is known.

-- name: scope(organization_id, team_id, since, until, by_day) :one
-- Until when everything is summed up, which months can be read as a whole, and whose usage is asked for; NULL is
-- everybody's. And for the rest of the transaction, that it is not compiled, which takes longer than it saves.
SELECT
    set_config('jit', 'off', true) AS jit,
    summed_until,
    CASE
        WHEN %(by_day)s THEN '9999-12-31'
        ELSE date_trunc('month', %(since)s::timestamptz AT TIME ZONE 'UTC' + interval '1 month' - interval '1 day')
    END::date AS months_since,
    date_trunc('month', least(%(until)s, summed_until) AT TIME ZONE 'UTC')::date AS months_until,
    CASE
        WHEN num_nonnulls(%(organization_id)s::text, %(team_id)s::text) > 0 THEN ARRAY(
            SELECT team_id::text
            FROM teams
            WHERE organization_id = coalesce(%(organization_id)s, organization_id)
              AND team_id = coalesce(%(team_id)s, team_id)
        )
    END AS team_ids
FROM usage_state;

-- name: parts(since, until, summed_until, months_since, months_until, team_ids) :many
-- The whole period and its parts: a row for each month, day, type of job, team and organization. (Type '' is of credits
-- that moved for no job.)
SELECT
    CASE
        WHEN GROUPING(month) = 0 THEN 'months'
        WHEN GROUPING(day) = 0 THEN 'days'
        WHEN GROUPING(job_type) = 0 THEN 'job_types'
        WHEN GROUPING(team_id) = 0 THEN 'teams'
        WHEN GROUPING(organization_id) = 0 THEN 'organizations'
        ELSE 'all'
    END AS part,
    coalesce(to_char(month, 'YYYY-MM'), day::text, job_type, team_id, organization_id) AS key,
    coalesce(sum(jobs), 0) AS jobs,
    coalesce(sum(jobs_completed), 0) AS jobs_completed,
    coalesce(sum(jobs_failed), 0) AS jobs_failed,
    coalesce(sum(jobs_cancelled), 0) AS jobs_cancelled,
    coalesce(sum(jobs_open), 0) AS jobs_open,
    coalesce(sum(jobs_unpriced), 0) AS jobs_unpriced,
    coalesce(sum(credits_charged), 0) AS credits_charged,
    coalesce(sum(credits_short), 0) AS credits_short,
    coalesce(sum(credits_added), 0) AS credits_added,
    coalesce(sum(credits_deducted), 0) AS credits_deducted,
    coalesce(sum(credits_refunded), 0) AS credits_refunded,
    coalesce(sum(credits_deducted), 0) - coalesce(sum(credits_refunded), 0) AS credits_net,
    coalesce(sum(credits_adjusted), 0) AS credits_adjusted,
    coalesce(sum(credits_expired), 0) AS credits_expired,
    coalesce(sum(calls), 0) AS calls,
    coalesce(sum(failed_calls), 0) AS failed_calls,
    coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
    coalesce(sum(completion_tokens), 0) AS completion_tokens,
    coalesce(sum(total_tokens), 0) AS total_tokens,
    CASE
        WHEN sum(priced_calls) > 0 OR coalesce(sum(calls) = sum(failed_calls), true) THEN coalesce(sum(cost_usd), 0)
    END AS cost_usd,
    coalesce(sum(unpriced_calls), 0) AS unpriced_calls,
    trim_scale(sum(margin_usd)) AS margin_usd
FROM usage_within(%(since)s, %(until)s, %(summed_until)s, %(months_since)s, %(months_until)s)
JOIN teams USING (team_id)
CROSS JOIN LATERAL date_trunc('month', day::timestamp) AS month
WHERE (%(team_ids)s::text[] IS NULL OR team_id = ANY (%(team_ids)s))
GROUP BY GROUPING SETS ((), (month), (day), (job_type), (team_id), (organization_id));

-- name: models(since, until, summed_until, months_since, months_until, team_ids) :many
SELECT
    resolved_model,
    coalesce(sum(calls), 0) AS calls,
    coalesce(sum(failed_calls), 0) AS failed_calls,
    coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
    coalesce(sum(completion_tokens), 0) AS completion_tokens,
    coalesce(sum(total_tokens), 0) AS total_tokens,
    CASE
        WHEN sum(priced_calls) > 0 OR coalesce(sum(calls) = sum(failed_calls), true) THEN coalesce(sum(cost_usd), 0)
    END AS cost_usd,
    coalesce(sum(unpriced_calls), 0) AS unpriced_calls
FROM calls_within(%(since)s, %(until)s, %(summed_until)s, %(months_since)s, %(months_until)s)
WHERE (%(team_ids)s::text[] IS NULL OR team_id = ANY (%(team_ids)s))
GROUP BY resolved_model;

-- name: names(team_ids) :many
-- Of teams and their organizations.
SELECT t.team_id, t.team_alias, o.organization_id, o.name AS organization_name
FROM teams t
JOIN organizations o USING (organization_id)
WHERE t.team_id = ANY (%(team_ids)s);

-- name: categories(since, until, team_ids) :many
-- The credits deducted in the whole period by the category of the grants that they were used of, or as overdraft.
--
-- Entries are dated in the order of their numbers. What is logged in credit_uses counts by itself: only of the spans in
-- which the period begins and ends (what is not logged yet is one, too) the ledger says how much was deducted before
-- and behind it.
WITH period AS (
    SELECT
        t.team_id, c.last_entry_no, c.credits_remaining, c.credits_owed,
        first.entry_no AS first_no,
        last.entry_no AS last_no,
        -- The spans that it touches are those behind this entry, up to that.
        (
            SELECT coalesce(max(u.last_no), 0)
            FROM credit_uses u
            WHERE u.team_id = t.team_id AND u.last_no < first.entry_no
        ) AS opening_no,
        (
            SELECT coalesce(min(u.last_no), c.last_entry_no)
            FROM credit_uses u
            WHERE u.team_id = t.team_id AND u.last_no >= last.entry_no
        ) AS closing_no
    FROM teams t
    JOIN team_credits c USING (team_id)
    CROSS JOIN LATERAL (
        SELECT entry_no
        FROM credit_transactions
        WHERE team_id = t.team_id AND created_at >= %(since)s AND created_at < %(until)s
        ORDER BY created_at, entry_no
        LIMIT 1
    ) AS first
    CROSS JOIN LATERAL (
        SELECT entry_no
        FROM credit_transactions
        WHERE team_id = t.team_id AND created_at >= %(since)s AND created_at < %(until)s
        ORDER BY created_at DESC, entry_no DESC
        LIMIT 1
    ) AS last
    WHERE %(team_ids)s::text[] IS NULL OR t.team_id = ANY (%(team_ids)s)
),
use AS (
    SELECT p.team_id, u.last_no, u.use_id AS place, u.grant_id, u.credits
    FROM period p
    JOIN credit_uses u ON u.team_id = p.team_id AND u.last_no > p.opening_no AND u.last_no <= p.closing_no
    UNION ALL
    SELECT p.team_id, NULL, tail.place, tail.grant_id, tail.credits
    FROM period p
    CROSS JOIN LATERAL (
        SELECT g.place, g.grant_id, g.credits_taken AS credits
        FROM grants_at(p.team_id::text, p.credits_remaining, p.credits_owed) g
        UNION ALL
        SELECT NULL, NULL, coalesce(sum(g.credits_left), 0)::bigint - p.credits_owed - p.credits_remaining
        FROM grants_at(p.team_id::text, p.credits_remaining, p.credits_owed) g
    ) AS tail
    WHERE p.closing_no = p.last_entry_no
)
SELECT
    coalesce(g.category, 'overdraft') AS category,
    sum(
        least(use.credits_to, use.credits_in_all - outside.after)
        - greatest(use.credits_to - use.credits, outside.before)
    ) AS credits_deducted
FROM (
    SELECT
        use.*,
        sum(credits) OVER (PARTITION BY team_id ORDER BY last_no, place) AS credits_to,
        sum(credits) OVER (PARTITION BY team_id) AS credits_in_all
    FROM use
    WHERE credits > 0
) AS use
JOIN (
    SELECT
        p.team_id,
        (
            SELECT coalesce(-sum(c.credits_amount), 0)
            FROM credit_transactions c
            WHERE c.team_id = p.team_id
              AND c.transaction_type = 'deduction'
              AND c.entry_no > p.opening_no
              AND c.entry_no < p.first_no
        ) AS before,
        (
            SELECT coalesce(-sum(c.credits_amount), 0)
            FROM credit_transactions c
            WHERE c.team_id = p.team_id
              AND c.transaction_type = 'deduction'
              AND c.entry_no > p.last_no
              AND c.entry_no <= p.closing_no
        ) AS after
    FROM period p
    OFFSET 0
) AS outside USING (team_id)
LEFT JOIN credit_grants g USING (grant_id)
WHERE use.credits_to > outside.before AND use.credits_to - use.credits < use.credits_in_all - outside.after
GROUP BY coalesce(g.category, 'overdraft');

-- name: by(by, since, until, summed_until, months_since, months_until, team_ids, job_type) :many
-- A row for each combination of what it is asked `by` (org, team, month, day, job_type), in that order. Where types are
-- asked for, the credits that moved for no job are left out.
SELECT
    organization_id,
    (SELECT name FROM organizations o WHERE o.organization_id = sums.organization_id) AS organization_name,
    team_id,
    (SELECT team_alias FROM teams t WHERE t.team_id = sums.team_id) AS team_alias,
    month,
    day,
    job_type,
    jobs, jobs_completed, jobs_failed, jobs_cancelled, jobs_open, jobs_unpriced, credits_charged, credits_short,
    credits_added, credits_deducted, credits_refunded, credits_deducted - credits_refunded AS credits_net,
    credits_adjusted, credits_expired,
    calls, failed_calls, prompt_tokens, completion_tokens, total_tokens, cost_usd, unpriced_calls, margin_usd
FROM (
    SELECT
        by.organization_id,
        by.team_id,
        to_char(by.month, 'YYYY-MM') AS month,
        by.day::text AS day,
        by.job_type,
        coalesce(sum(jobs), 0) AS jobs,
        coalesce(sum(jobs_completed), 0) AS jobs_completed,
        coalesce(sum(jobs_failed), 0) AS jobs_failed,
        coalesce(sum(jobs_cancelled), 0) AS jobs_cancelled,
        coalesce(sum(jobs_open), 0) AS jobs_open,
        coalesce(sum(jobs_unpriced), 0) AS jobs_unpriced,
        coalesce(sum(credits_charged), 0) AS credits_charged,
        coalesce(sum(credits_short), 0) AS credits_short,
        coalesce(sum(credits_added), 0) AS credits_added,
        coalesce(sum(credits_deducted), 0) AS credits_deducted,
        coalesce(sum(credits_refunded), 0) AS credits_refunded,
        coalesce(sum(credits_adjusted), 0) AS credits_adjusted,
        coalesce(sum(credits_expired), 0) AS credits_expired,
        coalesce(sum(calls), 0) AS calls,
        coalesce(sum(failed_calls), 0) AS failed_calls,
        coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens), 0) AS completion_tokens,
        coalesce(sum(total_tokens), 0) AS total_tokens,
        CASE
            WHEN sum(priced_calls) > 0 OR coalesce(sum(calls) = sum(failed_calls), true) THEN coalesce(sum(cost_usd), 0)
        END AS cost_usd,
        coalesce(sum(unpriced_calls), 0) AS unpriced_calls,
        trim_scale(sum(margin_usd)) AS margin_usd
    FROM usage_within(%(since)s, %(until)s, %(summed_until)s, %(months_since)s, %(months_until)s) u
    JOIN teams t USING (team_id)
    CROSS JOIN LATERAL (
        SELECT
            CASE WHEN 'org' = ANY (%(by)s::text[]) THEN t.organization_id END AS organization_id,
            CASE WHEN 'team' = ANY (%(by)s::text[]) THEN u.team_id END AS team_id,
            CASE WHEN 'month' = ANY (%(by)s::text[]) THEN date_trunc('month', u.day::timestamp) END AS month,
            CASE WHEN 'day' = ANY (%(by)s::text[]) THEN u.day END AS day,
            CASE WHEN 'job_type' = ANY (%(by)s::text[]) THEN u.job_type END AS job_type
    ) AS by
    WHERE (%(team_ids)s::text[] IS NULL OR u.team_id = ANY (%(team_ids)s))
      AND (%(job_type)s::text IS NULL OR u.job_type = %(job_type)s)
      AND ('job_type' <> ALL (%(by)s::text[]) OR u.job_type <> '')
    GROUP BY by.organization_id, by.team_id, by.month, by.day, by.job_type
) AS sums
ORDER BY
    usage_key((%(by)s::text[])[1], organization_id, team_id, month, day, job_type, NULL, NULL),
    usage_key((%(by)s::text[])[2], organization_id, team_id, month, day, job_type, NULL, NULL),
    usage_key((%(by)s::text[])[3], organization_id, team_id, month, day, job_type, NULL, NULL),
    usage_key((%(by)s::text[])[4], organization_id, team_id, month, day, job_type, NULL, NULL),
    usage_key((%(by)s::text[])[5], organization_id, team_id, month, day, job_type, NULL, NULL);

-- name: calls(by, since, until, summed_until, months_since, months_until, team_ids, job_type, group_name, model) :many
-- As `by`, of calls alone, which also have a model and a group.
SELECT
    organization_id,
    (SELECT name FROM organizations o WHERE o.organization_id = sums.organization_id) AS organization_name,
    team_id,
    (SELECT team_alias FROM teams t WHERE t.team_id = sums.team_id) AS team_alias,
    month,
    day,
    job_type,
    group_name,
    resolved_model,
    calls, failed_calls, prompt_tokens, completion_tokens, total_tokens, cost_usd, unpriced_calls
FROM (
    SELECT
        by.organization_id,
        by.team_id,
        to_char(by.month, 'YYYY-MM') AS month,
        by.day::text AS day,
        by.job_type,
        by.group_name,
        by.resolved_model,
        coalesce(sum(calls), 0) AS calls,
        coalesce(sum(failed_calls), 0) AS failed_calls,
        coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
        coalesce(sum(completion_tokens), 0) AS completion_tokens,
        coalesce(sum(total_tokens), 0) AS total_tokens,
        CASE
            WHEN sum(priced_calls) > 0 OR coalesce(sum(calls) = sum(failed_calls), true) THEN coalesce(sum(cost_usd), 0)
        END AS cost_usd,
        coalesce(sum(unpriced_calls), 0) AS unpriced_calls
    FROM calls_within(%(since)s, %(until)s, %(summed_until)s, %(months_since)s, %(months_until)s) c
    JOIN teams t USING (team_id)
    CROSS JOIN LATERAL (
        SELECT
            CASE WHEN 'org' = ANY (%(by)s::text[]) THEN t.organization_id END AS organization_id,
            CASE WHEN 'team' = ANY (%(by)s::text[]) THEN c.team_id END AS team_id,
            CASE WHEN 'month' = ANY (%(by)s::text[]) THEN date_trunc('month', c.day::timestamp) END AS month,
            CASE WHEN 'day' = ANY (%(by)s::text[]) THEN c.day END AS day,
            CASE WHEN 'job_type' = ANY (%(by)s::text[]) THEN c.job_type END AS job_type,
            CASE WHEN 'group' = ANY (%(by)s::text[]) THEN c.group_name END AS group_name,
            CASE WHEN 'model' = ANY (%(by)s::text[]) THEN c.resolved_model END AS resolved_model
    ) AS by
    WHERE (%(team_ids)s::text[] IS NULL OR c.team_id = ANY (%(team_ids)s))
      AND (%(job_type)s::text IS NULL OR c.job_type = %(job_type)s)
      AND (%(group_name)s::text IS NULL OR c.group_name = %(group_name)s)
      AND (%(model)s::text IS NULL OR c.resolved_model = %(model)s)
    GROUP BY by.organization_id, by.team_id, by.month, by.day, by.job_type, by.group_name, by.resolved_model
) AS sums
ORDER BY
    usage_key((%(by)s::text[])[1], organization_id, team_id, month, day, job_type, group_name, resolved_model),
    usage_key((%(by)s::text[])[2], organization_id, team_id, month, day, job_type, group_name, resolved_model),
    usage_key((%(by)s::text[])[3], organization_id, team_id, month, day, job_type, group_name, resolved_model),
    usage_key((%(by)s::text[])[4], organization_id, team_id, month, day, job_type, group_name, resolved_model),
    usage_key((%(by)s::text[])[5], organization_id, team_id, month, day, job_type, group_name, resolved_model),
    usage_key((%(by)s::text[])[6], organization_id, team_id, month, day, job_type, group_name, resolved_model),
    usage_key((%(by)s::text[])[7], organization_id, team_id, month, day, job_type, group_name, resolved_model);

-- name: sum() :one
SELECT hours, changes, is_done FROM sum_usage();
