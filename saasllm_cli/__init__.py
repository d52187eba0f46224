"""saasllm: run a multi-tenant LLM product on nothing but PostgreSQL."""
