-- What a report shows beside usage: balances, and the ledger without the jobs' deductions, which usage has by day.
--
-- Of an organization, a team, or all: NULL stands for what is not asked for.

-- name: balances(organization_id, team_id, since, until) :many
-- What each team had as the period began, and at its end, or now.
SELECT
    t.team_id,
    t.team_alias,
    t.organization_id,
    o.name AS organization_name,
    coalesce(opening.credits_after, 0) AS credits_opening,
    coalesce(closing.credits_after, 0) AS credits_closing
FROM teams t
JOIN organizations o USING (organization_id)
LEFT JOIN LATERAL (
    SELECT credits_after
    FROM credit_transactions
    WHERE team_id = t.team_id AND created_at < %(since)s
    ORDER BY created_at DESC, entry_no DESC
    LIMIT 1
) AS opening ON true
LEFT JOIN LATERAL (
    SELECT credits_after
    FROM credit_transactions
    WHERE team_id = t.team_id AND created_at < %(until)s
    ORDER BY created_at DESC, entry_no DESC
    LIMIT 1
) AS closing ON true
WHERE (%(organization_id)s::text IS NULL OR t.organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s)
ORDER BY t.team_id;

-- name: categories(organization_id, team_id, since, until) :many
-- The credits that came and that expired, by the category of their grants.
SELECT
    g.category,
    coalesce(sum(c.credits_amount) FILTER (WHERE c.transaction_type = 'allocation'), 0) AS credits_added,
    coalesce(-sum(c.credits_amount) FILTER (WHERE c.transaction_type = 'expiry'), 0) AS credits_expired
FROM teams t
JOIN credit_transactions c ON c.team_id = t.team_id
    AND c.created_at >= %(since)s
    AND c.created_at < %(until)s
    AND c.transaction_type <> 'deduction'
JOIN credit_grants g ON g.grant_id = CASE c.transaction_type
    WHEN 'allocation' THEN c.transaction_id
    WHEN 'expiry' THEN c.grant_id
END
WHERE (%(organization_id)s::text IS NULL OR t.organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s)
GROUP BY g.category;

-- name: entries(organization_id, team_id, since, until, row_limit) :many
-- The oldest first, each with how many there are in all.
SELECT
    c.transaction_id,
    c.team_id,
    t.team_alias,
    c.created_at,
    c.transaction_type,
    c.credits_amount,
    c.credits_after,
    g.category,
    g.expires_at,
    c.job_id,
    c.source,
    c.reason,
    count(*) OVER () AS entries
FROM teams t
JOIN credit_transactions c ON c.team_id = t.team_id
    AND c.created_at >= %(since)s
    AND c.created_at < %(until)s
    AND c.transaction_type <> 'deduction'
LEFT JOIN credit_grants g ON g.grant_id = CASE c.transaction_type
    WHEN 'allocation' THEN c.transaction_id
    WHEN 'expiry' THEN c.grant_id
END
WHERE (%(organization_id)s::text IS NULL OR t.organization_id = %(organization_id)s)
  AND (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s)
ORDER BY c.created_at, c.team_id, c.entry_no
LIMIT %(row_limit)s;
