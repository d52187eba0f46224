"""Many jobs from the lines of a file, begun, called and settled as single jobs are, but in groups.

The leading process (`leader`) reads the lines (`reader`), talks to the database and writes the results (`journal`); the
processes of a pool (`jobs/pool.py`) call the models. The key of each job is its line's id within the batch, so
that no line is paid for twice, whoever crashes when. What a model has answered is on disk, in the journal, before its
job is settled; and in the output when it is settled.
"""

from saasllm_cli.jobs.batch.leader import Summary, run
from saasllm_cli.jobs.batch.tasks import BatchRequest

__all__ = ["BatchRequest", "Summary", "run"]
