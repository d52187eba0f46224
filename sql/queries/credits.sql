-- Credits. Every statement that moves them locks the balance first and continues the ledger from it; the database
-- moves the balance and refuses what does not fit.

-- name: balance(team_id) :maybe
-- With what expires next of what is left now.
SELECT
    d.team_id, d.organization_id, d.credits_allocated, d.credits_used, d.credits_reserved, d.credits_remaining,
    d.credits_overdraft, coalesce(next.credits_expiring, 0) AS credits_expiring, next.next_expiry_at
FROM team_details d
LEFT JOIN LATERAL (
    SELECT sum(credits_left)::bigint AS credits_expiring, expires_at AS next_expiry_at
    FROM grants_now(ARRAY[d.team_id::text])
    WHERE expires_at > clock_timestamp() AND credits_left > 0
    GROUP BY expires_at
    ORDER BY expires_at
    LIMIT 1
) AS next ON true
WHERE d.team_id = %(team_id)s;

-- name: balance_as_of(team_id, as_of) :maybe
-- What the ledger says of a moment: all entries up to the last one that was written by then. What was reserved, and
-- what the overdraft was, it does not know.
SELECT
    t.team_id,
    t.organization_id,
    coalesce(sum(c.credits_amount) FILTER (WHERE c.transaction_type NOT IN ('deduction', 'refund')), 0)::bigint
        AS credits_allocated,
    coalesce(-sum(c.credits_amount) FILTER (WHERE c.transaction_type IN ('deduction', 'refund')), 0)::bigint
        AS credits_used,
    NULL::bigint AS credits_reserved,
    coalesce(sum(c.credits_amount), 0)::bigint AS credits_remaining
FROM teams t
LEFT JOIN credit_transactions c ON c.team_id = t.team_id
    AND c.entry_no <= (
        SELECT max(entry_no) FROM credit_transactions WHERE team_id = %(team_id)s AND created_at <= %(as_of)s
    )
WHERE t.team_id = %(team_id)s
GROUP BY t.team_id;

-- name: enter(team_id, transaction_type, credits_amount, category, priority, expires_at, expires_in, reason, source, idempotency_key) :maybe
-- The new entry, or the one that the key has made already. Nothing where there is no such team, or it would have
-- expired already.
WITH existing AS (
    SELECT transaction_id FROM credit_transactions WHERE idempotency_key = %(idempotency_key)s
),
balance AS (
    SELECT t.team_id, t.organization_id, c.last_entry_no, c.credits_remaining
    FROM teams t
    CROSS JOIN LATERAL lock_balance(t.team_id::text) AS c
    WHERE t.team_id = %(team_id)s
      AND NOT EXISTS (SELECT FROM existing)
      AND c.last_entry_no IS NOT NULL
      AND coalesce(%(expires_at)s::timestamptz > statement_timestamp(), true)
),
entry AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after,
        category, priority, expires_at, reason, source, idempotency_key
    )
    SELECT
        team_id, organization_id, last_entry_no + 1, %(transaction_type)s, %(credits_amount)s::bigint,
        credits_remaining, credits_remaining + %(credits_amount)s::bigint, %(category)s, %(priority)s,
        coalesce(%(expires_at)s::timestamptz, statement_timestamp() + %(expires_in)s::interval),
        %(reason)s, %(source)s, %(idempotency_key)s
    FROM balance
    RETURNING transaction_id
)
SELECT transaction_id FROM entry UNION ALL SELECT transaction_id FROM existing;

-- name: revoke(grant_id, reason, idempotency_key) :one
-- The entry that ends a grant now, but for what open jobs hold of it, or the one that the key has made already; else
-- why there is none.
WITH existing AS (
    SELECT transaction_id FROM credit_transactions WHERE idempotency_key = %(idempotency_key)s
),
balance AS (
    SELECT g.team_id, locked.last_entry_no, locked.credits_remaining
    FROM credit_grants g
    CROSS JOIN LATERAL lock_balance(g.team_id::text) AS locked
    WHERE g.grant_id = %(grant_id)s AND NOT EXISTS (SELECT FROM existing)
),
entry AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, grant_id,
        reason, idempotency_key
    )
    SELECT
        t.team_id, t.organization_id, balance.last_entry_no + 1, 'expiry', - unheld.credits,
        balance.credits_remaining, balance.credits_remaining - unheld.credits, %(grant_id)s, %(reason)s,
        %(idempotency_key)s
    FROM balance
    JOIN teams t USING (team_id)
    CROSS JOIN LATERAL unheld_credits(t.team_id::text, %(grant_id)s) AS unheld
    WHERE unheld.credits IS NOT NULL
    RETURNING transaction_id
)
SELECT
    coalesce((SELECT transaction_id FROM entry), (SELECT transaction_id FROM existing)) AS transaction_id,
    (SELECT team_id FROM credit_grants WHERE grant_id = %(grant_id)s) AS team_id;

-- name: grants(team_id, is_all, after, row_limit) :many
-- What a team has left in the order in which it is used; with `is_all` then what it has nothing left of, the newest
-- first. Behind the grant `after`.
WITH open AS (
    SELECT now.grant_id, now.place, now.credits_taken, coalesce(due.credits, 0) AS credits_due
    FROM grants_now(ARRAY[%(team_id)s::text]) now
    LEFT JOIN due_expiries(ARRAY[%(team_id)s::text]) due USING (grant_id)
),
listed AS (
    SELECT
        g.grant_id,
        g.team_id,
        g.category,
        g.priority,
        g.credits_amount,
        g.credits_used + coalesce(open.credits_taken, 0) AS credits_used,
        g.credits_expired + coalesce(open.credits_due, 0) AS credits_expired,
        g.credits_left - coalesce(open.credits_taken + open.credits_due, 0) AS credits_left,
        g.created_at,
        g.expires_at,
        c.period,
        c.reason,
        c.source,
        open.place
    FROM credit_grants g
    JOIN credit_transactions c ON c.transaction_id = g.grant_id
    LEFT JOIN open ON open.grant_id = g.grant_id
    WHERE g.team_id = %(team_id)s AND (%(is_all)s::boolean OR g.credits_left > 0)
),
numbered AS (
    SELECT
        listed.*,
        row_number() OVER (ORDER BY CASE WHEN credits_left > 0 THEN place END, grant_id DESC) AS number
    FROM listed
    WHERE %(is_all)s::boolean OR credits_left > 0
)
SELECT
    grant_id, team_id, category, priority, credits_amount, credits_used, credits_expired, credits_left, created_at,
    expires_at, period, reason, source
FROM numbered
WHERE %(after)s::bigint IS NULL OR number > (SELECT number FROM numbered WHERE grant_id = %(after)s)
ORDER BY number
LIMIT %(row_limit)s;

-- name: refund(job_id, reason, source, idempotency_key) :one
-- The entry that gives back what a job was charged, or the one that the key has made already; else why there is none.
WITH existing AS (
    SELECT transaction_id FROM credit_transactions WHERE idempotency_key = %(idempotency_key)s
),
request AS (
    SELECT
        j.job_id,
        j.team_id,
        j.organization_id,
        j.credits_charged,
        CASE
            WHEN j.job_id IS NULL THEN 'job_not_found'
            WHEN coalesce(j.credits_charged, 0) = 0 THEN 'job_not_charged'
            WHEN EXISTS (
                SELECT FROM credit_transactions c WHERE c.job_id = j.job_id AND c.transaction_type = 'refund'
            ) THEN 'job_refunded_before'
        END AS refusal
    FROM (VALUES (%(job_id)s::uuid)) AS asked (job_id)
    LEFT JOIN jobs j USING (job_id)
),
balance AS (
    SELECT r.job_id, r.team_id, r.organization_id, r.credits_charged, c.last_entry_no, c.credits_remaining
    FROM request r
    CROSS JOIN LATERAL lock_balance(r.team_id::text) AS c
    WHERE r.refusal IS NULL AND NOT EXISTS (SELECT FROM existing)
),
entry AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before, credits_after,
        reason, source, idempotency_key
    )
    SELECT
        team_id, organization_id, last_entry_no + 1, job_id, 'refund', credits_charged, credits_remaining,
        credits_remaining + credits_charged, %(reason)s, %(source)s, %(idempotency_key)s
    FROM balance
    RETURNING transaction_id
)
SELECT
    coalesce((SELECT transaction_id FROM entry), (SELECT transaction_id FROM existing)) AS transaction_id,
    refusal
FROM request;

-- name: transactions(team_id, transaction_type, since, until, sort, after, row_limit) :many
-- The newest first, or the oldest; behind the transaction `after`: by the order in which the team's credits moved,
-- which clocks need not agree with.
SELECT
    transaction_id, team_id, organization_id, job_id, transaction_type, credits_amount, credits_before, credits_after,
    category, priority, expires_at, grant_id, reason, source, actor, role, command, created_at
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

-- name: transaction(transaction_id) :maybe
SELECT
    transaction_id, team_id, organization_id, job_id, transaction_type, credits_amount, credits_before, credits_after,
    category, priority, expires_at, grant_id, reason, source, actor, role, command, created_at
FROM credit_transactions
WHERE transaction_id = %(transaction_id)s;

-- name: free(team_id) :maybe
-- What a team has, with what it has free to start jobs.
SELECT * FROM credit_details WHERE team_id = %(team_id)s;

-- name: below(credits, organization_id) :many
-- The active teams of active organizations that can use less than this, the poorest first.
SELECT d.*
FROM credit_details d
JOIN teams t USING (team_id)
JOIN organizations o ON o.organization_id = d.organization_id
WHERE t.status = 'active'
  AND o.status = 'active'
  AND d.credits_free + d.credits_overdraft < %(credits)s::bigint
  AND (%(organization_id)s::text IS NULL OR d.organization_id = %(organization_id)s)
ORDER BY d.credits_free + d.credits_overdraft, d.team_id;

-- name: forecast(team_id, organization_id, days, row_limit) :many
-- The active teams of active organizations by the day on which their credits and their overdraft run out: if they go on
-- as in the last `days` (or since they were created, a day at least), lose what expires, and are granted what is
-- scheduled. No day means not within a year. Of one team, one organization or all.
WITH burn AS (
    SELECT team_id, -sum(credits_amount) AS credits
    FROM credit_transactions
    WHERE transaction_type IN ('deduction', 'refund')
      AND created_at >= now() - %(days)s::integer * interval '1 day'
      AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
      AND (%(organization_id)s::text IS NULL OR organization_id = %(organization_id)s)
    GROUP BY team_id
),
team AS MATERIALIZED (
    SELECT
        t.team_id, t.organization_id, b.credits_remaining, b.credits_overdraft, s.credits_amount AS next_amount,
        -- What is overdue is granted today.
        CASE
            WHEN s.next_on IS NOT NULL THEN greatest(s.next_on, period_start(s.every, current_date))
        END AS next_on,
        greatest(burn.credits, 0)
        / least(%(days)s, greatest(1, EXTRACT(epoch FROM now() - t.created_at) / 86400)) AS credits_per_day
    FROM teams t
    JOIN organizations o USING (organization_id)
    JOIN current_balances b USING (team_id)
    LEFT JOIN burn USING (team_id)
    LEFT JOIN credit_schedules s USING (team_id)
    WHERE t.status = 'active'
      AND o.status = 'active'
      AND (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s)
      AND (%(organization_id)s::text IS NULL OR t.organization_id = %(organization_id)s)
)
SELECT
    team_id,
    team.organization_id,
    team.credits_remaining,
    team.credits_overdraft,
    coalesce(forecast.credits_expiring, 0) AS credits_expiring,
    forecast.next_expiry_at,
    round(team.credits_per_day, 2) AS credits_per_day,
    forecast.days_left,
    current_date + forecast.days_left AS runs_out_on,
    team.next_on,
    team.next_amount
FROM team
CROSS JOIN LATERAL forecast_team(team_id::text, team.credits_per_day::double precision) AS forecast
ORDER BY forecast.days_left, team_id
LIMIT %(row_limit)s;

-- name: verify(team_id) :many
-- Everything in which the ledger, the balances and the jobs disagree, of one team or of all, at one moment: the rules
-- that the database enforces, proven from the data alone.
WITH entry AS (
    SELECT
        transaction_id, team_id, organization_id, entry_no, job_id, transaction_type, credits_amount, credits_before,
        credits_after, idempotency_key, period, category, priority, expires_at, grant_id, created_at,
        max(entry_no) FILTER (WHERE transaction_type <> 'deduction') OVER (PARTITION BY team_id) AS last_change_no,
        lag(entry_no, 1, 0::bigint) OVER chain AS previous_no,
        lag(credits_after, 1, 0::bigint) OVER chain AS previous_after
    FROM credit_transactions
    WHERE %(team_id)s::text IS NULL OR team_id = %(team_id)s
    WINDOW chain AS (PARTITION BY team_id ORDER BY entry_no)
),
ledger AS (
    SELECT
        team_id,
        max(entry_no) AS last_entry_no,
        sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')) AS credits_allocated,
        -sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')) AS credits_used,
        -- What need not be attributed to its grants yet.
        coalesce(-sum(credits_amount) FILTER (WHERE entry_no > greatest(last_change_no, last_use_no)), 0)
            AS credits_used_lately,
        coalesce(
            -sum(credits_amount) FILTER (
                WHERE transaction_type = 'deduction' AND entry_no <= greatest(last_change_no, last_use_no)
            ),
            0
        ) AS credits_attributed,
        max(credits_in_uses) AS credits_in_uses
    FROM entry
    LEFT JOIN (
        SELECT team_id, max(last_no) AS last_use_no, sum(credits) AS credits_in_uses
        FROM credit_uses
        GROUP BY team_id
    ) AS used USING (team_id)
    GROUP BY team_id
),
expiry AS (
    SELECT grant_id, -sum(credits_amount) AS credits FROM entry WHERE grant_id IS NOT NULL GROUP BY grant_id
),
grant_ AS (
    SELECT
        g.*,
        e.transaction_id,
        e.team_id AS entry_team_id,
        coalesce(x.credits, 0) AS credits_entered,
        e.transaction_type = 'refund' AS is_refund,
        CASE
            WHEN e.transaction_type = 'refund'
                THEN g.credits_amount <= e.credits_amount AND (g.category, g.priority) = ('paid', 50)
            ELSE (g.credits_amount, g.category::text, g.priority)
                = (e.credits_amount, coalesce(e.category::text, 'paid'), coalesce(e.priority, 50))
                AND (g.expires_at IS NOT DISTINCT FROM e.expires_at OR x.grant_id IS NOT NULL) -- it was revoked
        END AS is_as_entered
    FROM (SELECT * FROM credit_grants WHERE %(team_id)s::text IS NULL OR team_id = %(team_id)s) AS g
    FULL JOIN (
        SELECT *
        FROM entry
        WHERE transaction_type = 'refund'
           OR (transaction_type IN ('allocation', 'adjustment') AND credits_amount > 0)
    ) AS e ON e.transaction_id = g.grant_id
    LEFT JOIN expiry x ON x.grant_id = g.grant_id
),
holding AS (
    SELECT
        c.team_id,
        c.next_expiry_at,
        c.held_expired_at,
        coalesce(l.credits_allocated, 0) - coalesce(l.credits_used, 0) + coalesce(l.credits_used_lately, 0)
            AS credits_attributed,
        coalesce(sum(g.credits_left), 0) - c.credits_owed AS credits_in_grants,
        min(g.expires_at) FILTER (
            WHERE g.credits_left > 0
              AND (g.expires_at <= c.held_expired_at AND g.expires_at <= clock_timestamp()) IS NOT TRUE
        ) AS first_expiry_at,
        min(g.expires_at) FILTER (WHERE g.credits_left > 0 AND g.expires_at <= c.held_expired_at) AS first_held_at
    FROM team_credits c
    LEFT JOIN credit_grants g USING (team_id)
    LEFT JOIN ledger l USING (team_id)
    WHERE %(team_id)s::text IS NULL OR c.team_id = %(team_id)s
    GROUP BY c.team_id, l.credits_allocated, l.credits_used, l.credits_used_lately
),
job AS (
    SELECT
        team_id,
        sum(credits_held) FILTER (WHERE status IN ('pending', 'in_progress')) AS credits_held,
        min(created_at) FILTER (WHERE status IN ('pending', 'in_progress')) AS first_open_at,
        greatest(max(hold_no), max(raise_no), max(release_no)) AS last_hold_no
    FROM jobs
    WHERE %(team_id)s::text IS NULL OR team_id = %(team_id)s
    GROUP BY team_id
),
balance AS (
    SELECT t.team_id, b.field, b.expected, b.found
    FROM teams t
    LEFT JOIN team_credits c USING (team_id)
    LEFT JOIN ledger l USING (team_id)
    LEFT JOIN job j USING (team_id)
    CROSS JOIN LATERAL (
        VALUES
            ('credits_allocated', coalesce(l.credits_allocated, 0), c.credits_allocated),
            ('credits_used', coalesce(l.credits_used, 0), c.credits_used),
            ('last_entry_no', coalesce(l.last_entry_no, 0), c.last_entry_no),
            ('credits_reserved', coalesce(j.credits_held, 0), c.credits_reserved),
            ('last_hold_no', coalesce(j.last_hold_no, 0), c.last_hold_no)
    ) AS b (field, expected, found)
    WHERE (%(team_id)s::text IS NULL OR t.team_id = %(team_id)s) AND b.expected IS DISTINCT FROM b.found
)
SELECT team_id, field || ' differs' AS problem, NULL::bigint AS transaction_id, NULL::uuid AS job_id, expected, found
FROM balance
UNION ALL
SELECT coalesce(team_id, entry_team_id), 'grant is missing', transaction_id, NULL, NULL, NULL
FROM grant_
WHERE grant_id IS NULL AND NOT is_refund
UNION ALL
SELECT team_id, 'grant differs from its entry', grant_id, NULL, NULL, credits_amount
FROM grant_
WHERE grant_id IS NOT NULL AND (is_as_entered IS NOT TRUE OR team_id <> entry_team_id)
UNION ALL
SELECT team_id, 'expired credits of a grant differ', grant_id, NULL, credits_entered, credits_expired
FROM grant_
WHERE credits_expired <> credits_entered
UNION ALL
SELECT team_id, 'grant has negative credits', grant_id, NULL, 0, least(credits_left, credits_used)
FROM grant_
WHERE least(credits_left, credits_used) < 0
UNION ALL
SELECT team_id, 'grants differ from the ledger', NULL, NULL, credits_attributed, credits_in_grants
FROM holding
WHERE credits_in_grants <> credits_attributed
UNION ALL
SELECT team_id, 'use of grants differs from the ledger', NULL, NULL, credits_attributed, coalesce(credits_in_uses, 0)
FROM ledger
WHERE credits_attributed <> coalesce(credits_in_uses, 0)
UNION ALL
SELECT team_id, 'next_expiry_at differs', NULL, NULL, NULL, NULL
FROM holding
WHERE first_expiry_at < coalesce(next_expiry_at, 'infinity')
UNION ALL
SELECT team_id, 'expired credits are held by no job', NULL, NULL, NULL, NULL
FROM holding
LEFT JOIN job USING (team_id)
WHERE first_held_at <= coalesce(first_open_at, 'infinity')
UNION ALL
SELECT team_id, 'entry_no does not follow', transaction_id, job_id, previous_no + 1, entry_no
FROM entry
WHERE entry_no <> previous_no + 1
UNION ALL
SELECT team_id, 'credits_before does not follow', transaction_id, job_id, previous_after, credits_before
FROM entry
WHERE credits_before <> previous_after
UNION ALL
SELECT team_id, 'credits_after is not the sum', transaction_id, job_id, credits_before + credits_amount, credits_after
FROM entry
WHERE credits_after <> credits_before + credits_amount
UNION ALL
SELECT e.team_id, 'entry of no completed job of the team', e.transaction_id, e.job_id, NULL, NULL
FROM entry e
LEFT JOIN jobs j ON j.job_id = e.job_id AND j.team_id = e.team_id AND j.status = 'completed'
WHERE e.transaction_type IN ('deduction', 'refund') AND j.job_id IS NULL
UNION ALL
SELECT min(team_id::text), transaction_type || ' more than once', max(transaction_id), job_id, 1, count(*)
FROM entry
WHERE job_id IS NOT NULL
GROUP BY job_id, transaction_type
HAVING count(*) > 1
UNION ALL
SELECT min(team_id::text), 'idempotency_key more than once', max(transaction_id), NULL, 1, count(*)
FROM entry
WHERE idempotency_key IS NOT NULL
GROUP BY idempotency_key
HAVING count(*) > 1
UNION ALL
SELECT team_id, transaction_type || ' of a period more than once', max(transaction_id), NULL, 1, count(*)
FROM entry
WHERE period IS NOT NULL
GROUP BY team_id, period, transaction_type
HAVING count(*) > 1
UNION ALL
SELECT e.team_id, 'entry of another organization', e.transaction_id, e.job_id, NULL, NULL
FROM entry e
JOIN teams t USING (team_id)
WHERE e.organization_id <> t.organization_id
UNION ALL
SELECT team_id, 'ledger of no team', max(transaction_id), NULL, 0, count(*)
FROM entry e
WHERE NOT EXISTS (SELECT FROM teams t WHERE t.team_id = e.team_id)
GROUP BY team_id
UNION ALL
SELECT team_id, 'balance of no team', NULL, NULL, NULL, credits_remaining
FROM team_credits c
WHERE NOT EXISTS (SELECT FROM teams t WHERE t.team_id = c.team_id)
  AND (%(team_id)s::text IS NULL OR team_id = %(team_id)s)
UNION ALL
-- A team that was purged has left nothing; what is of one that came back to a part of its ledger is older.
SELECT e.team_id, 'entry from before a purge of its team', max(e.transaction_id), NULL, 0, count(*)
FROM entry e
JOIN audit_log p ON p.action = 'purge'
    AND p.created_at > e.created_at
    AND p.organization_id = e.organization_id
    AND (p.team_id IS NULL OR p.team_id = e.team_id)
GROUP BY e.team_id
UNION ALL
SELECT
    e.team_id, e.transaction_type || ' is not what its job was charged', e.transaction_id, e.job_id, j.credits_charged,
    abs(e.credits_amount)
FROM entry e
JOIN jobs j USING (job_id)
WHERE e.transaction_type IN ('deduction', 'refund') AND abs(e.credits_amount) <> j.credits_charged
UNION ALL
SELECT j.team_id, 'completed job without its deduction', NULL, j.job_id, j.credits_charged, 0
FROM jobs j
LEFT JOIN entry e ON e.job_id = j.job_id AND e.transaction_type = 'deduction'
WHERE j.status = 'completed'
  AND e.job_id IS NULL
  AND (%(team_id)s::text IS NULL OR j.team_id = %(team_id)s)
ORDER BY team_id, transaction_id, problem;

-- name: lock_to_repair(team_ids) :many
-- A statement of its own, so that `repair` sees what was committed before it had the locks.
SELECT team_id FROM team_credits WHERE team_id = ANY (%(team_ids)s::text[]) ORDER BY team_id FOR UPDATE;

-- name: repair(team_ids) :many
-- Makes the balances that differ from their ledger what it says, and says by which adjustment (to be entered next) what
-- remains stays as it was. Left alone are teams whose entries do not add up to their last credits_after, or that have
-- more reserved by open jobs than credits. Afterwards no more is reserved than the ledger has: `reserve_open_jobs` goes
-- with it.
WITH ledger AS (
    SELECT
        team_id,
        max(entry_no) AS last_entry_no,
        coalesce(sum(credits_amount) FILTER (WHERE transaction_type NOT IN ('deduction', 'refund')), 0) AS allocated,
        coalesce(-sum(credits_amount) FILTER (WHERE transaction_type IN ('deduction', 'refund')), 0) AS used,
        sum(credits_amount) AS remaining,
        (array_agg(credits_after ORDER BY entry_no DESC))[1] AS last_after
    FROM credit_transactions
    WHERE team_id = ANY (%(team_ids)s::text[])
    GROUP BY team_id
),
job AS (
    SELECT
        team_id,
        sum(credits_held) FILTER (WHERE status IN ('pending', 'in_progress')) AS credits_held,
        greatest(max(hold_no), max(raise_no), max(release_no)) AS last_hold_no
    FROM jobs
    WHERE team_id = ANY (%(team_ids)s::text[])
    GROUP BY team_id
),
wrong AS (
    SELECT
        c.team_id,
        c.credits_remaining,
        coalesce(l.last_entry_no, 0) AS last_entry_no,
        coalesce(l.allocated, 0) AS allocated,
        coalesce(l.used, 0) AS used,
        coalesce(l.remaining, 0)::bigint AS ledger_remaining,
        coalesce(j.credits_held, 0) AS credits_held,
        c.credits_overdraft,
        coalesce(j.last_hold_no, 0) AS last_hold_no
    FROM team_credits c
    LEFT JOIN ledger l USING (team_id)
    LEFT JOIN job j USING (team_id)
    WHERE c.team_id = ANY (%(team_ids)s::text[])
      AND (c.credits_allocated, c.credits_used, c.last_entry_no, c.credits_reserved, c.last_hold_no)
          <> (
              coalesce(l.allocated, 0), coalesce(l.used, 0), coalesce(l.last_entry_no, 0), coalesce(j.credits_held, 0),
              coalesce(j.last_hold_no, 0)
          )
      AND coalesce(l.remaining = l.last_after, true)
      AND coalesce(c.credits_remaining + c.credits_overdraft >= coalesce(j.credits_held, 0), true)
      AND coalesce(l.used, 0) BETWEEN 0 AND 9223372036854775807 - c.credits_remaining
),
restored AS (
    UPDATE team_credits c
    SET credits_allocated = wrong.allocated,
        credits_used = wrong.used,
        credits_reserved = least(
            wrong.credits_held, greatest(wrong.ledger_remaining + wrong.credits_overdraft, 0)
        ),
        last_entry_no = wrong.last_entry_no,
        last_hold_no = wrong.last_hold_no
    FROM wrong
    WHERE c.team_id = wrong.team_id
    RETURNING wrong.*
)
SELECT
    team_id,
    credits_remaining - ledger_remaining AS credits_amount,
    'Repair: the ledger said ' || ledger_remaining || ', the balance ' || credits_remaining AS reason
FROM restored
ORDER BY team_id;

-- name: reserve_open_jobs(team_ids) :many
UPDATE team_credits c
SET credits_reserved = open_job.credits
FROM (
    SELECT team_id, sum(credits_held) AS credits
    FROM jobs
    WHERE team_id = ANY (%(team_ids)s::text[]) AND status IN ('pending', 'in_progress')
    GROUP BY team_id
) AS open_job
WHERE c.team_id = open_job.team_id
RETURNING c.team_id;

-- name: rebuild_grants(team_ids) :many
SELECT rebuild_grants(team_id) FROM unnest(%(team_ids)s::text[]) AS asked (team_id);

-- name: schedule(team_id, credits_amount, every, mode, credits_max, rollover, starts_on) :maybe
-- Sets the team's schedule. Its first period is the one of `starts_on`, else the next one after today, by the database;
-- a schedule that is changed goes on with its next period, as far as that is one of its new length.
INSERT INTO credit_schedules (team_id, credits_amount, every, mode, credits_max, rollover, next_on)
SELECT
    team_id, %(credits_amount)s, %(every)s, %(mode)s, %(credits_max)s, %(rollover)s,
    CASE
        WHEN %(starts_on)s::date IS NOT NULL THEN period_start(%(every)s, %(starts_on)s)
        ELSE period_after(%(every)s, period_start(%(every)s, (now() AT TIME ZONE 'UTC')::date), 1)
    END
FROM teams
WHERE team_id = %(team_id)s
ON CONFLICT (team_id) DO UPDATE
SET credits_amount = excluded.credits_amount,
    mode = excluded.mode,
    credits_max = excluded.credits_max,
    rollover = excluded.rollover,
    next_on = CASE
        WHEN %(starts_on)s::date IS NULL AND credit_schedules.every = excluded.every THEN credit_schedules.next_on
        ELSE excluded.next_on
    END,
    every = excluded.every,
    updated_at = now()
RETURNING team_id;

-- name: unschedule(team_id) :maybe
DELETE FROM credit_schedules WHERE team_id = %(team_id)s RETURNING team_id;

-- name: today() :one
-- By the clock of the database, which all machines share.
SELECT (now() AT TIME ZONE 'UTC')::date AS today;

-- name: due(as_of, every, organization_id, team_id, after, row_limit) :many
-- The next teams to be allocated to, or whose credits have expired, by their ids (behind `after`), with all of their
-- rows locked in this order, and whether they have credits that have expired. A statement of its own, so that `expire`
-- and `allocate` see what was committed before it had the locks.
WITH due AS (
    (
        SELECT s.team_id
        FROM credit_schedules s
        WHERE s.next_on <= %(as_of)s
          AND s.team_id > %(after)s
          AND (%(every)s::text IS NULL OR s.every = %(every)s)
          AND (%(team_id)s::text IS NULL OR s.team_id = %(team_id)s)
          AND (
              %(organization_id)s::text IS NULL
              OR s.team_id IN (SELECT t.team_id FROM teams t WHERE t.organization_id = %(organization_id)s)
          )
        ORDER BY s.team_id
        LIMIT %(row_limit)s
    )
    UNION
    (
        SELECT c.team_id
        FROM team_credits c
        WHERE c.next_expiry_at <= clock_timestamp()
          AND c.team_id > %(after)s
          AND (%(team_id)s::text IS NULL OR c.team_id = %(team_id)s)
          AND (
              %(organization_id)s::text IS NULL
              OR c.team_id IN (SELECT t.team_id FROM teams t WHERE t.organization_id = %(organization_id)s)
          )
        ORDER BY c.team_id
        LIMIT %(row_limit)s
    )
    ORDER BY team_id
    LIMIT %(row_limit)s
)
-- Team by team, in the order of `due`: joined as a whole, each chunk would read the balances of all.
SELECT due.team_id, balance.is_expiring
FROM due
LEFT JOIN LATERAL (SELECT FROM credit_schedules WHERE team_id = due.team_id FOR UPDATE) AS schedule ON true
LEFT JOIN LATERAL (
    SELECT next_expiry_at <= clock_timestamp() OR held_expired_at IS NOT NULL AS is_expiring
    FROM team_credits
    WHERE team_id = due.team_id
    FOR UPDATE
) AS balance ON true
ORDER BY due.team_id;

-- name: expire(team_ids, is_listing) :one
-- Enters what has expired of teams that `due` has locked.
SELECT
    coalesce(sum(credits), 0)::bigint AS credits_expired,
    coalesce(
        json_agg(
            json_build_object('team_id', team_id, 'period', NULL, 'credits_granted', 0, 'credits_expired', credits)
            ORDER BY team_id
        ) FILTER (WHERE %(is_listing)s::boolean),
        '[]'
    ) AS grants
FROM expire_credits(%(team_ids)s::text[], and_released => true);

-- name: allocate(team_ids, as_of, catch_up, every, is_listing) :one
-- Grants one period, the first that is due, to each of the teams that `due` has locked: those that are due still. Who
-- is suspended, has a balance that is not that of its last entry, or would have more credits than there are numbers, is
-- left as it is. Periods before the last `catch_up` missed ones are forgone. A reset grants credits that expire with
-- their period, and once more what has expired of the period before, as far as that rolls over.
WITH due AS (
    SELECT
        s.team_id, s.credits_amount, s.every, s.mode, s.credits_max, s.rollover,
        greatest(
            s.next_on, period_after(s.every, period_start(s.every, %(as_of)s), - %(catch_up)s::integer)
        ) AS first_day
    FROM unnest(%(team_ids)s::text[]) AS asked (team_id)
    CROSS JOIN LATERAL (SELECT * FROM credit_schedules WHERE team_id = asked.team_id OFFSET 0) AS s
    WHERE s.next_on <= %(as_of)s AND (%(every)s::text IS NULL OR s.every = %(every)s)
),
plan AS (
    SELECT
        due.team_id, t.organization_id, due.every, due.first_day, b.last_entry_no, b.credits_remaining,
        named.period, named.period_before, named.following,
        CASE WHEN due.mode = 'reset' THEN named.following::timestamp AT TIME ZONE 'UTC' END AS expires_at,
        CASE
            WHEN before.period IS NOT NULL OR due.rollover IS NULL THEN 0
            ELSE least(
                due.rollover,
                (
                    SELECT coalesce(-sum(e.credits_amount), 0)
                    FROM credit_transactions g
                    JOIN credit_transactions e ON e.grant_id = g.transaction_id AND e.created_at >= g.expires_at
                    WHERE g.team_id = due.team_id AND g.period = named.period_before
                )
            )
        END AS rolls_over,
        CASE
            WHEN before.period IS NOT NULL THEN 0 -- granted before its schedule was set anew
            WHEN due.mode = 'top-up' THEN greatest(
                due.credits_amount + b.credits_owed - (
                    SELECT coalesce(sum(g.credits_left), 0)
                    FROM grants_at(due.team_id::text, b.credits_remaining, b.credits_owed) g
                    WHERE g.category = 'included' AND (g.expires_at IS NULL OR g.expires_at > now())
                ),
                0
            )
            WHEN due.mode = 'add' THEN greatest(
                least(due.credits_amount, coalesce(due.credits_max - b.credits_remaining, due.credits_amount)), 0
            )
            ELSE due.credits_amount
        END AS grants,
        CASE
            WHEN o.status <> 'active' THEN 'organization_suspended'
            WHEN t.status <> 'active' THEN 'team_suspended'
            WHEN b.credits_allocated
                > 9223372036854775807 - due.credits_amount - coalesce(due.rollover, 0) + least(b.credits_remaining, 0)
                THEN 'out_of_range'
            WHEN b.is_sound IS NOT TRUE THEN 'balance_differs'
        END AS refusal
    FROM due
    CROSS JOIN LATERAL (
        SELECT
            period_name(due.every, due.first_day) AS period,
            period_name(due.every, period_after(due.every, due.first_day, -1)) AS period_before,
            period_after(due.every, due.first_day, 1) AS following
    ) AS named
    CROSS JOIN LATERAL (SELECT organization_id, status FROM teams WHERE team_id = due.team_id OFFSET 0) AS t
    JOIN organizations o USING (organization_id)
    LEFT JOIN LATERAL (SELECT * FROM checked_balances WHERE team_id = due.team_id OFFSET 0) AS b ON true
    LEFT JOIN credit_transactions before ON before.team_id = due.team_id AND before.period = named.period
),
granted AS (
    SELECT * FROM plan WHERE refusal IS NULL
),
entry AS (
    INSERT INTO credit_transactions (
        team_id, organization_id, entry_no, transaction_type, credits_amount, credits_before, credits_after, category,
        expires_at, period, reason
    )
    SELECT
        team_id, organization_id, last_entry_no + 1, 'allocation', rolls_over, credits_remaining,
        credits_remaining + rolls_over, 'included', expires_at, NULL,
        'Rolled over from ' || period_before
    FROM granted
    WHERE rolls_over > 0
    UNION ALL
    SELECT
        team_id, organization_id, last_entry_no + 1 + (rolls_over > 0)::integer, 'allocation', grants,
        credits_remaining + rolls_over, credits_remaining + rolls_over + grants, 'included', expires_at, period,
        'Allocation for ' || period
    FROM granted
    WHERE grants > 0
),
moved_on AS (
    UPDATE credit_schedules s SET next_on = granted.following FROM granted WHERE s.team_id = granted.team_id
)
SELECT
    count(*) FILTER (WHERE refusal IS NULL AND grants > 0) AS granted,
    count(*) FILTER (WHERE refusal IS NULL AND grants = 0) AS full,
    coalesce(sum(grants + rolls_over) FILTER (WHERE refusal IS NULL), 0) AS credits_granted,
    coalesce(
        array_agg(team_id::text ORDER BY team_id) FILTER (WHERE refusal IS NULL AND following <= %(as_of)s), '{}'
    ) AS still_due,
    coalesce(
        array_agg(team_id::text) FILTER (WHERE refusal IS NULL AND expires_at <= clock_timestamp()), '{}'
    ) AS expiring,
    coalesce(
        json_agg(
            json_build_object('team_id', team_id, 'period', period, 'reason', refusal) ORDER BY team_id
        ) FILTER (WHERE refusal IS NOT NULL),
        '[]'
    ) AS refused,
    coalesce(
        json_agg(
            json_build_object(
                'team_id', team_id, 'period', period, 'credits_granted', grants + rolls_over, 'credits_expired', 0
            )
            ORDER BY team_id
        ) FILTER (WHERE %(is_listing)s::boolean AND refusal IS NULL AND grants > 0),
        '[]'
    ) AS grants
FROM plan;
