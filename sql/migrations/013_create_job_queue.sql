-- Jobs that wait for a worker, their answers, and the workers. What takes them: sql/definitions/queue.sql.

-- From its submission until it is finished, a job that workers run has a row here, with what it asks. The job itself
-- (pending while it is here scheduled or waiting, in_progress while it is running) holds its credits under a lease:
-- while it waits, until expires_at.
CREATE TABLE job_queue (
    job_id          uuid        PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    queue_no        bigint      GENERATED ALWAYS AS IDENTITY, -- the order in which they came, whatever clocks say
    team_id         identifier  NOT NULL,
    group_name      identifier  NOT NULL,
    state           text        NOT NULL DEFAULT 'waiting',
    priority        smallint    NOT NULL DEFAULT 50,
    due_at          timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz NOT NULL,
    timeout_seconds integer     NOT NULL DEFAULT 300,
    request         jsonb       NOT NULL, -- the messages and parameters, in OpenAI's chat format
    purpose         text,
    worker_id       bigint, -- who runs it, or did last
    losses          smallint    NOT NULL DEFAULT 0, -- how often its worker died meanwhile
    CONSTRAINT job_queue_state CHECK (state IN ('scheduled', 'waiting', 'running')),
    CONSTRAINT job_queue_worker CHECK (state <> 'running' OR worker_id IS NOT NULL),
    CONSTRAINT job_queue_priority CHECK (priority BETWEEN 0 AND 100),
    CONSTRAINT job_queue_timeout CHECK (timeout_seconds BETWEEN 1 AND 86400),
    CONSTRAINT job_queue_expiry CHECK (expires_at > due_at),
    -- As of jobs: no time that no client can read.
    CONSTRAINT job_queue_times CHECK (due_at >= '1970-01-01' AND expires_at < '9999-01-01'),
    CONSTRAINT job_queue_request CHECK (
        jsonb_typeof(request) = 'object' AND jsonb_typeof(request -> 'messages') = 'array'
    )
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

CREATE INDEX job_queue_waiting ON job_queue (team_id, group_name, priority, queue_no) WHERE state = 'waiting';
CREATE INDEX job_queue_scheduled ON job_queue (due_at) WHERE state = 'scheduled';
CREATE INDEX job_queue_running ON job_queue (worker_id) WHERE state = 'running';

-- What was answered, for a time.
CREATE TABLE job_answers (
    job_id     uuid        PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
    content    text,
    tool_calls jsonb,
    not_sent   text[]      NOT NULL DEFAULT '{}', -- the parameters that the provider did not get
    expires_at timestamptz NOT NULL,
    CONSTRAINT job_answers_times CHECK (expires_at >= '1970-01-01' AND expires_at < '9999-01-01')
);

CREATE INDEX job_answers_by_expiry ON job_answers (expires_at);

-- Who takes jobs. One that has told nothing for a while is lost.
CREATE TABLE workers (
    worker_id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    host            text        NOT NULL,
    pid             integer     NOT NULL,
    concurrency     integer     NOT NULL, -- calls at once, in all its processes
    team_id         identifier, -- where it takes only some jobs
    organization_id identifier,
    group_name      identifier,
    started_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    is_idle         boolean     NOT NULL DEFAULT false, -- it waits to be told of jobs
    is_stopping     boolean     NOT NULL DEFAULT false,
    has_seen_all    boolean     NOT NULL DEFAULT false, -- when it last took jobs
    last_team_id    text        NOT NULL DEFAULT '', -- whose turn it was last
    last_group_name text        NOT NULL DEFAULT '',
    CONSTRAINT workers_times CHECK (
        started_at >= '1970-01-01' AND started_at < '9999-01-01' AND seen_at >= '1970-01-01' AND seen_at < '9999-01-01'
    )
) WITH (fillfactor = 20); -- each updates its row all the time

-- What workers do besides, as cron would: each once over all of them.
CREATE TABLE duties (
    duty      text        PRIMARY KEY,
    next_at   timestamptz NOT NULL DEFAULT now(),
    done_at   timestamptz,
    worker_id bigint, -- who is doing it
    CONSTRAINT duties_times CHECK (
        next_at >= '1970-01-01' AND next_at < '9999-01-01' AND done_at >= '1970-01-01' AND done_at < '9999-01-01'
    )
);

INSERT INTO duties (duty) VALUES ('sweep'), ('allocate'), ('prune');
