-- One row per relayed outbox: lease and progress together, so that one guarded UPDATE keeps an old leader from
-- overwriting a newer one's progress.
CREATE TABLE IF NOT EXISTS {relay} (
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
CREATE TABLE IF NOT EXISTS {members} (
    name text NOT NULL,
    instance text NOT NULL,
    leads integer NOT NULL CHECK (leads >= 0),
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (name, instance)
);

-- Where the floor was when: what retention goes by.
CREATE TABLE IF NOT EXISTS {floors} (
    name text NOT NULL,
    floor bigint NOT NULL,
    reached_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (name, floor)
);

-- How far rows were removed, per table: a lowest id would have to be searched for among dead rows.
CREATE TABLE IF NOT EXISTS {removed} (
    outbox text PRIMARY KEY,
    removed_to bigint NOT NULL DEFAULT 0,
    -- Ids up to here were given when the column was added, and say nothing of the order in which rows were written.
    numbered_to bigint NOT NULL DEFAULT 0
);

-- Records that Kafka does not take, and those behind them of the same key. They are kept as they would be published, so
-- that rows can leave the outbox in the meantime.
CREATE TABLE IF NOT EXISTS {quarantine} (
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
CREATE INDEX IF NOT EXISTS {quarantine_by_key} ON {quarantine} (name, aggregate_type, key, id) WHERE state <> 'skipped';
CREATE INDEX IF NOT EXISTS {quarantine_decided} ON {quarantine} (name) WHERE state IN ('retry', 'skip');
