-- What a team, or an organization with all its teams, has used in a period.
--
-- Each query gives the whole period and its parts: a row for each month, day and team, and for each type of job or
-- model. Everything is counted by its own time in UTC: a job when it was created, by what has become of it since; a
-- call when it was made; a credit when it moved. So the credits of a closed month stay what they are, unless it is
-- purged.

-- name: jobs(organization_id, team_id, since, until) :many
-- (Summed up by days first: that is much less to be grouped in five ways.)
SELECT
    CASE
        WHEN GROUPING(month) = 0 THEN 'months'
        WHEN GROUPING(day) = 0 THEN 'days'
        WHEN GROUPING(job_type) = 0 THEN 'job_types'
        WHEN GROUPING(team_id) = 0 THEN 'teams'
        ELSE 'all'
    END AS part,
    coalesce(month, day, job_type, team_id) AS key,
    coalesce(sum(jobs), 0) AS jobs,
    coalesce(sum(jobs) FILTER (WHERE status = 'completed'), 0) AS jobs_completed,
    coalesce(sum(jobs) FILTER (WHERE status = 'failed'), 0) AS jobs_failed,
    coalesce(sum(jobs) FILTER (WHERE status = 'cancelled'), 0) AS jobs_cancelled,
    coalesce(sum(jobs) FILTER (WHERE status IN ('pending', 'in_progress')), 0) AS jobs_open,
    coalesce(sum(jobs_unpriced), 0) AS jobs_unpriced,
    coalesce(sum(credits_charged), 0) AS credits_charged,
    coalesce(sum(credits_short), 0) AS credits_short
FROM (
    SELECT
        date_trunc('day', created_at AT TIME ZONE 'UTC') AS date,
        job_type,
        team_id,
        status,
        count(*) AS jobs,
        count(*) FILTER (WHERE is_unpriced) AS jobs_unpriced,
        sum(credits_charged) AS credits_charged,
        sum(credits_short) AS credits_short
    FROM jobs
    WHERE organization_id = %(organization_id)s
      AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
      AND created_at >= %(since)s
      AND created_at < %(until)s
    GROUP BY date, job_type, team_id, status
) AS job
CROSS JOIN LATERAL (
    SELECT to_char(date, 'YYYY-MM') AS month, to_char(date, 'YYYY-MM-DD') AS day
) AS calendar
GROUP BY GROUPING SETS ((), (month), (day), (job_type), (team_id));

-- name: credits(organization_id, team_id, since, until) :many
SELECT
    CASE
        WHEN GROUPING(month) = 0 THEN 'months'
        WHEN GROUPING(day) = 0 THEN 'days'
        WHEN GROUPING(team_id) = 0 THEN 'teams'
        ELSE 'all'
    END AS part,
    coalesce(month, day, team_id) AS key,
    coalesce(sum(credits_amount) FILTER (WHERE transaction_type = 'allocation'), 0) AS credits_added,
    coalesce(-sum(credits_amount) FILTER (WHERE transaction_type = 'deduction'), 0) AS credits_deducted,
    coalesce(sum(credits_amount) FILTER (WHERE transaction_type = 'refund'), 0) AS credits_refunded,
    coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0) AS credits_net,
    coalesce(sum(credits_amount) FILTER (WHERE transaction_type = 'adjustment'), 0) AS credits_adjusted,
    coalesce(-sum(credits_amount) FILTER (WHERE transaction_type = 'expiry'), 0) AS credits_expired
FROM credit_transactions
CROSS JOIN LATERAL (
    SELECT
        to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM') AS month,
        to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day
) AS calendar
WHERE team_id IN (
    SELECT team_id
    FROM teams
    WHERE organization_id = %(organization_id)s AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
)
  AND created_at >= %(since)s
  AND created_at < %(until)s
GROUP BY GROUPING SETS ((), (month), (day), (team_id));

-- name: categories(organization_id, team_id, since, until) :many
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
    WHERE t.organization_id = %(organization_id)s AND (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s)
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

-- name: calls(organization_id, team_id, since, until) :many
-- cost_usd is the sum of what is known, of failed calls too, and NULL where there were answers and none is known.
SELECT
    CASE
        WHEN GROUPING(month) = 0 THEN 'months'
        WHEN GROUPING(day) = 0 THEN 'days'
        WHEN GROUPING(resolved_model) = 0 THEN 'models'
        WHEN GROUPING(team_id) = 0 THEN 'teams'
        ELSE 'all'
    END AS part,
    coalesce(month, day, resolved_model, team_id) AS key,
    count(*) AS calls,
    count(error) AS failed_calls,
    coalesce(sum(prompt_tokens), 0) AS prompt_tokens,
    coalesce(sum(completion_tokens), 0) AS completion_tokens,
    coalesce(sum(total_tokens), 0) AS total_tokens,
    CASE
        WHEN count(cost_usd) = 0 AND count(*) > count(error) THEN NULL
        ELSE coalesce(sum(cost_usd), 0)
    END AS cost_usd,
    count(*) FILTER (WHERE error IS NULL AND cost_usd IS NULL) AS unpriced_calls
FROM llm_calls
CROSS JOIN LATERAL (
    SELECT
        to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM') AS month,
        to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD') AS day
) AS calendar
WHERE team_id IN (
    SELECT team_id
    FROM teams
    WHERE organization_id = %(organization_id)s AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
)
  AND created_at >= %(since)s
  AND created_at < %(until)s
GROUP BY GROUPING SETS ((), (month), (day), (resolved_model), (team_id));

-- name: margins(organization_id, team_id, since, until) :many
-- Of the jobs that were priced by money alone, less their own cost; NULL where there were none.
SELECT
    CASE
        WHEN GROUPING(month) = 0 THEN 'months'
        WHEN GROUPING(day) = 0 THEN 'days'
        WHEN GROUPING(job_type) = 0 THEN 'job_types'
        WHEN GROUPING(team_id) = 0 THEN 'teams'
        ELSE 'all'
    END AS part,
    coalesce(month, day, job_type, team_id) AS key,
    trim_scale(sum(amount_usd)) AS margin_usd
FROM (
    SELECT date_trunc('day', created_at AT TIME ZONE 'UTC') AS date, job_type, team_id, sum(amount_usd) AS amount_usd
    FROM margin_parts
    WHERE organization_id = %(organization_id)s
      AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
      AND created_at >= %(since)s
      AND created_at < %(until)s
    GROUP BY date, job_type, team_id
) AS margin
CROSS JOIN LATERAL (
    SELECT to_char(date, 'YYYY-MM') AS month, to_char(date, 'YYYY-MM-DD') AS day
) AS calendar
GROUP BY GROUPING SETS ((), (month), (day), (job_type), (team_id));
