-- What was told about windows by events. A rebuild of the figures leaves these tables alone.

-- The last event of a window: its version, and what it said.
CREATE TABLE window_emissions (
    -- 1 minute, 2 hour, 3 day
    window_size    smallint    NOT NULL CHECK (window_size BETWEEN 1 AND 3),
    window_start   timestamptz NOT NULL,
    version        bigint      NOT NULL CHECK (version > 0),
    -- SHA-256 of the event's figures.
    figures_digest bytea       NOT NULL CHECK (octet_length(figures_digest) = 32),
    emitted_at     timestamptz NOT NULL,
    PRIMARY KEY (window_size, window_start)
) WITH (fillfactor = 80);

-- Locked by whoever emits: one at a time.
CREATE TABLE emission_turn (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    -- The build of the figures that was compared with what had been told. NULL: none yet.
    build   uuid
);
INSERT INTO emission_turn DEFAULT VALUES;
