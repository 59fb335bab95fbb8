-- A consumer may be rebuilt beside itself: each generation has marks and parked records of its own.
CREATE TABLE consumer_generations (
    consumer   text COLLATE "C" PRIMARY KEY,
    -- The one that is served. A consumer without a row here is in its first.
    live       integer     NOT NULL CHECK (live > 0),
    -- The one that is being built, if any is.
    rebuilding integer     CHECK (rebuilding > live AND rebuilding = last),
    -- The last one that was begun: none is begun twice, since its Kafka group knows how far it came.
    last       integer     NOT NULL CHECK (last >= live),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

ALTER TABLE consumer_marks
    ADD COLUMN generation integer NOT NULL DEFAULT 1 CHECK (generation > 0),
    -- Records of this entity wait in parked_records, and later ones join them.
    ADD COLUMN parked boolean NOT NULL DEFAULT false,
    -- 0, without an event: parked before anything was applied.
    DROP CONSTRAINT consumer_marks_version_check,
    ADD CONSTRAINT consumer_marks_version_check CHECK (version >= 0),
    ALTER COLUMN event_id DROP NOT NULL,
    ADD CONSTRAINT consumer_marks_event_check CHECK (version = 0 OR event_id IS NOT NULL),
    DROP CONSTRAINT consumer_marks_pkey,
    ADD PRIMARY KEY (consumer, generation, topic, entity_id);

-- Records that cannot be handled, and the later ones of their entities, in the order of the topic.
CREATE TABLE parked_records (
    id               bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer         text        COLLATE "C" NOT NULL,
    generation       integer     NOT NULL CHECK (generation > 0),
    topic            text        COLLATE "C" NOT NULL,
    partition        integer     NOT NULL,
    kafka_offset     bigint      NOT NULL,
    -- As Kafka has it; the epoch where it has none.
    record_time      timestamptz NOT NULL,
    -- NULL: it has no key that could name an entity. Nothing waits behind it.
    entity_id        text        COLLATE "C",
    -- NULL: its envelope cannot be read.
    version          bigint      CHECK (version > 0),
    event_id         uuid,
    event_type       text,
    key              bytea,
    value            bytea,
    -- [name, value] pairs in their order; a value that is no text is {"base64": …}.
    headers          jsonb       NOT NULL CHECK (jsonb_typeof(headers) = 'array'),
    -- What failed: see the crate's documentation for the list.
    error_kind       text        NOT NULL CHECK (error_kind <> ''),
    error            text        NOT NULL,
    attempts         integer     NOT NULL DEFAULT 1 CHECK (attempts > 0),
    parked_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    state            text        NOT NULL DEFAULT 'parked'
                     CHECK (state IN ('parked', 'replayed', 'repeated', 'discarded', 'superseded')),
    settled_at       timestamptz,
    CHECK ((settled_at IS NULL) = (state = 'parked')),
    UNIQUE (consumer, generation, topic, partition, kafka_offset, record_time)
);
-- What waits of an entity.
CREATE INDEX parked_records_waiting ON parked_records (consumer, generation, topic, entity_id, id) WHERE state = 'parked';
-- What a rebuild passes over.
CREATE INDEX parked_records_discarded ON parked_records (consumer, topic, entity_id) WHERE state = 'discarded';

-- Who decided what about parked records. Insert-only by habit; nothing reads it but people.
CREATE TABLE parked_audit (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    parked_id  bigint      NOT NULL REFERENCES parked_records,
    action     text        NOT NULL CHECK (action IN ('replay', 'discard')),
    outcome    text        NOT NULL CHECK (outcome <> ''),
    reason     text        CHECK (reason <> ''),
    decided_by text        NOT NULL CHECK (decided_by <> ''),
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (action <> 'discard' OR reason IS NOT NULL)
);
CREATE INDEX parked_audit_by_record ON parked_audit (parked_id);

-- Dead letters on their way to <topic>-dlt: an outbox that outbox-relay serves, with a column for each header. What of the
-- envelope could not be read is NULL.
CREATE TABLE public.dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY,
    -- The dead letter's own.
    event_id uuid NOT NULL,
    aggregate_type text NOT NULL,
    -- The record's key, or its place where that is no text.
    aggregate_id text NOT NULL CHECK (aggregate_id <> ''),
    aggregate_version bigint,
    event_type text,
    schema_version integer,
    topic text NOT NULL CHECK (topic ~ '^[a-zA-Z0-9._-]{1,249}$'),
    source text,
    content_type text,
    data_schema text,
    correlation_id uuid,
    causation_id uuid,
    traceparent text,
    tracestate text,
    metadata jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
    occurred_at timestamptz,
    payload bytea,
    dlt_type text NOT NULL DEFAULT 'event.processing.failed',
    dlt_consumer text NOT NULL,
    dlt_original_topic text NOT NULL,
    dlt_original_partition integer NOT NULL,
    dlt_original_offset bigint NOT NULL,
    -- Milliseconds since 1970.
    dlt_original_timestamp bigint,
    dlt_original_id uuid,
    -- As JSON, where they are no envelope.
    dlt_original_headers text,
    -- In base64, where it is not this record's.
    dlt_original_key text,
    -- How long the value is, where it is left out.
    dlt_original_bytes bigint,
    dlt_error_kind text NOT NULL,
    dlt_attempt integer NOT NULL,
    processing_error text NOT NULL,
    -- RFC 3339.
    failed_at text NOT NULL
);

-- From here on as `outbox-relay init` makes it for this table.
-- One row per relayed outbox: lease and progress together, so that one guarded UPDATE keeps an old leader from
-- overwriting a newer one's progress.
CREATE TABLE IF NOT EXISTS public.outbox_relay (
    name text PRIMARY KEY CHECK (name <> ''),
    -- The table that it relays, as schema.table.
    outbox text NOT NULL DEFAULT '',
    -- Rises with every new leader.
    epoch bigint NOT NULL DEFAULT 0 CHECK (epoch >= 0),
    owner text NOT NULL DEFAULT '',
    expires_at timestamptz NOT NULL DEFAULT '-infinity',
    -- Who is to lead next; NULL: whoever comes.
    wanted_owner text,
    -- Every id up to here is published or dead.
    floor bigint NOT NULL DEFAULT 0 CHECK (floor >= 0),
    -- Ids above the floor that are published or dead.
    published int8multirange NOT NULL DEFAULT '{}',
    -- Counts the saves of all epochs.
    saves bigint NOT NULL DEFAULT 0 CHECK (saves >= 0),
    -- The cluster that the progress belongs to (pg_control_system); another one means a restore.
    system_identifier bigint,
    saved_at timestamptz,
    -- The leader's own figures, for those who look.
    figures jsonb,
    figures_at timestamptz
);

-- Who could lead, and how many outboxes each leads: by this they spread.
CREATE TABLE IF NOT EXISTS public.outbox_relay_members (
    name text NOT NULL,
    instance text NOT NULL,
    leads integer NOT NULL CHECK (leads >= 0),
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (name, instance)
);

-- Where the floor was when: what retention goes by.
CREATE TABLE IF NOT EXISTS public.outbox_relay_floors (
    name text NOT NULL,
    floor bigint NOT NULL,
    reached_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (name, floor)
);

-- How far rows were removed, per table: a lowest id would have to be searched for among dead rows.
CREATE TABLE IF NOT EXISTS public.outbox_relay_removed (
    outbox text PRIMARY KEY,
    removed_to bigint NOT NULL DEFAULT 0,
    -- Ids up to here were given when the column was added, and say nothing of the order in which rows were written.
    numbered_to bigint NOT NULL DEFAULT 0
);

-- Records that Kafka does not take, and those behind them of the same key. They are kept as they would be published, so
-- that rows can leave the outbox in the meantime.
CREATE TABLE IF NOT EXISTS public.outbox_relay_quarantine (
    name text NOT NULL,
    id bigint NOT NULL,
    aggregate_type text NOT NULL,
    key text NOT NULL,
    version bigint,
    topic text NOT NULL,
    -- [name, value] pairs in their order.
    headers jsonb NOT NULL CHECK (jsonb_typeof(headers) = 'array'),
    payload bytea,
    -- NULL: nothing but that it waits behind another one.
    problem text,
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    state text NOT NULL DEFAULT 'frozen' CHECK (state IN ('frozen', 'retry', 'skip', 'skipped')),
    -- Who asked for the skip or the retry, when and why.
    decided_by text,
    decided_at timestamptz,
    reason text,
    frozen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (name, id),
    CHECK (state NOT IN ('skip', 'skipped') OR (reason <> '' AND reason IS NOT NULL))
);
CREATE INDEX IF NOT EXISTS outbox_relay_quarantine_by_key ON public.outbox_relay_quarantine (name, aggregate_type, key, id) WHERE state <> 'skipped';
CREATE INDEX IF NOT EXISTS outbox_relay_quarantine_decided ON public.outbox_relay_quarantine (name) WHERE state IN ('retry', 'skip');

-- A row that went before it was published is an event lost. Retention removes rows below the floor, and nothing else.
CREATE OR REPLACE FUNCTION public.dead_letters_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('outbox.removing', true) = 'on' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'the outbox is insert-only: % refused', TG_OP
        USING ERRCODE = 'restrict_violation', HINT = 'rows leave through the relay''s retention';
END
$$;

-- Not where it is already: that would wait for every open transaction that wrote, and all other writers behind it. 58:
-- before UPDATE, DELETE and TRUNCATE, for each statement.
DO $guard$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'public.dead_letters'::regclass AND tgname = 'dead_letters_insert_only'::name
                      AND tgtype = 58 AND tgenabled <> 'D') THEN
        CREATE OR REPLACE TRIGGER dead_letters_insert_only
            BEFORE UPDATE OR DELETE OR TRUNCATE ON public.dead_letters
            FOR EACH STATEMENT EXECUTE FUNCTION public.dead_letters_refuse_change();
    END IF;
END $guard$;

-- Removes published rows by id range, at most up to the floor of every relay of this table, and returns how far it got.
-- With the rights of its owner: whoever runs the relay need not be able to delete anything else.
CREATE OR REPLACE FUNCTION public.dead_letters_remove(up_to bigint, max_ids bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    from_id bigint;
    lowest bigint;
    to_id bigint;
BEGIN
    INSERT INTO public.outbox_relay_removed (outbox) VALUES ('public.dead_letters') ON CONFLICT DO NOTHING;
    SELECT r.removed_to INTO from_id FROM public.outbox_relay_removed r WHERE r.outbox = 'public.dead_letters' FOR UPDATE;
    SELECT min(r.floor) INTO lowest FROM public.outbox_relay r WHERE r.outbox = 'public.dead_letters';
    IF lowest IS NULL THEN -- least() would pass over it
        RETURN from_id;
    END IF;
    to_id := least(up_to, lowest, from_id + max_ids);
    IF to_id <= from_id THEN
        RETURN from_id;
    END IF;
    PERFORM set_config('outbox.removing', 'on', true);
    DELETE FROM public.dead_letters o WHERE o.id > from_id AND o.id <= to_id;
    PERFORM set_config('outbox.removing', 'off', true);
    UPDATE public.outbox_relay_removed r SET removed_to = to_id WHERE r.outbox = 'public.dead_letters';
    RETURN to_id;
END
$$;
REVOKE ALL ON FUNCTION public.dead_letters_remove(bigint, bigint) FROM PUBLIC;
