-- Webhooks: which event is sent to which, and what becomes of it.


-- Gives new events their number in their organization, and a delivery for each webhook that wants them; says how many
-- there were. One does it at a time, so that the numbers have no gaps and follow the order of what happened one after
-- the other: whoever has the row of this duty, which nobody can lock who may not do it.
CREATE FUNCTION dispatch_events(most integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan SET jit = off SET enable_seqscan = off AS $$
DECLARE
    dispatched bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM events WHERE NOT is_dispatched) THEN
        RETURN 0;
    END IF;
    PERFORM FROM duties WHERE duty = 'dispatch' FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;

    WITH new AS (
        SELECT
            event_id, organization_id,
            row_number() OVER (PARTITION BY organization_id ORDER BY event_id) AS place,
            count(*) OVER (PARTITION BY organization_id) AS events
        FROM (
            SELECT event_id, organization_id FROM events WHERE NOT is_dispatched ORDER BY event_id LIMIT most
        ) AS oldest
    ),
    counter AS (
        INSERT INTO event_counters AS c (organization_id, last_no)
        SELECT organization_id, max(events)
        FROM new
        WHERE organization_id IS NOT NULL
        GROUP BY organization_id
        ORDER BY organization_id
        ON CONFLICT (organization_id) DO UPDATE SET last_no = c.last_no + excluded.last_no
        RETURNING c.organization_id, c.last_no
    ),
    numbered AS (
        UPDATE events e
        SET is_dispatched = true,
            sequence_no = counter.last_no - new.events + new.place
        FROM new
        LEFT JOIN counter USING (organization_id)
        WHERE e.event_id = new.event_id
        RETURNING e.event_id, e.event_type, e.organization_id, e.created_at
    ),
    delivery AS (
        INSERT INTO webhook_deliveries (event_id, webhook_id)
        SELECT e.event_id, w.webhook_id
        FROM numbered e
        CROSS JOIN LATERAL webhooks_for(e.organization_id::text, e.event_type) wanting
        JOIN webhooks w USING (webhook_id)
        JOIN webhook_states s USING (webhook_id)
        WHERE s.disabled_at IS NULL AND e.created_at >= w.created_at
        ORDER BY e.event_id, w.webhook_id
        FOR KEY SHARE OF w -- one that is deleted meanwhile is passed over
        ON CONFLICT DO NOTHING
    )
    SELECT count(*) INTO dispatched FROM numbered;
    RETURN dispatched;
END
$$;


-- A webhook has a state from its beginning.
CREATE FUNCTION begin_webhooks() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.webhook_states (webhook_id) VALUES (NEW.webhook_id);
    RETURN NULL;
END
$$;

CREATE TRIGGER webhooks_begin AFTER INSERT ON webhooks
    FOR EACH ROW EXECUTE FUNCTION begin_webhooks();

-- That it is disabled or enabled, by whomever, is an event: for the other webhooks.
CREATE FUNCTION tell_of_webhook() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO public.events (event_id, event_type, organization_id, data)
    SELECT
        public.new_id(),
        CASE WHEN NEW.disabled_at IS NULL THEN 'webhook.enabled' ELSE 'webhook.disabled' END,
        w.organization_id,
        jsonb_build_object(
            'webhook_id', w.webhook_id, 'url', w.url, 'disabled_reason', NEW.disabled_reason,
            'failing_since', public.utc(NEW.failing_since)
        )
    FROM public.webhooks w
    WHERE w.webhook_id = NEW.webhook_id;
    RETURN NULL;
END
$$;

CREATE TRIGGER webhook_states_tell AFTER UPDATE ON webhook_states
    FOR EACH ROW WHEN ((OLD.disabled_at IS NULL) <> (NEW.disabled_at IS NULL)) EXECUTE FUNCTION tell_of_webhook();


CREATE VIEW webhook_details AS
SELECT
    w.webhook_id,
    w.organization_id,
    w.url,
    w.event_types,
    CASE WHEN s.disabled_at IS NOT NULL THEN 'disabled' WHEN s.failing_since IS NOT NULL THEN 'failing' ELSE 'active' END
        AS status,
    s.disabled_reason,
    s.disabled_at,
    s.failing_since,
    s.retry_at,
    w.allow_http,
    w.allow_private,
    w.created_at,
    w.updated_at
FROM webhooks w
JOIN webhook_states s USING (webhook_id);

-- Deliveries with the last of their attempts.
CREATE VIEW webhook_delivery_details AS
SELECT
    d.delivery_id,
    d.webhook_id,
    d.event_id,
    e.event_type,
    e.organization_id,
    d.status,
    d.attempts,
    a.attempted_at,
    a.duration_ms,
    a.status_code,
    a.error,
    a.answer,
    CASE WHEN d.claimed_at IS NULL THEN d.next_at END AS next_at,
    d.created_at,
    d.ended_at
FROM webhook_deliveries d
JOIN events e USING (event_id)
LEFT JOIN LATERAL (
    SELECT *
    FROM webhook_attempts
    WHERE delivery_id = d.delivery_id
    ORDER BY attempt_id DESC
    LIMIT 1
) a ON true;
