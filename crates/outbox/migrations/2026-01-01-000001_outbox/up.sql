-- The outbox: insert-only, one row per event, written in the transaction that changes the entity.
--
-- Rules for writers: lock the entity's row (or read the version that the write is checked against) first, insert here
-- last, versions ascending, never supply ids. Then ids rise with versions per entity, and whoever sees a version also
-- sees the ones before it.
CREATE TABLE IF NOT EXISTS public.outbox (
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
CREATE OR REPLACE FUNCTION public.outbox_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
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
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'public.outbox'::regclass AND tgname = 'outbox_insert_only'::name
                      AND tgtype = 58 AND tgenabled <> 'D') THEN
        CREATE OR REPLACE TRIGGER outbox_insert_only
            BEFORE UPDATE OR DELETE OR TRUNCATE ON public.outbox
            FOR EACH STATEMENT EXECUTE FUNCTION public.outbox_refuse_change();
    END IF;
END $guard$;

-- Removes published rows by id range, at most up to the floor of every relay of this table, and returns how far it got.
-- With the rights of its owner: whoever runs the relay need not be able to delete anything else.
CREATE OR REPLACE FUNCTION public.outbox_remove(up_to bigint, max_ids bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    from_id bigint;
    lowest bigint;
    to_id bigint;
BEGIN
    INSERT INTO public.outbox_relay_removed (outbox) VALUES ('public.outbox') ON CONFLICT DO NOTHING;
    SELECT r.removed_to INTO from_id FROM public.outbox_relay_removed r WHERE r.outbox = 'public.outbox' FOR UPDATE;
    SELECT min(r.floor) INTO lowest FROM public.outbox_relay r WHERE r.outbox = 'public.outbox';
    IF lowest IS NULL THEN -- least() would pass over it
        RETURN from_id;
    END IF;
    to_id := least(up_to, lowest, from_id + max_ids);
    IF to_id <= from_id THEN
        RETURN from_id;
    END IF;
    PERFORM set_config('outbox.removing', 'on', true);
    DELETE FROM public.outbox o WHERE o.id > from_id AND o.id <= to_id;
    PERFORM set_config('outbox.removing', 'off', true);
    UPDATE public.outbox_relay_removed r SET removed_to = to_id WHERE r.outbox = 'public.outbox';
    RETURN to_id;
END
$$;
REVOKE ALL ON FUNCTION public.outbox_remove(bigint, bigint) FROM PUBLIC;
