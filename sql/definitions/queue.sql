-- The queue: jobs are submitted, taken by workers, and put back where a worker is lost.
--
-- Lock order: a job's row before its row in the queue, and that before balances and the counters of limits. Who takes
-- jobs waits for no job: what another holds is skipped. An application that submits jobs has a search_path of its own.


-- Begins jobs of one team and group: of those that are new, in the order of the JSON array `new_jobs`, as many as there
-- is room for within the limits and as there are credits for; and says what has become of each. One that brings its
-- `request` is queued for workers, under a lease until it expires; any other is in progress from now on, under a lease
-- of `lease_seconds`.
CREATE FUNCTION begin_jobs(of_team text, of_group text, new_jobs jsonb, lease_seconds double precision DEFAULT NULL)
RETURNS TABLE (
    job_id uuid, outcome text, limit_reached jsonb, credits_held bigint, organization_id text, model_names text[],
    model_prices jsonb, model_keys jsonb, existing_job_id uuid, existing_status text, existing_request_hash text
)
LANGUAGE plpgsql SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH asked AS (
        SELECT
            job.place,
            job.job_id,
            coalesce(job.job_type, 'completion') AS job_type,
            job.external_task_id,
            coalesce(job.metadata, '{}') AS metadata,
            job.idempotency_key,
            -- What was asked under a key is told from something else by all of it.
            CASE
                WHEN job.request IS NULL OR job.idempotency_key IS NULL THEN job.request_hash
                ELSE encode(
                    sha256(
                        convert_to(
                            jsonb_build_array(
                                of_team, of_group, job.job_type, job.external_task_id, job.metadata, job.request,
                                job.purpose
                            )::text,
                            'UTF8'
                        )
                    ),
                    'hex'
                )
            END AS request_hash,
            job.request,
            job.purpose,
            coalesce(job.timeout_seconds, 300) AS timeout_seconds,
            coalesce(job.priority, 50) AS priority,
            due.due_at,
            due.due_at + coalesce(job.expires_seconds, 604800) * interval '1 second' AS expires_at
        FROM ROWS FROM (
            jsonb_to_recordset(new_jobs) AS (
                job_id uuid, job_type text, external_task_id text, metadata jsonb, idempotency_key text,
                request_hash text, request jsonb, purpose text, timeout_seconds integer, priority smallint,
                due_at timestamptz, due_seconds double precision, expires_seconds double precision
            )
        ) WITH ORDINALITY AS job (
            job_id, job_type, external_task_id, metadata, idempotency_key, request_hash, request, purpose,
            timeout_seconds, priority, due_at, due_seconds, expires_seconds, place
        )
        CROSS JOIN LATERAL (
            SELECT greatest(job.due_at, now() + job.due_seconds * interval '1 second', now()) AS due_at
        ) AS due
    ),
    scope AS (
        SELECT * FROM job_scope(of_team, of_group)
    ),
    known AS ( -- by its key; or by its id, where it was begun before, and the answer lost
        SELECT asked.place, j.job_id, j.status, j.request_hash, j.credits_held
        FROM asked
        CROSS JOIN LATERAL (
            SELECT job_id, status::text, request_hash, credits_held
            FROM jobs
            WHERE job_id = asked.job_id
            UNION
            SELECT job_id, status::text, request_hash, credits_held
            FROM jobs
            WHERE idempotency_key = asked.idempotency_key AND status NOT IN ('failed', 'cancelled')
            LIMIT 1
        ) j
    ),
    price AS (
        SELECT kind.job_type, p.price_id, coalesce(p.hold, 1) AS hold
        FROM (SELECT DISTINCT job_type FROM asked) AS kind
        CROSS JOIN scope
        LEFT JOIN LATERAL price_of(scope.team_id, scope.organization_id, of_group, kind.job_type) p ON true
    ),
    new AS (
        SELECT
            asked.*,
            price.price_id,
            price.hold,
            row_number() OVER (ORDER BY place) AS jobs_so_far,
            sum(price.hold) OVER (ORDER BY place) AS credits_so_far
        FROM asked
        JOIN price USING (job_type)
        WHERE place NOT IN (SELECT place FROM known)
    ),
    -- How many may run at once, of those that are queued, is asked when they are taken.
    hard_limit AS (
        SELECT l.*
        FROM scope
        CROSS JOIN LATERAL hard_limits(scope.team_id, scope.organization_id, of_group) l
        WHERE scope.refusal IS NULL
          AND (l.per <> 'concurrent' OR EXISTS (SELECT FROM asked WHERE request IS NULL))
    ),
    room AS (
        SELECT
            coalesce(min(room_jobs), 'Infinity') AS jobs,
            coalesce(min(room_credits), 'Infinity') AS credits
        FROM hard_limit
    ),
    allowed AS (
        SELECT new.*
        FROM new, room
        WHERE new.jobs_so_far <= room.jobs AND new.credits_so_far <= room.credits
    ),
    balance AS (
        SELECT scope.team_id, scope.organization_id, locked.credits_usable, locked.last_hold_no
        FROM scope
        CROSS JOIN LATERAL lock_balance(scope.team_id) AS locked
        WHERE refusal IS NULL AND EXISTS (SELECT FROM allowed)
    ),
    begun AS (
        INSERT INTO jobs (
            job_id, team_id, organization_id, job_type, status, external_task_id, model_groups_used, price_ids,
            metadata, started_at, lease_expires_at, idempotency_key, request_hash, credits_held, hold_no, is_queued
        )
        SELECT
            job.job_id, balance.team_id, balance.organization_id, job.job_type,
            CASE WHEN job.request IS NULL THEN 'in_progress' ELSE 'pending' END, job.external_task_id,
            ARRAY[of_group], ARRAY[job.price_id], job.metadata, CASE WHEN job.request IS NULL THEN now() END,
            CASE WHEN job.request IS NULL THEN now() + lease_seconds * interval '1 second' ELSE job.expires_at END,
            job.idempotency_key, job.request_hash, job.hold, balance.last_hold_no + 1, job.request IS NOT NULL
        FROM balance
        JOIN allowed job ON job.credits_so_far <= balance.credits_usable
        RETURNING jobs.job_id
    ),
    queued AS (
        INSERT INTO job_queue (
            job_id, team_id, group_name, state, priority, due_at, expires_at, timeout_seconds, request, purpose
        )
        SELECT
            job.job_id, of_team, of_group, CASE WHEN job.due_at > now() THEN 'scheduled' ELSE 'waiting' END,
            job.priority, job.due_at, job.expires_at, job.timeout_seconds, job.request, job.purpose
        FROM begun
        JOIN allowed job USING (job_id)
        WHERE job.request IS NOT NULL
        ORDER BY job.place
    )
    SELECT
        asked.job_id,
        CASE
            WHEN known.job_id = asked.job_id THEN 'begun'
            WHEN known.request_hash <> asked.request_hash AND asked.request IS NOT NULL THEN 'key_reused'
            WHEN known.job_id IS NOT NULL THEN 'key_in_use'
            WHEN scope.refusal IS NOT NULL THEN scope.refusal
            WHEN begun.job_id IS NOT NULL THEN 'begun'
            WHEN asked.place NOT IN (SELECT place FROM allowed) THEN 'limit_reached'
            ELSE 'insufficient_credits'
        END,
        (
            SELECT limit_record(l.limit_id)
            FROM hard_limit l
            WHERE l.room_jobs < new.jobs_so_far OR l.room_credits < new.credits_so_far
            ORDER BY l.room_at DESC
            LIMIT 1
        ),
        coalesce(known.credits_held, price.hold),
        scope.organization_id,
        scope.model_names,
        scope.model_prices,
        scope.model_keys,
        known.job_id,
        known.status,
        known.request_hash
    FROM asked
    CROSS JOIN scope
    JOIN price USING (job_type)
    LEFT JOIN known USING (place)
    LEFT JOIN new USING (place)
    LEFT JOIN begun ON begun.job_id = asked.job_id
    ORDER BY place;

    -- Whoever is busy asks by itself when it has room.
    IF jsonb_path_exists(new_jobs, '$[*].request') THEN
        PERFORM pg_notify('saasllm_jobs', '')
        FROM (SELECT FROM workers WHERE is_idle LIMIT 1) AS waiting;
    END IF;
END
$$;

-- For applications: submits a job in their own transaction, and gives its id. `request` is a chat in OpenAI's format:
-- an object with `messages`, and `temperature`, `tools` and so on. It waits until it is due, and expires so long after.
-- Under an idempotency key that is in use, it is the job that there is. Raises SL013 where the job is refused, with the
-- reason as DETAIL, as `saasllm job list --refused` has it.
CREATE FUNCTION submit_job(
    team_id          text,
    group_name       text,
    request          jsonb,
    job_type         text        DEFAULT 'completion',
    external_task_id text        DEFAULT NULL,
    metadata         jsonb       DEFAULT '{}',
    purpose          text        DEFAULT NULL,
    priority         integer     DEFAULT 50,
    due_at           timestamptz DEFAULT NULL,
    expires          interval    DEFAULT '7 days',
    timeout          interval    DEFAULT '5 minutes',
    idempotency_key  text        DEFAULT NULL
)
RETURNS uuid
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    begun record;
BEGIN
    IF jsonb_typeof(request -> 'messages') IS DISTINCT FROM 'array' THEN
        RAISE EXCEPTION 'the request has no messages'
            USING ERRCODE = 'SL013', DETAIL = 'invalid_request',
                  HINT = 'Give a chat in OpenAI''s format: {"messages": [{"role": "user", "content": "..."}]}';
    END IF;
    FOR attempt IN 1..5 LOOP
        BEGIN
            SELECT * INTO begun
            FROM begin_jobs(
                team_id,
                group_name,
                jsonb_build_array(
                    jsonb_build_object(
                        'job_id', new_id(), 'job_type', job_type, 'external_task_id', external_task_id,
                        'metadata', metadata, 'idempotency_key', idempotency_key, 'request', request,
                        'purpose', purpose, 'timeout_seconds', ceil(extract(epoch FROM timeout))::integer,
                        'priority', priority, 'due_at', due_at, 'expires_seconds', extract(epoch FROM expires)
                    )
                )
            );
            EXIT;
        EXCEPTION WHEN unique_violation OR SQLSTATE 'SL011' THEN
            -- Another has just used the same key, or what room there was within a limit: asked again, it is known.
            IF attempt = 5 THEN
                RAISE;
            END IF;
        END;
    END LOOP;
    CASE begun.outcome
        WHEN 'begun' THEN
            RETURN begun.job_id;
        WHEN 'key_in_use' THEN
            RETURN begun.existing_job_id;
        ELSE
            RAISE EXCEPTION 'the job of team % is refused: %', team_id, replace(begun.outcome, '_', ' ')
                USING ERRCODE = 'SL013', DETAIL = begun.outcome;
    END CASE;
END
$$;


-- Takes up to `most` waiting jobs for a worker, under a lease. Teams take turns, each with one of its groups: a worker
-- goes on behind the last turn, and takes as many of each as is fair, however many of them wait. What may not run now
-- keeps waiting: a team that is suspended, or whose balance is not that of its ledger; a group without a model; more at
-- once than a limit says. Of jobs whose worker has died twice it takes one, and only where it runs none
-- (`with_suspect`): should that be what it dies of, the others of them do not die with it.
CREATE FUNCTION take_jobs(of_worker bigint, most integer, lease_seconds double precision, with_suspect boolean)
RETURNS TABLE (
    job_id uuid, team_id text, group_name text, request jsonb, purpose text, timeout_seconds integer,
    is_suspect boolean, model_names text[], model_prices jsonb, model_keys jsonb
)
LANGUAGE plpgsql SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    worker        workers;
    turn_team     text;
    turn_group    text;
    organization  text;
    teams         text[] := '{}';
    organizations text[] := '{}';
    groups        text[] := '{}';
    turns         integer := 0;
    is_wrapped    boolean := false;
BEGIN
    SELECT * INTO worker FROM workers WHERE worker_id = of_worker FOR UPDATE;
    IF NOT FOUND THEN -- it was given up and forgotten, and will say that it is back
        RETURN;
    END IF;

    UPDATE job_queue
    SET state = 'waiting'
    WHERE job_id IN (
        SELECT job_id
        FROM job_queue
        WHERE state = 'scheduled' AND due_at <= statement_timestamp() -- by the index
        ORDER BY due_at
        LIMIT 1000
        FOR UPDATE SKIP LOCKED
    );

    turn_team := worker.last_team_id;
    turn_group := worker.last_group_name;
    WHILE cardinality(teams) < most AND turns < 1000 LOOP -- of those that may not run there may be very many
        turns := turns + 1;
        SELECT q.team_id, q.group_name
        INTO turn_team, turn_group
        FROM job_queue q
        WHERE q.state = 'waiting' AND (q.team_id, q.group_name) > (turn_team, turn_group)
        ORDER BY q.team_id, q.group_name
        LIMIT 1;

        IF NOT FOUND AND NOT is_wrapped THEN
            is_wrapped := true;
            turn_team := '';
            turn_group := '';
            CONTINUE;
        END IF;
        EXIT WHEN NOT FOUND
            OR (is_wrapped AND (turn_team, turn_group) > (worker.last_team_id, worker.last_group_name));

        SELECT t.organization_id
        INTO organization
        FROM teams t
        JOIN organizations o USING (organization_id)
        JOIN team_model_groups a USING (team_id)
        JOIN model_groups g USING (group_name)
        WHERE t.team_id = turn_team
          AND a.group_name = turn_group
          AND t.status = 'active'
          AND o.status = 'active'
          AND g.status = 'active'
          AND EXISTS (SELECT FROM model_group_models m WHERE m.group_name = turn_group AND m.is_active)
          AND EXISTS (SELECT FROM checked_balances c WHERE c.team_id = turn_team AND c.is_sound)
          AND turn_team = coalesce(worker.team_id, turn_team)
          AND turn_group = coalesce(worker.group_name, turn_group)
          AND t.organization_id = coalesce(worker.organization_id, t.organization_id);
        IF FOUND THEN
            teams := teams || turn_team;
            organizations := organizations || organization;
            groups := groups || turn_group;
        END IF;
    END LOOP;
    UPDATE workers
    SET last_team_id = coalesce(turn_team, ''),
        last_group_name = coalesce(turn_group, ''),
        is_idle = cardinality(teams) = 0 AND is_wrapped,
        has_seen_all = is_wrapped,
        seen_at = clock_timestamp()
    WHERE worker_id = of_worker;
    IF cardinality(teams) = 0 THEN
        RETURN;
    END IF;

    RETURN QUERY
    WITH turn AS (
        SELECT turn.*, g.model_names, g.model_prices, keys_of(turn.team_id, turn.organization_id) AS model_keys
        FROM unnest(teams, organizations, groups) AS turn (team_id, organization_id, group_name)
        CROSS JOIN LATERAL (
            SELECT model_names, model_prices FROM callable_groups WHERE group_name = turn.group_name OFFSET 0
        ) AS g
    ),
    room AS ( -- within the limits of how many may run at once
        SELECT turn.team_id, turn.group_name, l.limit_id, l.room_jobs
        FROM turn
        CROSS JOIN LATERAL hard_limits(turn.team_id, turn.organization_id, turn.group_name) l
        WHERE l.per = 'concurrent'
    ),
    locked AS (
        SELECT turn.team_id, turn.group_name, turn.model_names, turn.model_prices, turn.model_keys, q.*
        FROM turn
        CROSS JOIN LATERAL (
            SELECT q.job_id, q.priority, q.queue_no, q.losses >= 2 AS is_suspect
            FROM job_queue q
            JOIN jobs j USING (job_id)
            WHERE q.state = 'waiting'
              AND q.team_id = turn.team_id
              AND q.group_name = turn.group_name
              -- Those that wait for room of their team take none of their organization's from others.
              AND NOT EXISTS (
                  SELECT
                  FROM room
                  WHERE room.team_id = turn.team_id AND room.group_name = turn.group_name AND room.room_jobs < 1
              )
              AND (with_suspect OR q.losses < 2)
              AND j.lease_expires_at > clock_timestamp()
            ORDER BY q.priority, q.queue_no
            LIMIT (most + cardinality(teams) - 1) / cardinality(teams)
            FOR UPDATE SKIP LOCKED
        ) AS q
    ),
    ranked AS (
        SELECT
            locked.*,
            row_number() OVER (PARTITION BY team_id ORDER BY priority, queue_no) AS place,
            count(*) FILTER (WHERE is_suspect) OVER (ORDER BY is_suspect DESC, queue_no) AS suspects
        FROM locked
    ),
    crowded AS (
        SELECT job_id
        FROM (
            SELECT
                ranked.job_id,
                row_number() OVER (PARTITION BY room.limit_id ORDER BY ranked.place, ranked.queue_no)
                    > room.room_jobs AS is_over
            FROM room
            JOIN ranked USING (team_id, group_name)
        ) AS counted
        WHERE is_over
    ),
    chosen AS (
        SELECT *
        FROM ranked
        WHERE (NOT is_suspect OR suspects = 1)
          AND job_id NOT IN (SELECT job_id FROM crowded)
        ORDER BY place, queue_no
        LIMIT most
    ),
    taken AS (
        UPDATE job_queue q
        SET state = 'running',
            worker_id = of_worker
        FROM chosen
        WHERE q.job_id = chosen.job_id
        RETURNING q.job_id, q.request, q.purpose, q.timeout_seconds
    ),
    started AS (
        UPDATE jobs j
        SET status = 'in_progress',
            started_at = clock_timestamp(),
            lease_expires_at = clock_timestamp() + lease_seconds * interval '1 second'
        FROM chosen
        WHERE j.job_id = chosen.job_id
        RETURNING j.job_id
    )
    SELECT
        chosen.job_id, chosen.team_id, chosen.group_name, taken.request, taken.purpose, taken.timeout_seconds,
        chosen.is_suspect, chosen.model_names, chosen.model_prices, chosen.model_keys
    FROM chosen
    JOIN taken USING (job_id)
    JOIN started USING (job_id)
    ORDER BY chosen.place, chosen.queue_no;
END
$$;

-- By when credits were last allocated, missed periods are granted: that is said by who may grant them.
CREATE FUNCTION refuse_allocation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT has_table_privilege('public.credit_schedules', 'UPDATE') THEN
        RAISE EXCEPTION 'when credits were allocated is said by who may allocate them'
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER duties_allocate AFTER UPDATE ON duties
    FOR EACH ROW WHEN (OLD.duty = 'allocate' AND NEW.done_at IS DISTINCT FROM OLD.done_at)
    EXECUTE FUNCTION refuse_allocation();


-- Who takes jobs, and how many each has. One that has told nothing for 45 seconds is lost: of what it ran the leases
-- have run out.
CREATE VIEW worker_details AS
SELECT
    w.worker_id,
    w.host,
    w.pid,
    CASE
        WHEN w.seen_at < clock_timestamp() - interval '45 seconds' THEN 'lost'
        WHEN w.is_stopping THEN 'stopping'
        ELSE 'alive'
    END AS status,
    r.running,
    r.running_groups,
    w.concurrency,
    w.team_id,
    w.organization_id,
    w.group_name,
    w.started_at,
    w.seen_at
FROM workers w
CROSS JOIN LATERAL (
    SELECT
        coalesce(sum(jobs), 0)::bigint AS running,
        coalesce(jsonb_object_agg(group_name, jobs), '{}') AS running_groups
    FROM (
        SELECT group_name, count(*) AS jobs
        FROM job_queue q
        WHERE q.worker_id = w.worker_id AND q.state = 'running'
        GROUP BY group_name
    ) AS of_group
) AS r;
