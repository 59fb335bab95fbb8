-- The outbox: insert-only, one row per event, written in the transaction that changes the entity.
--
-- Rules for writers: lock the entity's row (or read the version that the write is checked against) first, insert here
-- last, versions ascending, never supply ids. Then ids rise with versions per entity, and whoever sees a version also
-- sees the ones before it.
CREATE TABLE outbox (
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

-- A row that went before it was published is an event lost. Retention removes rows below the floor, and nothing else.
CREATE FUNCTION outbox_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the outbox is insert-only: % refused', TG_OP
        USING ERRCODE = 'restrict_violation', HINT = 'rows leave through the relay''s retention';
END
$$;

CREATE TRIGGER outbox_insert_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON outbox
    FOR EACH STATEMENT EXECUTE FUNCTION outbox_refuse_change();

-- One row per relayed outbox: lease and progress together, so that one guarded UPDATE keeps an old leader from
-- overwriting a newer one's progress.
CREATE TABLE outbox_relay (
    name text PRIMARY KEY CHECK (name <> ''),
    -- Rises with every new leader.
    epoch bigint NOT NULL DEFAULT 0 CHECK (epoch >= 0),
    owner text NOT NULL DEFAULT '',
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    -- Every id up to here is published or dead.
    floor bigint NOT NULL DEFAULT 0 CHECK (floor >= 0),
    -- Ids above the floor that are published or dead.
    published int8multirange NOT NULL DEFAULT '{}',
    -- Counts the saves of all epochs.
    saves bigint NOT NULL DEFAULT 0 CHECK (saves >= 0),
    -- The cluster that the progress belongs to (pg_control_system); another one means a restore.
    system_identifier bigint,
    saved_at timestamptz
);
