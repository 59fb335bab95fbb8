-- The outbox: insert-only, one row per event, written in the transaction that changes the entity.
--
-- Rules for writers: lock the entity's row (or read the version that the write is checked against) first, insert here
-- last, versions ascending, never supply ids. Then ids rise with versions per entity, and whoever sees a version also
-- sees the ones before it.
CREATE TABLE IF NOT EXISTS {outbox} (
    -- ALWAYS: a writer cannot supply an id. Cache 1: ids are given in the order of the inserts.
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY,
    event_id uuid NOT NULL,
    aggregate_type text NOT NULL CHECK (aggregate_type <> ''),
    -- Also the Kafka key.
    aggregate_id text NOT NULL CHECK (aggregate_id <> ''),
    -- Counts the entity's events from 1 without gaps.
    aggregate_version bigint NOT NULL CHECK (aggregate_version > 0),
    event_type text NOT NULL CHECK (event_type <> ''),
    schema_version integer NOT NULL DEFAULT 1 CHECK (schema_version > 0),
    -- The Kafka topic; NULL: the relay's template decides, events.<aggregate type> by default.
    topic text CHECK (topic ~ '^[a-zA-Z0-9._-]{1,249}$'),
    source text NOT NULL,
    content_type text NOT NULL DEFAULT 'application/protobuf',
    data_schema text,
    correlation_id uuid,
    causation_id uuid,
    -- W3C trace context of the command.
    traceparent text,
    tracestate text,
    -- Metadata, published as meta-<name>: an object of strings.
    metadata jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    occurred_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- NULL publishes a tombstone.
    payload bytea
);
