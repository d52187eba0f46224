-- Credits. Every statement that moves them locks the balance first and continues the ledger from it; the database
-- moves the balance and refuses what does not fit.

-- name: balance(team_id) :maybe
SELECT team_id, organization_id, credits_allocated, credits_used, credits_reserved, credits_remaining
FROM team_details
WHERE team_id = %(team_id)s;

-- name: add(team_id, credits_amount, reason, idempotency_key) :maybe
-- The new ledger row, or the one that the key has made already. Nothing where there is no such team.
WITH existing AS (
    SELECT * FROM credit_transactions WHERE idempotency_key = %(idempotency_key)s
),
balance AS (
    SELECT t.team_id, t.organization_id, c.last_entry_no, c.credits_remaining
    FROM teams t
    JOIN team_credits c USING (team_id)
    WHERE t.team_id = %(team_id)s AND NOT EXISTS (SELECT FROM existing)
    FOR UPDATE OF c
),
entry AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after,
        reason, idempotency_key
    )
    SELECT
        team_id, organization_id, last_entry_no + 1, 'allocation', %(credits_amount)s::bigint,
        credits_remaining, credits_remaining + %(credits_amount)s::bigint, %(reason)s, %(idempotency_key)s
    FROM balance
    RETURNING *
)
SELECT
    transaction_id, team_id, organization_id, job_id, transaction_type, credits_amount, credits_before, credits_after,
    reason, created_at
FROM (SELECT * FROM entry UNION ALL SELECT * FROM existing) AS written;

-- name: transactions(team_id, transaction_type, since, until, sort, after, row_limit) :many
-- The newest first, or the oldest; behind the transaction `after`: by the order in which the team's credits moved,
-- which clocks need not agree with.
SELECT
    transaction_id, team_id, organization_id, job_id, transaction_type, credits_amount, credits_before, credits_after,
    reason, created_at
FROM credit_transactions
WHERE team_id = %(team_id)s
  AND (%(transaction_type)s::text IS NULL OR transaction_type = %(transaction_type)s)
  AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
  AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s)
  AND CASE
      WHEN %(after)s::bigint IS NULL THEN true
      WHEN %(sort)s::text = 'oldest'
          THEN entry_no > (
              SELECT entry_no FROM credit_transactions WHERE team_id = %(team_id)s AND transaction_id = %(after)s
          )
      ELSE entry_no < (
          SELECT entry_no FROM credit_transactions WHERE team_id = %(team_id)s AND transaction_id = %(after)s
      )
  END
ORDER BY
    CASE WHEN %(sort)s::text = 'oldest' THEN entry_no END,
    entry_no DESC
LIMIT %(row_limit)s;

-- name: transaction(team_id, transaction_id) :maybe
SELECT transaction_id FROM credit_transactions WHERE team_id = %(team_id)s AND transaction_id = %(transaction_id)s;

-- name: free(team_id) :maybe
-- What a team has, with what it has free to start jobs.
SELECT * FROM credit_details WHERE team_id = %(team_id)s;

-- name: below(credits, organization_id) :many
-- The active teams of active organizations that have less than this free, the poorest first.
SELECT d.*
FROM credit_details d
JOIN teams t USING (team_id)
JOIN organizations o ON o.organization_id = d.organization_id
WHERE t.status = 'active'
  AND o.status = 'active'
  AND d.credits_free < %(credits)s::bigint
  AND (%(organization_id)s::text IS NULL OR d.organization_id = %(organization_id)s)
ORDER BY d.credits_free, d.team_id;
