-- Lists are read page by page, each beginning behind the last row of the one before.

CREATE INDEX jobs_by_external_task ON jobs (external_task_id, created_at, job_id) WHERE external_task_id IS NOT NULL;
