-- What was asked and answered, as far as the settings of the runner say that it is kept: nothing by default.

ALTER TABLE llm_calls
    ADD COLUMN prompt text,
    ADD COLUMN answer text;

CREATE OR REPLACE VIEW llm_call_details AS
SELECT
    call_id,
    job_id,
    model_group_used,
    resolved_model,
    attempt,
    prompt_tokens,
    completion_tokens,
    total_tokens,
    cost_usd,
    latency_ms,
    purpose,
    error,
    created_at,
    prompt,
    answer
FROM llm_calls;

-- Calls as they come from a runner; `began` counts the seconds from the start of their job, or of their request.
CREATE FUNCTION call_rows(calls jsonb) RETURNS TABLE (
    model_group_used text, resolved_model text, attempt integer, prompt_tokens integer, completion_tokens integer,
    total_tokens integer, cost_usd numeric, latency_ms integer, purpose text, error text, prompt text, answer text,
    began interval
)
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT
        model_group_used, resolved_model, attempt, prompt_tokens, completion_tokens, total_tokens, cost_usd,
        latency_ms, purpose, error, prompt, answer, began * interval '1 second'
    FROM jsonb_to_recordset(calls) AS call (
        model_group_used text, resolved_model text, attempt integer, prompt_tokens integer, completion_tokens integer,
        total_tokens integer, cost_usd numeric, latency_ms integer, purpose text, error text, prompt text, answer text,
        began double precision
    )
    ORDER BY attempt
$$;
