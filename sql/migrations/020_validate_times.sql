-- Apart from the file before, so that jobs go on while the rows that are there are read.

ALTER TABLE jobs VALIDATE CONSTRAINT jobs_times;
ALTER TABLE llm_calls VALIDATE CONSTRAINT llm_calls_time;
